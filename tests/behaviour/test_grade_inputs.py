"""Grading odd files and odd names: none ends the marking of a class, or reaches the terminal and the spreadsheet.

Nothing here starts a process; `test_grade.py` has what needs one.
"""

import csv
import json
import os
import re
import socket
import time

import pytest
from typer.testing import CliRunner

from fluxedu.cli import app
from fluxedu.course import grade
from fluxedu.course.grade import Mark, as_csv, class_table, exercises_of, grade_notebook, read_cells, students
from fluxedu.errors import CourseError

FORMAT = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}}
CODE = {"cell_type": "code", "metadata": {"fluxedu": {"exercise": "rope.ids", "role": "answer"}}, "source": "x = 1\ny"}


def notebook(*cells, **more):
    return json.dumps(FORMAT | {"cells": cells} | more)


# ---------------------------------------------------------------- files

NOT_READ = {
    "empty": "",
    "not JSON": "{",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "a string": '"x"',
    "text": "# notes",
    "no cells": "{}",
    "cells are null": '{"cells": null}',
    "cells are a number": '{"cells": 3}',
    "HTML": "<html></html>",
    "no worksheets": '{"nbformat": 3, "worksheets": []}',
    "nested": "[" * 200_000,
    "nested cells": '{"cells":' * 50_000,
    "bytes": b"\xff\xfe\xfd\x00\x01",
    "a zip": b"PK\x03\x04" + bytes(99),
    "half": notebook(CODE)[:99],
}
ODD = {
    "an unknown kernel": notebook(CODE, metadata={"kernelspec": {"name": "fortran", "language": "x"}}),
    "a kernel that is text": notebook(CODE, metadata={"kernelspec": "python3"}),
    "metadata is a list": notebook(CODE, metadata=[]),
    "metadata is text": notebook(CODE, metadata="x"),
    "format 3": json.dumps({"nbformat": 3, "worksheets": [{"cells": [CODE | {"input": "x = 1\ny"}]}]}),
    "format 5": notebook(CODE, nbformat=5, nbformat_minor=99),
    "no format": json.dumps({"cells": [CODE]}),
    "a format that is text": notebook(CODE, nbformat="four"),
    "source is a list": notebook(CODE | {"source": ["x = 1\n", "y"]}),
    "source is mixed": notebook(CODE | {"source": ["x = 1\n", None, 3, "y"]}),
    "outputs are odd": notebook(CODE | {"outputs": "x", "execution_count": "seven"}),
    "a byte-order mark": "\ufeff" + notebook(CODE),
    "UTF-16": notebook(CODE).encode("utf-16"),
    "odd cells": notebook(None, 3, "code", [], {}, {"cell_type": ["code"]}, {"cell_type": "raw"}, CODE),
    "NaN": notebook(CODE | {"execution_count": float("nan")}),
}
METADATA = [
    None,
    [],
    "fluxedu",
    3,
    {"fluxedu": None},
    {"fluxedu": []},
    {"fluxedu": "rope.ids"},
    {"fluxedu": {"role": "answer"}},
    {"fluxedu": {"role": ["answer"], "exercise": "rope.ids"}},
    {"fluxedu": {"role": "answer", "exercise": ["rope.ids"]}},
    {"fluxedu": {"role": "answer", "exercise": {}}},
    {"fluxedu": {"role": "answer", "exercise": "no.such"}},
]


def written(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", NOT_READ)
def test_a_file_that_is_no_notebook_is_refused_in_a_sentence(kind, tmp_path):
    with pytest.raises(CourseError, match=r"x\.ipynb is no notebook that can be read\.$"):
        grade_notebook(written(tmp_path / "x.ipynb", NOT_READ[kind]))


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_notebook_is_read(kind, tmp_path):
    (cell,) = read_cells(written(tmp_path / "x.ipynb", ODD[kind]))
    assert cell.source == "x = 1\ny" and cell.exercise == "rope.ids"


@pytest.mark.parametrize("metadata", METADATA, ids=json.dumps)
def test_odd_metadata_names_no_exercise(metadata, tmp_path):
    cells = read_cells(written(tmp_path / "x.ipynb", notebook(CODE | {"metadata": metadata}, {"cell_type": "code"})))
    assert exercises_of(tmp_path / "x.ipynb", cells) == []
    assert cells[1].source == ""


def test_a_surrogate_in_a_source_can_be_sent(tmp_path):
    (cell,) = read_cells(written(tmp_path / "x.ipynb", json.dumps({"cells": [CODE | {"source": "'\ud800'"}]})))
    assert cell.source == "'?'"


def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch):
    """A pipe would be waited for; a device has no end. Nothing of a file beyond the limit is read."""
    os.mkfifo(tmp_path / "pipe.ipynb")
    (tmp_path / "folder.ipynb").mkdir()
    (tmp_path / "circle.ipynb").symlink_to("circle.ipynb")
    (tmp_path / "zero.ipynb").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.ipynb")
    monkeypatch.setattr(grade, "MOST_BYTES", 1 << 20)
    written(tmp_path / "huge.ipynb", notebook(CODE | {"source": "x" * (1 << 20)}))
    written(tmp_path / "secret.ipynb", notebook(CODE))
    opened = type(tmp_path).open
    monkeypatch.setattr(type(tmp_path), "open", lambda path, mode: open_unless_secret(opened, path, mode))
    reasons = {
        "pipe": "is not a file",
        "folder": "is not a file",
        "zero": "is a link, perhaps to another student's notebook; grade the file itself",
        "socket": "is not a file",
        "circle": "is a link, perhaps to another student's notebook; grade the file itself",
        "huge": "is larger than 1 MB, the limit of a notebook",
        "secret": "cannot be read: Permission denied",
        "none": "there is no notebook none.ipynb",
        "x" * 300: "cannot be read: File name too long",
        "\x1b[2Jfolder": "there is no notebook \\x1b[2Jfolder.ipynb",
    }
    started = time.monotonic()
    for name, reason in reasons.items():
        with pytest.raises(CourseError, match=re.escape(reason) + r"\.$"):
            grade_notebook(f"{name}.ipynb")
    assert time.monotonic() - started < 5


def open_unless_secret(opened, path, mode):
    if path.name == "secret.ipynb":  # chmod would not keep out root, as whom tests run in containers
        raise PermissionError(13, "Permission denied")
    return opened(path, mode)


def test_every_failure_is_a_mark_and_the_next_notebook_is_graded(tmp_path, monkeypatch):
    """Whatever raises (here the files and the start of a process), each student has a row with its reason."""
    run = []

    def kernel(*_):
        run.append(1)
        raise (RuntimeError("no\nports"), OSError(28, "No space left on device"), MemoryError())[len(run) - 1]

    monkeypatch.setattr(grade, "Kernel", kernel)
    contents = [notebook(CODE), "{", notebook(CODE), notebook(), notebook(CODE)]
    paths = []
    for i, content in enumerate(contents):
        (tmp_path / f"s{i}").mkdir()
        paths.append(str(written(tmp_path / f"s{i}" / "x.ipynb", content)))
    ran = CliRunner().invoke(app, ["grade", *paths, str(tmp_path / "s1"), "--csv", str(tmp_path / "m.csv")])
    assert ran.exit_code == 0 and "Traceback" not in ran.output
    rows = list(csv.DictReader((tmp_path / "m.csv").open()))
    reasons = {row["student"]: row["message"].rpartition("x.ipynb ")[2] for row in rows}
    assert reasons == {
        "s0": "not marked, because of an error (RuntimeError: no\\nports).",
        "s1": "is no notebook that can be read.",
        "s2": "not marked, because of an error (OSError: [Errno 28] No space left on device).",
        "s3": "has no exercise of this course.",
        "s4": "not marked, because of an error (MemoryError: ).",
        tmp_path.name: f"{tmp_path / 's1'} is not a file.",
    }
    assert {row["passed"] for row in rows} == {"0"}


def test_the_target_may_not_be_a_notebook(tmp_path):
    path = written(tmp_path / "x.ipynb", notebook(CODE))
    ran = CliRunner().invoke(app, ["grade", str(path), "--table", str(tmp_path / "." / "x.ipynb")])
    assert ran.exit_code == 2 and "is one of the notebooks; name another file." in ran.output
    assert path.read_text() == notebook(CODE)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["ada/x.ipynb", "bob/x.ipynb"], ["ada", "bob"]),
        (["one/ada/x.ipynb", "two/ada/x.ipynb"], ["one/ada", "two/ada"]),
        (["one/class/ada/x.ipynb", "two/class/ada/x.ipynb", "bob/x.ipynb"], ["one/class/ada", "two/class/ada", "bob"]),
        (["ada/04-rotary-positions.ipynb", "ada/00-overview.ipynb"], ["ada", "ada/00-overview.ipynb"]),
        (["ada/04-rotary-positions.ipynb", "ada/11-sampling.ipynb"], ["ada", "ada"]),
        (["class/ada.ipynb", "class/bob.ipynb"], ["class/ada.ipynb", "class/bob.ipynb"]),
        (
            ["ada/04-rotary-positions.ipynb", "ada/04-rotary-positions (1).ipynb"],
            ["ada", "ada/04-rotary-positions (1).ipynb"],
        ),
        (["ada.ipynb", "./ada.ipynb", "../{here}/ada.ipynb"], ["ada"]),
        (["ada/x.ipynb", "./ada/../ada/x.ipynb"], ["ada"]),
    ],
)
def test_students_are_told_apart(paths, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = students([path.format(here=tmp_path.name) for path in paths])
    assert [name for _, name in found] == names


COPIES = {
    "homework.ipynb": ["rope.ids"],
    "04-rotary-positions (1).ipynb": [],
    "Copy of 04-rotary-positions.ipynb": [],
    "04-rotary-positions-Copy1.ipynb": [],
    "04-rotary-positions copy.ipynb": ["rope.angles"],
    "5.ipynb": ["rope.rotate"],
}
ROPE = ["rope.ids", "rope.angles", "rope.rotate", "rope.roll"]


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_recognised_and_deleted_exercises_count(name, tmp_path):
    cells = [grade.CodeCell("", exercise) for exercise in COPIES[name]]
    assert [task.name for task in exercises_of(tmp_path / name, cells)] == ROPE


def test_a_copy_without_metadata_is_recognised_by_its_checks(tmp_path):
    cells = [grade.CodeCell("passed = fe.check('rope.angles', angles)", "")]
    assert [task.name for task in exercises_of(tmp_path / "x.ipynb", cells)] == ROPE
    easier = [grade.CodeCell("", "latents.pack")]  # does not replace those of the notebook that the name tells
    names = [task.name for task in exercises_of(tmp_path / "04-rotary-positions.ipynb", easier)]
    assert set(ROPE) < set(names)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        (" =1", "' =1"),
        ("＝1", "'＝1"),
        ("\t=1", "\\t=1"),
        ("\r=1", "\\r=1"),
        ("\n=1", "\\n=1"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\x00b", "a\\x00b"),
        ("\u202egpj", "\\u202egpj"),
        ("\udcff", "\\udcff"),
        ("ok, 'yes'", "ok, 'yes'"),
        ("x" * 999, "x" * 300 + "…"),
    ],
)
def test_no_cell_is_a_formula_or_controls_the_terminal(text, cell):
    assert list(csv.reader(as_csv([["a", text, 1]]).splitlines())) == [["a", cell, "1"]]


def test_names_of_files_do_not_control_the_terminal(tmp_path):
    names = ["=cmd|calc", "\x1b]0;owned\x07", "a\rb", "\u202eb"]
    paths = []
    for name in names:
        (tmp_path / name).mkdir()
        paths.append(str(written(tmp_path / name / "x\x1b[2J.ipynb", "{")))
    ran = CliRunner().invoke(app, ["grade", *paths, "--csv", str(tmp_path / "m.csv")])
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", ran.output + (tmp_path / "m.csv").read_text())
    found = [row["student"] for row in csv.DictReader((tmp_path / "m.csv").open())]
    assert found == ["'=cmd|calc", "\\x1b]0;owned\\x07", "a\\rb", "\\u202eb"]


def test_a_student_whose_notebook_could_not_be_run_is_in_the_table():
    rows = class_table([Mark("ada", "x", "rope.ids", True, ""), Mark("bob", "x", "", False, "no notebook.")])
    assert rows == [["student", "rope.ids", "passed"], ["ada", "1", "1"], ["bob", "", "0"]]


def test_a_mention_of_the_solutions_is_flagged():
    for path in grade.notebooks_folder().glob("*.ipynb"):
        assert not grade.mentions_solutions(read_cells(path))
    for line in ("from fluxedu.course.exercises import n04_rope", "x = all_exercises()", "task.solution(1)"):
        assert grade.mentions_solutions([grade.CodeCell(f"# {line}\nimport torch", "")])
    assert not grade.mentions_solutions([grade.CodeCell("solution = 3\nfe.check('rope.ids', ids)", "")])


def test_a_link_to_another_students_notebook_is_not_graded(tmp_path):
    """Archives keep links. The student whose notebook it is keeps the marks."""
    path = written(tmp_path / "zoe" / "own.ipynb", notebook(CODE))
    (tmp_path / "aaron").mkdir()
    (link := tmp_path / "aaron" / "own.ipynb").symlink_to(path)
    assert [student for _, student in students([link, path])] == ["aaron", "zoe"]
    with pytest.raises(CourseError, match=r"own\.ipynb is a link, perhaps to another student's notebook"):
        read_cells(link)
    (loop := tmp_path / "loop.ipynb").symlink_to("loop.ipynb")
    ran = CliRunner().invoke(app, ["grade", str(loop), "--csv", str(tmp_path / "m.csv")])
    assert ran.exit_code == 2 and "is a link" in ran.output and isinstance(ran.exception, SystemExit)


def fake_marks(monkeypatch, change=lambda path: None):
    """Every notebook gets one mark at once, after ``change(path)``."""

    def marks_of(path, student, *_):
        change(path)
        return [Mark(student, path.name, "rope.ids", True, "right.")]

    monkeypatch.setattr("fluxedu.course.grade.marks_of", marks_of)


def test_a_csv_that_cannot_be_written_does_not_end_the_marking(tmp_path, monkeypatch):
    paths = [str(written(tmp_path / name / "own.ipynb", notebook(CODE))) for name in "ab"]
    (target := tmp_path / "m.csv").write_text("the marks of last week\n")

    def full(*_):
        raise OSError(28, "No space left on device")

    fake_marks(monkeypatch)
    monkeypatch.setattr("fluxedu.course.grade.write_text", full)
    ran = CliRunner().invoke(app, ["grade", *paths, "--csv", str(target)])
    assert ran.exit_code == 2 and ran.output.count("1 of 1") == 2
    assert ran.output.count("m.csv cannot be written: No space left on device.") == 2
    assert target.read_text() == "the marks of last week\n"


def test_marks_of_an_interrupted_run_replace_nothing_before_there_are_any(tmp_path, monkeypatch):
    path = written(tmp_path / "a" / "own.ipynb", notebook(CODE))
    (target := tmp_path / "m.csv").write_text("the marks of last week\n")

    def interrupt(_):
        raise KeyboardInterrupt

    fake_marks(monkeypatch, interrupt)
    assert CliRunner().invoke(app, ["grade", str(path), "--csv", str(target)]).exit_code == 2
    assert target.read_text() == "the marks of last week\n"


def test_a_notebook_that_changes_another_one_ends_the_marking(tmp_path, monkeypatch):
    paths = [written(tmp_path / name / "own.ipynb", notebook(CODE)) for name in "abc"]
    fake_marks(monkeypatch, lambda path: paths[2].write_text("{}") if path == paths[1] else None)
    ran = CliRunner().invoke(app, ["grade", *map(str, paths), "--csv", str(tmp_path / "m.csv")])
    assert ran.exit_code == 2 and "b/own.ipynb has changed files of fluxedu or another notebook" in ran.output
    assert [row.split(",")[0] for row in (tmp_path / "m.csv").read_text().splitlines()] == ["student", "a"]
