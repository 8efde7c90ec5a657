"""Matplotlib figures that a notebook shows although they do not belong to pyplot."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from matplotlib import figure
from matplotlib.axes import Axes


class Figure(figure.Figure):
    """matplotlib's Figure, which Jupyter shows as the value of a cell. Of a plain Figure it shows only the ``repr``,
    until pyplot is imported; pyplot's own way of showing it then comes first, so it is never shown twice.
    """

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png", bbox_inches="tight")  # as pyplot's inline backend does
        return png.getvalue()


def new_figure(rows: int, columns: int, cell: tuple[float, float] = (1.5, 1.5), **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows x columns`` cells, each ``cell`` inches wide and high, and its axes ``[rows, columns]``.

    The figure does not belong to pyplot, so no window opens. ``kwargs``: as for ``Figure.subplots``.
    """
    fig = Figure(figsize=(cell[0] * columns + 0.4, cell[1] * rows + 0.4), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **kwargs)
    for ax in axes.flat:
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_fontsize(8)
        ax.yaxis.label.set_fontsize(8)
    return fig, axes


def hide_axes(ax: Axes) -> Axes:
    """Remove ticks and frame, as for an image; returns ``ax``."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return ax
