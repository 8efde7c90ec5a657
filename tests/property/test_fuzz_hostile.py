"""What an outsider can hand over in the place of a file, a header, a picture or a description ends in a sentence."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from fuzzing import CASES, SEED, bytes_changed, fuzz, guarded, is_a_sentence
from hostile import DEEP, NAMES, THINGS, forged, pictures, put
from PIL import Image
from test_fuzz_files import FLUX, fresh_copy, intact  # noqa: F401  (a fixture)

import fluxedu as fe
from fluxedu.checkpoints import convert_file, load_model, merge, read
from fluxedu.checkpoints.lora_files import read_lora
from fluxedu.instruments import open_recording
from fluxedu.models import Flux
from fluxedu.sampling.images import edges, open_picture, to_mask, to_tensor
from fluxedu.sweep import open_sweep, read_config

PICTURES = pictures()


def ends_well(case, folder: Path, what: str) -> None:
    """A result or a sentence, in time, with nothing written elsewhere."""
    try:
        with guarded(folder):
            case()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        assert is_a_sentence(error), f"{what}: {error!r}"


def draw(path: Path) -> None:
    fe.load(path)("a red circle", steps=1, height=16, width=16, progress=False)


def merge_into(path: Path) -> None:
    merge(Flux(FLUX), read_lora(path)).unmerge()


#: what is opened, which of its files is replaced, and how it is opened
TARGETS = {
    "a checkpoint": ("flux.safetensors", "", load_model),
    "a file to convert": ("flux.safetensors", "", lambda path: convert_file(path, path.parent / "n", "diffusers")),
    "a folder's shard": ("transformer", "diffusion_pytorch_model-00001-of-*.safetensors", load_model),
    "a folder's index": ("transformer", "*.index.json", load_model),
    "a folder's config": ("transformer", "config.json", load_model),
    "a LoRA": ("lora.safetensors", "", merge_into),
    "a LoRA to load": ("lora.safetensors", "", lambda path: fe.load("nano", lora=path)),
    "a model's weights": ("model", "vae/*.safetensors", draw),
    "a model's config": ("model", "text_encoder/config.json", draw),
    "a model's tokenizer": ("model", "tokenizer/tokenizer.json", draw),
    "a model's other tokenizer": ("model", "tokenizer_2/tokenizer.json", draw),
    "a model": ("flux.safetensors", "", draw),
    "a description of a sweep": ("flux.safetensors", "", read_config),
    "a sweep": ("flux.safetensors", "", open_sweep),
    "a recording": ("flux.safetensors", "", open_recording),
    "a picture": ("flux.safetensors", "", lambda path: to_tensor(open_picture(path))),
    "a picture with edges": ("flux.safetensors", "", edges),
}  # fmt: skip


def some_things(seconds: float) -> list[str]:
    """The things to try where each takes so long: all of them if there are many cases."""
    return random.Random(SEED).sample(sorted(THINGS), min(len(THINGS), max(3, int(CASES / 200 / seconds))))


@pytest.mark.parametrize("target", TARGETS)
def test_another_thing_in_the_place_of_a_file(intact, tmp_path, monkeypatch, target):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    name, pattern, use = TARGETS[target]
    for thing in some_things(0.4 if use is draw or "to load" in target else 0.03):
        path = fresh_copy(tmp_path, intact, name)
        put(thing, next(iter(sorted(path.glob(pattern)))) if pattern else path)
        ends_well(lambda path=path: use(path), tmp_path, f"{thing} in the place of {target}")


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "model_index.json", "adapter_config.json"])
def test_another_thing_beside_the_files(intact, tmp_path, monkeypatch, name):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for thing in some_things(0.5):
        path = fresh_copy(tmp_path, intact, "model")
        lora = shutil.copy(intact / "lora.safetensors", path / "adapter_model.safetensors")
        (path / name).parent.mkdir(exist_ok=True)
        put(thing, path / name)
        what = f"{thing} called {name}"
        ends_well(lambda path=path: draw(path), tmp_path, what)
        ends_well(lambda lora=lora: merge_into(lora), tmp_path, what)


def test_forged_headers(intact, tmp_path):  # noqa: F811
    flux = Flux(FLUX)

    def case(chance):
        name, data = chance.choice(
            [(name, (intact / name).read_bytes()) for name in ("flux.safetensors", "lora.safetensors")]
        )
        path = tmp_path / name
        path.write_bytes(forged(chance, data))
        if name.startswith("flux"):
            load_model(path)
        else:
            merge(flux, read_lora(path)).unmerge()

    fuzz("forged", 0.1, case, tmp_path)


INDICES = [
    {}, "x", 3, None, [], {"metadata": DEEP},
    *({"weight_map": value} for value in
      ({}, [], None, {"a": None}, {"a": 3}, [["a", "b"]], {"a": {"b": "c"}}, "x.safetensors", dict.fromkeys(NAMES))),
    *({"weight_map": {"img_in.weight": shard}} for shard in
      ("../flux.safetensors", "/dev/zero", "/etc/passwd", ".", "..", "", "\x00", "a" * 5000, "~", "*", "config.json",
       "diffusion_pytorch_model.safetensors.index.json", "a/../b", "file:///dev/zero", "\ud800", "CON", "a\nb")),
    *({"weight_map": {name: "diffusion_pytorch_model-00001-of-00002.safetensors"}} for name in NAMES),
]  # fmt: skip


def test_indices_of_shards(intact, tmp_path):  # noqa: F811
    (tmp_path / "in").mkdir()
    path = fresh_copy(tmp_path, intact, "transformer")
    for number, index in enumerate(INDICES):
        next(path.glob("*.index.json")).write_text(json.dumps(index))
        ends_well(lambda: load_model(path), tmp_path, f"index {number}")
        ends_well(lambda: read(next(path.glob("*.index.json"))), tmp_path, f"index {number}")


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("ignore")
def test_odd_pictures(tmp_path, name):
    path = tmp_path / "a.png"
    path.write_bytes(PICTURES[name])

    def use():
        picture = open_picture(path)
        assert np.asarray(to_tensor(picture)).shape[:2] == (1, 3)
        to_mask(picture)
        edges(path)

    ends_well(use, tmp_path, name)
    try:
        picture = Image.open(path)  # as somebody may do it, without reading the pixels
    except Exception:
        return
    if picture.width * picture.height < 10**7:
        ends_well(lambda: to_tensor(picture), tmp_path, name)
        ends_well(lambda: to_mask(picture), tmp_path, name)


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures(tmp_path):
    sound = [data for name, data in PICTURES.items() if "bomb" not in name]

    def case(chance):
        path = tmp_path / "a.tiff"
        path.write_bytes(bytes_changed(chance, chance.choice(sound)))
        picture = open_picture(path)
        to_tensor(picture)
        to_mask(picture)

    fuzz("pictures", 0.2, case, tmp_path)


TEXTS = [
    "prompts: [a]\nprompts: [b]", "a: &a [x, x]\nprompts: [*a, *a]", "prompts: !!python/object/apply:os.system [ls]",
    "prompts:\n\t- a", "- prompts", "prompts: a: b", "? [a]\n: b", "prompts: [a", "prompts: {a, b}",
    "%YAML 9.9\n---\na: b", "---\na: 1\n---\nb: 2", "prompts: !!binary aGk=", "prompts: 2001-01-01",
    "seeds: 0x7fffffffffffffff\nprompts: [a]", "seeds: 1_000\nprompts: [a]", "seeds: 1:30\nprompts: [a]",
    "prompts: .nan", "prompts: [.inf]", "prompts: ~", "1: 2", "~: 1", "prompts: !!set {a, b}",
    "prompts: !!omap [a: 1]", "<<: {prompts: [a]}", "prompts: [a]\n<<: [1, 2]", "'\\x00': 1", "\x00",
    'prompts: ["\\ud800"]', "prompts: ['\x1b[2J']", "\ufeffprompts: [a]", "prompts: |\n a\n", "prompts: >+\n\n\n",
    "prompts: []", "prompts: [[a]]", "prompts: [1]", "prompts: [yes]", "yes: no",
    "prompts: [a]\nseeds: {from: -1, count: 1}", "prompts: [a]\nseeds: {from: 0, count: 999999999}",
    "prompts: [a]\nshard: 0", "prompts: [a]\nsettings: [1]", "{" * 5000, "prompts: [a]\nsettings: {steps: 1e3}",
    "prompts: [a]\nmodel: /dev/zero", "prompts: [a]\nmodel: ''", "[" * 100_000, "a" * 9**6,
    "prompts: [a]\nlens: {word_maps: {words: !!float 3}}", "prompts: [a]\nrecord: [{sites: [[]]}]", "- " * 50_000,
    "? " * 20_000, "prompts: [a]\ninterventions: {x: {scale: '*', by: 1e400}}",
    "prompts: [a]\ninterventions: {x: {ablate: 3}}", "&a *a", "*a",
    "prompts: [a]\ninterventions: {x: {patch: '*', from: {prompt: a, seed: 0.5}}}", "!!str", "!", "!<>", "@", "`",
    "%", "\t", "|",
]  # fmt: skip


def test_descriptions_of_sweeps(tmp_path):
    path = tmp_path / "sweep.yaml"
    for text in TEXTS:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        ends_well(lambda: read_config(path), tmp_path, text[:60])
