"""What every notebook of the course uses: its settings, the diagram of where we are, and comparisons.

course.begin()
course.where(pipe, "double")
course.compare("your block and the library's", mine, theirs)
"""

from __future__ import annotations

import logging

import torch
from IPython import get_ipython
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from fluxedu.errors import CourseError, checked, first_of
from fluxedu.instruments.parts import parts
from fluxedu.plots import hide_axes
from fluxedu.progress import disable_bars
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.architecture import diagram
from fluxedu.widgets.panels import draw_arrows

FIGURE_STYLE = {
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
    """Set the style of figures and the seed, and hide progress bars. Returns the device, a GPU if there is one."""
    if (shell := get_ipython()) is not None:
        shell.run_line_magic("matplotlib", "inline")
    # a progress bar is an output that depends on the machine's speed, and stored outputs are compared
    disable_bars()
    rcParams.update(FIGURE_STYLE)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@checked(CourseError)
def where(pipe: FluxPipeline, *names: str) -> Figure:
    """The model's diagram with some parts highlighted: ``where(pipe, "clip", "single.0")``.

    ``"double"`` and ``"single"`` highlight all blocks of that kind.
    """
    all_parts = parts(pipe)
    known = {part.name for part in all_parts} | {"double", "single"}
    if unknown := [name for name in names if name not in known]:
        raise CourseError(f"the model has no part {first_of(unknown)}; its parts are {', '.join(sorted(known))}.")
    boxes, lines, (width, height) = diagram(all_parts)
    fig = Figure(figsize=(6.4, 6.4 * height / width))
    ax = hide_axes(fig.add_axes((0, 0, 1, 1)))
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    draw_arrows(ax, lines, "0.6")
    for part, (label, x, y, w, h, colour) in zip(all_parts, boxes, strict=True):
        highlighted = part.name in names or part.name.split(".")[0] in names
        face, edge, text = (colour, colour, "white") if highlighted else ("0.94", "0.75", "0.45")
        ax.add_patch(
            FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=3", facecolor=face, edgecolor=edge)
        )
        ax.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=7, color=text)
    return fig


# ---------------------------------------------------------------- comparisons


def compare(what: str, mine: Tensor, theirs: Tensor, within: float = 1e-5) -> None:
    """Print the relative difference ``|mine - theirs| / |theirs|`` of two tensors of one shape, and whether it is at
    most ``within``. Rounding differs between machines, so two runs of a notebook are compared without this number.
    """
    if mine.shape != theirs.shape:
        print(f"{what}: the shapes differ, {list(mine.shape)} and {list(theirs.shape)}")
        return
    mine, theirs = mine.detach().double().cpu(), theirs.detach().double().cpu()
    difference = float((mine - theirs).norm() / theirs.norm().clamp(min=1e-300))
    meaning = (
        f"rounding; at most {within:g}" if difference <= within else f"more than rounding, which is below {within:g}"
    )
    print(f"{what}: relative difference {difference:.0e} ({meaning})")
