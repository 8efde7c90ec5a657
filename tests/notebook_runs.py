"""Notebooks run from a test: the solved ones, and what each cell that failed raised."""

from pathlib import Path

from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def solved(of: tuple[str, ...] | None = None) -> list[Path]:
    """The solved editions, all of them or those whose numbers are in ``of``."""
    return [
        path
        for path in sorted((NOTEBOOKS / "solved").glob("*.ipynb"))
        if of is None or path.name.partition("-")[0] in of
    ]


def failures(notebook: NotebookNode, timeout: int) -> list[str]:
    """Run it to its end, in place: what each failing cell raised."""
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=timeout, allow_errors=True, resources=where, store_widget_state=False).execute()
    return [
        f"{cell.id}: {out.ename}: {out.evalue}"
        for cell in notebook.cells
        for out in cell.get("outputs", [])
        if out.output_type == "error"
    ]
