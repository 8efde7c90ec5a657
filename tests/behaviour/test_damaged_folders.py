"""Damaged folders of sweeps, recordings and training: the damage is found before the folder counts as complete."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fluxedu as fe
from fluxedu.errors import InstrumentError, SweepError
from fluxedu.instruments.recording import open_recording
from fluxedu.sweep import from_dict, open_sweep, run_sweep

SWEEP = from_dict(
    {"prompts": ["a red circle"], "seeds": [0, 1, 2], "settings": {"steps": 1, "height": 32, "width": 32}, "shard": 1}
)
MIDDLE = "shards/00001.safetensors"


def other_keys(path: Path) -> None:
    """The file is in order, but one of its tensors has another name."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({name.replace("latent", "noise") + "x": value for name, value in tensors.items()}, path, metadata)


def in_place(path: Path, make) -> None:
    path.unlink()
    make(path)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in the header": lambda path: os.truncate(path, 100),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(3000)),
    "without metadata": lambda path: save_file(load_file(path), path),
    "other keys": other_keys,
    "another file's": lambda path: shutil.copy(next(p for p in sorted(path.parent.iterdir()) if p != path), path),
    "missing": lambda path: path.unlink(),
}
#: what cannot be opened as a file
THINGS = {
    "a folder": lambda path: in_place(path, Path.mkdir),
    "a link to nothing": lambda path: in_place(path, lambda path: path.symlink_to("nothing")),
    **({"a pipe": lambda path: in_place(path, os.mkfifo)} if hasattr(os, "mkfifo") else {}),
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return run_sweep(SWEEP, tmp_path_factory.mktemp("sweep") / "out")


@pytest.fixture(scope="module")
def recording(make_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording") / "run"
    with fe.record("vec", "single.*.out", to=folder):
        make_pipe()("a red circle", steps=3, height=32, width=32, progress=False)
    return folder


@pytest.fixture
def copied(tmp_path):
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


# ---------------------------------------------------------------- sweeps


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_sweep_redraws_what_is_damaged_and_says_so(sweep, copied, damage, finished):
    folder = copied(sweep)
    before = {path.name: path.read_bytes() for path in folder.glob("shards/*")}
    DAMAGES[damage](folder / MIDDLE)
    if finished:
        assert open_sweep(folder).damaged() == [MIDDLE]
        with pytest.raises(SweepError, match=f"{MIDDLE} is missing or damaged; run the sweep again"):
            open_sweep(folder)[1]
        assert open_sweep(folder)[2].keys() == {"image", "latent"}
    else:
        (folder / "manifest.json").unlink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run_sweep(SWEEP, folder)
    found = [str(warning.message) for warning in said if "damaged files are drawn again" in str(warning.message)]
    assert found == ([] if damage == "missing" else [f"{folder}: damaged files are drawn again: {MIDDLE!r}."])
    assert {path.name: path.read_bytes() for path in folder.glob("shards/*")} == before
    assert open_sweep(folder).damaged() == []


@pytest.mark.parametrize("name", [MIDDLE, "cells.csv", "manifest.json", "sweep.json"])
@pytest.mark.parametrize("thing", THINGS)
def test_a_sweep_refuses_what_is_not_a_file_before_it_draws(sweep, copied, thing, name, monkeypatch):
    folder = copied(sweep)
    THINGS[thing](folder / name)
    try:
        assert name in open_sweep(folder).damaged()
    except SweepError as error:
        assert Path(name).name in str(error)
    if thing == "a link to nothing":
        return
    monkeypatch.setattr("fluxedu.sweep.run.Runner.draw", lambda *_: pytest.fail("it drew first"))
    with pytest.raises(SweepError, match=f"{name} is not a file; delete it, or choose a new folder"):
        run_sweep(SWEEP, folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"files": 1}', '{"files": {}}', '{"files": {"cells.csv": 1}}']
)
def test_a_damaged_manifest_is_named_and_written_anew(sweep, copied, text):
    folder = copied(sweep)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(SweepError, match=r"manifest.json cannot be read, or does not list the files of this sweep"):
        open_sweep(folder)
    run_sweep(SWEEP, folder)
    assert (folder / "manifest.json").read_bytes() == (sweep / "manifest.json").read_bytes()


def test_a_new_table_does_not_certify_changed_values(sweep, copied):
    """One bit of an image is flipped, which no header shows, and the table is written again: the file stays damaged."""
    folder = copied(sweep)
    data = bytearray((folder / MIDDLE).read_bytes())
    data[-1] ^= 1
    (folder / MIDDLE).write_bytes(data)
    (folder / "cells.csv").write_text("x")
    assert open_sweep(folder).damaged() == ["cells.csv", MIDDLE]
    run_sweep(SWEEP, folder)
    assert open_sweep(folder).damaged() == [MIDDLE]


def test_a_sweep_has_no_place(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(SweepError, match=f"the folder {folder} cannot be written to: "):
            run_sweep(SWEEP, folder)
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- recordings


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("damage", [*DAMAGES, *THINGS])
def test_a_recording_with_a_damaged_file_is_not_opened(recording, copied, damage, number):
    folder = copied(recording)
    path = sorted(folder.iterdir())[number]
    {**DAMAGES, **THINGS}[damage](path)
    with pytest.raises(InstrumentError, match=f"{number:06d}-picture-"):
        open_recording(folder)


def test_the_last_steps_may_be_missing(recording, copied):
    """As after a kill: what was completed is opened."""
    folder = copied(recording)
    sorted(folder.iterdir())[-1].unlink()
    assert open_recording(folder)["vec"].shape[0] == 2


def test_a_file_that_is_damaged_after_opening(recording, copied):
    folder = copied(recording)
    opened = open_recording(folder)
    sorted(folder.iterdir())[1].write_bytes(b"x")
    with pytest.raises(InstrumentError, match="000001-.* was damaged or deleted after the recording was opened"):
        opened["vec"]
