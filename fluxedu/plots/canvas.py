"""What all pictures share: a figure that no window opens, quiet axes, and what goes in turned to arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fluxedu.errors import InstrumentError
from fluxedu.instruments.named import Named

HEAT = "magma"  # of maps: dark is little, and it reads in grey as well
TWO_SIDED = "RdBu_r"
#: of the kinds of part in the architecture's diagram
SHADES = {"text": "#9333ea", "time": "#d97706", "flow": "#2563eb", "image": "#059669"}


def figure(rows: int, columns: int, cell: tuple[float, float] = (1.5, 1.5), **how) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows x columns`` cells of so many inches; axes ``[rows, columns]``, always two-dimensional."""
    fig = Figure(figsize=(cell[0] * columns + 0.4, cell[1] * rows + 0.4), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **how)


def quiet(ax: Axes) -> Axes:
    """No ticks, no frame: for pictures."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def arrows(ax: Axes, ways: Iterable[Sequence[float]], color: str) -> None:
    """Thin arrows ``(x, y, x, y, ...)``: with corners where there are more than two places, the head at the last."""
    for way in ways:
        *corners, last_but_one, last = zip(way[::2], way[1::2], strict=True)
        ax.plot(*zip(*corners, last_but_one, strict=True), color=color, linewidth=0.8, solid_joinstyle="round")
        arrow = {"arrowstyle": "->", "color": color, "linewidth": 0.8, "shrinkA": 0}
        ax.annotate("", last, last_but_one, arrowprops=arrow)


def array(value) -> np.ndarray:
    """A tensor, a Named or an array as float numbers."""
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, dtype=float)


def pixels(image) -> np.ndarray:
    """A PIL image, or a tensor ``[3, H, W]`` or ``[1, 3, H, W]`` in [-1, 1], as ``[H, W, 3]`` in [0, 1]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"), dtype=float) / 255
    x = array(image)
    x = x[0] if x.ndim == 4 and len(x) == 1 else x
    if x.ndim != 3 or x.shape[0] != 3:
        raise InstrumentError(f"a picture is a PIL image or a tensor [3, H, W], not {list(x.shape)}.")
    return np.clip(x.transpose(1, 2, 0) / 2 + 0.5, 0, 1)


def wanted(value: Named, *axes: str) -> Named:
    """Refuse what has other axes."""
    if not isinstance(value, Named) or value.axes != axes:
        have = ", ".join(value.axes) if isinstance(value, Named) else type(value).__name__
        raise InstrumentError(f"this picture is of a Named with axes {', '.join(axes)}, not of {have}.")
    return value


def labels(value: Named, axis: str) -> list:
    """The labels of an axis; its numbers if it has none."""
    return value.coords.get(axis) or list(range(value.sizes[axis]))
