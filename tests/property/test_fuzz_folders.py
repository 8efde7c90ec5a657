"""Damaged folders of sweeps, recordings and training end in a one-line error, and never pass for complete ones."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import fuzz, plain_changed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fuzz_files import damage
from torch import nn

import fluxedu as fe
from fluxedu.instruments.recording import open_recording
from fluxedu.sweep import from_dict, open_sweep, run, run_sweep
from training.loop import Recipe, Run

SWEEP = from_dict(
    {
        "prompts": ["a red circle"], "seeds": [0, 1, 2], "settings": {"steps": 1, "height": 32, "width": 32},
        "shard": 1, "record": [{"sites": "double.0.attn.map", "reduce": "head-mean"}],
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def intact(make_pipe, tmp_path_factory):
    """A finished sweep, a recording of two images and a training in the middle."""
    folder = tmp_path_factory.mktemp("intact")
    run_sweep(SWEEP, folder / "sweep")
    with fe.record("vec", "double.*.attn.map", to=folder / "recording"):
        make_pipe()(["a red circle", "a star"], steps=2, height=32, width=32, progress=False)
    train(folder / "training", 3)
    return folder


def train(folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    run = Run("toy", model, Recipe(steps=5, lr=0.01, batch=4, warmup=2, muon=True), folder)
    for _ in range(run.step, steps):
        run._one_step(lambda step: (model(torch.ones(4, 6)).square().mean(), {}))
    run.save()


def damaged_somehow(chance, path: Path) -> None:
    """Another thing in the place of a file, other bytes, other JSON, or other JSON in a tensor file's metadata."""
    match chance.randrange(8):
        case 0:
            path.unlink()
            folder, nothing = path.parent, path.parent / "nothing"
            make = [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(nothing), lambda path: path.symlink_to(folder)]
            chance.choice(make)(path)
        case 1:
            path.unlink()
        case 2:
            path.write_bytes(chance.choice((b"", b"\0", b"[" * 100_000, b"{}", b"null", chance.randbytes(2000))))
        case 3 | 4 | 5 if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            name = chance.choice(sorted(metadata))
            try:
                metadata[name] = json.dumps(plain_changed(chance, json.loads(metadata[name])))
            except ValueError:  # not JSON
                metadata[name] = chance.choice(("", "-1", "nan", "1e999", "x", "9" * 5000))
            if chance.random() < 0.2:
                del metadata[name]
            save_file(
                load_file(path), path, {key: text.encode("utf-8", "replace").decode() for key, text in metadata.items()}
            )
        case _:
            damage(chance, path)


def use_sweep(folder: Path) -> bool:
    """Whether it passes for a complete one. What a second run does with it comes first, without the drawing."""
    try:
        results = open_sweep(folder)
        whole = results.damaged() == []
        for number in range(len(results)):
            for value in results[number].values():
                np.asarray(value)
    finally:
        environment = json.loads((folder.parent.parent / "environment.json").read_text())
        run.begin(SWEEP, folder, environment)
        run.finish(SWEEP, folder)
    return whole


def use_recording(folder: Path) -> bool:
    recording = open_recording(folder)
    for name in recording:
        recording.dataset(name)[0]
        [np.asarray(value) for _, value in recording.entries(name)]
        np.asarray(recording[name])
    return False  # its last steps may be missing


def use_training(folder: Path) -> bool:
    try:
        train(folder, 5)
    except FloatingPointError as error:
        assert str(error).endswith("use a lower learning rate.")
    return False


@pytest.mark.parametrize("name", ["sweep", "recording", "training"])
def test_damaged_folders(intact, tmp_path, name):
    use = {"sweep": use_sweep, "recording": use_recording, "training": use_training}[name]
    bytes_of = {path.name: path.read_bytes() for path in intact.glob("sweep/shards/*")}
    environment = json.loads((intact / "sweep" / "sweep.json").read_text())["environment"]
    (tmp_path / "environment.json").write_text(json.dumps(environment))

    def case(chance):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        folder = Path(shutil.copytree(intact / name, tmp_path / "in" / name))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in chance.sample(files, chance.choice((1, 1, min(2, len(files))))):
            damaged_somehow(chance, path)
        try:
            complete = use(folder)
        except OSError as error:
            raise AssertionError("the system's own error") from error
        if complete:
            assert {path.name: path.read_bytes() for path in folder.glob("shards/*")} == bytes_of

    fuzz(f"folders {name}", 0.1, case, tmp_path)
