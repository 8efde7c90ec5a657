"""Where in the model a notebook is: the diagram with its parts marked; and the look of its figures."""

from __future__ import annotations

import logging
from functools import partialmethod

import torch
from IPython import get_ipython
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from tqdm.auto import tqdm

from fluxedu.errors import CourseError
from fluxedu.instruments.parts import parts
from fluxedu.plots.canvas import arrows, quiet
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.diagram import diagram

#: Okabe and Ito's colours, which the colour-blind can tell apart
LOOK = {
    "figure.dpi": 90,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "image.interpolation": "nearest",
}


def begin(seed: int = 0) -> torch.device:
    """Set the look of figures and the seed, silence progress bars; give back the device, a GPU where there is one."""
    if (shell := get_ipython()) is not None:
        shell.run_line_magic("matplotlib", "inline")
    # A progress bar is an output, and outputs are compared: a page must be the same on a slow machine.
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    rcParams.update(LOOK)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def where(pipe: FluxPipeline, *names: str) -> Figure:
    """The model's diagram with the named parts marked: ``where(pipe, "clip", "single.0")``; ``"double"`` marks all."""
    those = parts(pipe)
    known = {part.name for part in those} | {"double", "single"}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CourseError(f"the model has no part {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    boxes, lines, (width, height) = diagram(those)
    fig = Figure(figsize=(6.4, 6.4 * height / width))
    ax = quiet(fig.add_axes((0, 0, 1, 1)))
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    arrows(ax, lines, "0.6")
    for part, (label, x, y, w, h, colour) in zip(those, boxes, strict=True):
        here = part.name in names or part.name.split(".")[0] in names
        ax.add_patch(
            FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=3", facecolor=colour if here else "0.94",
                           edgecolor=colour if here else "0.75")
        )  # fmt: skip
        ax.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=7, color="white" if here else "0.45")
    return fig
