"""Attention over the picture: one map, a word's maps block by block, all heads at once."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fluxedu.errors import InstrumentError
from fluxedu.instruments.named import Named
from fluxedu.plots.canvas import HEAT, array, figure, labels, pixels, quiet, wanted


def _lay(ax: Axes, image, weights: np.ndarray, most: float | None = None) -> None:
    """A map over a grey picture: opaque where it is strong."""
    grey = pixels(image).mean(-1)
    extent = (0, grey.shape[1], grey.shape[0], 0)
    ax.imshow(grey, cmap="gray", vmin=-0.3, vmax=1.3, extent=extent)
    most = most or max(weights.max(), 1e-12)
    alpha = np.clip(weights / most, 0, 1) ** 0.7 * 0.9
    ax.imshow(weights, cmap=HEAT, vmin=0, vmax=most, alpha=alpha, extent=extent, interpolation="nearest")


def overlay(image, weights, title: str = "") -> Figure:
    """One map ``[rows, columns]`` of patches over the picture, with its scale."""
    fig, ((ax,),) = figure(1, 1, (3.4, 3.0))
    weights = array(weights)
    if weights.ndim != 2:
        raise InstrumentError(f"one map is [rows, columns], not {list(weights.shape)}.")
    _lay(quiet(ax), image, weights)
    ax.set_title(title, fontsize=10)
    bar = fig.colorbar(ax.images[-1], ax=ax, shrink=0.8)
    bar.solids.set_alpha(1)
    bar.set_label("share of a patch's attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return fig


def word_maps(maps: Named, image) -> Figure:
    """:func:`fluxedu.instruments.lenses.word_maps` as a grid: a row a word, a column a block, over the picture.

    Each row has its own scale, so that blocks can be compared; a word's strongest map is all bright.
    """
    wanted(maps, "block", "word", "row", "column")
    words, blocks, table = labels(maps, "word"), labels(maps, "block"), array(maps)
    fig, axes = figure(len(words), len(blocks) + 1, (1.25, 1.25))
    for i, word in enumerate(words):
        quiet(axes[i, 0]).imshow(pixels(image))
        axes[i, 0].set_ylabel(word, fontsize=10)
        for j, block in enumerate(blocks):
            ax = quiet(axes[i, j + 1])
            _lay(ax, image, table[j, i], table[:, i].max())
            if i == 0:
                ax.set_title(block, fontsize=8)
    return fig


def head_gallery(heads: Named, image=None) -> Figure:
    """:func:`fluxedu.instruments.lenses.head_gallery` as a grid: a row a block, a column a head, own scales."""
    wanted(heads, "block", "head", "row", "column")
    blocks, count, table = labels(heads, "block"), heads.sizes["head"], array(heads)
    fig, axes = figure(len(blocks), count, (1.0, 1.0))
    for i, block in enumerate(blocks):
        for j in range(count):
            ax = quiet(axes[i, j])
            if image is None:
                ax.imshow(table[i, j], cmap=HEAT, vmin=0)
            else:
                _lay(ax, image, table[i, j])
            if i == 0:
                ax.set_title(f"head {j}", fontsize=8)
        axes[i, 0].set_ylabel(block, fontsize=8)
    return fig
