"""FLUXEDU_MODEL=dev switches every notebook to the official weights: the solved editions run on a simulated dev.

What they print is not compared: a network of random numbers draws nothing. What they record is counted as large as it
is at full size, so a cell that would pass fe.record's budget there passes it here. Two quick ones always, all of them
with FLUXEDU_DEV_LAYOUT=1.
"""

import os
from pathlib import Path

import nbformat
import pretend_dev
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from notebook_runs import failures, solved

HERE = Path(__file__).resolve().parent
QUICK = ("00", "09")
ALL = "FLUXEDU_DEV_LAYOUT" in os.environ
SOLVED = solved(None if ALL else QUICK)

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


def on_dev(notebook: NotebookNode) -> list[str]:
    """Run it: what each failing cell raised."""
    notebook.cells = [new_code_cell(BEFORE), *notebook.cells]
    return failures(notebook, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
def test_it_runs_on_dev(dev, path):
    failed = on_dev(nbformat.read(path, 4))
    assert not failed, "\n".join(failed)


def test_a_cell_for_the_miniature_alone_is_found(dev):
    """So that the test above can fail: it is dev that is opened, and what fits the miniature only fails on it."""
    cells = {
        "dev": "import torch, fluxedu as fe; pipe = fe.load(); c = pipe.flux.config; assert (c.head_dim, c.axes_dim, "
        "c.guidance_embed, pipe.dtype) == (128, (16, 56, 56), True, torch.bfloat16)",
        "dtype": "pipe.autoencoder.encode(torch.zeros(1, 3, 32, 32))",
        "head": "from fluxedu.models.attention import rotate; rotate(torch.zeros(1, 5, 64, 32), pipe.flux.rope("
        "torch.zeros(32, 3), torch.zeros(32, 3)))",
        "numpy": "pipe.flux.img_in.weight.numpy()",
        "one-step": "with fe.record('double.*.img', 'double.*.txt', 'single.*.x', steps=3): pipe('', progress=False)",
        "bytes": "with fe.record('double.*.img', 'double.*.txt', 'single.*.x', steps=[3, 4]): pipe('', progress=False)",
    }
    failed = on_dev(new_notebook(cells=[new_code_cell(code, id=name) for name, code in cells.items()]))
    assert [one.split(": ")[:2] for one in failed] == [
        ["dtype", "RuntimeError"],
        ["head", "RuntimeError"],
        ["numpy", "TypeError"],
        ["bytes", "BudgetError"],
    ]
