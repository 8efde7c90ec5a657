"""Every notebook runs on a GPU with no change: the solved editions, on a simulated one.

Two quick ones always, all of them with FLUXEDU_PRETEND_GPU=1.
"""

import ast
import os
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from notebook_runs import failures, solved

HERE = Path(__file__).resolve().parent
QUICK = ("00", "09")
ALL = "FLUXEDU_PRETEND_GPU" in os.environ
SOLVED = solved(None if ALL else QUICK)

BEFORE = (
    f"import sys; sys.path.append({str(HERE)!r}); import pretend_gpu; pretend_gpu.answers = pretend_gpu.switch_on()"
)
AFTER = "import pretend_gpu; print(dict(pretend_gpu.answers))"


def on_the_gpu(notebook: NotebookNode) -> tuple[list[str], Counter]:
    """Run it: what each failing cell raised, and how often a module of each class answered on which device."""
    notebook.cells = [new_code_cell(BEFORE), *notebook.cells, new_code_cell(AFTER)]
    failed = failures(notebook, timeout=300)
    return failed, Counter(ast.literal_eval(notebook.cells[-1].outputs[0].text))


@pytest.mark.slow
@pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
def test_it_runs_on_a_gpu(path):
    failed, answers = on_the_gpu(nbformat.read(path, 4))
    assert not failed, "\n".join(failed)
    blocks = ("DoubleStreamBlock", "ResnetBlock", "CLIPLayer")  # of the transformer, the autoencoder and CLIP
    on, off = (sum(answers[name, device] for name in blocks) for device in ("cuda", "cpu"))
    assert on > 10 * off, f"the networks' blocks answered {on} times on the GPU and {off} times on the CPU"


def test_a_cell_that_mixes_devices_is_found():
    """So that the test above can fail: a mixture, a tensor for numpy, and a module that was left behind."""
    cells = {
        "fine": "import torch; x = torch.ones(3, device='cuda'); (x + 1).cpu().numpy()",
        "mixed": "x + torch.ones(3)",
        "numpy": "x.numpy()",
        "left": "torch.nn.Linear(3, 3)(torch.ones(3))",
    }
    failed, answers = on_the_gpu(new_notebook(cells=[new_code_cell(code, id=name) for name, code in cells.items()]))
    assert [one.split(": ")[:2] for one in failed] == [["mixed", "RuntimeError"], ["numpy", "TypeError"]]
    assert answers == {("Linear", "cpu"): 1}
