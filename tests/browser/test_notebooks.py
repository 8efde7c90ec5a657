"""One explorer of every notebook that has one, in JupyterLab in a real browser, on the student's edition.

The explorers that test_explorers.py moves are left out here; the notebooks' cells are all run by nbval.
"""

import re
from pathlib import Path

import nbformat
import pytest
from test_explorers import MADE, content, moved

WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = [path for path in sorted(FOLDER.glob("[0-9][0-9]*-*.ipynb")) if WIDGET in path.read_text()]


def test_most_topics_have_an_explorer():
    assert len({path.name[:2] for path in NOTEBOOKS}) >= 14


def until_the_explorer(path):
    """The code of a notebook's cells up to the first that shows an explorer."""
    cells = []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            cells.append(cell.source)
            if any(WIDGET in output.get("data", {}) for output in cell.outputs):
                return cells
    raise AssertionError(f"{path.name} has no explorer")


def is_tested_elsewhere(path):
    return bool({*MADE, "attention"} & {*re.findall(r"widgets\.(\w+)", until_the_explorer(path)[-1])})


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if not is_tested_elsewhere(p)], ids=lambda p: p.stem)
def test_its_explorer_answers(run, path):
    tab = run(*until_the_explorer(path), name=path.stem)
    tab.locator(".fluxedu").wait_for()
    before = content(tab)
    parts = tab.locator(".fluxedu").locator(
        "[data-pointer]:not([data-pointer='']), input, g[tabindex='0'], select, .buttons[role='group'] > button"
    )
    assert any(moved(tab, parts.nth(i)) != before for i in range(min(parts.count(), 3)))  # the first that changes it
