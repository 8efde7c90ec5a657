"""Weights that would only draw black pictures: NaN, whole numbers, networks of other models, each refused by name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fluxedu as fe
from fluxedu.checkpoints import load_into, load_model, merge, read
from fluxedu.errors import CheckpointError, RequestError
from fluxedu.loading import LORA_FILE, LORAS, WEIGHTS
from fluxedu.models import AutoEncoder, CLIPTextEncoder, Flux, T5Encoder
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import PromptEncoder

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture
def folder(tmp_path):
    """A copy of the miniature."""
    for name in (*PARTS, "tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(WEIGHTS / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def change(folder, name=None, value=None, dtype=None):
    """Change the last number of a tensor (by default the middle one), or its dtype; returns its name."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = name or sorted(tensors)[len(tensors) // 2]
    tensors[name] = tensors[name].to(dtype or tensors[name].dtype)
    if value is not None:
        tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    return name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", PARTS)
def test_one_number_that_is_not_finite(part, value, folder):
    name = change(folder / part, value=value)
    with pytest.raises(CheckpointError, match=f"^{part} has NaN or infinity in '{name}' ") as error:
        fe.load(folder)
    assert str(error.value).endswith(".")
    with pytest.raises(CheckpointError, match=f"^{part} has NaN or infinity in '{name}' "):
        load_model(folder / part)


def test_of_a_stacked_matrix_the_stored_tensor_is_named(folder):
    """diffusers stores to_q, to_k and to_v, which are one matrix here."""
    name = change(folder / "transformer", "transformer_blocks.0.attn.to_k.weight", torch.nan)
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        fe.load(folder, dtype="bfloat16")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_every_floating_point_dtype_is_searched(dtype):
    layer = torch.nn.Linear(4, 3)
    weights = {"weight": torch.ones(3, 4).to(dtype), "bias": torch.zeros(3).to(dtype)}
    assert load_into(layer, weights).weight.dtype == dtype
    weights["bias"] = torch.tensor([0, torch.nan, 0]).to(dtype)
    with pytest.raises(CheckpointError, match=f"the state dict has NaN or infinity in 'bias' .loaded as {dtype}."):
        load_into(layer, weights)
    assert layer.bias.isfinite().all() if dtype.itemsize > 1 else True


def test_numbers_that_are_large_but_finite_are_loaded_and_those_too_large_for_float16_are_not():
    layer = torch.nn.Linear(4, 3)
    weights = {"weight": torch.full((3, 4), 3e38), "bias": torch.zeros(3)}
    assert torch.equal(load_into(layer, weights).weight, weights["weight"])
    with pytest.raises(CheckpointError, match="'weight' .loaded as torch.float16."):
        load_into(layer, weights, dtype=torch.float16)


def test_of_a_large_tensor_the_beginning_the_middle_and_the_end_are_searched():
    layer = torch.nn.Linear(2048, 1024, bias=False)
    for row in (0, 512, 1023):
        weight = torch.ones(1024, 2048)
        weight[row, 7] = torch.nan
        with pytest.raises(CheckpointError, match="'weight'"):
            load_into(layer, {"weight": weight})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(dtype, folder):
    with pytest.raises(CheckpointError, match=f"'bias' in {dtype}; weights must be floating-point numbers"):
        load_into(torch.nn.Linear(4, 3), {"weight": torch.ones(3, 4), "bias": torch.ones(3).to(dtype)})
    for part in PARTS:
        before = next((folder / part).glob("*.safetensors")).read_bytes()
        name = change(folder / part, dtype=dtype)
        with pytest.raises(CheckpointError, match=f"^{part} has '{name}' in {dtype}; weights must be floating-point"):
            fe.load(folder)
        next((folder / part).glob("*.safetensors")).write_bytes(before)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: x.index_fill(0, torch.tensor([0]), torch.nan), "has NaN or infinity in the"),
        (lambda x: x * torch.inf, "has NaN or infinity in the"),
        (lambda x: x.to(torch.int8), "has torch.int8, not floating-point numbers in the"),
        (lambda x: x.to(torch.bool), "has torch.bool, not floating-point numbers in the"),
    ],
)
def test_a_lora_that_is_not_finite_or_no_numbers(change, found, tmp_path):
    tensors = load_file(WEIGHTS / LORAS["hollow"] / LORA_FILE)
    for name in (next(n for n in tensors if "lora_A" in n), next(n for n in tensors if "lora_B" in n)):
        save_file(tensors | {name: change(tensors[name]).contiguous()}, tmp_path / "lora.safetensors")
        factor = name.split(".")[-2]
        with pytest.raises(CheckpointError, match=f"^lora.safetensors {found} {factor} of '{name.split('.lora_')[0]}'"):
            fe.load("nano", lora=tmp_path / "lora.safetensors")
        flux = fe.load("nano").flux
        before = {key: value.clone() for key, value in flux.state_dict().items()}
        with pytest.raises(CheckpointError, match=found):
            merge(flux, read(tmp_path / "lora.safetensors"))
        assert all(torch.equal(before[key], value) for key, value in flux.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_must_be_finite(value, pipe):
    latents = pipe("a red circle", steps=1, progress=False, decode=False).latents
    latents[0, 0, 0, 0] = value
    with pytest.raises(RequestError, match="latents must be finite numbers"):
        pipe("a red circle", latents=latents, progress=False)


def test_swapped_folders_and_swapped_networks(folder, pipe):
    (folder / "vae").rename(folder / "other")
    (folder / "transformer").rename(folder / "vae")
    (folder / "other").rename(folder / "transformer")
    with pytest.raises(CheckpointError, match="transformer is an autoencoder, but a flow transformer is needed"):
        fe.load(folder)
    with pytest.raises(RequestError, match="a Flux and an AutoEncoder, in this order, not AutoEncoder and Flux"):
        FluxPipeline(pipe.prompt_encoder, pipe.autoencoder, pipe.flux, pipe.defaults, pipe.size)


def test_networks_of_other_widths(pipe):
    """Also those that would compute: a pooled vector of width 1, say, would be broadcast."""
    flux, prompts = pipe.flux.config, pipe.prompt_encoder
    clip, t5 = prompts.clip.config, prompts.t5.config
    wrong = {
        f"CLIP's width is {clip.hidden_size}, not 5": (prompts, Flux(flux.with_(vec_in_dim=5)), pipe.autoencoder),
        f"T5's width is {t5.d_model}, not 7": (prompts, Flux(flux.with_(context_in_dim=7)), pipe.autoencoder),
        "the autoencoder's channels times 4 is": (
            prompts,
            Flux(flux.with_(in_channels=2 * flux.out_channels, out_channels=2 * flux.out_channels)),
            pipe.autoencoder,
        ),
    }
    for found, networks in wrong.items():
        with pytest.raises(RequestError, match=f"parts of different models: {found}"):
            FluxPipeline(*networks, pipe.defaults, pipe.size)
    other = PromptEncoder(
        prompts.clip_tokenizer,
        CLIPTextEncoder(clip.with_(hidden_size=2 * clip.hidden_size)),
        prompts.t5_tokenizer,
        T5Encoder(t5),
    )
    with pytest.raises(RequestError, match="CLIP's width is"):
        FluxPipeline(other, pipe.flux, AutoEncoder(pipe.autoencoder.config), pipe.defaults, pipe.size)


@pytest.mark.parametrize("encoder", ["t5", "clip"])
def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(encoder, monkeypatch):
    pipe = fe.load()
    network = getattr(pipe.prompt_encoder, encoder)
    monkeypatch.setattr(network, "config", network.config.with_(vocab_size=5))
    with pytest.raises(fe.FluxeduError, match=r"the tokenizer gives the id \d+, but (T5|CLIP) has only 5 tokens\.$"):
        pipe("a red circle", steps=1, progress=False)
