"""The course: solutions pass, wrong answers get their own message, notebooks match their sources."""

import re
from pathlib import Path

import nbformat
import pytest
import torch
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu import course
from fluxedu.cli import app
from fluxedu.course import all_exercises
from fluxedu.course.build import EDITIONS, copy_notebooks, edition, notebook_number, sources
from fluxedu.course.check import assess, relative_error
from fluxedu.course.exercise import Exercise, WrongAnswer
from fluxedu.course.grade import Mark, class_table, grade_notebook
from fluxedu.errors import CourseError

ROOT = Path(__file__).resolve().parents[2]
TASKS = list(all_exercises().values())
MADE = [(s, which) for s in sources(ROOT / "notebooks") for which in EDITIONS]


# ---------------------------------------------------------------- every exercise


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_solution_is_right_and_the_stub_is_not(task):
    assert assess(task, task.solution).passed, assess(task, task.solution)
    started = names_of_the_notebook(task)
    exec(task.starter_code, started)
    assert not assess(task, started[task.answer_name]).passed
    assert assess(task, started[task.answer_name]).message == "not written yet."


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_solution_runs_as_it_is_printed(task):
    """The notebook's code with the notebook's imports, without the rest of the file that defines the exercise."""
    printed = names_of_the_notebook(task)
    exec(task.solution_code, printed)
    assert assess(task, printed[task.answer_name]).passed


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_wrong_answers_get_their_own_message(task):
    assert len(task.wrong) >= 3
    assert len({w.message for w in task.wrong}) == len(task.wrong)
    for known in task.wrong:
        assert assess(task, known.answer).message == known.message


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_hints_difficulty_and_minutes_are_given(task):
    assert len(task.hints) == 3 and all(len(hint) > 20 for hint in task.hints)
    assert task.difficulty in (1, 2, 3) and 2 <= task.minutes <= 45
    assert task.task


def names_of_the_notebook(task):
    """The names that a notebook has imported before the exercise."""
    (source,) = [s for s in sources(ROOT / "notebooks") if notebook_number(s) == task.notebook]
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
    assert len(texts) == 33
    assert len(TASKS) >= 70
    assert sum("fe.predict(" in text for text in texts) == 33
    assert sum(text.rstrip().endswith("fe.score()") for text in texts) == 33


@pytest.mark.parametrize("source", sources(ROOT / "notebooks"), ids=lambda path: path.stem)
def test_a_notebook_takes_the_minutes_that_it_states(source):
    """Prose at 150 words a minute, code that is read at 10 lines, exercises and a third of them for being stuck."""
    words = lines = 0
    for cell in edition(source, "student").cells:
        if cell.cell_type == "markdown" and not cell.source.startswith("<details>"):
            words += len(re.sub(r"\$\$.*?\$\$", "", cell.source, flags=re.DOTALL).split())
        elif cell.cell_type == "code" and "fluxedu" not in cell.metadata:
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    minutes = words / 150 + lines / 10 + sum(t.minutes for t in TASKS if t.notebook == notebook_number(source)) * 4 / 3
    stated = int(re.search(r"^# (\d+) minutes", source.read_text("utf-8"), re.MULTILINE)[1])
    assert minutes - 1 <= stated <= 60 and stated < minutes + 6


# ---------------------------------------------------------------- the check itself


def double(x):
    """Twice x."""
    return 2 * x


def task_of(solution, **how):
    cases = lambda: [(torch.arange(6.0).view(2, 3),), (torch.ones(4, 1),)]  # noqa: E731
    return Exercise("a.b", solution, 5, 1, ("a", "b", "c"), **{"cases": cases} | how)


WRONG = "the shapes are right but the values are wrong:"


def in_place(x):
    return x.mul_(2)


@pytest.mark.parametrize(
    "answer, message",
    [
        (double, "right in 2 cases."),
        (lambda x: x + x * (1 + 1e-7), "right in 2 cases."),
        (lambda x: None, "it returns None; is there a `return` statement? (inputs: x [2, 3])."),
        (lambda x: {"a": x}, "it returns a dict instead of a tensor (inputs: x [2, 3])."),
        (lambda x: (x, x), "it returns 2 tensors instead of 1 (inputs: x [2, 3])."),
        (
            lambda x: 2 * x.T,
            "the shape is [3, 2] but should be [2, 3]: the rows and columns are exchanged (inputs: x [2, 3]).",
        ),
        (lambda x: 2 * x + 0j, "the values are complex but should be real (inputs: x [2, 3])."),
        (in_place, "it modifies its input in place; create a new tensor instead (inputs: x [2, 3])."),
        (lambda x: x / 0, f"{WRONG} there are NaN or infinite values in all cases."),
        (lambda x: x * 2.2, "the values are proportional to the right ones: a constant factor is wrong."),
        (lambda x: x * 2 + (x.shape[1] == 1), "the values are 1 too large."),
        (lambda x: x * 2 + 3 * (2 * x).sin(), f"{WRONG} the relative error is 1.4 in all cases."),
        (
            lambda x: x * 2 + (x.shape[1] == 1) * torch.arange(len(x))[:, None] ** 2,
            f"{WRONG} the relative error is 2.5 in case 2 of 2.",
        ),
        (
            lambda: 1,
            "it raises TypeError: <lambda>() takes 0 positional arguments but 1 was given (inputs: x [2, 3]).",
        ),
        (3, "it raises TypeError: 'int' object is not callable (inputs: x [2, 3])."),
        (None, "not written yet."),
        (..., "not written yet."),
    ],
)  # fmt: skip
def test_the_message_of_a_verdict(answer, message):
    task = task_of(double)
    for _ in range(2):  # an answer must not change the cases
        assert assess(task, answer).message.replace("test_course.", "") == message


@pytest.mark.parametrize("scale", [1e6, 1e-5, 1e-14, 1e-30, 1e-200])
def test_a_tiny_answer_is_compared_with_its_own_size(scale):
    """No absolute error and no underflow of squares lets a wrong answer pass because all its values are small."""

    def scaled(x):
        """x times a constant."""
        return x.double() * scale

    task = task_of(scaled)
    assert assess(task, scaled).passed
    assert assess(task, lambda x: scaled(x) * (1 + 1e-7)).passed
    for wrong in (
        lambda x: 0 * scaled(x),
        lambda x: -scaled(x),
        lambda x: 1.001 * scaled(x),
        lambda x: scaled(x) + scale,
    ):
        assert not assess(task, wrong).passed


def test_every_tensor_of_an_answer_counts_by_itself():
    """A large tensor that is right does not hide a small one that is wrong; zeros are compared exactly."""
    large, small, zeros = torch.full((3,), 1e8), torch.full((3,), 1e-8), torch.zeros(3)
    assert relative_error([large, small, zeros], [large, small, zeros]) == 0
    assert relative_error([large, 2 * small, zeros], [large, small, zeros]) == pytest.approx(1)
    assert relative_error([large, small, small], [large, small, zeros]) == float("inf")
    assert relative_error([zeros], [small]) == relative_error([2 * large], [large]) == 1
    task = task_of(lambda x: 0 * x)
    assert (
        assess(task, lambda x: 0 * x + 1e-20).message
        == f"{WRONG} there are values other than the expected zeros in all cases."
    )


def test_a_known_mistake_is_reported_before_the_error():
    task = task_of(double)
    task.wrong.append(WrongAnswer(lambda x: 3 * x, "three times."))
    assert assess(task, lambda x: x + x + x).message == "three times."
    assert assess(task, lambda x: 4 * x).message == "the values are 2 times the right ones."


def test_a_wider_dtype_than_the_input_is_reported():
    class Wide(all_exercises()["attention.qknorm"].solution):
        def rms_norm(self, x, scale):
            return super().rms_norm(x.float(), scale)

    message = assess(all_exercises()["attention.qknorm"], Wide).message
    assert message.startswith("the dtype is float32 but should be bfloat16")


def test_a_recording_needs_names():
    message = assess(all_exercises()["inside.spread"], lambda p: torch.special.entr(p.tensor).sum(-1).exp()).message
    assert "a recording needs a Named" in message


def test_a_check_prints_its_verdict_and_is_a_truth_value(capsys):
    passed = fe.check("rope.ids", all_exercises()["rope.ids"].solution)
    assert passed
    assert capsys.readouterr().out == "✓ rope.ids: right in 3 cases.\n"
    assert passed._ipython_display_() is None
    with pytest.raises(CourseError, match="there is no exercise 'rope.none'; there are "):
        fe.check("rope.none", None)


# ---------------------------------------------------------------- gates and comparisons


def test_passed_is_about_the_last_check_of_each_exercise(capsys):
    names = ("latents.pack", "clip.quick_gelu")
    fe.check("clip.quick_gelu", all_exercises()["clip.quick_gelu"].solution)
    capsys.readouterr()
    assert fe.passed("clip.quick_gelu") and not capsys.readouterr().out
    assert not fe.passed(*names)
    assert capsys.readouterr().out == "solve latents.pack above first; then run this cell again\n"
    fe.check("latents.pack", all_exercises()["latents.pack"].solution)
    assert fe.passed(*names)
    fe.check("clip.quick_gelu", torch.relu)
    assert not fe.passed(*names)
    with pytest.raises(CourseError, match="the name of an exercise must be one of"):
        fe.passed("no such exercise")


@pytest.mark.parametrize(
    ("mine", "printed"),
    [
        ([3.0, 4.0], "a: relative difference 0e+00 (rounding; at most 1e-05)"),
        ([3.0, 4.00002], "a: relative difference 4e-06 (rounding; at most 1e-05)"),
        ([3.0, 4.5], "a: relative difference 1e-01 (more than rounding, which is below 1e-05)"),
        ([3.0], "a: the shapes differ, [1] and [2]"),
    ],
)
def test_a_comparison_shows_its_number(mine, printed, capsys):
    course.compare("a", torch.tensor(mine), torch.tensor([3.0, 4.0]))
    assert capsys.readouterr().out.strip() == printed


# ---------------------------------------------------------------- the notebooks


def notebook_path(source, which):
    return ROOT / "notebooks" / EDITIONS[which] / f"{source.stem}.ipynb"


@pytest.mark.parametrize("source, which", MADE, ids=lambda x: getattr(x, "stem", x))
def test_a_notebook_matches_its_source(source, which):
    """Run `make notebooks` after every change of a source or an exercise."""
    made, kept = edition(source, which), nbformat.read(notebook_path(source, which), 4)
    assert [(c.cell_type, c.source, c.id) for c in kept.cells] == [(c.cell_type, c.source, c.id) for c in made.cells]


@pytest.mark.parametrize("source, which", MADE, ids=lambda x: getattr(x, "stem", x))
def test_a_notebook_has_run_from_top_to_bottom(source, which):
    """A cell without an execution count is never compared, so it would pass whatever it does."""
    kept = nbformat.read(notebook_path(source, which), 4)
    cells = [c for c in kept.cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = "".join(o.get("text", "") for o in outputs)
    has_exercises = notebook_number(source) in {task.notebook for task in TASKS}
    assert ("✓" in text) == (which == "solved" and has_exercises)
    assert "✗" not in text and "widgets" not in kept.metadata
    assert ("○" in text) == (which == "student" and has_exercises)


@pytest.mark.parametrize("source", [s for s, which in MADE if which == "student"], ids=lambda s: s.stem)
def test_a_students_notebook_gives_nothing_away(source):
    student = nbformat.read(notebook_path(source, "student"), 4)
    code = "\n".join(c.source for c in student.cells if c.cell_type == "code")
    for task in [task for task in TASKS if task.notebook == notebook_number(source)]:
        assert task.solution_code not in code and task.starter_code in code
        new = [line for line in task.solution_code.splitlines() if line not in task.starter_code.splitlines()]
        assert len(new) >= 1 and "\n".join(new) not in code
    assert not re.search(r"  # answer$", code, re.M)
    assert code.count("fe.predict(") == code.count(", ...)")


# ---------------------------------------------------------------- START.ipynb


def test_start_is_built_from_its_source_and_has_run():
    kept = nbformat.read(ROOT / "notebooks" / "START.ipynb", 4)
    made = edition(ROOT / "notebooks" / "source" / "START.py", "student")
    assert [(c.cell_type, c.source, c.id) for c in kept.cells] == [(c.cell_type, c.source, c.id) for c in made.cells]
    cells = [c for c in kept.cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error" or o.get("name") == "stderr"]


def titles_and_minutes() -> dict[str, tuple[str, int]]:
    """Name of a notebook -> its title, such as ``00 · An image from a sentence``, and its minutes."""
    texts = {s.stem: s.read_text("utf-8") for s in sources(ROOT / "notebooks")}
    pattern = r"# # (.+)\n(?s:.*?)^# (\d+) minutes"
    return {name: (m[1], int(m[2])) for name, text in texts.items() if (m := re.search(pattern, text, re.MULTILINE))}


def test_start_lists_every_notebook_with_its_minutes():
    text = (ROOT / "notebooks" / "source" / "START.py").read_text("utf-8")
    rows = re.findall(r"^# \| \[(.+)\]\((.+)\.ipynb\) \| (\d+) \|$", text, re.MULTILINE)
    assert {name: (title, int(minutes)) for title, name, minutes in rows} == titles_and_minutes()
    assert len(rows) == 33 and "Thirty-three notebooks, thirty-two hours" in text
    assert round(sum(minutes for _, minutes in titles_and_minutes().values()) / 60) == 32


# ---------------------------------------------------------------- copies to work in, and grading


def test_a_copy_never_replaces_work(tmp_path):
    new, kept = copy_notebooks(tmp_path / "mine")
    assert len(new) == len(sources(ROOT / "notebooks")) + 1 and "START.ipynb" in new and not kept
    (tmp_path / "mine" / new[0]).write_text("my work")
    (tmp_path / "mine" / new[1]).unlink()
    assert copy_notebooks(tmp_path / "mine")[0] == [new[1]]
    assert (tmp_path / "mine" / new[0]).read_text() == "my work"
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="cannot be copied to"):
        copy_notebooks(tmp_path / "file")


@pytest.mark.slow
def test_marks(tmp_path):
    """A student who solved one exercise, got one wrong in a known way, and broke a cell in between."""
    notebook = nbformat.read(ROOT / "notebooks" / "04-rotary-positions.ipynb", 4)
    cells = [c for c in notebook.cells if c.metadata.get("fluxedu", {}).get("role") == "answer"]
    answers = {"rope.ids": all_exercises()["rope.ids"].solution_code, "rope.angles": "1 / 0", "rope.rotate": HALVES}
    names = [cell.metadata["fluxedu"]["exercise"] for cell in cells]
    for name, cell in zip(names, cells, strict=True):
        cell.source = answers.get(name, "")
    first = [c for c in notebook.cells if c.cell_type == "code"][0]
    first.source = "import torch\nfrom torch import Tensor"
    notebook.cells = [first, *cells]
    (tmp_path / "ada").mkdir()
    path = tmp_path / "ada" / "04-rotary-positions.ipynb"
    nbformat.write(notebook, path)
    ran = CliRunner().invoke(app, ["grade", str(path), str(tmp_path / "none.ipynb"), "--csv", str(tmp_path / "m.csv"),
                                    "--table", str(tmp_path / "t.csv")])  # fmt: skip
    assert f"ada: 1 of {len(names)}" in ran.output
    assert "✓ rope.ids: right in 3 cases." in ran.output
    assert "✗ rope.angles: not written yet." in ran.output
    assert "✗ rope.rotate: your pairs are halves" in ran.output
    assert "there is no notebook" in ran.output
    rows = (tmp_path / "m.csv").read_text().splitlines()
    assert rows[0] == "student,notebook,exercise,passed,flagged,message"
    assert rows[1].startswith("ada,04-rotary-positions.ipynb,rope.ids,1,0,")
    header, row = (line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines())
    assert header == ["student", *names, "passed"]
    assert row == ["ada", *("1" if name == "rope.ids" else "0" for name in names), "1"]


HALVES = """
def rotate(x, angles):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)
"""


def test_a_file_without_exercises_is_refused(tmp_path):
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(CourseError, match="is no notebook that can be read"):
        grade_notebook(tmp_path / "x.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "y.ipynb")
    with pytest.raises(CourseError, match="has no exercise of this course"):
        grade_notebook(tmp_path / "y.ipynb")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "solved").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_predictions_of_the_solved_edition_are_right(path):
    printed = [out.get("text", "") for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", [])]
    assert not [text for text in printed if "wrong ·" in text or "partly right" in text]


def test_a_copy_has_no_outputs(tmp_path):
    for name in copy_notebooks(tmp_path / "mine")[0]:
        copy = nbformat.read(tmp_path / "mine" / name, 4)
        outputs = [out for cell in copy.cells for out in cell.get("outputs", [])]
        if name == "START.ipynb":  # keeps its static figure, since nothing on it is to be predicted
            assert outputs and not any("widget-view" in kind for out in outputs for kind in out.data)
        else:
            assert copy.cells and not outputs


def test_a_table_of_the_class():
    """One row per student, one column per exercise; an exercise that was not handed in is neither right nor wrong."""
    marks = [
        Mark("eve", "04.ipynb", "rope.rotate", True, ""),
        Mark("eve", "04.ipynb", "rope.table", False, "wrong"),
        Mark("ada", "04.ipynb", "rope.rotate", True, ""),
        Mark("ada", "04.ipynb", "rope.table", True, ""),
        Mark("ada", "06.ipynb", "attention.map", True, ""),
    ]
    assert class_table(marks) == [
        ["student", "rope.rotate", "rope.table", "attention.map", "passed"],
        ["ada", "1", "1", "1", "3"],
        ["eve", "1", "0", "", "1"],
    ]
