"""Weights in the forms in which people share them: variants, all-in-one files, prefixes, scaled fp8, larger encoders.

Files are written by diffusers, transformers and safetensors, or with the names that other programs use. What is read
must be equal to the bit, and dequantised values follow the formula weight * scale.
"""

import functools
import re
import shutil

import bitsandbytes
import pytest
import torch
from diffusers import ChromaTransformer2DModel, Flux2Transformer2DModel, FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import save_file
from test_checkpoints_errors import says
from test_checkpoints_files import AE, CLIP, FLUX, T5, random_weights, same, their_size
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, T5ForConditionalGeneration
from transformers import T5Config as TheirT5Config
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.checkpoints import convert, convert_file, load_into, load_model, read, reading
from fluxedu.checkpoints import save_file as our_save_file
from fluxedu.cli import app
from fluxedu.errors import CheckpointError
from fluxedu.models import AutoEncoder, CLIPTextEncoder, Flux, T5Encoder

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
PARTS = {"transformer": (Flux, FLUX), "vae": (AutoEncoder, AE)}
PARTS |= {"text_encoder": (CLIPTextEncoder, CLIP), "text_encoder_2": (T5Encoder, T5)}
#: where ComfyUI puts the networks of one file
COMFY = {
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
}


@functools.cache
def state_of(part: str) -> dict[str, torch.Tensor]:
    kind, config = PARTS[part]
    return dict(random_weights(kind(config)).state_dict())


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def all_in_one(prefixes: dict[str, str] = COMFY) -> dict[str, torch.Tensor]:
    return {name: tensor for part in PARTS for name, tensor in with_prefix(prefixes[part], state_of(part)).items()}


# ---------------------------------------------------------------- several networks in one file


@pytest.mark.parametrize(
    "prefixes",
    [
        COMFY,
        {part: f"{part}." for part in PARTS},
        {**COMFY, "vae": "first_stage_model.", "transformer": "diffusion_model.", "text_encoder": "cond_stage_model."},
        {**COMFY, "transformer": ""},
        {**COMFY, "transformer": "module._orig_mod."},
    ],
)
def test_every_part_of_an_all_in_one_file_is_read(tmp_path, prefixes):
    unused = {
        "text_encoders.clip_l.logit_scale": torch.ones(()),
        "text_encoders.t5xxl.logit_scale": torch.ones(()),
        prefixes["text_encoder"] + "text_projection.weight": torch.ones(16, 16),
        prefixes["text_encoder"] + "text_model.embeddings.position_ids": torch.arange(9)[None],
        prefixes["text_encoder_2"] + "spiece_model": torch.ones(9, dtype=torch.uint8),
        prefixes["text_encoder_2"] + "encoder.embed_tokens.weight": state_of("text_encoder_2")["shared.weight"].clone(),
    }
    save_file(all_in_one(prefixes) | unused, tmp_path / "all.safetensors")
    for part, (kind, config) in PARTS.items():
        same(load_model(tmp_path / "all.safetensors", config, part=part).state_dict(), state_of(part))
        same(load_model(tmp_path / "all.safetensors", config).state_dict(), state_of(part))  # the config says which
        same(load_into(kind(config), all_in_one(prefixes) | unused).state_dict(), state_of(part))
    parts = "transformer, vae, text_encoder, text_encoder_2"
    says(
        f"all.safetensors holds several networks; choose one with part= ({parts}).", read, tmp_path / "all.safetensors"
    )
    says(f"part must be one of {parts}, not 'unet'.", read, tmp_path / "all.safetensors", "unet")


def test_one_part_of_an_all_in_one_file_is_converted(tmp_path):
    save_file(all_in_one(), tmp_path / "all.safetensors")
    convert_file(tmp_path / "all.safetensors", tmp_path / "vae", to="diffusers", config=AE)
    convert_file(tmp_path / "all.safetensors", tmp_path / "t5.safetensors", to="bfl", part="text_encoder_2")
    same(dict(read(tmp_path / "vae")), convert(state_of("vae"), "diffusers", AE))
    same(dict(read(tmp_path / "t5.safetensors")), state_of("text_encoder_2"))
    command = [
        "convert",
        str(tmp_path / "all.safetensors"),
        str(tmp_path / "again.safetensors"),
        "--to",
        "bfl",
        "--part",
    ]
    result = CliRunner().invoke(app, [*command, "text_encoder_2"])
    assert result.exit_code == 0, result.output
    same(dict(read(tmp_path / "again.safetensors")), state_of("text_encoder_2"))
    assert "part must be one of transformer, vae" in CliRunner().invoke(app, [*command, "unet"]).output


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.new.weight", "vae.new.weight", "new.weight", "text_encoders.x"]
)
def test_an_unknown_tensor_of_an_all_in_one_file_is_named(tmp_path, name):
    save_file(all_in_one() | {name: torch.ones(2)}, tmp_path / "all.safetensors")
    owner = next((part for part, prefix in COMFY.items() if name.startswith(prefix)), None)
    for part, (_, config) in PARTS.items():
        if owner in (None, part):
            with pytest.raises(CheckpointError, match=re.escape(name.removeprefix(COMFY.get(owner, "")))):
                load_model(tmp_path / "all.safetensors", config, part=part)
        else:
            load_model(tmp_path / "all.safetensors", config, part=part)


def test_a_network_that_occurs_twice_is_not_chosen_by_chance(tmp_path):
    twice = with_prefix("model.", state_of("transformer")) | with_prefix("model_ema.", state_of("transformer"))
    save_file(twice, tmp_path / "f.safetensors")
    sentence = "f.safetensors holds a flow transformer twice, under 'model.' and 'model_ema.'; save one of them."
    says(sentence, read, tmp_path / "f.safetensors")
    twice = state_of("transformer") | {"module.img_in.weight": torch.ones(32, 12)}
    says(
        "the state dict holds 'img_in.weight' twice, as 'img_in.weight' and 'module.img_in.weight'.",
        load_into, Flux(FLUX), twice,
    )  # fmt: skip


def test_another_network_than_the_part_is_named(tmp_path):
    save_file(state_of("vae"), tmp_path / "ae.safetensors")
    sentence = "ae.safetensors is an autoencoder, but a flow transformer is needed."
    says(sentence, load_model, tmp_path / "ae.safetensors", part="transformer")


# ---------------------------------------------------------------- prefixes and wrappers


@pytest.mark.parametrize("wrap", ["compile", "parallel", "checkpoint", "all"])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_wrapped_modules_are_unwrapped(tmp_path, wrap, layout):
    flux = random_weights(Flux(FLUX))
    theirs = random_weights(FluxTransformer2DModel(**their_size())) if layout == "diffusers" else flux
    plain = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    blocks = theirs.transformer_blocks if layout == "diffusers" else theirs.double_blocks
    wrapped = theirs
    if wrap in ("checkpoint", "all"):
        blocks[0] = checkpoint_wrapper(blocks[0])
    if wrap in ("compile", "all"):
        blocks[1] = torch.compile(blocks[1])
        wrapped = torch.compile(wrapped)
    if wrap in ("parallel", "all"):
        wrapped = torch.nn.DataParallel(wrapped)
    state = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    if wrap == "checkpoint":  # its own hook removes the name; FSDP's files have it
        state = {name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): t for name, t in state.items()}
    assert state.keys() != plain.keys()
    save_file(state, tmp_path / "f.safetensors")
    same(dict(read(tmp_path / "f.safetensors")), plain)
    same(load_model(tmp_path / "f.safetensors", FLUX).state_dict(), convert(plain, "bfl", FLUX))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_norms_whose_scale_is_called_weight(tmp_path, prefix):
    names = {name: re.sub(r"(query|key)_norm\.scale$", r"\1_norm.weight", name) for name in state_of("transformer")}
    state = {prefix + names[name]: tensor.clone() for name, tensor in state_of("transformer").items()}
    assert len(set(names.values()) - names.keys()) == 4 * 2 + 2 * 3
    save_file(state, tmp_path / "f.safetensors")
    same(load_model(tmp_path / "f.safetensors", FLUX).state_dict(), state_of("transformer"))


# ---------------------------------------------------------------- variants of files


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_files_of_a_variant(tmp_path, shard):
    theirs = FluxTransformer2DModel.from_config(FluxTransformer2DModel(**their_size()).config)
    saved = {}
    for seed, (variant, dtype) in enumerate(
        {"fp16": torch.float16, "bf16": torch.bfloat16, None: torch.float32}.items()
    ):
        random_weights(theirs, seed).to(dtype)
        theirs.save_pretrained(tmp_path / str(variant), variant=variant, max_shard_size=shard)
        saved[variant] = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    same(dict(read(tmp_path / "fp16")), saved["fp16"])
    assert load_model(tmp_path / "fp16").config == FLUX  # from the config.json
    both = shutil.copytree(tmp_path / "fp16", tmp_path / "both")
    shutil.copytree(tmp_path / "bf16", both, dirs_exist_ok=True)
    says("both has the variants bf16, fp16; choose one with variant=.", read, both)
    shutil.copytree(tmp_path / "None", both, dirs_exist_ok=True)
    same(dict(read(both)), saved[None])  # the plain files come first
    stem = "diffusion_pytorch_model"
    chosen = both / (f"{stem}.safetensors.index.fp16.json" if shard == "40KB" else f"{stem}.fp16.safetensors")
    same(dict(read(chosen)), saved["fp16"])
    assert load_model(chosen).config == FLUX


def test_files_of_a_variant_of_a_text_encoder(tmp_path):
    size = {"vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 3}
    t5 = random_weights(T5ForConditionalGeneration(TheirT5Config(**size, feed_forward_proj="gated-gelu")))
    t5.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="2KB")
    assert len(list(tmp_path.glob("model.fp16-*.safetensors"))) > 3
    ours = load_model(tmp_path).state_dict()
    expected = {n: t for n, t in t5.state_dict().items() if n == "shared.weight" or n.startswith("encoder.block")}
    same({name: ours[name] for name in expected}, expected)
    assert ours.keys() - expected.keys() == {"encoder.final_layer_norm.weight"}


# ---------------------------------------------------------------- larger networks than FLUX uses


def test_encoders_inside_larger_models(tmp_path):
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 9, "eos_token_id": 49, "bos_token_id": 48}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4}))
    projected = CLIPTextModelWithProjection(CLIPTextConfig(**text))
    ids = torch.tensor([[48, 7, 49, 0]])
    for number, model in enumerate((whole, projected)):
        random_weights(model.text_model)
        model.save_pretrained(tmp_path / str(number))
        clip = load_model(tmp_path / str(number))
        assert clip.config == CLIP
        text_model = model.text_model
        with torch.no_grad():
            expected = text_model(ids).pooler_output
            assert torch.linalg.norm(clip(ids)[1] - expected) < 1e-5 * torch.linalg.norm(expected)


def test_defaults_that_a_whole_clip_omits_are_transformers_own():
    from fluxedu.checkpoints import from_diffusers_config

    values = {"architectures": ["CLIPModel"], "text_config": {"vocab_size": 50}}
    theirs, ours = CLIPTextConfig(vocab_size=50), from_diffusers_config(values)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "layer_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name)


# ---------------------------------------------------------------- scaled fp8


def quantised(state: dict, fp8: torch.dtype, spelling: str, per_row: bool, other: torch.dtype):
    """Matrices in fp8 with their scales, all else in ``other``; and the values that they stand for, in float32."""
    stored, values = {}, {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or "embed" in name or "shared" in name:
            stored[name] = tensor.to(other)
            values[name] = stored[name].float()
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if per_row else tensor.abs().max()
        scale = largest / torch.finfo(fp8).max
        stored[name] = (tensor / scale).to(fp8)
        values[name] = stored[name].to(torch.float32) * scale
        stored[f"{name.removesuffix('.weight')}.{spelling}"] = scale
    return stored, values


INPUT = {"scale_weight": "scale_input", "weight_scale": "input_scale"}


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("spelling", INPUT)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_scaled_fp8_is_dequantised(tmp_path, monkeypatch, fp8, spelling, per_row, layout):
    state = convert(state_of("transformer"), layout, FLUX)
    stored, values = quantised(state, FP8[fp8], spelling, per_row, torch.bfloat16)
    first = next(name for name in stored if name.endswith(spelling)).removesuffix(spelling)
    stored[first + INPUT[spelling]] = torch.tensor(7.0)  # the scale of activations, which we do not quantise
    stored |= (
        {"scaled_fp8": torch.zeros(2, dtype=FP8[fp8])}
        if spelling == "scale_weight"
        else {first + "comfy_quant": torch.tensor(list(f'{{"format": "{fp8}"}}'.encode()), dtype=torch.uint8)}
    )
    stored = {"model.diffusion_model." + name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(stored, tmp_path / "f.safetensors")
    expected = convert(values, "bfl", FLUX)
    for chunk in (1, 999, 1 << 20):
        monkeypatch.setattr(reading, "CHUNK", chunk)
        exact = load_model(tmp_path / "f.safetensors", FLUX, dtype=torch.float32).state_dict()
        same(exact, expected)
    own = load_model(tmp_path / "f.safetensors", FLUX).state_dict()
    same(own, {name: tensor.bfloat16() for name, tensor in expected.items()})
    in_memory = {name: tensor.bfloat16() for name, tensor in expected.items()}
    same(load_into(Flux(FLUX), convert(stored, "bfl", FLUX)).state_dict(), in_memory)
    convert_file(tmp_path / "f.safetensors", tmp_path / "bf16.safetensors", to="bfl", config=FLUX)
    same(dict(read(tmp_path / "bf16.safetensors")), in_memory)


@pytest.mark.parametrize("embeddings", [("shared", "encoder.embed_tokens"), ("encoder.embed_tokens",)])
def test_scaled_fp8_of_a_text_encoder_in_an_all_in_one_file(tmp_path, embeddings):
    stored, values = quantised(state_of("text_encoder_2"), torch.float8_e4m3fn, "scale_weight", False, torch.float16)
    stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    scale = stored["shared.weight"].abs().max() / 448  # the embedding too, under its names
    fp8 = (stored["shared.weight"] / scale).to(torch.float8_e4m3fn)
    values["shared.weight"] = fp8.float() * scale.float()
    del stored["shared.weight"]
    for name in embeddings:
        stored |= {f"{name}.weight": fp8.clone(), f"{name}.scale_weight": scale.float()}
    mixed = with_prefix("text_encoders.t5xxl.transformer.", stored)
    mixed |= {name: t for name, t in all_in_one().items() if "t5xxl" not in name}
    save_file(mixed, tmp_path / "all.safetensors")
    same(load_model(tmp_path / "all.safetensors", T5, dtype=torch.float32, part="text_encoder_2").state_dict(), values)
    same(load_model(tmp_path / "all.safetensors", FLUX).state_dict(), state_of("transformer"))


@pytest.mark.parametrize("other", [torch.float16, torch.float32])
def test_dequantised_weights_get_the_dtype_of_the_unscaled_ones(tmp_path, other):
    """Not fp8, in which most bytes are; and a scale at the end of the file is read."""
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state_of("transformer").items()}
    state |= {name: tensor.to(other) for name, tensor in state_of("transformer").items() if name.endswith("bias")}
    our_save_file(state | {"img_in.weight_scale": torch.tensor([0.3])}, tmp_path / "f.safetensors")
    tensors = read(tmp_path / "f.safetensors")
    assert tensors.dtypes["img_in.weight"] == tensors["img_in.weight"].dtype == other
    assert torch.equal(tensors["img_in.weight"], (state["img_in.weight"].float() * 0.3).to(other))
    assert tensors["txt_in.weight"].dtype == torch.float8_e4m3fn


def test_fp8_without_a_scale_is_a_cast(tmp_path):
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state_of("transformer").items()}
    save_file(stored, tmp_path / "f.safetensors")
    exact = load_model(tmp_path / "f.safetensors", FLUX, dtype=torch.float32).state_dict()
    same(exact, {name: tensor.float() for name, tensor in stored.items()})


@pytest.mark.parametrize(
    "scale", [torch.ones(3), torch.ones(1, 12), torch.ones(2, 2), torch.ones(32, 1, dtype=torch.uint8)]
)
def test_a_scale_that_is_not_one_number_or_one_per_row(tmp_path, scale):
    state = state_of("transformer") | {"img_in.scale_weight": scale}
    save_file(state, tmp_path / "f.safetensors")
    sentence = (
        r"f\.safetensors has the scale 'img_in\.scale_weight' in torch\.\w+ and shape \[.*\], but it must be one .*"
    )
    says(re.compile(sentence), read, tmp_path / "f.safetensors")


def test_scales_without_a_weight_and_integer_weights_are_named(tmp_path):
    save_file(state_of("transformer") | {"img_on.scale_weight": torch.ones(())}, tmp_path / "f.safetensors")
    says("f.safetensors has an unexpected key 'img_on.scale_weight'.", load_model, tmp_path / "f.safetensors", FLUX)
    save_file(
        state_of("transformer") | {"img_in.weight": torch.ones(32, 12, dtype=torch.int8)}, tmp_path / "i.safetensors"
    )
    sentence = "i.safetensors has 'img_in.weight' in torch.int8; weights must be floating-point numbers."
    says(sentence, load_model, tmp_path / "i.safetensors", FLUX)


# ---------------------------------------------------------------- refused by name


def bitsandbytes_state(kind: str, nested: bool) -> dict[str, torch.Tensor]:
    state = dict(state_of("transformer"))
    weight, quant_state = bitsandbytes.functional.quantize_4bit(
        state["img_in.weight"], quant_type=kind, compress_statistics=nested
    )
    state["img_in.weight"] = weight
    return state | {f"img_in.weight.{name}": value for name, value in quant_state.as_dict(packed=True).items()}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_bitsandbytes_is_refused_by_name(tmp_path, kind, nested, prefix):
    state = {prefix + name: tensor.clone() for name, tensor in bitsandbytes_state(kind, nested).items()}
    save_file(state, tmp_path / "f.safetensors")
    says(
        re.compile(r"f\.safetensors holds weights quantised with bitsandbytes nf4/fp4, .*"),
        read,
        tmp_path / "f.safetensors",
    )


TINY = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
TINY |= {"in_channels": 8, "joint_attention_dim": 14, "axes_dims_rope": (4, 6, 6)}
OTHERS = {
    "Chroma": lambda: ChromaTransformer2DModel(**TINY, approximator_hidden_dim=8, approximator_layers=1),
    "a ControlNet": lambda: FluxControlNetModel(**TINY, pooled_projection_dim=10),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_refused_by_name(tmp_path, name):
    OTHERS[name]().save_pretrained(tmp_path / "transformer")
    says(re.compile(f"transformer is {re.escape(name)}, .*"), read, tmp_path / "transformer")
    state = {"model.diffusion_model." + n: t.clone() for n, t in OTHERS[name]().state_dict().items()}
    save_file(state, tmp_path / "f.safetensors")
    says(re.compile(f"f.safetensors is {re.escape(name)}, .*"), load_model, tmp_path / "f.safetensors")


def test_a_pipeline_of_flux2_needs_all_of_its_parts(tmp_path):
    """A folder says what it lacks; a file alone must have heads of 128, as all published ones (see test_flux2.py)."""
    theirs = Flux2Transformer2DModel(**{**TINY, "axes_dims_rope": (4, 4, 4, 4)})
    theirs.save_pretrained(tmp_path / "transformer")
    says(re.compile(r"'.*' lacks vae/\*, text_encoder/\*, tokenizer/\*; get them with `hf .*"), fe.load, tmp_path)
    state = {"model.diffusion_model." + name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "f.safetensors")
    says(
        re.compile(r"the shapes in f\.safetensors leave the configuration open, .*"),
        fe.load,
        tmp_path / "f.safetensors",
    )
    assert len(read(tmp_path / "transformer")) == len(state)


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_gguf_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"flux1-dev-Q4_0.{suffix}"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(64))
    says(re.compile(rf"flux1-dev-Q4_0\.{suffix} is a GGUF file, .*"), load_model, path)
    if suffix == "gguf":
        says(re.compile(r"flux1-dev-Q4_0\.gguf is a GGUF file, .*"), load_model, tmp_path)
