"""fe.load on files as people have them: loose folders, lone and all-in-one files, variants, revisions, models
without a name."""

import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from test_official import AE, ENCODERS, SMALL, randomised, repository
from transformers import CLIPTextConfig as TheirCLIPConfig
from transformers import CLIPTextModelWithProjection, T5ForConditionalGeneration
from transformers import T5Config as TheirT5Config
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.checkpoints import find, load_model, save_folder
from fluxedu.cli import app
from fluxedu.errors import CheckpointError, RequestError
from fluxedu.models import VARIANTS, AutoEncoder, AutoEncoderConfig, CLIPTextEncoder, Flux, FluxConfig, T5Encoder
from fluxedu.nano import networks
from fluxedu.nano.tokenizers import save_tokenizers

#: sizes that follow from the shapes alone: heads of 64 in CLIP
CLIP = networks.CLIP.with_(hidden_size=64, intermediate_size=36, num_hidden_layers=2, num_attention_heads=1)
T5 = networks.T5.with_(d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=3)
FLUX = FluxConfig().with_(**SMALL).with_(vec_in_dim=64)
UNGUIDED = FLUX.with_(guidance_embed=False)
STATES = {
    name: dict(randomised(kind(config), seed).state_dict())
    for seed, (name, kind, config) in enumerate(
        [
            ("flux", Flux, FLUX),
            ("unguided", Flux, UNGUIDED),
            ("ae", AutoEncoder, AE),
            ("clip", CLIPTextEncoder, CLIP),
            ("t5", T5Encoder, T5),
        ]
    )
}
REDRAWN = dict(randomised(Flux(FLUX), 9).state_dict())


def write(path, state, prefix="", dtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: tensor.to(dtype or tensor.dtype).clone() for name, tensor in state.items()}, path)
    return path


def is_loaded(pipe, flux="flux"):
    """Every network has the values of ``STATES``, in its own dtype."""
    for name, network in pipe.networks().items():
        expected = STATES[flux if name == "flux" else name]
        state = network.state_dict()
        assert state.keys() == expected.keys() and all(
            torch.equal(state[n], t.to(pipe.dtype)) for n, t in expected.items()
        )
    return True


def encoders(folder):
    """Encoders, autoencoder and tokenizers as in a repository."""
    save_folder(STATES["ae"], folder / "vae", AE)
    save_folder(STATES["clip"], folder / "text_encoder", CLIP)
    save_folder(STATES["t5"], folder / "text_encoder_2", T5)
    save_tokenizers(folder)
    return folder


def cached(cache, repo_id, revision="main"):
    """An empty snapshot of a repository in the cache; its commit is made from the revision's name."""
    home = cache / f"models--{repo_id.replace('/', '--')}"
    commit = revision.encode().hex().ljust(40, "0")[:40]
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def loose(folder, flux="flux"):
    write(folder / "my tune.safetensors", STATES[flux], "model.diffusion_model.")
    write(
        folder / "b.safetensors",
        STATES["clip"] | {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(64, 64)},
    )
    write(folder / "c.safetensors", STATES["t5"] | {"encoder.embed_tokens.weight": STATES["t5"]["shared.weight"]})
    write(folder / "a.safetensors", STATES["ae"])
    save_tokenizers(folder)
    return folder


# ---------------------------------------------------------------- loose folders


def test_a_loose_folder_is_recognised_by_its_tensors(cache, tmp_path):
    folder = loose(tmp_path / "loose")
    write(folder / "lora.safetensors", {"transformer.x_embedder.lora_A.weight": torch.ones(2, 64)})
    write(folder / "upscaler.safetensors", {"conv.weight": torch.ones(3, 3)})
    pipe = fe.load(folder)
    assert is_loaded(pipe) and pipe.dtype == torch.bfloat16 and pipe.size == 1024
    assert pipe.defaults == VARIANTS["dev"].sampling
    assert is_loaded(fe.load(folder / "my tune.safetensors"))  # what is beside the file


def test_names_do_not_mislead(cache, tmp_path):
    """Files whose names are those of other parts."""
    folder = loose(tmp_path / "loose")
    for old, new in {"my tune": "ae", "a": "clip_l", "b": "t5xxl_fp16", "c": "flux1-dev"}.items():
        (folder / f"{old}.safetensors").rename(folder / f"{new}.st")
    for path in list(folder.glob("*.st")):
        path.rename(path.with_suffix(".safetensors"))
    assert is_loaded(fe.load(folder))


def test_encoders_that_do_not_fit_are_not_taken(cache, tmp_path):
    """CLIP-G beside CLIP-L, an SDXL autoencoder with 4 channels, another T5."""
    folder = loose(tmp_path / "loose")
    other = CLIP.with_(hidden_size=128, num_attention_heads=2)
    write(folder / "clip_g.safetensors", randomised(CLIPTextEncoder(other)).state_dict())
    sdxl = AutoEncoderConfig(ch=64, ch_mult=(1, 1, 1, 1), z_channels=4)
    write(folder / "sdxl_vae.safetensors", randomised(AutoEncoder(sdxl)).state_dict())
    write(folder / "t5_base.safetensors", randomised(T5Encoder(T5.with_(d_model=30))).state_dict())
    assert is_loaded(fe.load(folder))


def test_of_two_precisions_of_an_encoder_the_finer_one_is_taken(cache, tmp_path):
    folder = loose(tmp_path / "loose")
    write(folder / "a_t5xxl_fp8.safetensors", STATES["t5"], dtype=torch.float8_e4m3fn)
    assert is_loaded(fe.load(folder))
    write(folder / "t5xxl_other.safetensors", STATES["t5"])
    with pytest.raises(
        CheckpointError, match="holds a T5 encoder in several files, c.safetensors, t5xxl_other.safetensors"
    ):
        fe.load(folder)


def test_of_two_transformers_none_is_taken_by_chance(cache, tmp_path):
    folder = loose(tmp_path / "loose")
    write(folder / "flux1-schnell.safetensors", STATES["unguided"])
    write(folder / "flux1-dev.safetensors", REDRAWN, dtype=torch.float8_e4m3fn)  # smaller, and not the same model
    with pytest.raises(
        CheckpointError, match="in several files, flux1-dev.* my tune.safetensors; pass the path of one"
    ):
        fe.load(folder)
    assert is_loaded(fe.load(folder / "my tune.safetensors"))
    assert fe.load(folder / "flux1-schnell.safetensors").defaults == VARIANTS["schnell"].sampling


def test_a_file_that_cannot_be_read_is_named_if_its_part_is_missing(cache, tmp_path):
    folder = loose(tmp_path / "loose")
    (folder / "stray.safetensors").write_bytes(b"not a file of tensors")
    assert is_loaded(fe.load(folder))
    (folder / "stray.safetensors").unlink()
    data = (folder / "c.safetensors").read_bytes()
    (folder / "c.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"^c.safetensors is cut short: .*\.$"):
        fe.load(folder)
    (folder / "c.safetensors").write_bytes(data)
    nf4 = STATES["flux"] | {"img_in.weight.absmax": torch.ones(4)}
    write(folder / "my tune.safetensors", nf4)
    with pytest.raises(CheckpointError, match="my tune.safetensors holds weights quantised with bitsandbytes"):
        fe.load(folder)
    (folder / "my tune.safetensors").unlink()
    (folder / "flux1-dev-Q4_0.gguf").write_bytes(b"GGUF" + bytes(60))
    for where in (folder, folder / "flux1-dev-Q4_0.gguf"):
        with pytest.raises(CheckpointError, match="flux1-dev-Q4_0.gguf is a GGUF file"):
            fe.load(where)


def test_files_called_sft(cache, tmp_path):
    folder = loose(tmp_path / "loose")
    for path in list(folder.glob("*.safetensors")):
        path.rename(path.with_suffix(".sft"))
    assert is_loaded(fe.load(folder)) and is_loaded(fe.load(folder / "my tune.sft"))


def test_parts_of_different_models_are_not_combined(cache, tmp_path):
    folder = encoders(tmp_path / "mixed")
    save_folder(STATES["flux"], folder / "transformer", FLUX)
    assert is_loaded(fe.load(folder))
    other = AutoEncoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4)
    save_folder(AutoEncoder(other).state_dict(), folder / "vae", other, overwrite=True)
    with pytest.raises(
        CheckpointError, match="parts of different models: the autoencoder's channels times 4 is 16, not 64"
    ):
        fe.load(folder)


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("inside", [True, False])
def test_an_all_in_one_file_uses_all_its_parts(cache, tmp_path, inside):
    """Although the folder and the cache have others."""
    repository(cache, "dev", encoders(tmp_path / "others"), "vae", *ENCODERS)
    prefixes = {"flux": "model.diffusion_model.", "ae": "vae.", "clip": "text_encoders.clip_l.transformer."}
    prefixes |= {"t5": "text_encoders.t5xxl.transformer."}
    other = {name: {n: 2 * t for n, t in state.items()} for name, state in STATES.items()}
    STATES_BEFORE = dict(STATES)
    state = {prefix + n: t for name, prefix in prefixes.items() for n, t in other[name].items()}
    write(tmp_path / "box" / "all.safetensors", state | {"text_encoders.clip_l.logit_scale": torch.ones(())})
    write(tmp_path / "box" / "ae.safetensors", STATES["ae"])
    write(tmp_path / "box" / "clip.safetensors", STATES["clip"])
    pipe = fe.load(tmp_path / "box" / "all.safetensors" if inside else tmp_path / "box")
    for name, network in pipe.networks().items():
        assert all(torch.equal(t, other[name][n]) for n, t in network.state_dict().items())
    assert STATES == STATES_BEFORE


@pytest.mark.parametrize("known", ["black-forest-labs/FLUX.1-schnell", "someone/tune", "someone/half"])
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_lone_transformer_takes_the_rest_from_any_repository_of_the_family(cache, tmp_path, known, layout):
    sd3 = encoders(cached(cache, "a/stable-diffusion-3"))  # sorted before the others
    write(
        sd3 / "vae" / "diffusion_pytorch_model.safetensors",
        {n: 3 * t for n, t in load_model(sd3 / "vae").state_dict().items()},
    )
    (sd3 / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    many = cached(cache, "a/kijai")  # several of everything, from which nothing can be chosen
    for name in ("x", "y"):
        write(many / f"{name}.safetensors", STATES["flux"])
        write(many / f"{name}-clip.safetensors", STATES["clip"])
    snapshot = encoders(cached(cache, known))
    if known == "someone/tune":
        (snapshot / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    elif known == "someone/half":  # without the pipeline's index, a transformer tells
        save_folder(REDRAWN, snapshot / "transformer", FLUX)
    lone = tmp_path / "tune"
    if layout == "file":
        lone = write(lone / "pixel-art.safetensors", STATES["flux"])
    else:
        save_folder(STATES["flux"], lone, FLUX, max_shard_bytes=500_000)
    found = find(lone)
    assert all(snapshot in path.parents for part, path in found.parts.items() if part != "transformer")
    assert is_loaded(fe.load(lone))


def test_without_the_family_in_the_cache_the_rest_is_missing(cache, tmp_path):
    encoders(cached(cache, "a/other"))
    lone = write(tmp_path / "tune.safetensors", STATES["flux"])
    with pytest.raises(
        CheckpointError, match=r"lacks ae.safetensors, text_encoder/\*, .*`hf download black-forest-labs/FLUX.1-dev"
    ):
        fe.load(lone)
    with pytest.raises(CheckpointError, match=r"^ae.safetensors holds no transformer of FLUX.1; pass a folder, or"):
        fe.load(write(tmp_path / "ae.safetensors", STATES["ae"]))


# ---------------------------------------------------------------- diffusers' folders: variants and dtypes


def saved_by_diffusers(folder, **options):
    """A pipeline's folder, without the pipeline's index: every part as its own library saves it."""
    size = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    flux = FluxTransformer2DModel(**size, joint_attention_dim=24, pooled_projection_dim=64, guidance_embeds=True)
    levels = {"block_out_channels": (32, 32, 32, 32), "latent_channels": 16, "layers_per_block": 1}
    levels |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**levels, use_quant_conv=False, use_post_quant_conv=False)
    text = {"vocab_size": CLIP.vocab_size, "hidden_size": 64, "intermediate_size": 36, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "eos_token_id": CLIP.eos_token_id, "max_position_embeddings": 32}
    clip = CLIPTextModelWithProjection(TheirCLIPConfig(**text, projection_dim=64))
    size = {"vocab_size": T5.vocab_size, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 3}
    t5 = T5ForConditionalGeneration(TheirT5Config(**size, feed_forward_proj="gated-gelu"))
    parts = {"transformer": flux, "vae": vae, "text_encoder": clip, "text_encoder_2": t5}
    for name, model in parts.items():
        model.to(options.get("dtype", torch.float32)).save_pretrained(
            folder / name, variant=options.get("variant"), max_shard_size="400KB"
        )
    save_tokenizers(folder)
    return flux.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_in_devs_layout_opens_in_its_own_dtype(cache, tmp_path, dtype):
    theirs = saved_by_diffusers(tmp_path / "mine", dtype=dtype)
    pipe = fe.load(tmp_path / "mine")
    assert {network.state_dict()[n].dtype for network in pipe.networks().values() for n in network.state_dict()} == {
        dtype
    }
    assert torch.equal(pipe.flux.img_in.weight, theirs["x_embedder.weight"])
    assert pipe.size == 1024 and pipe.defaults == VARIANTS["dev"].sampling
    assert fe.load(tmp_path / "mine", dtype="float64").dtype == torch.float64


def test_scaled_fp8_opens_in_bfloat16(cache, tmp_path):
    folder = loose(tmp_path / "loose")
    state = {}
    for name, tensor in STATES["flux"].items():
        state[name] = tensor.float()
        if tensor.ndim == 2:
            scale = tensor.float().abs().max() / 448
            state[name], state[name.replace(".weight", ".scale_weight")] = (
                (tensor / scale).to(torch.float8_e4m3fn),
                scale,
            )
    write(folder / "my tune.safetensors", state | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)})
    pipe = fe.load(folder)
    assert pipe.dtype == torch.bfloat16
    value = (state["img_in.weight"].float() * state["img_in.scale_weight"]).bfloat16()
    assert torch.equal(pipe.flux.img_in.weight, value)


def test_variant_chooses_the_files(cache, tmp_path):
    plain = saved_by_diffusers(tmp_path / "plain")
    half = saved_by_diffusers(tmp_path / "half", dtype=torch.float16, variant="fp16")
    both = shutil.copytree(tmp_path / "plain", tmp_path / "both")
    shutil.copytree(tmp_path / "half", both, dirs_exist_ok=True)
    for where, variant, expected in ((both, None, plain), (both, "fp16", half), (tmp_path / "half", None, half)):
        pipe = fe.load(where, variant=variant)
        assert torch.equal(pipe.flux.img_in.weight, expected["x_embedder.weight"])
        assert pipe.dtype == expected["x_embedder.weight"].dtype
    for where in (both, tmp_path / "plain"):
        with pytest.raises(CheckpointError, match="has no files of the variant 'bf16'"):
            fe.load(where, variant="bf16")
    next((tmp_path / "half" / "transformer").glob("*-00002-of-*")).unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks transformer/diffusion_pytorch_model.fp16-00002-of-\d+.safetensors;"
    ):
        fe.load(tmp_path / "half", variant="fp16")
    with pytest.raises(RequestError, match=r"variant= and revision= do not apply to nano, which ships with fluxedu\.$"):
        fe.load("nano", variant="fp16")
    with pytest.raises(RequestError, match="fluxedu; load 'nano-canny' instead"):
        fe.load("nano", variant="canny")


# ---------------------------------------------------------------- revisions


def test_revision_chooses_a_version_of_a_repository(cache, tmp_path):
    for revision, state in {"main": REDRAWN, "v2": STATES["flux"]}.items():
        save_folder(state, encoders(cached(cache, "someone/tune", revision)) / "transformer", FLUX)
    assert is_loaded(fe.load("someone/tune", revision="v2"))
    assert torch.equal(fe.load("someone/tune").flux.img_in.weight, REDRAWN["img_in.weight"])
    with pytest.raises(CheckpointError, match=r"no model 'someone/tune' .* Face cache at revision 'v3';"):
        fe.load("someone/tune", revision="v3")
    shutil.rmtree(cache / "models--someone--tune" / "snapshots" / b"main".hex().ljust(40, "0") / "transformer")
    with pytest.raises(
        CheckpointError, match=r"lacks transformer/\*; get it with `hf download someone/tune --include \S+`\.$"
    ):
        fe.load("someone/tune")
    with pytest.raises(CheckpointError, match=r"`hf download black-forest-labs/FLUX.1-dev .*--revision v3`"):
        fe.load("dev", revision="v3")
    with pytest.raises(CheckpointError, match="revision= is for repositories in the Hugging Face cache, and '.*' is a"):
        fe.load(tmp_path, revision="v2")
    for option in ("variant", "revision"):
        with pytest.raises(CheckpointError, match=f"{option} must be a text, such as 'fp16' or 'main', not 2"):
            fe.load("someone/tune", **{option: 2})


@pytest.mark.parametrize("command", [["sample", "x"], ["trace", "x"], ["sites"], ["judge"]])
def test_every_command_that_loads_a_model_chooses_its_files(monkeypatch, tmp_path, command):
    loaded = []

    def load(name, **options):
        loaded.append((name, options))
        raise RequestError("not today")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fe, "load", load)
    monkeypatch.setattr("fluxedu.arena.stable_diffusion.load", load)
    chosen = {"like": "schnell", "variant": "fp16", "revision": "v2"}
    for options in (chosen, {}):
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        result = CliRunner().invoke(app, [*command, "--model", "someone/tune", *words])
        assert result.output.strip() == "fluxedu: not today"
        name, given = loaded.pop()
        assert (
            name == "someone/tune" and {option: given[option] for option in chosen} == dict.fromkeys(chosen) | options
        )


def test_a_sweep_chooses_its_files(monkeypatch, tmp_path):
    loaded = []

    def load(name, **options):
        loaded.append((name, options))
        raise RequestError("not today")

    monkeypatch.setattr(fe, "load", load)
    chosen = {"like": "schnell", "variant": "fp16", "revision": "v2"}
    for i, options in enumerate((chosen, {})):
        (tmp_path / f"{i}.yaml").write_text(json.dumps({"prompts": ["x"], "model": "someone/tune"} | options))
        result = CliRunner().invoke(app, ["sweep", str(tmp_path / f"{i}.yaml")])
        assert result.output.strip() == "fluxedu: not today"
        expected = {"device": None, "dtype": None} | dict.fromkeys(chosen) | options
        assert loaded.pop() == ("someone/tune", expected)


def test_the_command_line_draws_with_the_chosen_files(cache, tmp_path):
    for revision, state in {"main": REDRAWN, "v2": STATES["unguided"]}.items():
        config = FLUX if revision == "main" else UNGUIDED
        save_folder(state, encoders(cached(cache, "someone/tune", revision)) / "transformer", config)
    words = ["sample", "x", "--model", "someone/tune", "--revision", "v2", "--like", "schnell", "-o", "out.png"]
    size = ["--height", "32", "--width", "32"]
    result = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "out.png"), *size])
    assert result.exit_code == 0, result.output
    pipe = fe.load("someone/tune", revision="v2", like="schnell")
    drawn = pipe("x", height=32, width=32, progress=False)
    assert drawn.trajectory.times.tolist() == [1, 0.75, 0.5, 0.25, 0]  # schnell's four steps
    assert Image.open(tmp_path / "out.png").tobytes() == drawn.images[0].tobytes()


# ---------------------------------------------------------------- which sampling settings


def test_a_transformer_without_guidance_input_and_name_asks(cache, tmp_path):
    folder = loose(tmp_path / "loose", "unguided")
    with pytest.raises(
        RequestError, match=r"my tune.safetensors has no guidance input.* like='schnell' or like='dev'\.$"
    ):
        fe.load(folder)
    for like in ("dev", "schnell"):
        pipe = fe.load(folder, like=like)
        assert is_loaded(pipe, "unguided") and pipe.defaults == VARIANTS[like].sampling
    out = fe.load(folder, like="dev")("a red circle", height=32, width=32, steps=2, progress=False)
    plain = fe.load(folder, like="dev")("a red circle", height=32, width=32, steps=2, guidance=0.0, progress=False)
    assert not torch.equal(out.latents, plain.latents)  # guidance is classifier-free


@pytest.mark.parametrize(("dynamic", "like"), [(True, "dev"), (False, "schnell")])
def test_the_scheduler_tells_schnell_from_a_de_distilled_dev(cache, tmp_path, dynamic, like):
    folder = loose(tmp_path / "loose", "unguided")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"use_dynamic_shifting": dynamic}))
    assert fe.load(folder).defaults == VARIANTS[like].sampling
    with pytest.raises(RequestError, match="like='schnell'"):  # the scheduler may belong to another transformer
        fe.load(folder / "my tune.safetensors")


def test_like_must_fit(cache, tmp_path):
    folder = loose(tmp_path / "loose")
    assert fe.load(folder, like="kontext").defaults == VARIANTS["kontext"].sampling
    for like, reason in {
        "schnell": "this transformer has a guidance input, which schnell has not; choose like='dev'.",
        "fill": "a transformer like fill has 384 input channels for 64 output channels, but this one has 64 for 64; ",
        "turbo": "like must be one of dev, schnell, krea, fill, canny, depth, kontext, not 'turbo'.",
    }.items():
        with pytest.raises(RequestError, match=re.escape(reason)):
            fe.load(folder, like=like)
    with pytest.raises(RequestError, match="like= does not apply to the miniature"):
        fe.load("nano", like="dev")
