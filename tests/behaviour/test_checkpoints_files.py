"""Files: we read what diffusers and transformers write, they read what we write, and memory stays small."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as their_save_file
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from fluxedu.checkpoints import (
    config_of,
    convert,
    convert_file,
    from_diffusers_config,
    load_into,
    load_model,
    read,
    save_file,
    save_folder,
    to_diffusers_config,
)
from fluxedu.errors import CheckpointError
from fluxedu.files import write_text
from fluxedu.models import (
    AutoEncoder,
    AutoEncoderConfig,
    CLIPTextConfig,
    CLIPTextEncoder,
    Flux,
    FluxConfig,
    T5Config,
    T5Encoder,
)

FLUX = FluxConfig(
    in_channels=12,
    out_channels=8,
    vec_in_dim=10,
    context_in_dim=14,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 6, 6),
)
AE = AutoEncoderConfig(ch=32, ch_mult=(1, 2, 3), num_res_blocks=1, z_channels=4, norm_groups=8, scale_factor=0.7)
CLIP = CLIPTextConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
    eos_token_id=49,
)
T5 = T5Config(vocab_size=40, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=3)
linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5
    return model.eval()


def same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def velocity(model, theirs: bool):
    g = torch.Generator().manual_seed(1)
    img, txt, y = (torch.randn(shape, generator=g) for shape in ((2, 6, 12), (2, 3, 14), (2, 10)))
    ids = torch.tensor([[0.0, i, j] for i in range(2) for j in range(3)])
    t, w = torch.tensor([0.3, 0.9]), torch.tensor([2.0, 3.5])
    with torch.no_grad():
        if not theirs:
            return model(img, ids, txt, torch.zeros(3, 3), t, y, w)
        states = {"hidden_states": img, "encoder_hidden_states": txt, "pooled_projections": y}
        return model(**states, timestep=t, guidance=w, img_ids=ids, txt_ids=torch.zeros(3, 3)).sample


def close(left, right):  # float32, the same sums in another order
    assert torch.linalg.norm(left - right) < 1e-5 * torch.linalg.norm(right)


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_diffusers_opens_our_transformer_folder(tmp_path, shard_bytes):
    flux = random_weights(Flux(FLUX))
    save_folder(flux.state_dict(), tmp_path / "t", FLUX, max_shard_bytes=shard_bytes)
    theirs, info = FluxTransformer2DModel.from_pretrained(tmp_path / "t", output_loading_info=True)
    assert not any(info.values())
    same(theirs.state_dict(), convert(flux.state_dict(), to="diffusers", config=FLUX))
    close(velocity(flux, False), velocity(theirs, True))
    shards = sorted((tmp_path / "t").glob("*.safetensors"))
    assert (len(shards) > 5) == (shard_bytes == 40_000)
    assert all(s.stat().st_size < shard_bytes + 16_384 for s in shards)  # data and header; no tensor is larger


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_we_open_the_folder_diffusers_saved(tmp_path, shard):
    theirs = random_weights(FluxTransformer2DModel.from_config(FluxTransformer2DModel(**their_size()).config))
    theirs.save_pretrained(tmp_path / "t", max_shard_size=shard)
    ours = load_model(tmp_path / "t")
    assert ours.config == FLUX
    close(velocity(ours, False), velocity(theirs, True))
    same(dict(read(tmp_path / "t")), theirs.state_dict())


def their_size():
    size = {"in_channels": 12, "out_channels": 8, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16}
    size |= {"num_attention_heads": 2, "joint_attention_dim": 14, "pooled_projection_dim": 10, "guidance_embeds": True}
    return size | {"axes_dims_rope": (4, 6, 6)}


def test_autoencoder_folders_both_ways(tmp_path):
    ours, image = random_weights(AutoEncoder(AE)), torch.rand(1, 3, 16, 24) * 2 - 1
    save_folder(ours.state_dict(), tmp_path / "vae", AE)
    theirs, info = AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        mean = theirs.encode(image).latent_dist.mean
        close(ours.encode(image), (mean - theirs.config.shift_factor) * theirs.config.scaling_factor)
        close(ours.decoder(mean), theirs.decode(mean).sample)
    theirs.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == AE
    same(again.state_dict(), ours.state_dict())


def test_text_encoders_both_ways(tmp_path):
    ids = torch.tensor([[3, 7, 49, 0], [49, 1, 2, 3]])
    clip, t5 = random_weights(CLIPTextEncoder(CLIP)), random_weights(T5Encoder(T5))
    save_folder(clip.state_dict(), tmp_path / "clip", CLIP)
    save_folder(t5.state_dict(), tmp_path / "t5", T5, max_shard_bytes=3000)
    their_clip, their_t5 = (
        CLIPTextModel.from_pretrained(tmp_path / "clip"),
        T5EncoderModel.from_pretrained(tmp_path / "t5"),
    )
    with torch.no_grad():
        close(clip(ids)[1], their_clip.eval()(ids).pooler_output)
        close(t5(ids % 40), their_t5.eval()(ids % 40).last_hidden_state)
    for theirs, ours, name in ((their_clip, clip, "clip2"), (their_t5, t5, "t52")):
        theirs.save_pretrained(tmp_path / name)
        again = load_model(tmp_path / name)
        assert again.config == ours.config
        same(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize(("stored", "expected"), [(2, 49), (49, 49), (7, 7)])
def test_the_end_of_text_token_2_of_clips_own_file_is_the_last_of_the_vocabulary(stored, expected):
    values = to_diffusers_config(CLIP) | {"eos_token_id": stored}
    assert from_diffusers_config(values) == CLIP.with_(eos_token_id=expected)


def test_other_names_of_the_text_encoders_tensors(tmp_path):
    clip, t5 = random_weights(CLIPTextEncoder(CLIP)).state_dict(), random_weights(T5Encoder(T5)).state_dict()
    flat = {name.removeprefix("text_model."): tensor for name, tensor in clip.items()}
    flat["embeddings.position_ids"] = torch.arange(9)[None]
    same(load_into(CLIPTextEncoder(CLIP), flat).state_dict(), clip)
    twice = {**t5, "encoder.embed_tokens.weight": t5["shared.weight"].clone()}
    their_save_file(twice, tmp_path / "t5.safetensors")
    same(load_into(T5Encoder(T5), read(tmp_path / "t5.safetensors")).state_dict(), t5)
    only = {name.replace("shared.weight", "encoder.embed_tokens.weight"): tensor for name, tensor in t5.items()}
    same(load_into(T5Encoder(T5), only).state_dict(), t5)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model."])
def test_prefixes_are_taken_off(tmp_path, prefix):
    state = Flux(FLUX).state_dict()
    named = {prefix + name: tensor for name, tensor in state.items()}
    their_save_file(named, tmp_path / "f.safetensors")
    same(dict(read(tmp_path / "f.safetensors")), dict(state))
    same(convert(named, to="bfl", config=FLUX), dict(state))
    same(load_into(Flux(FLUX), named).state_dict(), dict(state))


def test_a_prefix_is_one_only_if_all_names_have_it(tmp_path):
    state = Flux(FLUX).state_dict()
    state["vae.img_in.weight"] = state.pop("img_in.weight")
    with pytest.raises(CheckpointError, match="lacks the key 'img_in.weight' and has an unexpected key 'vae.img_in"):
        load_into(Flux(FLUX), state)


@pytest.mark.parametrize("config", [FLUX, AE], ids=["flux", "autoencoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_file_round_trip_is_exact_and_as_in_memory(tmp_path, config, dtype):
    model = random_weights(Flux(config) if config is FLUX else AutoEncoder(config)).to(dtype)
    their_save_file(model.state_dict(), tmp_path / "a.safetensors")
    progress = []
    options = {"config": config, "shard_bytes": 50_000, "progress": lambda done, total: progress.append(done / total)}
    convert_file(tmp_path / "a.safetensors", tmp_path / "folder", to="diffusers", **options)
    assert progress == sorted(progress) and progress[-1] == 1
    same(dict(read(tmp_path / "folder")), convert(model.state_dict(), to="diffusers", config=config))
    convert_file(tmp_path / "folder", tmp_path / "b.safetensors", to="bfl")
    same(load_file(tmp_path / "b.safetensors"), dict(model.state_dict()))  # their reader
    assert config_of(read(tmp_path / "b.safetensors")) == config  # stored in the file, axes_dim too
    convert_file(tmp_path / "b.safetensors", tmp_path / "folder2", to="diffusers", shard_bytes=50_000)
    files = sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "folder2").iterdir())
    assert all((tmp_path / "folder" / f).read_bytes() == (tmp_path / "folder2" / f).read_bytes() for f in files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "folder", "folder2"]


def test_another_dtype_and_odd_tensors(tmp_path):
    state = {
        "scalar": torch.tensor(3),
        "empty": torch.zeros(5, 0),
        "none": torch.zeros(0),
        "flag": torch.tensor([True]),
    }
    state |= {"half": torch.randn(3, 2).half(), "eight": torch.randn(4).to(torch.float8_e4m3fn)}
    state["view"] = torch.randn(4, 6).T
    save_file(state, tmp_path / "odd.safetensors")
    for back in (load_file(tmp_path / "odd.safetensors"), dict(read(tmp_path / "odd.safetensors"))):
        assert back.keys() == state.keys() and all(back[n].dtype == state[n].dtype for n in state)
        assert all(torch.equal(back[n].float(), state[n].float()) for n in state)
    save_file(read(tmp_path / "odd.safetensors"), tmp_path / "bf16.safetensors", dtype=torch.bfloat16)
    back = load_file(tmp_path / "bf16.safetensors")
    assert back["scalar"].dtype == torch.int64 and torch.equal(back["view"], state["view"].to(torch.bfloat16))
    with safe_open(tmp_path / "bf16.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("length", range(1, 140, 9))
def test_the_data_of_a_file_begins_at_a_multiple_of_64_bytes(tmp_path, length):
    save_file({"n" * length: torch.ones(3)}, tmp_path / "f.safetensors")
    header = int.from_bytes((tmp_path / "f.safetensors").read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0
    assert read(tmp_path / "f.safetensors")["n" * length].data_ptr() % 64 == 0


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_load_into_a_meta_module_and_a_dtype(tmp_path, dtype):
    state = random_weights(Flux(FLUX)).to(torch.bfloat16).state_dict()
    save_file(state, tmp_path / "f.safetensors")
    with torch.device("meta"):
        flux = Flux(FLUX)
    load_into(flux, read(tmp_path / "f.safetensors"), dtype=dtype)
    assert {p.dtype for p in flux.parameters()} == {dtype or torch.bfloat16}
    assert all(p.requires_grad and not p.is_meta for p in flux.parameters())
    same({n: t.to(torch.bfloat16) for n, t in flux.state_dict().items()}, dict(state))


def test_a_loaded_weight_can_change_and_the_file_does_not(tmp_path):
    save_file(Flux(FLUX).state_dict(), tmp_path / "f.safetensors")
    before = (tmp_path / "f.safetensors").read_bytes()
    flux = load_model(tmp_path / "f.safetensors", config=FLUX)
    with torch.no_grad():
        flux.img_in.weight.add_(1.0)
    assert (tmp_path / "f.safetensors").read_bytes() == before


# -- memory, and interruptions


WIDE = FLUX.with_(hidden_size=1024, num_heads=8, axes_dim=(16, 56, 56), depth=1, depth_single_blocks=1)


def sparse_file(path: Path, config: FluxConfig) -> int:
    """A file of zeros with the right header, which costs no disk and no time; returns its size."""
    with torch.device("meta"):
        state = Flux(config).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + 4 * tensor.numel()],
        }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


MEASURE = """
import sys, pathlib
from fluxedu.checkpoints import convert_file
resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
source, target, to, shard = sys.argv[1:]
before, sizes = resident(), []
convert_file(source, target, to=to, shard_bytes=int(shard), progress=lambda done, total: sizes.append(resident()))
print(max(sizes) - before)
"""


def measured(*arguments) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@linux
def test_conversion_holds_a_few_megabytes(tmp_path):
    size = sparse_file(tmp_path / "wide.safetensors", WIDE)
    assert size > 200e6
    shard = 40_000_000
    out = measured(tmp_path / "wide.safetensors", tmp_path / "folder", "diffusers", shard)
    largest = max(p.stat().st_size for p in (tmp_path / "folder").glob("*.safetensors"))
    assert out < 1.5 * largest and out < 30e6, f"{out / 1e6:.0f} MB for shards of {largest / 1e6:.0f} MB"
    back = measured(tmp_path / "folder", tmp_path / "back.safetensors", "bfl", shard)
    assert back < 30e6, f"{back / 1e6:.0f} MB for converting back"


STUCK = """
import sys, time
from fluxedu.checkpoints import convert_file
def progress(done, total):
    if done > total / 2:
        print("halfway", flush=True)
        time.sleep(60)
source, target, to = sys.argv[1:]
convert_file(source, target, to=to, shard_bytes=40_000, overwrite=True, progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("to", ["bfl", "diffusers"])
@pytest.mark.parametrize("existing", [False, True])
def test_killed_halfway_nothing_looks_like_a_result(tmp_path, to, existing):
    source, out = tmp_path / "f.safetensors", tmp_path / "out"
    state = random_weights(Flux(FLUX)).state_dict()
    save_file(state, source, config=FLUX)
    target = out / ("result.safetensors" if to == "bfl" else "result")
    if existing:
        convert_file(source, target, to=to, dtype=torch.bfloat16)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    arguments = [sys.executable, "-c", STUCK, source, target, to]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "halfway\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    left = [p for p in out.rglob("*") if p.is_file() and p not in before]
    assert left and all(p.suffix in (".part", ".lock") or ".part" in p.parent.suffix for p in left)
    assert {p: p.read_bytes() for p in before} == before and target.exists() == existing
    assert [p for p in out.rglob("*.safetensors") if p not in before] == []
    assert [p for p in out.rglob("*.json") if p not in before] == []
    convert_file(source, target, to=to, overwrite=True)  # the next writer works, and deletes what was left
    assert [p.name for p in out.iterdir()] == [target.name]
    same(dict(read(target)), convert(state, to=to, config=FLUX))


@pytest.mark.parametrize("to", ["bfl", "diffusers"])
def test_an_exception_leaves_the_target_as_it_was(tmp_path, to):
    source, target = tmp_path / "f.safetensors", tmp_path / "out" / ("r.safetensors" if to == "bfl" else "r")
    save_file(Flux(FLUX).state_dict(), source, config=FLUX)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_file(source, target, to=to, progress=stop)
    assert list((tmp_path / "out").iterdir()) == []
    convert_file(source, target, to=to)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(KeyboardInterrupt):
        convert_file(source, target, to=to, overwrite=True, progress=stop)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_of_two_writers_of_a_new_name_the_first_succeeds_and_the_other_is_told(tmp_path):
    ours, theirs = {"a": torch.ones(3)}, {"a": torch.zeros(3)}

    def meanwhile(done, total):
        if not (tmp_path / "x.safetensors").exists():
            save_file(theirs, tmp_path / "x.safetensors")

    with pytest.raises(CheckpointError, match="was created while this was written"):
        save_file(ours, tmp_path / "x.safetensors", progress=meanwhile)
    same(load_file(tmp_path / "x.safetensors"), theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_text_is_replaced_whole_with_the_usual_permissions(tmp_path):
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "two é")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "two é"
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert os.listdir(tmp_path) in (["a.json", "plain"], ["plain", "a.json"])
