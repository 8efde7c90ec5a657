"""Two processes use the same files: nothing is lost, nothing is read half-written, and neither of them fails.

Sweeps, votes and the cache of the official weights have tests of their own (test_sweep.py, test_arena_votes.py,
test_official.py).
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

#: a process that executes the code it reads, line by line; ``me`` is its number
LISTENER = """
import json, sys, traceback
import torch
from PIL import Image
from fluxedu.arena.match import Contestant, Gallery
from fluxedu.checkpoints import save_file
from fluxedu.files import write_text
from training.card import add_entry
me = sys.argv[1]
print("ready", flush=True)
for line in sys.stdin:
    code, target = json.loads(line)
    try:
        exec(code)
        print("done", flush=True)
    except BaseException:
        print(json.dumps(traceback.format_exc()), flush=True)
"""


@pytest.fixture(scope="module")
def pair():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[2]}
    both = [subprocess.Popen([sys.executable, "-c", LISTENER, number], **pipes) for number in "01"]
    try:
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        yield both
    finally:
        for process in both:
            process.kill()
            process.wait()


def begin(pair, code: str, target: Path) -> None:
    """Both processes run ``code`` at the same time."""
    for process in pair:
        process.stdin.write(json.dumps([code, str(target)]) + "\n")
        process.stdin.flush()


def end(pair) -> None:
    replies = [process.stdout.readline() for process in pair]
    assert replies == ["done\n"] * 2, "\n".join(json.loads(t) for t in replies if t != "done\n")


def leave_behind(target: Path, count: int = 200) -> None:
    """Leave the files that ``count`` killed writers of ``target`` would have left."""
    for number in range(count):
        (target.parent / f".{target.name}.{number:08d}.part").touch()


def test_one_file_is_written_by_both(pair, tmp_path):
    """At any time a reader sees the complete text of one writer; both delete what killed writers have left."""
    target, seen = tmp_path / "notes.txt", set()
    leave_behind(target)
    begin(pair, 'for n in range(150): write_text(target, f"{me} {n};" * 5_000)', target)
    give_up = time.monotonic() + 60
    while not {"0 149", "1 149"} & seen and time.monotonic() < give_up:
        if target.exists():
            first, *rest = target.read_text().split(";")[:-1]
            assert len(rest) == 4_999 and set(rest) == {first}
            seen.add(first)
    end(pair)
    assert {text.split()[0] for text in seen} == {"0", "1"}, "they did not run at the same time"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_one_checkpoint_is_written_by_both(pair, tmp_path):
    target = tmp_path / "model.safetensors"
    leave_behind(target)
    begin(pair, 'for _ in range(30): save_file({"w": torch.full((9_000,), float(me))}, target, overwrite=True)', target)
    end(pair)
    assert len(set(load_file(target)["w"].tolist())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_both_write_one_new_name(pair, tmp_path, folder, overwrite):
    """Exactly one succeeds, and its result is there; with ``overwrite`` both do, and one result is there."""
    code = f"""
import time
from pathlib import Path
from fluxedu.checkpoints import save_file, save_folder
from fluxedu.errors import CheckpointError
from fluxedu.models import AutoEncoder, AutoEncoderConfig
config = AutoEncoderConfig(ch=4, ch_mult=(1,), num_res_blocks=1, z_channels=2, norm_groups=2)
tensors = {{name: torch.full_like(value, float(me)) for name, value in AutoEncoder(config).state_dict().items()}}
end = time.monotonic() + 60
for n in range(40):
    Path(target, f"ready {{n}} {{me}}").touch()
    while not Path(target, f"ready {{n}} {{1 - int(me)}}").exists():
        assert time.monotonic() < end
    try:
        if {folder}:
            save_folder(tensors, Path(target, f"m{{n}}"), config, overwrite={overwrite})
        else:
            save_file(tensors, Path(target, f"m{{n}}.safetensors"), overwrite={overwrite})
        Path(target, f"won {{n}} {{me}}").touch()
    except CheckpointError as error:
        assert str(error).endswith((
            "was created while this was written; choose another name.",
            "exists already; choose another name, or set overwrite.",
        ))
"""
    begin(pair, code, tmp_path)
    end(pair)
    assert not list(tmp_path.glob(".*"))
    for n in range(40):
        winners = [path.name[-1] for path in tmp_path.glob(f"won {n} *")]
        assert len(winners) == (2 if overwrite else 1)
        (file,) = (tmp_path / f"m{n}").glob("*.safetensors") if folder else [tmp_path / f"m{n}.safetensors"]
        assert {value.unique().item() for value in load_file(file).values()} in [{float(me)} for me in winners]


def test_both_note_their_figures_in_one_file(pair, tmp_path):
    """Two trainings that end at the same time: both members are in the file."""
    begin(pair, 'for n in range(40): add_entry(target, f"{me} {n}", {"figures": {}})', tmp_path)
    end(pair)
    family = json.loads((tmp_path / "family.json").read_text())
    assert set(family) == {f"{me} {n}" for me in "01" for n in range(40)}


def test_a_gallery_is_filled_by_both(pair, tmp_path):
    """The images of an arena in one folder: each is there once, and complete."""
    code = """
draw = lambda prompt, seed, height, width: Image.effect_noise((width, height), seed + 1)
gallery = Gallery([Contestant("a", draw), Contestant("b", draw)], target)
for seed in range(100):
    for name in "ab":
        gallery.image(name, "x", seed, 64, 64)
"""
    begin(pair, code, tmp_path)
    end(pair)
    assert len(list(tmp_path.iterdir())) == 200
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            picture.load()


def test_two_labs_are_opened_in_one_folder(pair, tmp_path):
    begin(
        pair,
        "from fluxedu.course.build import copy_notebooks; from pathlib import Path; copy_notebooks(Path(target))",
        tmp_path,
    )
    end(pair)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 34 and all(json.loads(file.read_text())["cells"] for file in files)
