"""One source, two editions: ``notebooks/source/NN-name.py`` becomes the student's notebook and the solved one.

    python -m fluxedu.course.build notebooks            # both editions of every notebook, executed
    python -m fluxedu.course.build notebooks 04 06      # of some

A source is jupytext's percent format. ``# %% exercise="rope.rotate"`` stands for a whole exercise: its head, the
stub or the solution, the check, the hints. A line that ends in ``# answer`` holds a prediction, which the student's
edition leaves open.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.errors import CourseError

EDITIONS = {"student": Path("."), "solved": Path("solved")}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ANSWER = re.compile(r",\s+(\"[^\"]*\"|\[[^\]]*\]|[^,()\[\]\"]+?)\s*\)  # answer$", re.MULTILINE)


def sources(folder: Path) -> list[Path]:
    """The sources of the notebooks in ``folder``, in order."""
    return sorted((folder / "source").glob("[0-9][0-9]-*.py"))


def edition(source: Path, which: str) -> NotebookNode:
    """A notebook made from ``source``, without outputs; ``which`` is ``student`` or ``solved``."""
    import jupytext

    cells = []
    for cell in jupytext.read(source, fmt="py:percent").cells:
        if "exercise" in cell.metadata:
            name = cell.metadata["exercise"]
            if name not in all_exercises():
                raise CourseError(f"{source.name} asks for the exercise {name!r}, which is not there.")
            cells += _exercise(all_exercises()[name], cell.source.strip(), which == "solved")
        elif cell.cell_type == "code":
            cells.append(new_code_cell(_predictions(cell.source, which == "solved")))
        else:
            cells.append(new_markdown_cell(cell.source))
    for i, cell in enumerate(cells):
        cell["id"] = f"{source.stem[:2]}-{i:03d}"
    told = {"kernelspec": KERNEL, "language_info": {"name": "python"}, "fluxedu": {"edition": which}}
    return new_notebook(cells=cells, metadata=told)


def _predictions(code: str, solved: bool) -> str:
    return re.sub(r"  # answer$", "", code, flags=re.M) if solved else ANSWER.sub(", ...)  # your answer for ...", code)


def _exercise(task: Exercise, words: str, solved: bool) -> list[NotebookNode]:
    """Head, code, check, and for the student hints and the folded solution."""
    dots = "●" * task.difficulty + "○" * (3 - task.difficulty)
    head = f"### Exercise · `{task.name}`\n\n{dots} · {task.minutes} minutes\n\n{task.task}"
    words = "\n".join(line.removeprefix("#").strip() for line in words.splitlines())
    mark = lambda role: {"fluxedu": {"exercise": task.name, "role": role}}  # noqa: E731
    cells = [
        new_markdown_cell(f"{head}\n\n{words}".strip()),
        new_code_cell(task.solved if solved else task.unsolved, metadata=mark("answer")),
        new_code_cell(f'passed = fe.check("{task.name}", {task.object})', metadata=mark("check")),
    ]
    if not solved:
        folded = [(f"Hint {i}", hint) for i, hint in enumerate(task.hints, 1)]
        folded.append(("Solution", f"```python\n{task.solved}\n```"))
        text = "\n".join(f"<details><summary>{name}</summary>\n\n{body}\n\n</details>" for name, body in folded)
        cells.append(new_markdown_cell(text))
    return cells


def executed(notebook: NotebookNode, folder: Path, timeout: int = 120) -> NotebookNode:
    """Run it in ``folder``, and keep of the outputs what a page needs and a comparison can hold."""
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}, store_widget_state=False
    )
    client.execute()
    notebook.metadata = {**notebook.metadata, "kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []) if notebook.metadata["fluxedu"]["edition"] == "solved" else []:
            if not behind_exercise(cell):
                _without_picture(output)
    return notebook


def behind_exercise(cell: NotebookNode) -> bool:
    """Does it show something only once an exercise is solved?"""
    return cell.cell_type == "code" and re.search(r"^\s*if passed:", cell.source, re.MULTILINE) is not None


def _without_picture(output: NotebookNode) -> None:
    """The solved edition keeps its texts, and pictures where the student's has none yet."""
    data = output.get("data", {})
    for kind in ("image/png", "image/jpeg"):
        data.pop(kind, None)
    if "text/html" in data:
        data["text/html"] = re.sub(r"data:image/png;base64,[\w+/=]+", "data:image/png;base64,", data["text/html"])


def build(folder: Path, numbers: list[str]) -> None:
    """Make and execute both editions of the notebooks whose numbers are given, of all if none is."""
    chosen = [s for s in sources(folder) if not numbers or s.name[:2] in numbers]
    if not chosen:
        raise CourseError(f"{folder}/source has no notebook {', '.join(numbers) or 'at all'}.")
    for source in chosen:
        for which, place in EDITIONS.items():
            (folder / place).mkdir(exist_ok=True)
            target = folder / place / f"{source.stem}.ipynb"
            nbformat.write(executed(edition(source, which), folder), target)
            print(f"{target}  {target.stat().st_size // 1024} KB")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python -m fluxedu.course.build FOLDER [NUMBER ...]")
    build(Path(sys.argv[1]), sys.argv[2:])
