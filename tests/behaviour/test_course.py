"""The course: solutions pass, wrong answers are named, notebooks are what their sources say."""

import re
from pathlib import Path

import nbformat
import pytest
import torch
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.cli import app
from fluxedu.course import all_exercises, predict
from fluxedu.course.build import EDITIONS, edition, sources
from fluxedu.course.check import judged
from fluxedu.course.exercise import Exercise, Wrong
from fluxedu.course.files import copied
from fluxedu.course.grade import Mark, graded, table
from fluxedu.course.predict import points
from fluxedu.errors import CourseError

ROOT = Path(__file__).resolve().parents[2]
TASKS = list(all_exercises().values())
MADE = [(s, which) for s in sources(ROOT / "notebooks") for which in EDITIONS]


# ---------------------------------------------------------------- every exercise


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_solution_is_right_and_the_stub_is_not(task):
    assert judged(task, task.solution).passed, judged(task, task.solution)
    begun = names_of_the_notebook(task)
    exec(task.unsolved, begun)
    assert not judged(task, begun[task.object]).passed
    assert judged(task, begun[task.object]).says == "not written yet."


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_solution_runs_as_it_is_printed(task):
    """The code in the notebook, with the notebook's imports and nothing else of the file it comes from."""
    printed = names_of_the_notebook(task)
    exec(task.solved, printed)
    assert judged(task, printed[task.object]).passed


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_wrong_answers_are_told_why(task):
    assert len(task.wrong) >= 3
    assert len({w.says for w in task.wrong}) == len(task.wrong)
    for known in task.wrong:
        assert judged(task, known.answer).says == known.says


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_it_is_told_how_hard_and_how_long(task):
    assert len(task.hints) == 3 and all(len(hint) > 20 for hint in task.hints)
    assert task.difficulty in (1, 2, 3) and 2 <= task.minutes <= 45
    assert task.task


def names_of_the_notebook(task):
    """What a notebook's imports have defined where the exercise comes."""
    (source,) = [s for s, _ in MADE if f'exercise="{task.name}"' in s.read_text(encoding="utf-8") and _ == "solved"]
    names = {}
    for cell in edition(source, "solved").cells:
        if cell.metadata.get("fluxedu", {}).get("exercise") == task.name:
            return names
        if cell.cell_type == "code" and cell.metadata.get("fluxedu", {}).get("role") == "answer":
            exec(cell.source, names)  # an earlier exercise may be used
        elif cell.cell_type == "code":
            exec("\n".join(imports_of(cell.source)), names)
    raise AssertionError(f"{task.name} is in no notebook")


def imports_of(code):
    import ast

    nodes = [n for n in ast.parse(code).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    return [ast.unparse(node) for node in nodes]


def test_there_are_enough():
    texts = [s.read_text(encoding="utf-8") for s in sources(ROOT / "notebooks")]
    assert len(texts) == 16
    assert len(TASKS) >= 30
    assert sum("fe.predict(" in text for text in texts) == 16
    assert sum(text.rstrip().endswith("fe.score()") for text in texts) == 16


# ---------------------------------------------------------------- the check itself


def double(x):
    """Twice x."""
    return 2 * x


def task_of(solution, **how):
    cases = lambda: [(torch.arange(6.0).view(2, 3),), (torch.ones(4, 1),)]  # noqa: E731
    how = {"cases": cases, "call": lambda f, *a: f(*a), "against": None, "tolerance": 1e-5, "stub": None} | how
    return Exercise("a.b", solution, 5, 1, ("a", "b", "c"), **how)


def in_place(x):
    return x.mul_(2)


@pytest.mark.parametrize(
    "answer, says",
    [
        (double, "right in 2 cases."),
        (lambda x: x + x * (1 + 1e-7), "right in 2 cases."),
        (lambda x: None, "it returns nothing; is there a return? (tried on [2, 3])."),
        (lambda x: {"a": x}, "it returns a dict, and a tensor is wanted (tried on [2, 3])."),
        (lambda x: (x, x), "it returns 2 tensors, and 1 is wanted (tried on [2, 3])."),
        (lambda x: 2 * x.T, "the shape is [3, 2], and should be [2, 3] (tried on [2, 3])."),
        (lambda x: 2 * x + 0j, "the numbers are complex, and should not be (tried on [2, 3])."),
        (in_place, "it changes its argument in place; make a new tensor instead (tried on [2, 3])."),
        (lambda x: x / 0, "the shapes are right, the values are not: values that are no numbers in all cases."),
        (lambda x: x * 2.2, "the shapes are right, the values are not: values off by 0.1 of their size in all cases."),
        (lambda x: x * 2 + (x.shape[1] == 1), "the shapes are right, the values are not: values off by 0.5 of their "
                                             "size in case 2 of 2."),
        (lambda: 1, "it raises TypeError: <lambda>() takes 0 positional arguments but 1 was given (tried on [2, 3])."),
        (3, "it raises TypeError: 'int' object is not callable (tried on [2, 3])."),
        (None, "not written yet."),
        (..., "not written yet."),
    ],
)  # fmt: skip
def test_what_a_check_says(answer, says):
    task = task_of(double)
    for _ in range(2):  # a case must not be spoiled by an answer
        assert judged(task, answer).says.replace("test_course.", "") == says


def test_a_known_mistake_comes_before_the_numbers():
    task = task_of(double)
    task.wrong.append(Wrong(lambda x: 3 * x, "three times."))
    assert judged(task, lambda x: x + x + x).says == "three times."
    assert "values off" in judged(task, lambda x: 4 * x).says


def test_a_wider_type_than_what_came_in_is_told():
    class Wide(all_exercises()["attention.qknorm"].solution):
        def one(self, x, scale):
            return super().one(x.float(), scale)

    said = judged(all_exercises()["attention.qknorm"], Wide).says
    assert said.startswith("the numbers are float32, and should be bfloat16")


def test_a_recording_needs_names():
    said = judged(all_exercises()["inside.spread"], lambda p: torch.special.entr(p.tensor).sum(-1).exp()).says
    assert "a recording needs a Named" in said


def test_a_check_is_a_truth_value_and_has_been_said(capsys):
    passed = fe.check("rope.ids", all_exercises()["rope.ids"].solution)
    assert passed
    assert capsys.readouterr().out == "✓ rope.ids: right in 3 cases.\n"
    assert passed._ipython_display_() is None
    with pytest.raises(CourseError, match="there is no exercise 'rope.none'; there are "):
        fe.check("rope.none", None)


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    "answer, actual, got",
    [
        (100, 105, 1.0), (100, 180, 0.5), (100, 210, 0.0), (-1, 1, 0.0), (0, 0, 1.0), (0.0, 0.3, 0.0),
        ("Much ", "much", 1.0), ("little", "much", 0.0), (["a", "b", "c", "d"], ["a", "c", "b", "d"], 0.5),
        ("a, b", ["a", "c"], 0.5), ("a/b", ["a", "b"], 1.0), ([1, 2], [1, 4], 0.75), (True, True, 1.0), (1, True, 0.0),
    ],
)  # fmt: skip
def test_points(answer, actual, got):
    assert points(answer, actual, within=0.1) == got


@pytest.mark.parametrize(
    "answer, actual, said",
    [
        ("two", 2, "a number; 'two' is not"),
        ([1], [1, 2], "2 parts"),
        ("ab", ["a", "b"], "2 parts"),
        (True, 1.0, "a number"),
    ],
)
def test_what_cannot_be_compared_is_said(answer, actual, said):
    with pytest.raises(CourseError, match=said):
        points(answer, actual, within=0.1)


def test_a_session_of_predictions(capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["fluxedu.course.predict"], "_asked", {})
    predict("how many?", 4000).against(4096)
    predict("which?", ...).against("a")
    predict("in what order?", ["a", "b"]).against(["b", "a"])
    fe.score()
    assert capsys.readouterr().out.splitlines() == [
        "right · predicted: 4,000 · measured: 4,096",
        "no prediction was made · measured: a",
        "not so · predicted: a, b · measured: b, a",
        "1 of 3 points for 2 predictions",
    ]
    with pytest.raises(CourseError, match="needs a question"):
        predict(4096, 1)


# ---------------------------------------------------------------- the notebooks


def place(source, which):
    return ROOT / "notebooks" / EDITIONS[which] / f"{source.stem}.ipynb"


@pytest.mark.parametrize("source, which", MADE, ids=lambda x: getattr(x, "stem", x))
def test_a_notebook_is_what_its_source_says(source, which):
    """`make notebooks` after every change of a source or an exercise."""
    made, kept = edition(source, which), nbformat.read(place(source, which), 4)
    assert [(c.cell_type, c.source, c.id) for c in kept.cells] == [(c.cell_type, c.source, c.id) for c in made.cells]


@pytest.mark.parametrize("source, which", MADE, ids=lambda x: getattr(x, "stem", x))
def test_a_notebook_has_run_from_top_to_bottom(source, which):
    """A cell without a count is never compared, so it would pass whatever it does."""
    kept = nbformat.read(place(source, which), 4)
    cells = [c for c in kept.cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    said = "".join(o.get("text", "") for o in outputs)
    assert ("✓" in said) == (which == "solved" and "exercise=" in source.read_text(encoding="utf-8"))
    assert "✗" not in said and "widgets" not in kept.metadata
    assert ("○" in said) == (which == "student" and "exercise=" in source.read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", [s for s, which in MADE if which == "student"], ids=lambda s: s.stem)
def test_a_students_notebook_gives_nothing_away(source):
    student = nbformat.read(place(source, "student"), 4)
    code = "\n".join(c.source for c in student.cells if c.cell_type == "code")
    for name in re.findall(r'exercise="([\w.]+)"', source.read_text(encoding="utf-8")):
        task = all_exercises()[name]
        assert task.solved not in code and task.unsolved in code
        new = [line for line in task.solved.splitlines() if line not in task.unsolved.splitlines()]
        assert len(new) >= 1 and "\n".join(new) not in code
    assert not re.search(r"  # answer$", code, re.M)
    assert code.count("fe.predict(") == code.count(", ...)")


# ---------------------------------------------------------------- a reader's copy, and marks


def test_a_copy_never_replaces_work(tmp_path):
    new, kept = copied(tmp_path / "mine")
    assert len(new) == len(sources(ROOT / "notebooks")) and not kept
    (tmp_path / "mine" / new[0]).write_text("my work")
    (tmp_path / "mine" / new[1]).unlink()
    assert copied(tmp_path / "mine")[0] == [new[1]]
    assert (tmp_path / "mine" / new[0]).read_text() == "my work"
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="cannot be copied to"):
        copied(tmp_path / "file")


@pytest.mark.slow
def test_marks(tmp_path):
    """A student who solved one exercise, got one wrong in a known way, and broke a cell in between."""
    notebook = nbformat.read(ROOT / "notebooks" / "04-rotary-positions.ipynb", 4)
    cells = [c for c in notebook.cells if c.metadata.get("fluxedu", {}).get("role") == "answer"]
    answers = {"rope.ids": all_exercises()["rope.ids"].solved, "rope.angles": "1 / 0", "rope.rotate": HALVES}
    for cell in cells:
        cell.source = answers[cell.metadata["fluxedu"]["exercise"]]
    first = [c for c in notebook.cells if c.cell_type == "code"][0]
    first.source = "import torch\nfrom torch import Tensor"
    notebook.cells = [first, *cells]
    (tmp_path / "ada").mkdir()
    path = tmp_path / "ada" / "04-rotary-positions.ipynb"
    nbformat.write(notebook, path)
    ran = CliRunner().invoke(app, ["grade", str(path), str(tmp_path / "none.ipynb"), "--csv", str(tmp_path / "m.csv"),
                                    "--table", str(tmp_path / "t.csv")])  # fmt: skip
    assert "ada: 1 of 3" in ran.output
    assert "✓ rope.ids: right in 3 cases." in ran.output
    assert "✗ rope.angles: not written yet." in ran.output
    assert "✗ rope.rotate: your pairs are halves" in ran.output
    assert "there is no notebook" in ran.output
    rows = (tmp_path / "m.csv").read_text().splitlines()
    assert rows[0] == "student,notebook,exercise,passed,says"
    assert rows[1].startswith("ada,04-rotary-positions.ipynb,rope.ids,1,")
    assert (tmp_path / "t.csv").read_text() == "student,rope.ids,rope.angles,rope.rotate,passed\nada,1,0,0,1\n"


HALVES = """
def rotate(x, angles):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)
"""


def test_what_is_no_notebook_is_said(tmp_path):
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(CourseError, match="is no notebook that can be read"):
        graded(tmp_path / "x.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "y.ipynb")
    with pytest.raises(CourseError, match="has no exercise of this course"):
        graded(tmp_path / "y.ipynb")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "solved").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_solved_edition_foretells_what_is_measured(path):
    printed = [out.get("text", "") for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", [])]
    assert not [text for text in printed if "not so ·" in text or "partly right" in text]


def test_a_copy_shows_nothing_that_was_measured(tmp_path):
    for name in copied(tmp_path / "mine")[0]:
        copy = nbformat.read(tmp_path / "mine" / name, 4)
        assert copy.cells and not any(cell.get("outputs") for cell in copy.cells)


def test_a_table_of_the_class():
    """A row a student, a column an exercise; what was not handed in is neither right nor wrong."""
    marks = [
        Mark("eve", "04.ipynb", "rope.rotate", True, ""),
        Mark("eve", "04.ipynb", "rope.table", False, "wrong"),
        Mark("ada", "04.ipynb", "rope.rotate", True, ""),
        Mark("ada", "04.ipynb", "rope.table", True, ""),
        Mark("ada", "06.ipynb", "attention.map", True, ""),
    ]
    assert table(marks) == [
        ["student", "rope.rotate", "rope.table", "attention.map", "passed"],
        ["ada", "1", "1", "1", "3"],
        ["eve", "1", "0", "", "1"],
    ]
