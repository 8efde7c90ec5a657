"""The official weights: found in the cache, folders and files; missing files named; loaded in little memory.

The checkpoints here are synthetic: the true names, layout and folders with small widths and random values, and the true
sizes as sparse files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file as their_save_file
from sizes import TINY_CLIP, TINY_T5

import fluxedu as fe
from fluxedu.checkpoints import OFFICIAL, convert, find, load_model, open_model, reading, save_folder
from fluxedu.checkpoints.reading import TensorFile
from fluxedu.errors import CheckpointError
from fluxedu.models import (
    VARIANTS,
    AutoEncoder,
    AutoEncoderConfig,
    CLIPTextEncoder,
    Flux,
    FluxConfig,
    T5Config,
    T5Encoder,
)
from fluxedu.models.meta_init import meta_init
from fluxedu.nano.tokenizers import save_tokenizers

#: heads of 128 and 32 groups, as assumed for a file without a configuration
SMALL = {
    "hidden_size": 256,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "vec_in_dim": 20,
    "context_in_dim": 24,
}
AE = AutoEncoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def randomised(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data = (torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5).bfloat16()
    return network.eval().requires_grad_(False)


def flux_of(variant: str) -> Flux:
    return randomised(Flux(FluxConfig.variant(variant).with_(**SMALL)))


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory):
    """What all repositories share, once: an autoencoder in both layouts, encoders, tokenizers."""
    folder = tmp_path_factory.mktemp("shared")
    ae = randomised(AutoEncoder(AE))
    their_save_file(ae.state_dict(), folder / "ae.safetensors")
    save_folder(ae.state_dict(), folder / "vae", AE)
    save_folder(randomised(CLIPTextEncoder(TINY_CLIP)).state_dict(), folder / "text_encoder", TINY_CLIP)
    save_folder(randomised(T5Encoder(TINY_T5)).state_dict(), folder / "text_encoder_2", TINY_T5, max_shard_bytes=20_000)
    save_tokenizers(folder)
    return folder


def repository(cache: Path, variant: str, ingredients: Path, *parts: str) -> Path:
    """A snapshot in the cache, with links into it as the hub's client makes them; the transformer's file is written."""
    home = cache / f"models--{OFFICIAL[variant].id.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    for part in parts:
        if part == OFFICIAL[variant].single:
            (home / "blobs").mkdir()
            their_save_file(flux_of(variant).state_dict(), home / "blobs" / "abc")
            (snapshot / part).symlink_to(Path("..", "..", "blobs", "abc"))
        elif part == "transformer":
            flux = flux_of(variant)
            save_folder(flux.state_dict(), snapshot / part, flux.config, max_shard_bytes=500_000)
        else:
            (snapshot / part).symlink_to(ingredients / part)
    return snapshot


def complete(variant: str) -> tuple[str, ...]:
    return OFFICIAL[variant].single, "ae.safetensors", *ENCODERS


@pytest.mark.parametrize("variant", OFFICIAL)
def test_every_variant_loads_by_name_from_the_cache(cache, ingredients, variant):
    repository(cache, variant, ingredients, *complete(variant))
    pipe = fe.load(variant, device="cpu")
    assert pipe.defaults == VARIANTS[variant].sampling and pipe.size == 1024 and pipe.dtype == torch.bfloat16
    assert pipe.flux.config == FluxConfig.variant(variant).with_(**SMALL)
    expected = flux_of(variant).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in pipe.flux.state_dict().items())
    assert pipe.prompt_encoder.t5_tokenizer.length == VARIANTS[variant].sampling.text_length


def test_the_cached_pipeline_draws(cache, ingredients):
    repository(cache, "schnell", ingredients, *complete("schnell"))
    out = fe.load("schnell", device="cpu")("a red circle", height=32, width=32, steps=2, progress=False)
    assert out.images[0].size == (32, 32)


def test_two_processes_load_from_one_cache(cache, ingredients):
    """Both draw the same image at the same time, and the cache stays unchanged, down to names and times."""
    repository(cache, "dev", ingredients, *complete("dev"))

    def contents():
        return {str(p): (p.lstat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in cache.rglob("*")}

    code = """
import sys, fluxedu
print("ready", flush=True)
sys.stdin.readline()
out = fluxedu.load("dev", device="cpu")("a red circle", height=32, width=32, steps=1, progress=False)
print(out.images[0].tobytes().hex())
"""
    before, env = contents(), {**os.environ, "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-c", code]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    both = [subprocess.Popen(start, env=env, text=True, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and len(outputs[0][0]) > 6000
    assert contents() == before


def test_diffusers_shards_are_the_same_weights(cache, ingredients):
    repository(cache, "dev", ingredients, "transformer", "vae", *ENCODERS)
    files = find("dev")
    assert files.parts["transformer"].name == "transformer" and len(list(files.parts["transformer"].iterdir())) > 3
    ours, expected = load_model(files.parts["transformer"]).state_dict(), flux_of("dev").state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in ours.items())
    assert convert(ours, to="diffusers").keys() != ours.keys()


def test_a_folder_a_file_and_an_id_are_the_same(cache, ingredients):
    snapshot = repository(cache, "dev", ingredients, *complete("dev"))
    by_name = find("dev")
    for where in (snapshot, str(snapshot / "flux1-dev.safetensors"), OFFICIAL["dev"].id):
        found = find(where)
        assert found.variant == "dev"
        assert {p: x.resolve() for p, x in found.parts.items()} == {p: x.resolve() for p, x in by_name.parts.items()}


def test_single_files_take_the_encoders_from_the_cache(cache, ingredients, tmp_path):
    repository(cache, "schnell", ingredients, *complete("schnell"))
    their_save_file(flux_of("krea").state_dict(), tmp_path / "flux1-krea-dev.safetensors")
    files = find(tmp_path / "flux1-krea-dev.safetensors")
    assert files.variant == "krea" and files.parts["transformer"].parent == tmp_path
    assert "FLUX.1-schnell" in str(files.parts["text_encoder_2"]) and files.parts["vae"].name == "ae.safetensors"


def test_the_environment_switches_what_load_opens(cache, ingredients, monkeypatch):
    repository(cache, "dev", ingredients, *complete("dev"))
    monkeypatch.setenv("FLUXEDU_MODEL", "dev")
    assert fe.load(device="cpu").flux.config.hidden_size == 256
    assert fe.load("nano").flux.config.hidden_size == 160
    monkeypatch.delenv("FLUXEDU_MODEL")
    assert fe.load().flux.config.hidden_size == 160


def test_all_missing_files_are_named(cache):
    with pytest.raises(CheckpointError) as error:
        fe.load("kontext")
    message = str(error.value)
    expected = (
        "flux1-kontext-dev.safetensors",
        "ae.safetensors",
        "text_encoder/*",
        "text_encoder_2/*",
        "tokenizer_2/*",
    )
    assert all(f'--include "{name}"' in message for name in expected)
    assert "`hf download black-forest-labs/FLUX.1-Kontext-dev " in message
    assert "FLUX.1 [dev] Non-Commercial License" in message and "`hf auth login`" in message
    assert "https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev" in message and "\n" not in message


def test_only_missing_files_are_named(cache, ingredients):
    snapshot = repository(cache, "dev", ingredients, "transformer", "vae", *ENCODERS)
    shard = sorted((snapshot / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    (snapshot / "tokenizer").unlink()
    with pytest.raises(CheckpointError) as error:
        find("dev")
    message = str(error.value)
    assert f"lacks transformer/{shard.name}, tokenizer/*; get them with" in message
    assert f'FLUX.1-dev --include "transformer/{shard.name}" --include "tokenizer/*"`' in message


def test_a_link_to_a_file_that_never_came_is_missing(cache, ingredients):
    snapshot = repository(cache, "schnell", ingredients, *complete("schnell"))
    (snapshot / "flux1-schnell.safetensors").resolve().unlink()
    with pytest.raises(CheckpointError, match=r"lacks flux1-schnell.safetensors; get it with .*Apache License 2.0"):
        find("schnell")


@pytest.mark.parametrize("name", ["nowhere", "no/where", "a/b/c", "../x", ""])
def test_no_such_model(cache, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(CheckpointError, match="there is no model .* neither file nor folder"):
            find(name)
    else:
        assert fe.load(name).size == 128  # no name is the default


def test_the_command_is_one_that_the_hub_client_has():
    beside = Path(sys.executable).parent / "hf"
    help_text = subprocess.run([beside, "download", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--include" in help_text


# ---------------------------------------------------------------- the true sizes


def empty_file(path: Path, state: dict, dtype: str = "BF16") -> None:
    """A sparse safetensors file with these shapes, which takes no disk space."""
    header, at = {}, 0
    for name, tensor in state.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


@linux
@pytest.mark.parametrize("variant", ["dev", "schnell", "fill", "canny"])
def test_a_file_of_the_true_size_opens_at_once(tmp_path, variant):
    with meta_init():
        flux = Flux(FluxConfig.variant(variant))
    empty_file(tmp_path / "flux.safetensors", flux.state_dict())
    module, tensors = open_model(tmp_path / "flux.safetensors")
    assert module.config == flux.config
    assert sum(p.numel() for p in module.parameters()) > 11_890_000_000 and len(tensors) in (776, 780)


@linux
def test_the_whole_of_dev_is_mapped_in_little_memory(tmp_path):
    with meta_init():
        empty_file(tmp_path / "flux.safetensors", Flux(FluxConfig()).state_dict())
        empty_file(tmp_path / "t5.safetensors", T5Encoder(T5Config()).state_dict())
    code = (
        "import sys, torch; from fluxedu.checkpoints import load_model\n"
        "flux, t5 = (load_model(p) for p in sys.argv[1:])\n"
        "assert flux.img_in.weight.dtype == torch.bfloat16\n"
        "print(sum(p.numel() for m in (flux, t5) for p in m.parameters()), peak())"
    )
    count, peak = run_measured(code, tmp_path / "flux.safetensors", tmp_path / "t5.safetensors")
    assert count == 11_901_408_320 + 4_762_310_656
    assert peak < 1.5e9  # of 33 GB


def run_measured(code: str, *arguments) -> list[int]:
    """The numbers that ``code`` prints; its ``peak()`` is the process's largest resident size in bytes."""
    peak = "def peak():\n    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
    done = subprocess.run(
        [sys.executable, "-c", peak + code, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(x) for x in done.stdout.split()]


@linux
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_streaming_holds_less_than_the_largest_group(tmp_path, layout):
    """To the meta device, which stands for a GPU and holds nothing; so all memory counted here is the host's."""
    config = FluxConfig(depth=1, depth_single_blocks=1, hidden_size=2048, num_heads=16)
    with meta_init():
        flux = Flux(config)
        state = convert(flux.state_dict(), layout, config)
    empty_file(tmp_path / "flux.safetensors", state)
    largest = 2 * sum(p.numel() for p in flux.double_blocks[0].parameters())
    code = (
        "import sys, torch; from fluxedu.checkpoints import open_model\n"
        "from fluxedu.checkpoints.reading import stream\n"
        "module, tensors = open_model(sys.argv[1])\n"
        "before = peak(); stream(tensors, torch.float32, lambda name: 'meta'); print(peak() - before)"
    )
    (held,) = run_measured(code, tmp_path / "flux.safetensors")
    assert held < 0.5 * largest  # the bar is 1.2


@pytest.mark.parametrize("chunk", [1, 999, 4096, 1 << 20])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_streamed_values_are_those_of_the_file(tmp_path, monkeypatch, chunk, layout):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    flux = flux_of("dev")
    state = convert(flux.state_dict(), layout, flux.config)
    their_save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "flux.safetensors")
    for dtype in (torch.float32, torch.bfloat16, None):
        ours = load_model(tmp_path / "flux.safetensors", flux.config, dtype=dtype).state_dict()
        for name, tensor in flux.state_dict().items():
            assert torch.equal(ours[name], tensor.to(dtype or torch.bfloat16))


def test_weights_for_a_device_are_read_and_not_mapped(tmp_path, monkeypatch):
    flux = flux_of("dev")
    their_save_file(flux.state_dict(), tmp_path / "flux.safetensors")
    monkeypatch.setattr(TensorFile, "_window", None)
    moved = load_model(tmp_path / "flux.safetensors", flux.config, device="meta").state_dict()
    assert all(tensor.is_meta and tensor.shape == flux.state_dict()[name].shape for name, tensor in moved.items())
    with pytest.raises(TypeError):
        load_model(tmp_path / "flux.safetensors", flux.config)
