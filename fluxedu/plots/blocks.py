"""Depth against time: how much each block adds, and how time steers it."""

from __future__ import annotations

from matplotlib.figure import Figure

from fluxedu.instruments.named import Named
from fluxedu.plots.canvas import array, figure, labels, wanted


def _times(ax, times: list[float]) -> None:
    """Ticks with the times, noise on the left."""
    places = sorted({0, len(times) // 2, len(times) - 1})
    ax.set_xticks(places, [f"{times[p]:.2f}" for p in places])
    ax.set_xlabel("time (1 is noise)", fontsize=8)
    ax.tick_params(labelsize=8)


def contributions(added: Named) -> Figure:
    """:func:`fluxedu.instruments.lenses.contributions` as a heat map: a row a block, a column a step."""
    wanted(added, "block", "step")
    blocks, table = labels(added, "block"), array(added)
    fig, ((ax,),) = figure(1, 1, (5.4, 0.26 * len(blocks) + 1.4))
    image = ax.imshow(table, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(blocks)), blocks)
    _times(ax, labels(added, "step"))
    bar = fig.colorbar(image, ax=ax)
    bar.set_label("|added| / |what was there|", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return fig


def modulation(sizes: Named) -> Figure:
    """:func:`fluxedu.instruments.lenses.modulation` as three heat maps, shift, scale and gate: a row a layer."""
    wanted(sizes, "time", "layer", "kind")
    layers, kinds, table = labels(sizes, "layer"), labels(sizes, "kind"), array(sizes)
    fig, axes = figure(1, len(kinds), (2.7, 0.2 * len(layers) + 1.2), sharey=True)
    for ax, kind, values in zip(axes[0], kinds, table.transpose(2, 1, 0), strict=True):
        image = ax.imshow(values, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
        ax.set_title(kind, fontsize=10)
        _times(ax, labels(sizes, "time"))
        fig.colorbar(image, ax=ax).ax.tick_params(labelsize=7)
    axes[0, 0].set_yticks(range(len(layers)), layers)
    axes[0, -1].set_ylabel("root mean square over channels", fontsize=8)
    axes[0, -1].yaxis.set_label_position("right")
    return fig
