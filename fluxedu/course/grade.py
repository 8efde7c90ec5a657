"""Grading: run students' notebooks and check the answers that they define.

A notebook runs in its own process, which is killed if it exceeds its limits of time or memory. It is not a sandbox: its
code has all rights of the user who runs it, so grade strangers' notebooks in a container.
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

from fluxedu.course.build import notebooks_folder
from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.errors import CourseError
from fluxedu.files import write_text

GRACE = 5  # seconds that a cell has to stop after an interrupt
#: runs before the student's cells; on a system without memory limits it does nothing
FIRST_CELL = """
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({bytes}, {bytes}))
except (ImportError, ValueError, OSError):
    pass
"""
#: runs after the student's cells and checks what they have defined
LAST_CELL = """
import os
os.environ["FLUXEDU_VERDICTS"] = {file!r}
from fluxedu.course.check import check as _check
for _name, _answer in {exercises!r}:
    _check(_name, globals().get(_answer))
"""


@dataclass(frozen=True)
class Mark:
    """The result of one exercise in one student's notebook; ``message`` is the check's sentence."""

    student: str
    notebook: str
    exercise: str
    passed: bool
    message: str


def exercises_in(notebook: nbformat.NotebookNode) -> list[Exercise]:
    """The exercises that a notebook has answer cells for, in order."""
    metadata = (cell.metadata.get("fluxedu", {}) for cell in notebook.cells)
    names = [m["exercise"] for m in metadata if m.get("role") == "answer"]
    return [all_exercises()[name] for name in dict.fromkeys(names) if name in all_exercises()]


@contextmanager
def time_limits(client, cell: float, notebook: float):
    """Kill the kernel if a cell ignores its interrupt, or if the notebook takes longer than ``notebook`` seconds.

    nbclient interrupts a cell after ``cell`` seconds, but would wait forever for one that ignores this.
    """
    started, finished = time.monotonic(), threading.Event()
    cell_deadline = float("inf")

    def cell_begins(**_) -> None:
        nonlocal cell_deadline
        cell_deadline = time.monotonic() + cell + GRACE

    def cell_ends(**_) -> None:
        nonlocal cell_deadline
        cell_deadline = float("inf")

    def watch() -> None:
        while not finished.wait(0.2):
            if time.monotonic() > min(started + notebook, cell_deadline) and client.km is not None:
                client.km.provisioner.process.kill()
                return

    client.on_cell_execute, client.on_cell_executed = cell_begins, cell_ends
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def grade_notebook(path: Path, timeout: int = 120, notebook_timeout: int = 900, memory: int = 16) -> list[Mark]:
    """Run one notebook and check its exercises: those of the course's notebook of that name, else its answer cells'.

    A cell that raises, or is interrupted after ``timeout`` seconds, does not stop the rest; a cell that ignores the
    interrupt does, and so does the end of ``notebook_timeout`` seconds. ``memory`` is the limit of the address space in
    GB, where the system supports one. Raises CourseError if the file is no notebook or has no exercise.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    try:
        notebook = nbformat.read(path, 4)
    except FileNotFoundError:
        raise CourseError(f"there is no notebook {path}.") from None
    except Exception:  # noqa: BLE001 - whatever is wrong with the file
        raise CourseError(f"{path} is no notebook that can be read.") from None
    original = notebooks_folder() / path.name
    exercises = exercises_in(nbformat.read(original, 4) if original.exists() else notebook)
    if not exercises:
        raise CourseError(f"{path} has no exercise of this course.")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as private:
        file = Path(private) / "verdicts.jsonl"
        first = FIRST_CELL.format(bytes=memory * 10**9)
        last = LAST_CELL.format(file=str(file), exercises=[(task.name, task.answer_name) for task in exercises])
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        notebook.cells = [new_code_cell(first), *cells, new_code_cell(last)]
        where = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook, timeout=timeout, allow_errors=True, interrupt_on_timeout=True, resources=where
        )
        reason = "it was not reached, because the notebook did not run to its end."
        try:
            with time_limits(client, timeout, notebook_timeout):
                client.execute(env=os.environ | {"MPLBACKEND": "agg"})
        except (CellTimeoutError, DeadKernelError) as error:
            reason = f"it was not reached, because of a {type(error).__name__}."
        verdicts = read_verdicts(file)
    student = str(path.parent.name or path.stem)
    not_reached = {"passed": False, "message": reason}
    return [Mark(student, path.name, task.name, **verdicts.get(task.name, not_reached)) for task in exercises]


def read_verdicts(file: Path) -> dict[str, dict]:
    """The verdicts that the checks have written, by exercise; lines of any other form are ignored."""
    verdicts = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
            verdicts[str(entry["name"])] = {"passed": bool(entry["passed"]), "message": str(entry["message"])}
        except (ValueError, KeyError, TypeError):
            continue
    return verdicts


def class_table(marks: Iterable[Mark]) -> list[list[str]]:
    """A header, then one row per student: 1 or 0 for each exercise (empty if not handed in), and the number passed."""
    results: dict[str, dict[str, int]] = {}
    for mark in marks:
        results.setdefault(mark.student, {})[mark.exercise] = int(mark.passed)
    exercises = list(dict.fromkeys(exercise for result in results.values() for exercise in result))
    rows = []
    for student, result in sorted(results.items()):
        rows.append([student, *(str(result.get(exercise, "")) for exercise in exercises), str(sum(result.values()))])
    return [["student", *exercises, "passed"], *rows]


def write_csv(marks: Iterable[Mark], path: Path) -> None:
    """Write one line per student and exercise."""
    rows = [[m.student, m.notebook, m.exercise, int(m.passed), m.message] for m in marks]
    write_text(path, as_csv([["student", "notebook", "exercise", "passed", "message"], *rows]))


def as_csv(rows: Iterable[list]) -> str:
    """Rows as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
