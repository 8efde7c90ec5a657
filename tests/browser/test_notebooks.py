"""A notebook of the course in JupyterLab in a real browser, up to its explorer, on the student's edition.

One is enough: nbval runs the cells of all notebooks, and test_explorers.py moves every explorer.
"""

from pathlib import Path

import nbformat
from test_explorers import content, moved

WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def test_most_topics_have_an_explorer():
    assert len({path.name[:2] for path in FOLDER.glob("[0-9]*-*.ipynb") if WIDGET in path.read_text()}) >= 14


def until_the_explorer(path):
    """The code of a notebook's cells up to the first that shows an explorer."""
    cells = []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            cells.append(cell.source)
            if any(WIDGET in output.get("data", {}) for output in cell.outputs):
                return cells
    raise AssertionError(f"{path.name} has no explorer")


def test_its_explorer_answers(run):
    tab = run(*until_the_explorer(FOLDER / "08b-what-single-blocks-add.ipynb"))
    tab.locator(".fluxedu").wait_for()
    before = content(tab)
    assert moved(tab, tab.locator(".fluxedu select").first) != before
