"""Marking notebooks that do not mean well: each ends within its limits and costs nobody else a mark."""

import time

import nbformat
import pytest

from fluxedu.course.exercise import all_exercises
from fluxedu.course.grade import graded, verdicts

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


def handed_in(folder, first):
    """A notebook of one solved exercise, after a cell of the student's own."""
    cell = nbformat.v4.new_code_cell(all_exercises()["rope.ids"].solved)
    cell.metadata["fluxedu"] = {"exercise": "rope.ids", "role": "answer"}
    imports = nbformat.v4.new_code_cell("import torch\nfrom torch import Tensor")
    folder.mkdir()
    nbformat.write(
        nbformat.v4.new_notebook(cells=[imports, nbformat.v4.new_code_cell(first), cell]), folder / "own.ipynb"
    )
    return folder / "own.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{"timeout": 2}, {"timeout": 100, "whole": 12}])
def test_a_cell_that_will_not_be_interrupted_is_killed(tmp_path, limits):
    started = time.monotonic()
    (mark,) = graded(handed_in(tmp_path / "eve", STUBBORN), **limits)
    assert time.monotonic() - started < 60
    assert not mark.passed and "it was not reached" in mark.says


@pytest.mark.slow
def test_a_student_does_not_write_the_verdicts(tmp_path):
    (mark,) = graded(handed_in(tmp_path / "eve", NONSENSE))
    assert mark.passed and mark.says == "right in 3 cases."  # what the check said, of an answer that is right


@pytest.mark.slow
def test_more_memory_than_allowed_is_not_given(tmp_path):
    pytest.importorskip("resource")
    path = handed_in(tmp_path / "eve", HUNGRY)
    notebook = nbformat.read(path, 4)
    notebook.cells[2].source = f"if had: raise SystemExit\n{notebook.cells[2].source}"
    nbformat.write(notebook, path)
    (mark,) = graded(path, memory=8)
    assert mark.passed


def test_lines_that_no_check_wrote_are_left_out(tmp_path):
    lines = ["nonsense", '["name"]', '{"name": "a"}', '{"name": "b", "passed": true, "says": "right."}', ""]
    (tmp_path / "v").write_text("\n".join(lines))
    assert verdicts(tmp_path / "v") == {"b": {"passed": True, "says": "right."}}
    assert verdicts(tmp_path / "none") == {}
