"""Marking: run a student's notebook and check what it defines, exercise by exercise.

The notebook runs in a process of its own, with limits of time and of memory; what goes on past them is killed. That is
no sandbox: it may do whatever the person who runs it may do, so mark strangers' notebooks in a container.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell

from fluxedu.checkpoints.save import write_text
from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.course.files import shipped
from fluxedu.errors import CourseError

GRACE = 5  # seconds that a cell has to end once it was interrupted
FIRST = """
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({bytes}, {bytes}))
except (ImportError, ValueError, OSError):  # a system without it
    pass
"""
LAST = """
import os
os.environ["FLUXEDU_VERDICTS"] = {file!r}
from fluxedu.course.check import check as _check
for _name, _object in {wanted!r}:
    _check(_name, globals().get(_object))
"""


@dataclass(frozen=True)
class Mark:
    """One exercise of one student, of the ``notebook`` by its file's name: ``passed`` and the sentence."""

    student: str
    notebook: str
    exercise: str
    passed: bool
    says: str


def exercises_in(notebook: nbformat.NotebookNode) -> list[Exercise]:
    """The exercises whose cells a notebook has, in order."""
    told = (cell.metadata.get("fluxedu", {}) for cell in notebook.cells)
    names = [m["exercise"] for m in told if m.get("role") == "answer"]
    return [all_exercises()[name] for name in dict.fromkeys(names) if name in all_exercises()]


def wanted_of(path: Path, notebook: nbformat.NotebookNode) -> list[Exercise]:
    """What is to be marked: the exercises of the shipped notebook of that name, else those whose cells are left."""
    original = shipped() / path.name
    return exercises_in(nbformat.read(original, 4)) if original.exists() else exercises_in(notebook)


@contextmanager
def watched(client, cell: float, whole: float):
    """Kill the kernel of a cell that does not end when interrupted, and of a notebook that takes longer than ``whole``.

    nbclient interrupts a cell, and waits for ever for one that will not be interrupted.
    """
    until, ended = {"whole": time.monotonic() + whole}, threading.Event()
    client.on_cell_execute = lambda **_: until.update(cell=time.monotonic() + cell + GRACE)
    client.on_cell_executed = lambda **_: until.pop("cell", None)

    def look() -> None:
        while not ended.wait(0.2):
            if time.monotonic() > min(list(until.values())) and client.km is not None:
                client.km.provisioner.process.kill()
                return

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def graded(path: Path, timeout: int = 120, whole: int = 900, memory: int = 16) -> list[Mark]:
    """Run one notebook and mark it; a cell that fails or takes longer than ``timeout`` seconds does not stop the rest.

    One that will not be interrupted does, as does a notebook that takes longer than ``whole`` seconds. ``memory``: GB
    of addresses it may have, where the system can limit them. Raises CourseError for what is no notebook or has no
    exercise.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    try:
        notebook = nbformat.read(path, 4)
    except FileNotFoundError:
        raise CourseError(f"there is no notebook {path}.") from None
    except Exception:  # noqa: BLE001 - whatever is wrong with the file
        raise CourseError(f"{path} is no notebook that can be read.") from None
    wanted = wanted_of(path, notebook)
    if not wanted:
        raise CourseError(f"{path} has no exercise of this course.")
    student = str(path.parent.name or path.stem)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as apart:
        file = Path(apart) / "verdicts.jsonl"
        first = FIRST.format(bytes=memory * 10**9)
        last = LAST.format(file=str(file), wanted=[(task.name, task.object) for task in wanted])
        cells = [c for c in notebook.cells if c.cell_type == "code"]
        notebook.cells = [new_code_cell(first), *cells, new_code_cell(last)]
        client = NotebookClient(
            notebook, timeout=timeout, allow_errors=True, interrupt_on_timeout=True,
            resources={"metadata": {"path": folder}},
        )  # fmt: skip
        ended = "it was not reached: the notebook did not run to its end."
        try:
            with watched(client, timeout, whole):
                client.execute(env=os.environ | {"MPLBACKEND": "agg"})
        except (CellTimeoutError, DeadKernelError) as error:
            ended = f"it was not reached: {type(error).__name__}."
        said = verdicts(file)
    missing = {"passed": False, "says": ended}
    return [Mark(student, path.name, task.name, **said.get(task.name, missing)) for task in wanted]


def verdicts(file: Path) -> dict[str, dict]:
    """What the checks said, by exercise; lines that are none of theirs are left out."""
    said = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            told = json.loads(line)
            said[str(told["name"])] = {"passed": bool(told["passed"]), "says": str(told["says"])}
        except (ValueError, KeyError, TypeError):
            continue
    return said


def table(marks: Iterable[Mark]) -> list[list[str]]:
    """A row a student, after a row of heads: 1 or 0 an exercise (empty: not handed in), and how many passed."""
    of: dict[str, dict[str, int]] = {}
    for mark in marks:
        of.setdefault(mark.student, {})[mark.exercise] = int(mark.passed)
    exercises = list(dict.fromkeys(exercise for each in of.values() for exercise in each))
    rows = [[name, *(str(each.get(e, "")) for e in exercises), str(sum(each.values()))] for name, each in of.items()]
    return [["student", *exercises, "passed"], *sorted(rows)]


def write_csv(marks: Iterable[Mark], path: Path) -> None:
    """A line a student and exercise."""
    rows = [[m.student, m.notebook, m.exercise, int(m.passed), m.says] for m in marks]
    write_text(path, as_csv([["student", "notebook", "exercise", "passed", "says"], *rows]))


def as_csv(rows: Iterable[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
