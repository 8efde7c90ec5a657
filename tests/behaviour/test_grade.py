"""Grading notebooks that misbehave: each is stopped at its limits, and no other mark suffers."""

import time

import nbformat
import pytest

from fluxedu.course.exercise import all_exercises
from fluxedu.course.grade import grade_notebook, read_verdicts

STUBBORN = """
import time
while True:
    try:
        time.sleep(1)
    except KeyboardInterrupt:
        pass
"""
NONSENSE = """
import os
lines = 'nonsense\\n["name"]\\n{"name": "rope.ids", "passed": true}\\n'
for folder in (".", os.environ.get("TMPDIR", "/tmp")):
    open(os.path.join(folder, "verdicts.jsonl"), "w").write(lines)
"""
HUNGRY = """
import torch
try:
    torch.empty(20_000_000_000, dtype=torch.uint8)
    had = True
except RuntimeError:
    had = False
"""


def submitted(folder, first):
    """A notebook with a cell of the student's own, followed by one solved exercise."""
    cell = nbformat.v4.new_code_cell(all_exercises()["rope.ids"].solution_code)
    cell.metadata["fluxedu"] = {"exercise": "rope.ids", "role": "answer"}
    imports = nbformat.v4.new_code_cell("import torch\nfrom torch import Tensor")
    folder.mkdir()
    nbformat.write(
        nbformat.v4.new_notebook(cells=[imports, nbformat.v4.new_code_cell(first), cell]), folder / "own.ipynb"
    )
    return folder / "own.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{"timeout": 2}, {"timeout": 100, "notebook_timeout": 12}])
def test_a_cell_that_ignores_its_interrupt_is_killed(tmp_path, limits):
    started = time.monotonic()
    (mark,) = grade_notebook(submitted(tmp_path / "eve", STUBBORN), **limits)
    assert time.monotonic() - started < 60
    assert not mark.passed and "it was not reached" in mark.message


@pytest.mark.slow
def test_a_student_cannot_write_verdicts(tmp_path):
    (mark,) = grade_notebook(submitted(tmp_path / "eve", NONSENSE))
    assert mark.passed and mark.message == "right in 3 cases."  # the check's own verdict on a right answer


@pytest.mark.slow
def test_the_memory_limit_is_enforced(tmp_path):
    pytest.importorskip("resource")
    path = submitted(tmp_path / "eve", HUNGRY)
    notebook = nbformat.read(path, 4)
    notebook.cells[2].source = f"if had: raise SystemExit\n{notebook.cells[2].source}"
    nbformat.write(notebook, path)
    (mark,) = grade_notebook(path, memory=8)
    assert mark.passed


def test_lines_that_no_check_wrote_are_ignored(tmp_path):
    lines = ["nonsense", '["name"]', '{"name": "a"}', '{"name": "b", "passed": true, "message": "right."}', ""]
    (tmp_path / "v").write_text("\n".join(lines))
    assert read_verdicts(tmp_path / "v") == {"b": {"passed": True, "message": "right."}}
    assert read_verdicts(tmp_path / "none") == {}
