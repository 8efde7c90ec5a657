"""Who draws better: ratings on the Elo scale with their intervals, on one axis and on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fluxedu.errors import InstrumentError
from fluxedu.plots.canvas import figure

Rows = Mapping[str, Mapping[str, float]]  # model -> elo, low, high, votes: as fluxedu.arena's Ratings.rows() has them
WIDEST = 700.0  # Elo on each side of 1000 that is drawn; an interval may go on, with an arrow
MODELS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito


def _checked(rows: Rows) -> Rows:
    if not rows or not all({"elo", "low", "high", "votes"} <= set(row) for row in rows.values()):
        raise InstrumentError("ratings are a dictionary model -> elo, low, high and votes, and not empty.")
    return rows


def _shade(name: str, names: Sequence[str]) -> str:
    return MODELS[list(names).index(name) % len(MODELS)]


def _dots(ax: Axes, rows: Rows, names: Sequence[str], ends: tuple[float, float]) -> None:
    """A line a model, from top to bottom as in ``rows``: a dot at its Elo, a bar over its interval."""
    for y, (name, row) in enumerate(rows.items()):
        low, high = max(row["low"], ends[0]), min(row["high"], ends[1])
        shade = _shade(name, names)
        ax.plot([low, high], [y, y], color=shade, linewidth=2, solid_capstyle="butt")
        for end, true, mark in ((low, row["low"], "<"), (high, row["high"], ">")):
            ax.plot(end, y, mark if end != true else "|", color=shade, markersize=6, clip_on=False)
        ax.plot(min(max(row["elo"], ends[0]), ends[1]), y, "o", color=shade, markersize=6)
    ax.axvline(1000, color="0.8", linewidth=1, zorder=0)
    ax.set(xlim=ends, ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), list(rows), fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _ends(tables: Sequence[Rows]) -> tuple[float, float]:
    """The same scale for all: what the intervals need, at most :data:`WIDEST` from the mean."""
    far = max(max(row["high"] - 1000, 1000 - row["low"]) for rows in tables for row in rows.values())
    return 1000 - min(far * 1.05 + 5, WIDEST), 1000 + min(far * 1.05 + 5, WIDEST)


def elo(rows: Rows, title: str = "Overall") -> Figure:
    """Models from the strongest down, ``rows`` as :meth:`fluxedu.arena.Ratings.rows` gives them."""
    rows = dict(sorted(_checked(rows).items(), key=lambda item: -item[1]["elo"]))
    fig, ((ax,),) = figure(1, 1, (5.4, 0.36 * len(rows) + 0.9))
    ends = _ends([rows])
    _dots(ax, rows, sorted(rows), ends)
    for y, row in enumerate(rows.values()):
        said = f"{row['elo']:.0f}   {row['votes']} votes"
        ax.annotate(said, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ax.set_xlabel("Elo (mean 1000), 95% interval", fontsize=8)
    ax.set_title(title, fontsize=10)
    return fig


def elo_axes(tables: Mapping[str, Rows]) -> Figure:
    """A panel an axis (its title -> rows), the models in one order and colour everywhere, one scale."""
    for rows in tables.values():
        _checked(rows)
    if len({frozenset(rows) for rows in tables.values()}) != 1:
        raise InstrumentError("every axis needs ratings of the same models.")
    names = sorted(next(iter(tables.values())))
    across = min(3, len(tables))
    down = ceil(len(tables) / across)
    fig, axes = figure(down, across, (2.7, 0.26 * len(names) + 0.8), sharex=True, sharey=True)
    ends, order = _ends(list(tables.values())), _order(tables)
    for ax, (title, rows) in zip(axes.flat, tables.items(), strict=False):
        _dots(ax, {name: rows[name] for name in order}, names, ends)
        votes = sum(row["votes"] for row in rows.values()) // 2
        ax.set_title(f"{title}\n{votes} votes", fontsize=9)
    for ax in axes.flat[len(tables) :]:
        ax.set_visible(False)
    fig.supxlabel("Elo (mean 1000), 95% interval", fontsize=8)
    return fig


def _order(tables: Mapping[str, Rows]) -> list[str]:
    """Models by their mean Elo over the axes, the strongest first."""
    first = next(iter(tables.values()))
    return sorted(first, key=lambda name: -sum(rows[name]["elo"] for rows in tables.values()))
