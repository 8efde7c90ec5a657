"""Pictures beside each other: the steps of a run, and a run beside another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from fluxedu.errors import InstrumentError
from fluxedu.plots.canvas import array, figure, pixels, quiet


def film_strip(rows: Mapping[str, Sequence], times: Sequence[float] | None = None, most: int = 8) -> Figure:
    """The steps of a run from left to right: a row a name, e.g. the states and the pictures foreseen, decoded.

    rows: name -> pictures (PIL, or tensors ``[3, H, W]`` in [-1, 1]), as many in each · times: one a picture, written
    above · of more than ``most`` pictures, evenly chosen ones are shown.
    """
    counts = {len(pictures) for pictures in rows.values()}
    if len(counts) != 1 or 0 in counts:
        raise InstrumentError(f"every row of a film strip needs equally many pictures, not {sorted(counts)}.")
    count = counts.pop()
    chosen = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    fig, axes = figure(len(rows), len(chosen), (1.3, 1.3))
    for i, (name, pictures) in enumerate(rows.items()):
        for j, k in enumerate(chosen):
            quiet(axes[i, j]).imshow(pixels(pictures[k]))
            if i == 0 and times is not None:
                axes[i, j].set_title(f"t = {float(times[k]):.2f}", fontsize=8)
        axes[i, 0].set_ylabel(name, fontsize=9)
    return fig


def side_by_side(first, second, names: tuple[str, str] = ("before", "after")) -> Figure:
    """Two pictures and where they differ: the mean absolute difference over colours, black where there is none."""
    a, b = pixels(first), pixels(second)
    if a.shape != b.shape:
        raise InstrumentError(f"the pictures have {a.shape[:2]} and {b.shape[:2]} pixels; they must be alike.")
    fig, ((one, two, between),) = figure(1, 3, (2.2, 2.2))
    for ax, picture, name in ((one, a, names[0]), (two, b, names[1])):
        quiet(ax).imshow(picture)
        ax.set_title(name, fontsize=10)
    image = quiet(between).imshow(array(np.abs(a - b).mean(-1)), cmap="magma", vmin=0, vmax=1)
    between.set_title("difference", fontsize=10)
    fig.colorbar(image, ax=between, shrink=0.8).ax.tick_params(labelsize=7)
    return fig
