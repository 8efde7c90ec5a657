"""What every notebook of the course uses: its settings, the diagram of where we are, and scored predictions.

course.begin()
course.where(pipe, "double")
guess = fe.predict("How many numbers does the latent have?", 4096)
...
guess.against(out.latents.numel())
course.compare("your block and the library's", mine, theirs)
fe.score()
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

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


# ---------------------------------------------------------------- predictions

_predictions: dict[str, Prediction] = {}


class Prediction:
    """An answer given before the measurement: a number, a word, or a list of these."""

    def __init__(self, question: str, answer: Any):
        self.question, self.answer, self.points = question, answer, None

    def against(self, measured: Any, within: float = 0.1) -> None:
        """Compare the prediction with the measured value, print the result and store the points.

        A number scores 1 if its relative error is at most ``within``, and 0.5 if it is right within a factor of two. A
        word is right or wrong. A list scores the share of its elements that are right.
        """
        if self.answer is ...:
            print(f"no prediction was made · measured: {format_value(measured)}")
            return
        self.points = points(self.answer, measured, within)
        result = "right" if self.points == 1 else "wrong" if self.points == 0 else "partly right"
        print(f"{result} · predicted: {format_value(self.answer)} · measured: {format_value(measured)}")

    def _ipython_display_(self) -> None:
        """A prediction shows nothing until it is compared."""


def points(answer: Any, measured: Any, within: float) -> float:
    """The score of an answer, from 0 to 1. Raises CourseError if the two cannot be compared."""
    if isinstance(measured, str):
        return float(str(answer).strip().casefold() == measured.strip().casefold())
    if isinstance(measured, bool):
        return float(answer is measured)
    if isinstance(measured, Sequence):
        if isinstance(answer, str):  # "yes, no, no" for ["yes", "no", "no"]
            answer = re.split(r"[\s,/]+", answer.strip())
        if not isinstance(answer, Sequence) or len(answer) != len(measured):
            raise CourseError(f"the answer must have {len(measured)} parts; {answer!r} does not.")
        return sum(points(a, b, within) for a, b in zip(answer, measured, strict=True)) / len(measured)
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        raise CourseError(f"the answer must be a number, not {answer!r}.")
    if math.isclose(answer, measured, rel_tol=within, abs_tol=1e-12):
        return 1.0
    return 0.5 if answer * measured > 0 and 0.5 <= answer / measured <= 2 else 0.0


def format_value(value: Any) -> str:
    """Numbers with three digits, so that the page is the same on every machine."""
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(format_value(v) for v in value)


def predict(question: str, answer: Any) -> Prediction:
    """Store an ``answer`` before the run; ``...`` means none. A second answer to the same question replaces it."""
    if not isinstance(question, str) or not question.strip():
        raise CourseError(f"a prediction needs a question as text, not {question!r}.")
    _predictions[question] = Prediction(question, answer)
    return _predictions[question]


def score() -> None:
    """Print how many points the predictions of this session have scored."""
    scored = [p.points for p in _predictions.values() if p.points is not None]
    made = sum(p.answer is not ... for p in _predictions.values())
    if made:
        print(f"{sum(scored):g} of {len(_predictions)} points for {made} prediction{'s' * (made != 1)}")
    else:
        print(f"no predictions were made ({len(_predictions)} were asked for)")
