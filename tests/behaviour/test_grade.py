"""Grading notebooks that misbehave in their own process: each is stopped at its limits, and no other mark suffers.

Every test starts a process, so the tricks of one kind share a notebook.
"""

import json
import os
import resource as memory_of
import signal
import subprocess
import sys
import time
from textwrap import indent

import nbformat
import psutil
import pytest
from typer.testing import CliRunner

from fluxedu.cli import app
from fluxedu.course.exercise import all_exercises
from fluxedu.course.grade import grade_notebook

pytestmark = pytest.mark.slow
SOLVED = {name: all_exercises()[name].solution_code for name in ("rope.ids", "rope.angles", "rope.rotate")}
STUBBORN = """
import time
while True:
    try:
        time.sleep(1)
    except KeyboardInterrupt:
        pass
"""
HUNGRY = """
import torch
try:
    torch.empty(20_000_000_000, dtype=torch.uint8)
    had = True
except RuntimeError:
    had = False
"""


def submitted(folder, first, answers=None, name="own.ipynb"):
    """A notebook with a cell of the student's own, followed by answers; by default one exercise is solved."""
    cells = [nbformat.v4.new_code_cell("import torch\nfrom torch import Tensor"), nbformat.v4.new_code_cell(first)]
    for exercise, code in (answers or {"rope.ids": SOLVED["rope.ids"]}).items():
        metadata = {"fluxedu": {"exercise": exercise, "role": "answer"}}
        cells.append(nbformat.v4.new_code_cell(code, metadata=metadata))
    folder.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / name)
    return folder / name


def marks(path, **limits):
    return {mark.exercise: mark for mark in grade_notebook(path, **limits)}


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"timeout": 1}, "code cell 2 took longer than 1 s, the limit of a cell, and ignored its interrupt"),
        ({"timeout": 100, "notebook_timeout": 3}, "the notebook reached its limit of 3 s in code cell 2"),
    ],
)
def test_a_cell_that_ignores_its_interrupt_is_killed(tmp_path, limits, reason, monkeypatch):
    monkeypatch.setattr("fluxedu.course.kernel.GRACE", 1)
    started = time.monotonic()
    mark = marks(submitted(tmp_path / "eve", STUBBORN), **limits)["rope.ids"]
    assert time.monotonic() - started < 60
    assert not mark.passed and mark.message == f"not marked, because {reason}."


def test_the_memory_limit_is_enforced(tmp_path):
    answer = f"if had: raise SystemExit\n{SOLVED['rope.ids']}"
    assert marks(submitted(tmp_path / "eve", HUNGRY, {"rope.ids": answer}), memory=8)["rope.ids"].passed


def test_limits_are_named_and_other_answers_are_still_judged(tmp_path):
    """A cell that takes too long or too much defines no answer; a call that takes too long costs one mark."""
    answers = {
        "rope.angles": "torch.empty(20_000_000_000, dtype=torch.uint8)",
        "rope.rotate": "def rotate(x, angles):\n    while True: pass",
        "rope.ids": SOLVED["rope.ids"],
    }
    got = marks(submitted(tmp_path / "eve", "while True: pass", answers), timeout=2, memory=8)
    assert got["rope.angles"].message == (
        "not written yet; code cell 2 was stopped after 2 s, the limit of a cell; "
        "code cell 3 needed more memory than the limit of 8 GB."
    )
    assert got["rope.rotate"].message == "the call of rotate was stopped after 2 s, the limit of a cell."
    assert got["rope.ids"].passed


def test_a_process_that_ends_in_an_answer_costs_the_answers_from_there(tmp_path):
    answers = SOLVED | {"rope.angles": "import os\ndef angles(*_): os.kill(os.getpid(), 9)"}
    answers["rope.ids"] = (
        f"if (_, _2) == (42, 42):  # outputs are numbered as in Jupyter\n{indent(SOLVED['rope.ids'], '  ')}"
    )
    got = marks(submitted(tmp_path / "eve", "21 + 21", answers))
    assert got["rope.ids"].passed
    assert got["rope.rotate"].message == (
        "not marked, because its process ended (signal 9) in the call of angles; its limit of memory is 16 GB."
    )


def test_what_is_printed_costs_the_marker_no_memory(tmp_path):
    """300 MB of text and 100 MB of HTML; the former way kept all of it."""
    loud = """
from IPython.display import HTML, display
for _ in range(3): print("x" * 100_000_000)
display(HTML("x" * 100_000_000))
"""
    before = memory_of.getrusage(memory_of.RUSAGE_SELF).ru_maxrss
    assert marks(submitted(tmp_path / "eve", loud))["rope.ids"].passed
    assert memory_of.getrusage(memory_of.RUSAGE_SELF).ru_maxrss - before < 60_000  # kilobytes


# ---------------------------------------------------------------- isolation

LOOKS_AROUND = """
import json, os, pathlib, sys, tempfile
from jupyter_core import paths
here = pathlib.Path.home().parent
folders = [os.getcwd(), os.environ["IPYTHONDIR"], tempfile.gettempdir(), paths.jupyter_config_dir(),
           paths.jupyter_data_dir(), paths.jupyter_runtime_dir(), get_ipython().profile_dir.location]
(here / "home" / "sitecustomize.py").write_text("raise SystemExit")
pathlib.Path({to!r}).write_text(json.dumps([str(here), folders, dict(os.environ), sys.executable]))
"""
#: four ways to outlive the notebook: a child, one in its own session, a daemon, a daemon without an environment
LIVES_ON = """
import os, subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(300)", {token!r}]
subprocess.Popen(sleep)
subprocess.Popen(sleep, start_new_session=True)
for env in (os.environ, {{}}):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve(sys.executable, sleep, env)
        os._exit(0)
"""


def test_a_run_has_its_own_folders_and_no_secrets(tmp_path, monkeypatch):
    """The kernels of the user, the notebook's own kernel and the user's environment do not matter."""

    kernel = tmp_path / "home" / ".local" / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["/bin/false"], "language": "python", "display_name": "x"}')
    for name in ("SECRET_TOKEN", "AWS_KEY", "JUPYTER_TOKEN", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = submitted(tmp_path / "eve", LOOKS_AROUND.format(to=str(tmp_path / "found.json")))
    notebook = json.loads(path.read_text())
    path.write_text(json.dumps(notebook | {"metadata": {"kernelspec": {"name": "fortran"}}}))
    assert marks(path)["rope.ids"].passed
    here, folders, environment, python = json.loads((tmp_path / "found.json").read_text())
    assert not os.path.exists(here) and not [folder for folder in folders if not folder.startswith(here)]
    assert "s3cret" not in environment.values() and python == sys.executable


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process that left its group can live on")
def test_no_process_outlives_its_notebook(tmp_path):
    token = f"lives-on-{os.getpid()}"
    assert marks(submitted(tmp_path / "eve", LIVES_ON.format(token=token)))["rope.ids"].passed
    assert not [p for p in psutil.process_iter(["cmdline"]) if token in (p.info["cmdline"] or [])]


# ---------------------------------------------------------------- forging

WRONG = {
    "rope.ids": "def ids(rows, columns): return torch.zeros(rows * columns, 3)",
    "rope.angles": "def angles(*_): return torch.zeros(1)",
    "rope.rotate": "def rotate(x, angles): return x.clone()",
}
PATCHES = """
import atexit, builtins, json, os, sys, threading, types
import fluxedu.course as course
checker = sys.modules["fluxedu.course.check"]
right = lambda name: checker.Verdict(name, True, "right.")
checker.assess = lambda task, answer: right(task.name)
checker.judge = lambda task, *_: right(task.name)
checker.check = lambda name, answer: right(name)
checker.relative_error = lambda *_: 0.0
checker.outcomes = lambda task, answer, cases: []
for task in course.all_exercises().values():
    task.tolerance, task.call = float("inf"), lambda answer, *case, task=task: task.solution(*case)
for name in ("allclose", "equal", "isclose"):
    setattr(torch, name, lambda *_, **__: True)
torch.testing.assert_close = lambda *_, **__: None
torch.Tensor.__eq__ = lambda *_: True
fake = types.ModuleType("fluxedu.course.answers")
fake.reply = lambda *_: "right in 3 cases."
sys.modules["fluxedu.course.answers"] = fake
def write():
    line = json.dumps({"name": "rope.ids", "passed": True, "message": "right in 3 cases."})
    for folder in (".", os.path.dirname(os.environ.get("FLUXEDU_VERDICTS", "./x"))):
        open(os.path.join(folder, "verdicts.jsonl"), "a").write(line)
atexit.register(write)
threading.Timer(1, write).start()
for name in ("sitecustomize", "usercustomize"):
    open(name + ".py", "w").write("import fluxedu.course")
"""
OF_PACKAGE = {
    "rope.ids": "from fluxedu.course.exercises.n04_rope import ids",
    "rope.angles": "import importlib\nn = importlib.import_module('fluxedu.course.ex' + 'ercises.n04_rope')\n"
    "def angles(*case): return 1.0 * n.angles(*case)",
    "rope.rotate": "import functools, gc, types\n"
    "rotate = functools.partial(next(f for f in gc.get_objects() if isinstance(f, types.FunctionType)"
    " and f.__name__ == 'rotate' and 'n04' in f.__module__))",
}


def test_no_patch_changes_a_verdict(tmp_path):
    got = marks(submitted(tmp_path / "eve", PATCHES, WRONG))
    assert len(got) == 4 and not [mark for mark in got.values() if mark.passed]


def test_answers_of_the_package_do_not_pass_and_are_flagged(tmp_path):
    got = marks(submitted(tmp_path / "eve", "", OF_PACKAGE))
    assert not got.pop("rope.roll").flagged
    assert all(mark.flagged and not mark.passed and "fluxedu's own solution" in mark.message for mark in got.values())


# ---------------------------------------------------------------- the command


def test_what_is_marked_stays_after_an_interrupt(tmp_path):
    """Ctrl-C while the second of three notebooks runs: the first one's marks are in the file, no process is left."""
    paths = [submitted(tmp_path / name, f"# {name}") for name in ("ada", "cy")]
    paths.insert(1, submitted(tmp_path / "bob", f"open({str(tmp_path / 'began')!r}, 'w')\nimport time; time.sleep(99)"))
    command = [sys.executable, "-m", "fluxedu.cli", "grade", *paths, "--csv", tmp_path / "m.csv"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "began").exists() and time.monotonic() < end:
        time.sleep(0.1)
    rows = (tmp_path / "m.csv").read_text().splitlines()
    assert len(rows) == 5 and all(row.startswith("ada,own.ipynb,") for row in rows[1:])  # already while bob's runs
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2 and error == "fluxedu: interrupted; 1 of 3 notebooks are marked.\n"
    assert (tmp_path / "m.csv").read_text().splitlines() == rows
    assert kernels and not [p for p in kernels if p.is_running()]


def test_a_renamed_copy_with_deleted_exercises(tmp_path):
    """The content tells which notebook it is a copy of; what was deleted from it is not done. Two students are two."""
    one = submitted(tmp_path / "a", "", {"rope.ids": SOLVED["rope.ids"]}, "homework (1).ipynb")
    path = tmp_path / "b" / "homework"
    path.mkdir(parents=True)
    (path / "04-rotary-positions (1).ipynb").write_text("{")
    one = one.rename(tmp_path / "a" / "homework.ipynb")
    arguments = ["grade", str(one), *map(str, path.iterdir()), "--table", str(tmp_path / "t.csv")]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "student,rope.ids,rope.angles,rope.rotate,rope.roll,passed",
        "a,1,0,0,0,1",
        "homework,0,0,0,0,0",
    ]
