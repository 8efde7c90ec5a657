"""The course's notebooks as files: where they are, and a copy of them for a reader to work in."""

from __future__ import annotations

import json
from pathlib import Path

from fluxedu.errors import CheckpointError, CourseError
from fluxedu.files import atomic_path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped() -> Path:
    """The folder of the student's notebooks: inside an installed package, or in the repository it is run from."""
    for folder in (PACKAGE / "course" / "notebooks", PACKAGE.parent / "notebooks"):
        if any(folder.glob("[0-9][0-9]-*.ipynb")):
            return folder
    raise CourseError("the course's notebooks are not installed with this package; clone the repository instead.")


def unrun(notebook: str) -> str:
    """A notebook without its outputs: what is measured is not to be seen before it is foretold."""
    told = json.loads(notebook)
    for cell in told["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def _copy(notebook: Path, target: Path) -> bool:
    """Write a copy, or, where another process was first, leave what is there and say False."""
    try:
        with atomic_path(target) as part:
            part.write_text(unrun(notebook.read_text("utf-8")), "utf-8")
    except CheckpointError:
        if not target.exists():
            raise
        return False
    return True


def copied(folder: Path) -> tuple[list[str], list[str]]:
    """Copy the notebooks that ``folder`` has not, and leave those it has as they are: (copied, kept) by name.

    A copy is whole or not there at all. Raises CourseError where nothing can be written.
    """
    new, kept = [], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for notebook in sorted(shipped().glob("[0-9][0-9]-*.ipynb")):
            target = folder / notebook.name
            (kept if target.exists() or not _copy(notebook, target) else new).append(notebook.name)
    except OSError as error:
        raise CourseError(f"the notebooks cannot be copied to {folder}: {error.strerror or error}.") from None
    return new, kept
