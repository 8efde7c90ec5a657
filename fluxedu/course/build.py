"""Building the notebooks: ``notebooks/source/NN-name.py`` becomes a student's and a solved edition.

    python -m fluxedu.course.build notebooks            # build and run both editions of every notebook
    python -m fluxedu.course.build notebooks 04 06      # only these

A source is in jupytext's percent format. A cell ``# %% exercise="rope.rotate"`` stands for a whole exercise: its task,
the starter code or the solution, the check and the hints. An exercise that no cell names stands where its own ``after``
says. A line that ends in ``# answer`` contains a prediction, which the student's edition replaces by ``...``.

START.ipynb, which ``fluxedu lab`` opens first, is not a part of the course: it has no number and no solved edition.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.errors import CheckpointError, CourseError
from fluxedu.files import atomic_path

EDITIONS = {"student": Path("."), "solved": Path("solved")}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
ANSWER = r",\s+(\"[^\"]*\"|\[[^\]]*\]|[^,()\[\]\"]+?),?\s*\)  # answer$"
WIDGET = "application/vnd.jupyter.widget-view+json"
NUMBERED = "[0-9][0-9]*-*"  # "13-ablation", "13b-patching"
START = "START"


# ---------------------------------------------------------------- from source to notebook


def sources(folder: Path) -> list[Path]:
    """The sources of the notebooks in ``folder``, in order."""
    return sorted((folder / "source").glob(f"{NUMBERED}.py"))


def notebook_number(path: Path) -> str:
    """The number of a notebook or its source: ``"13b"`` for ``13b-patching.py``."""
    return path.stem.partition("-")[0]


def edition(source: Path, which: str) -> NotebookNode:
    """The ``student`` or the ``solved`` edition of a source, without outputs."""
    import jupytext

    solved = which == "solved"
    source_cells = jupytext.read(source, fmt="py:percent").cells
    below = _placed_by_text(source, source_cells)
    assign = "passed = " if any(re.search(r"(?<!\.)\bpassed\b", cell.source) for cell in source_cells) else ""
    cells = []
    for i, cell in enumerate(source_cells):
        if "exercise" in cell.metadata:
            name = cell.metadata["exercise"]
            if name not in all_exercises():
                raise CourseError(f"{source.name} refers to an exercise {name!r}, which does not exist.")
            cells += _exercise_cells(all_exercises()[name], solved, cell.source.strip(), assign)
        elif cell.cell_type == "code":
            marked, replacement = ("  # answer$", "") if solved else (ANSWER, ", ...)  # your answer for ...")
            cells.append(new_code_cell(re.sub(marked, replacement, cell.source, flags=re.M)))
        else:
            cells.append(new_markdown_cell(cell.source))
        for task in below.get(i, []):
            cells += _exercise_cells(task, solved)
    for i, cell in enumerate(cells):
        cell["id"] = f"{notebook_number(source)}-{i:03d}"
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}, "fluxedu": {"edition": which}}
    return new_notebook(cells=cells, metadata=metadata)


def _placed_by_text(source: Path, cells: list[NotebookNode]) -> dict[int, list[Exercise]]:
    """The notebook's exercises that no cell of the source names, by the index of the cell that they stand below."""
    names = [cell.metadata.get("exercise") for cell in cells]
    below: dict[int, list[Exercise]] = {}
    for task in all_exercises().values():
        if task.notebook != notebook_number(source) or task.name in names:
            continue
        matches = [name == task.after or task.after in cell.source for name, cell in zip(names, cells, strict=True)]
        if sum(matches) != 1:
            raise CourseError(
                f"the exercise {task.name!r} needs as `after` the name of an exercise in {source.name}, or a text of "
                f"exactly one cell; {task.after!r} fits {sum(matches)} cells."
            )
        below.setdefault(matches.index(True), []).append(task)
    return below


def _exercise_cells(task: Exercise, solved: bool, introduction: str = "", assign: str = "") -> list[NotebookNode]:
    """Task, code and check; in the student's edition also the hints and the folded solution.

    ``assign`` comes before the check, in a source whose cells read the verdict of the exercise above them.
    """
    dots = "●" * task.difficulty + "○" * (3 - task.difficulty)
    head = f"### Exercise · `{task.name}`\n\n{dots} · {task.minutes} minutes\n\n{task.task}"
    introduction = "\n".join(line.removeprefix("#").strip() for line in introduction.splitlines())
    code = task.solution_code if solved else task.starter_code
    check = f'{assign}fe.check("{task.name}", {task.answer_name})'
    cells = [
        new_markdown_cell(f"{head}\n\n{introduction}".strip()),
        new_code_cell(code, metadata={"fluxedu": {"exercise": task.name, "role": "answer"}}),
        new_code_cell(check, metadata={"fluxedu": {"exercise": task.name, "role": "check"}}),
    ]
    if not solved:
        folded = [(f"Hint {i}", hint) for i, hint in enumerate(task.hints, 1)]
        folded.append(("Solution", f"```python\n{task.solution_code}\n```"))
        text = "\n".join(f"<details><summary>{name}</summary>\n\n{body}\n\n</details>" for name, body in folded)
        cells.append(new_markdown_cell(text))
    return cells


def execute(notebook: NotebookNode, folder: Path, timeout: int = 120) -> NotebookNode:
    """Run a notebook in ``folder`` and remove the parts of its outputs that are not worth storing.

    The solved edition stores texts only, except where the student's edition has no image yet.
    """
    from nbclient import NotebookClient

    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=timeout, resources=where, store_widget_state=False).execute()
    notebook.metadata = {**notebook.metadata, "kernelspec": KERNEL, "language_info": {"name": "python"}}
    solved = notebook.metadata["fluxedu"]["edition"] == "solved"
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if solved and not needs_solution(cell):
            for output in cell.get("outputs", []):
                _remove_images(output.get("data", {}))
    return notebook


def needs_solution(cell: NotebookNode) -> bool:
    """True for a cell that shows something only after an exercise has been solved."""
    return (
        cell.cell_type == "code" and re.search(r"^\s*if (passed:|fe\.passed\()", cell.source, re.MULTILINE) is not None
    )


def _remove_images(data: dict) -> None:
    data.pop("image/png", None)
    data.pop("image/jpeg", None)
    if "text/html" in data:
        data["text/html"] = re.sub(r"data:image/png;base64,[\w+/=]+", "data:image/png;base64,", data["text/html"])


def build(folder: Path, numbers: list[str]) -> None:
    """Build and run both editions of the notebooks with these numbers, or of all notebooks."""
    available = [folder / "source" / f"{START}.py", *sources(folder)]
    chosen = [source for source in available if not numbers or notebook_number(source) in numbers]
    if not chosen:
        raise CourseError(f"{folder}/source has no notebook {', '.join(numbers) or 'at all'}.")
    for source in chosen:
        for which, place in EDITIONS.items():
            if source.stem == START and which == "solved":
                continue
            (folder / place).mkdir(exist_ok=True)
            target = folder / place / f"{source.stem}.ipynb"
            nbformat.write(execute(edition(source, which), folder), target)
            print(f"{target}  {target.stat().st_size // 1024} KB")


# ---------------------------------------------------------------- copies to work in


def notebooks_folder() -> Path:
    """The folder of the students' notebooks: in the installed package, or in the repository."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "course" / "notebooks", package.parent / "notebooks"):
        if any(folder.glob(f"{NUMBERED}.ipynb")):
            return folder
    raise CourseError("this installation does not contain the course's notebooks; clone the repository instead.")


def copy_notebooks(folder: Path) -> tuple[list[str], list[str]]:
    """Copy the notebooks to ``folder``, those of the course without outputs. Returns the names (copied, left as they
    are).

    A notebook that exists in ``folder`` is never replaced, and a copy is either complete or not there. Outputs are
    removed because students should make their predictions before they see the measured values. Raises CourseError if
    nothing can be written.
    """
    copied, existing = [], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        notebooks = notebooks_folder()
        for notebook in [notebooks / f"{START}.ipynb", *sorted(notebooks.glob(f"{NUMBERED}.ipynb"))]:
            target = folder / notebook.name
            is_new = not target.exists() and _write_copy(notebook, target)
            (copied if is_new else existing).append(notebook.name)
    except OSError as error:
        raise CourseError(f"the notebooks cannot be copied to {folder}: {error.strerror or error}.") from None
    return copied, existing


def _write_copy(notebook: Path, target: Path) -> bool:
    """Write a copy without outputs. False if another process has written the target first.

    START keeps its static figures, which show what its cells will do; widgets need a kernel.
    """
    content = json.loads(notebook.read_text("utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            figures = [out for out in cell["outputs"] if WIDGET not in out.get("data", {})]
            cell["outputs"] = figures if notebook.stem == START else []
            cell["execution_count"] = None
    try:
        with atomic_path(target) as part:
            part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except CheckpointError:
        if not target.exists():
            raise
        return False
    return True


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m fluxedu.course.build FOLDER [NUMBER ...]")
    build(Path(sys.argv[1]), sys.argv[2:])
