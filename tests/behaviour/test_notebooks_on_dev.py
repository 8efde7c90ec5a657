"""FLUXEDU_MODEL=dev switches every notebook to the official weights: the solved editions run, on a pretend FLUX.1-dev.

What they print is not compared: a network of random numbers draws nothing. What they record is counted as large as it
is at full size, so a cell that would pass fe.record's budget there passes it here. Two quick ones always, all of them
with FLUXEDU_DEV_LAYOUT=1.
"""

import os
from pathlib import Path

import nbformat
import pretend_dev
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

HERE = Path(__file__).resolve().parent
NOTEBOOKS = HERE.parents[1] / "notebooks"
QUICK = ("00", "09")
ALL = "FLUXEDU_DEV_LAYOUT" in os.environ
SOLVED = [path for path in sorted((NOTEBOOKS / "solved").glob("*.ipynb")) if ALL or path.name[:2] in QUICK]

BEFORE = (
    f"import sys; sys.path.append({str(HERE)!r}); import full_size, pretend_dev; "
    "pretend_dev.make_quick(); full_size.measure()"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hugging Face cache with FLUX.1-dev in it."""
    folder = tmp_path_factory.mktemp("hub")
    pretend_dev.put_in(folder)
    return folder


@pytest.fixture
def dev(hub, monkeypatch):
    """What a reader sets to have the official weights."""
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("FLUXEDU_MODEL", "dev")


def failures(notebook: NotebookNode) -> list[str]:
    """Run it: what each failing cell raised."""
    notebook.cells = [new_code_cell(BEFORE), *notebook.cells]
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=900, allow_errors=True, resources=where, store_widget_state=False).execute()
    return [
        f"{cell.id}: {out.ename}: {out.evalue}"
        for cell in notebook.cells
        for out in cell.get("outputs", [])
        if out.output_type == "error"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
def test_it_runs_on_dev(dev, path):
    failed = failures(nbformat.read(path, 4))
    assert not failed, "\n".join(failed)


def test_a_cell_for_the_miniature_alone_is_found(dev):
    """So that the test above can fail: it is dev that is opened, and what fits the miniature only fails on it."""
    cells = {
        "dev": "import torch, fluxedu as fe; pipe = fe.load(); c = pipe.flux.config; assert (c.head_dim, c.axes_dim, "
        "c.guidance_embed, pipe.dtype) == (128, (16, 56, 56), True, torch.bfloat16)",
        "dtype": "pipe.autoencoder.encode(torch.zeros(1, 3, 32, 32))",
        "head": "from fluxedu.models.rope import rotate; rotate(torch.zeros(1, 5, 64, 32), pipe.flux.rope("
        "torch.zeros(32, 3), torch.zeros(32, 3)))",
        "numpy": "pipe.flux.img_in.weight.numpy()",
        "one-step": "with fe.record('double.*.img', 'double.*.txt', 'single.*.x', steps=3): pipe('', progress=False)",
        "bytes": "with fe.record('double.*.img', 'double.*.txt', 'single.*.x', steps=[3, 4]): pipe('', progress=False)",
    }
    failed = failures(new_notebook(cells=[new_code_cell(code, id=name) for name, code in cells.items()]))
    assert [one.split(": ")[:2] for one in failed] == [
        ["dtype", "RuntimeError"],
        ["head", "RuntimeError"],
        ["numpy", "TypeError"],
        ["bytes", "BudgetError"],
    ]
