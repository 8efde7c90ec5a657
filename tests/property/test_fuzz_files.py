"""Damaged, forged and random files end in a one-line error: no crash, hang or pickle, nothing written elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import bytes_changed, fuzz, plain_changed

import fluxedu as fe
from fluxedu.checkpoints import config_of, convert_file, load_model, merge, read, save_file, save_folder
from fluxedu.models import AutoEncoder, AutoEncoderConfig, Flux, FluxConfig

FLUX = FluxConfig(
    in_channels=4, out_channels=4, vec_in_dim=6, context_in_dim=5, hidden_size=16, num_heads=2, axes_dim=(2, 2, 4),
    depth=1, depth_single_blocks=1,
)  # fmt: skip
AE = AutoEncoderConfig(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=2, norm_groups=2)


@pytest.fixture(scope="module")
def intact(tmp_path_factory, tokenizer_folder, make_pipe):
    """Intact files and folders, copies of which are damaged; ``model`` is a whole pipeline."""
    folder = tmp_path_factory.mktemp("intact")
    flux, ae, pipe = Flux(FLUX), AutoEncoder(AE), make_pipe()
    save_file(flux.state_dict(), folder / "flux.safetensors", config=FLUX)
    save_file(ae.state_dict(), folder / "ae.safetensors")
    save_folder(flux.state_dict(), folder / "transformer", config=FLUX, max_shard_bytes=9_000)
    save_folder(ae.state_dict(), folder / "vae", config=AE)
    low = {"lora_A.weight": torch.ones(2, 16), "lora_B.weight": torch.ones(48, 2)}
    save_file({f"double_blocks.0.img_attn.qkv.{k}": v for k, v in low.items()}, folder / "lora.safetensors")
    names = {"clip": "text_encoder", "t5": "text_encoder_2", "flux": "transformer", "ae": "vae"}
    for network, module in pipe.networks().items():
        save_folder(module.state_dict(), folder / "model" / names[network], config=module.config)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizer_folder / name, folder / "model" / name)
    return folder


def with_header(data: bytes, change) -> bytes:
    """A safetensors file with its header's JSON passed through ``change`` (text to text)."""
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def doubled_key(chance, text: str) -> str:
    """A key that occurs twice, which JSON allows and Python ignores."""
    header = json.loads(text)
    key = chance.choice(list(header))
    other = plain_changed(chance, header[key])
    return "{" + json.dumps(key) + ":" + json.dumps(other) + "," + text.strip()[1:]


def damage(chance, path: Path) -> None:
    """Change one file of a checkpoint."""
    data = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.8:
        data = json.dumps(plain_changed(chance, json.loads(data))).encode()
    elif path.suffix == ".safetensors" and (kind := chance.random()) < 0.6:
        data = with_header(data, lambda text: json.dumps(plain_changed(chance, json.loads(text))))
    elif path.suffix == ".safetensors" and kind < 0.7:
        data = with_header(data, lambda text: doubled_key(chance, text))
    else:
        data = bytes_changed(chance, data)
    path.write_bytes(data)


def use_everything(path: Path, out: Path, chance) -> None:
    """Everything that can be done with a checkpoint."""
    tensors = read(path)
    config_of(tensors)
    module = load_model(path)
    assert all(p.device.type == "cpu" for p in module.parameters()), "loaded, but still on the meta device"
    convert_file(path, out / "new.safetensors", to="bfl", overwrite=True)
    convert_file(path, out / "new", to="diffusers", overwrite=True, shard_bytes=chance.choice((1, 9_000, 10**9)))
    if isinstance(module, Flux):
        merge(module, tensors)


@pytest.fixture
def folders(tmp_path):
    """A folder with files to damage and one to write to, inside a folder that is checked afterwards."""
    for name in ("in", "out"):
        (tmp_path / "inside" / name).mkdir(parents=True)
    yield tmp_path / "inside"
    assert [p.name for p in tmp_path.iterdir()] == ["inside"], "something was written outside"


def fresh_copy(folders: Path, intact: Path, name: str) -> Path:
    shutil.rmtree(folders / "in")
    (folders / "in").mkdir()
    source, target = intact / name, folders / "in" / name
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return target


@pytest.mark.parametrize(
    ("name", "share"), [("flux.safetensors", 0.15), ("ae.safetensors", 0.08), ("transformer", 0.12), ("vae", 0.06)]
)
def test_checkpoints(intact, folders, name, share):
    def case(chance):
        path = fresh_copy(folders, intact, name)
        damage(chance, chance.choice([p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]))
        use_everything(path, folders / "out", chance)

    fuzz(f"checkpoints {name}", share, case, folders)


def test_loras(intact, folders):
    flux = Flux(FLUX)

    def case(chance):
        path = fresh_copy(folders, intact, "lora.safetensors")
        damage(chance, path)
        merge(flux, read(path), scale=chance.choice((0.5, 1.0, -1.0))).unmerge()

    fuzz("loras", 0.05, case, folders)


def test_whole_models(intact, folders):
    def case(chance):
        path = fresh_copy(folders, intact, "model")
        damage(chance, chance.choice(sorted(p for p in path.rglob("*") if p.is_file())))
        fe.load(path)("a red circle", steps=1, height=16, width=16, progress=False)

    fuzz("models", 0.06, case, folders)
