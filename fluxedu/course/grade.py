"""Grading: run students' notebooks and judge the answers that they define.

A notebook runs in its own process (:mod:`fluxedu.course.kernel`). An answer is called there, also with new random
inputs, and only tensors and sentences come back (:mod:`fluxedu.course.answers`), which are judged here. So a student's
code cannot change a verdict. It can still return right values that are not the student's work: a pasted solution, or
the result of fluxedu's or PyTorch's own function. Marks are flagged if that is seen.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fluxedu
from fluxedu.course.answers import CALL, printable, read_reply
from fluxedu.course.build import NUMBERED, notebook_number, notebooks_folder
from fluxedu.course.check import NOT_WRITTEN, judge
from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.course.kernel import Kernel, Stopped
from fluxedu.errors import CourseError
from fluxedu.files import write_text

MOST_BYTES = 32 << 20  # of a notebook, with its outputs
CHECKED = re.compile(r"""check\(\s*["']([\w.]+)["']""")
SOLUTIONS = re.compile(r"course\.exercises|all_exercises|solution_code|\.solution\b")
FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")  # what a spreadsheet would compute
OF_PACKAGE = "the answer calls fluxedu's own solution."
LOOK = "the notebook mentions fluxedu's solutions, so look at its code"


@dataclass(frozen=True)
class Mark:
    """The result of one exercise in one student's notebook; ``message`` is the sentence of the check.

    ``exercise`` is empty if the notebook could not be run at all. ``flagged`` says that the answer, or another line of
    the notebook, uses fluxedu's own solutions.
    """

    student: str
    notebook: str
    exercise: str
    passed: bool
    message: str
    flagged: bool = False


@dataclass(frozen=True)
class CodeCell:
    """The code of a notebook's cell, and the exercise that it answers according to its metadata, or an empty text."""

    source: str
    exercise: str


def read_cells(path: Path) -> list[CodeCell]:
    """The code cells of a notebook of any format; whatever is odd in it is left out.

    Raises CourseError if there is no such file, or if it is no notebook.
    """
    name = printable(str(path))
    try:
        if path.is_symlink():
            raise CourseError(f"{name} is a link, perhaps to another student's notebook; grade the file itself.")
        if not stat.S_ISREG(path.stat().st_mode):
            raise CourseError(f"{name} is not a file.")  # a pipe would be waited for
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise CourseError(f"{name} is larger than {MOST_BYTES >> 20} MB, the limit of a notebook.")
        notebook = json.loads(data)
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]  # format 3
        return [_code_cell(cell) for cell in cells if isinstance(cell, dict) and cell.get("cell_type") == "code"]
    except FileNotFoundError:
        raise CourseError(f"there is no notebook {name}.") from None
    except OSError as error:
        raise CourseError(f"{name} cannot be read: {error.strerror}.") from None
    except CourseError:
        raise
    except Exception:  # noqa: BLE001 - whatever is wrong with the file
        raise CourseError(f"{name} is no notebook that can be read.") from None


def _code_cell(cell: dict) -> CodeCell:
    source = cell.get("source", cell.get("input", ""))
    lines = source if isinstance(source, list) else [source]
    source = "".join(line for line in lines if isinstance(line, str)).encode("utf-8", "replace").decode()
    metadata = cell.get("metadata")
    details = metadata.get("fluxedu") if isinstance(metadata, dict) else None
    name = details.get("exercise") if isinstance(details, dict) and details.get("role") == "answer" else ""
    return CodeCell(source, name if isinstance(name, str) else "")


def exercises_of(path: Path, cells: Sequence[CodeCell]) -> list[Exercise]:
    """The exercises to mark in a student's notebook, which may be a copy of one of the course's.

    The copy is recognised by the exercises in it, and by its name, which may have an addition such as `` (1)``. All
    exercises of the original are marked, also those that the student has deleted, then others that the copy contains.
    """
    known = all_exercises()
    written = [cell.exercise for cell in cells]
    if not any(name in known for name in written):  # a program has removed the metadata
        written = [name for cell in cells for name in CHECKED.findall(cell.source)]
    written = [name for name in dict.fromkeys(written) if name in known]
    most = [number for number, _ in Counter(known[name].notebook for name in written).most_common(1)]
    original = [
        cell
        for file in sorted(notebooks_folder().glob(f"{NUMBERED}.ipynb"))
        if notebook_number(file) in most or file.stem in path.name
        for cell in read_cells(file)
    ]
    names = dict.fromkeys([*(cell.exercise for cell in original if cell.exercise), *written])
    return [known[name] for name in names]


def grade_notebook(
    path: Path, timeout: float = 120, notebook_timeout: float = 900, memory: int = 16, student: str = ""
) -> list[Mark]:
    """Run one notebook and mark its exercises, those of the course's notebook that it is a copy of.

    A cell that raises, or is interrupted after ``timeout`` seconds, does not stop the rest; a cell that ignores the
    interrupt does, and so does the end of ``notebook_timeout`` seconds. ``memory`` is the limit of the address space in
    GB, where the system supports one. ``student`` is by default the name of the folder. Raises CourseError if the file
    is no notebook or has no exercise.
    """
    path = Path(path)
    student = student or students([path])[0][1]
    cells = read_cells(path)
    tasks = exercises_of(path, cells)
    if not tasks:
        raise CourseError(f"{printable(str(path))} has no exercise of this course.")
    suspicious = mentions_solutions(cells)
    marks = []

    def mark(task: Exercise, passed: bool, message: str, flagged: bool = False) -> None:
        if suspicious and passed:
            message, flagged = f"{message.rstrip('.')}; {LOOK}.", True
        marks.append(Mark(student, path.name, task.name, passed, message, flagged))

    try:
        with Kernel(timeout, notebook_timeout, memory) as kernel:
            for number, cell in enumerate(cells, 1):
                kernel.execute(cell.source, f"code cell {number}")
            for task in tasks:
                mark(task, *_judged(task, kernel))
    except Exception as error:  # noqa: BLE001 - one notebook must not end the marking of a class
        reason = error if isinstance(error, Stopped) else printable(f"of an error ({type(error).__name__}: {error})")
        for task in tasks[len(marks) :]:
            mark(task, False, f"not marked, because {reason}.")
    return marks


def _judged(task: Exercise, kernel: Kernel) -> tuple[bool, str, bool]:
    """Whether the answer in a notebook's process is right, the sentence, and whether it is fluxedu's own."""
    salt = secrets.randbelow(10**9) + 1
    notes = list(kernel.notes)
    call = CALL.format(name=task.name, answer=task.answer_name, salts=[0, salt])
    text = kernel.execute(call, f"the call of {task.answer_name}", "_reply")
    if text is None and kernel.notes[len(notes) :]:
        return False, f"{kernel.notes[-1]}.", False
    try:
        of_package, used, (public, *fresh) = read_reply(text or "")
        verdict = judge(task, task.cases(), public)
        again = judge(task, task.fresh_cases(salt), fresh[0] if fresh else []) if verdict else verdict
    except (ValueError, TypeError, RuntimeError, NotImplementedError):  # whatever its process sends
        return False, "the notebook sent no valid result for this answer.", False
    if verdict.message == NOT_WRITTEN and notes:
        return False, f"{NOT_WRITTEN.rstrip('.')}; {'; '.join(notes)}.", False
    if verdict and not again:
        return False, f"it is right for the inputs of the notebook's check, but not for others: {again.message}", False
    if verdict and used:
        return True, f"{verdict.message.rstrip('.')}; it calls {', '.join(used)} of fluxedu, so look at its code.", True
    return (False, OF_PACKAGE, True) if verdict and of_package else (verdict.passed, verdict.message, False)


def mentions_solutions(cells: Iterable[CodeCell]) -> bool:
    """Whether the code names fluxedu's solutions, which no notebook of the course does."""
    return any(SOLUTIONS.search(cell.source) for cell in cells)


# ---------------------------------------------------------------- a class


def fingerprint(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Size and time of change of these files and of fluxedu's own: a notebook's code may change them."""
    files = [*Path(fluxedu.__file__).parent.rglob("*.py"), *paths]
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()}


def marks_of(path: Path, student: str, timeout: float, notebook_timeout: float, memory: int) -> list[Mark]:
    """As :func:`grade_notebook`, but a file that cannot be graded gets marks, of each exercise that its name tells."""
    try:
        return grade_notebook(path, timeout, notebook_timeout, memory, student)
    except CourseError as error:
        tasks = exercises_of(path, []) if os.path.exists(path) else []
        return [Mark(student, path.name, name, False, str(error)) for name in [task.name for task in tasks] or [""]]


def students(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """Each notebook once, with its student: the name of its folder, or as much of its path as tells students apart.

    Notebooks in one folder are of one student if they have the names of the course's notebooks; otherwise the file
    names tell the students apart.
    """
    places: dict[str, Path] = {}
    for path in paths:
        places.setdefault(os.path.abspath(path), Path(path))
    original = {path.name for path in notebooks_folder().glob(f"{NUMBERED}.ipynb")}
    folders = Counter(path.parent for path in places.values())
    wholes = []
    for path in places.values():
        whole = Path(os.path.abspath(path))
        by_file = path.parent == Path() or (folders[path.parent] > 1 and path.name not in original)
        wholes.append(whole.with_suffix("") if path.parent == Path() else whole if by_file else whole.parent)
    names = {}
    for whole, path in zip(wholes, places.values(), strict=True):
        length = 2 if whole.name == path.name else 1
        while any(w != whole and w.parts[-length:] == whole.parts[-length:] for w in wholes):
            length += 1
        names[path] = "/".join(whole.parts[-length:]) or path.stem
    return list(names.items())


def class_table(marks: Iterable[Mark]) -> list[list[str]]:
    """A header, then one row per student: 1 or 0 for each exercise (empty if not handed in), and the number passed."""
    results: dict[str, dict[str, int]] = {}
    for mark in marks:
        result = results.setdefault(mark.student, {})
        if mark.exercise:
            result[mark.exercise] = int(mark.passed)
    exercises = list(dict.fromkeys(exercise for result in results.values() for exercise in result))
    rows = []
    for student, result in sorted(results.items()):
        rows.append([student, *(str(result.get(exercise, "")) for exercise in exercises), str(sum(result.values()))])
    return [["student", *exercises, "passed"], *rows]


def write_csv(marks: Iterable[Mark], path: Path) -> None:
    """Write one line per student and exercise."""
    rows = [[m.student, m.notebook, m.exercise, int(m.passed), int(m.flagged), m.message] for m in marks]
    write_text(path, as_csv([["student", "notebook", "exercise", "passed", "flagged", "message"], *rows]))


def store_csv(marks: Iterable[Mark], path: Path) -> str:
    """As :func:`write_csv`, but returns the reason in a sentence if the file cannot be written, else nothing."""
    try:
        write_csv(marks, path)
    except (OSError, ValueError) as error:
        return f"{printable(str(path))} cannot be written: {getattr(error, 'strerror', None) or error}."
    return ""


def summary(marks: Sequence[Mark]) -> str:
    """The marks of one notebook, one line each, for a terminal."""
    first = printable(f"{marks[0].student}: {sum(mark.passed for mark in marks)} of {len(marks)}  {marks[0].notebook}")
    rest = [f"  {'✓' if mark.passed else '✗'} {mark.exercise}: {printable(mark.message)}" for mark in marks]
    return "\n".join([first, *rest])


def as_text(rows: Sequence[Sequence]) -> str:
    """A table with aligned columns, for a terminal."""
    rows = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)


def as_csv(rows: Iterable[list]) -> str:
    """Rows as the text of a CSV file, without control characters, and with an apostrophe before a formula's sign."""
    text = io.StringIO()
    cells = ([printable(str(cell)) for cell in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows([f"'{c}" if FORMULA.match(c) else c for c in row] for row in cells)
    return text.getvalue()
