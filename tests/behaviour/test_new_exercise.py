"""A new exercise is one new file: the build places it, and students, teachers and checks find it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from fluxedu.course import all_exercises
from fluxedu.course.build import edition
from fluxedu.course.exercise import Exercise
from fluxedu.errors import CourseError

ROOT = Path(__file__).resolve().parents[2]

NEW_FILE = '''"""Notebook 04: one more exercise."""

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes


@exercise(
    "rope.half",
    minutes=3,
    difficulty=1,
    cases=lambda: [(torch.arange(6.0).view(2, 3),)],
    after="## See it",
    hints=("Half a turn is an angle of pi.", "Its cosine is -1 and its sine is 0.", "Return the negative."),
)
def half(x: Tensor) -> Tensor:
    """Rotate every pair of numbers by half a turn."""
    return -x


@mistakes("rope.half", ("none", "you rotate by no angle."), ("twice", "-2 is no rotation."), ("zero", "0 is none."))
def _half_with(mistake, x):
    return {"none": 1, "twice": -2, "zero": 0}[mistake] * x
'''

SOURCE = """# %% [markdown]
# # 04 · A short notebook
#
# ## Build it

# %%
import torch
from torch import Tensor

import fluxedu as fe

# %% exercise="rope.ids"

# %% exercise="rope.angles"

# %% exercise="rope.rotate"

# %% [markdown]
# Look at your rotations.
#
# ## See it

# %%
print("rotate passed:", bool(passed))
"""


def files_below(folder):
    return {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_one_new_file_and_the_build_add_an_exercise(tmp_path):
    shutil.copytree(  # a copy of the package that links to the files of this one
        ROOT / "fluxedu", tmp_path / "fluxedu", copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "notebooks" / "source").mkdir(parents=True)
    (tmp_path / "notebooks" / "source" / "04-short.py").write_text(SOURCE, encoding="utf-8")
    before = files_below(tmp_path)

    (tmp_path / "fluxedu" / "course" / "exercises" / "n04_half.py").write_text(NEW_FILE, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fluxedu.course.build", "notebooks", "04"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)

    built = {Path("notebooks/04-short.ipynb"), Path("notebooks/solved/04-short.ipynb")}
    assert files_below(tmp_path) - before == {Path("fluxedu/course/exercises/n04_half.py"), *built}
    assert (tmp_path / "notebooks" / "source" / "04-short.py").read_text(encoding="utf-8") == SOURCE
    for path, verdict in zip(
        sorted(built), ("○ rope.half: not written yet.", "✓ rope.half: right in 1 case."), strict=True
    ):
        cells = nbformat.read(tmp_path / path, 4).cells
        (heading,) = [i for i, cell in enumerate(cells) if "## See it" in cell.source]
        task, answer, check = cells[heading + 1 : heading + 4]
        assert "### Exercise · `rope.half`" in task.source and "by half a turn" in task.source
        assert answer.metadata["fluxedu"] == {"exercise": "rope.half", "role": "answer"}
        assert check.outputs[0].text.strip() == verdict
        assert cells[-1].outputs[0].text == f"rotate passed: {verdict.startswith('✓')}\n"
        assert check.source == 'fe.check("rope.half", half)'  # the cells below still read the verdict on rope.rotate


def half(x):
    """Rotate every pair of numbers by half a turn."""
    return -x


half.__module__ = "fluxedu.course.exercises.n04_half"


def heads_of(tmp_path, monkeypatch, after):
    """The first lines of the cells of a notebook with a new exercise that stands ``after``."""
    task = Exercise("rope.half", half, 3, 1, ("a", "b", "c"), cases=list, after=after)
    monkeypatch.setitem(all_exercises(), task.name, task)
    (tmp_path / "04-short.py").write_text(SOURCE, encoding="utf-8")
    return [cell.source.partition("\n")[0] for cell in edition(tmp_path / "04-short.py", "student").cells]


@pytest.mark.parametrize(
    "after, above", [("rope.angles", "### Exercise · `rope.angles`"), ("## Build it", "# 04 · A short notebook")]
)
def test_an_exercise_stands_below_a_text_or_another_exercise(tmp_path, monkeypatch, after, above):
    heads = heads_of(tmp_path, monkeypatch, after)
    before = heads[: heads.index("### Exercise · `rope.half`")]
    assert [head for head in before if head.startswith("#")][-1] == above


@pytest.mark.parametrize("after, count", [("", 7), ("## No such heading", 0), ("## ", 2)])
def test_the_place_of_an_exercise_must_be_clear(tmp_path, monkeypatch, after, count):
    with pytest.raises(
        CourseError, match=f"'rope.half' needs as `after` .*, or a text of exactly one cell; .* fits {count} cells"
    ):
        heads_of(tmp_path, monkeypatch, after)
