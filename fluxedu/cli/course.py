"""The course: opening it, and marking notebooks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fluxedu.terminal import check_extra, check_writable, fail, report_errors, write_result

app = typer.Typer()


@app.command(epilog="Example: fluxedu lab --folder my-course")
def lab(
    port: Annotated[int, typer.Option(help="The port of JupyterLab.")] = 8888,
    folder: Annotated[Path, typer.Option(help="The folder of your copies; missing notebooks are added.")] = Path(
        "fluxedu-course"
    ),
    browser: Annotated[bool, typer.Option(help="Open JupyterLab in a browser.")] = True,
) -> None:
    """Open your own copy of the course in JupyterLab. Notebooks that exist in your folder are never replaced."""
    import signal
    import subprocess
    import sys
    from tempfile import TemporaryDirectory

    check_extra("lab", "jupyterlab")
    from fluxedu.course.build import copy_notebooks

    with report_errors():
        copied, existing = copy_notebooks(folder)
    typer.echo(f"{folder}: {len(copied)} notebooks copied, {len(existing)} left as they are")
    root = ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []  # the usual user of a container
    signal.signal(signal.SIGINT, lambda *_: None)  # Jupyter gets Ctrl-C itself, and asks; this process waits for it
    with TemporaryDirectory(prefix="fluxedu-lab-") as settings:
        options = [f"--port={port}", *root, *lab_options(Path(settings)), *([] if browser else ["--no-browser"])]
        status = subprocess.call([sys.executable, "-m", "jupyterlab", *options, str(folder)])
    raise typer.Exit(status)


def lab_options(settings: Path) -> list[str]:
    """JupyterLab's options: it opens START.ipynb, and it asks no server for news or updates.

    ``settings`` is a folder for JupyterLab's defaults; a user's own settings still come first.
    """
    import json
    import shutil
    import sys

    shared = Path(sys.prefix) / "share" / "jupyter" / "lab" / "settings"  # of this installation, such as by a hub
    if shared.is_dir():
        shutil.copytree(shared, settings, dirs_exist_ok=True)
    file = settings / "overrides.json"
    overrides = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    overrides["@jupyterlab/apputils-extension:notification"] = quiet
    file.write_text(json.dumps(overrides), "utf-8")
    return [
        f"--LabApp.app_settings_dir={settings}",
        "--LabApp.default_url=/lab/tree/START.ipynb",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.news_url=",
    ]


@app.command(epilog="Example: fluxedu grade class/*/04*.ipynb --csv marks.csv")
def grade(
    notebooks: Annotated[
        list[Path], typer.Argument(help="Students' notebooks, each in a folder named after its student.")
    ],
    csv: Annotated[
        Path | None, typer.Option(help="Also write one line per student and exercise to this CSV file.")
    ] = None,
    by_student: Annotated[
        Path | None,
        typer.Option("--table", help="Also write a CSV file with one row per student, one column per exercise."),
    ] = None,
    timeout: Annotated[int, typer.Option(min=1, help="Time limit of a cell, in seconds.")] = 120,
    notebook_timeout: Annotated[int, typer.Option(min=1, help="Time limit of a notebook, in seconds.")] = 900,
    memory: Annotated[int, typer.Option(min=1, help="Memory limit of a notebook, in GB.")] = 16,
) -> None:
    """Run students' notebooks, each in its own process, and mark the exercises. The CSV file grows with each notebook.

    It is not a sandbox: a notebook's code has your rights. Answers are judged
    outside its process, also with new random inputs. A pasted solution passes,
    and so does a function that calls PyTorch, or hides that it calls fluxedu;
    marks are flagged where that is seen.
    """
    check_extra("lab", "jupyter_client")
    from fluxedu.course import grade as course
    from fluxedu.course.answers import printable

    for target in (csv, by_student):
        check_writable(target)
        if target is not None and os.path.realpath(target) in map(os.path.realpath, notebooks):
            raise fail(f"{printable(str(target))} is one of the notebooks; name another file.")
    marks: list[course.Mark] = []
    named, graded, status = course.students(notebooks), 0, 2
    grows = csv is not None and (csv.is_file() or not csv.exists())  # not a pipe, which is written to once
    files = course.fingerprint(notebooks)
    try:
        for path, student in named:
            if grows and marks and (problem := course.store_csv(marks, csv)):
                fail(problem)  # printed once; the rest of the class is still graded
                grows = False
            of_notebook = course.marks_of(path, student, timeout, notebook_timeout, memory)
            if course.fingerprint(notebooks) != files:
                status = fail(f"{path} has changed files of fluxedu or another notebook; restore them first.").exit_code
                break
            if not any(mark.exercise for mark in of_notebook):
                fail(of_notebook[0].message)  # printed; the other notebooks are still graded
                marks += of_notebook if os.path.exists(path) else []
                continue
            marks += of_notebook
            graded, status = graded + 1, 0
            typer.echo(course.summary(of_notebook))
    except KeyboardInterrupt:
        fail(f"interrupted; {graded} of {len(named)} notebooks are marked.")
        status = 2
    rows = course.class_table(marks)
    if len(rows) > 2:  # several students
        typer.echo(course.as_text(rows))
    if csv is not None and marks:
        if problem := course.store_csv(marks, csv):
            raise fail(problem)
        typer.echo(f"wrote {csv}")
    write_result(by_student, course.as_csv(rows))
    raise typer.Exit(status)
