"""What a reader sees: pixels, lines, points, boxes. Each panel says itself twice: to the browser, as few bytes that it
paints at once, and to matplotlib, for the page without a kernel.

A panel with a ``pointer`` is a control too: pointing at a cell, a point or a box moves the state of that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch, Rectangle

from fluxedu.plots.canvas import HEAT, arrows, quiet
from fluxedu.widgets.paint import Pixels8, stops

#: colours that the colour-blind can tell apart (Okabe and Ito), in the order of use
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def plain(value) -> list:
    """Numbers as lists, four significant digits: no more can be seen."""
    return [float(f"{v:.4g}") for v in np.asarray(value, float).ravel()]


@dataclass
class Panel:
    """``pointer``: the name of the state that pointing at it moves, if any."""

    title: str
    pointer: str | None = field(default=None, kw_only=True)
    kind: ClassVar[str]

    @property
    def extent(self) -> int | tuple[int, int] | None:
        """How many places can be pointed at, where that is the same in every view."""
        return None

    def message(self) -> dict[str, Any]:
        """What the browser is told."""
        return {"kind": self.kind, "title": self.title, "pointer": self.pointer}

    def paint(self, ax: Axes) -> None:
        """The same with matplotlib, the title apart."""
        raise NotImplementedError


@dataclass
class Pixels(Panel):
    """An 8-bit picture. ``cells``: rows and columns of what can be pointed at · ``mark``: the cell pointed at ·
    ``key``: what the two ends of the colours mean · ``colours``: their map, or the colours · ``rows``, ``columns``:
    names of the cells' rows and columns, for a table.
    """

    image: Pixels8
    cells: tuple[int, int] = (1, 1)
    mark: tuple[int, int] | None = None
    key: tuple[str, str] | None = None
    colours: str | Sequence[str] = HEAT
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    kind = "pixels"

    @property
    def extent(self) -> tuple[int, int]:
        return tuple(self.cells)

    @property
    def stops(self) -> list[str]:
        return stops(self.colours) if isinstance(self.colours, str) else list(self.colours)

    def message(self) -> dict[str, Any]:
        height, width = self.image.shape[:2]
        return super().message() | {
            "width": width,
            "height": height,
            "data": np.ascontiguousarray(self.image, np.uint8).tobytes(),
            "cells": list(self.cells),
            "mark": None if self.mark is None else list(self.mark),
            "key": None if self.key is None else list(self.key),
            "stops": self.stops if self.key else [],
            "rows": list(map(str, self.rows)),
            "columns": list(map(str, self.columns)),
        }

    def paint(self, ax: Axes) -> None:
        height, width = self.image.shape[:2]
        quiet(ax).imshow(self.image, interpolation="nearest")
        for names, side, axis in ((self.rows, height, ax.yaxis), (self.columns, width, ax.xaxis)):
            if names:
                axis.set_ticks([(i + 0.5) * side / len(names) - 0.5 for i in range(len(names))], names, fontsize=6)
        ax.tick_params(length=0, top=False, labeltop=bool(self.columns), labelbottom=False)
        if self.mark is not None:
            h, w = height / self.cells[0], width / self.cells[1]
            corner = (self.mark[1] * w - 0.5, self.mark[0] * h - 0.5)
            for colour, wide in (("black", 3.0), ("white", 1.2)):
                ax.add_patch(Rectangle(corner, w, h, fill=False, edgecolor=colour, linewidth=wide))
        if self.key is not None:
            strip = ax.inset_axes((0.15, -0.09, 0.7, 0.04))
            colours = LinearSegmentedColormap.from_list("key", self.stops)
            strip.imshow(np.arange(256)[None], cmap=colours, aspect="auto")
            strip.set(yticks=[], xticks=[0, 255], xticklabels=self.key)
            strip.tick_params(labelsize=7, length=0)


@dataclass
class Lines(Panel):
    """``series``: name -> values, one a place of ``x`` · ``mark``: where on x the reader stands."""

    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    across: str = ""
    up: str = ""
    mark: float | None = None
    kind = "lines"

    def message(self) -> dict[str, Any]:
        series = [{"name": name, "y": plain(y)} for name, y in self.series.items()]
        told = {"x": plain(self.x), "series": series, "across": self.across, "up": self.up, "mark": self.mark}
        return super().message() | told | {"colours": list(COLOURS)}

    def paint(self, ax: Axes) -> None:
        for (name, y), colour in zip(self.series.items(), COLOURS, strict=False):
            ax.plot(self.x, y, label=name, color=colour)
        if self.mark is not None:
            ax.axvline(self.mark, color="0.5", linewidth=1)
        ax.set_xlabel(self.across, fontsize=8)
        ax.set_ylabel(self.up, fontsize=8)
        ax.tick_params(labelsize=7)
        if self.x[0] != self.x[-1]:
            ax.set_xlim(self.x[0], self.x[-1])  # as given: time may run from 1 to 0
        ax.set_ylim(bottom=min(0.0, *(min(y) for y in self.series.values())))
        ax.legend(fontsize=7)


@dataclass
class Points(Panel):
    """Points ``xy [N, 2]`` with ``arrows [N, 2]``, coloured by ``group`` (a place in ``groups``).

    ``reach``: how far the axes go on each side of 0, the same in all views, so that what moves is the points.
    """

    xy: np.ndarray
    arrows: np.ndarray
    group: Sequence[int]
    groups: Sequence[str]
    reach: tuple[float, float]
    across: str = ""
    up: str = ""
    mark: int | None = None
    kind = "points"

    @property
    def extent(self) -> int:
        return len(self.group)

    def message(self) -> dict[str, Any]:
        told = {"xy": plain(self.xy), "arrows": plain(self.arrows), "group": list(map(int, self.group))}
        names = {"groups": list(self.groups), "reach": list(self.reach), "across": self.across, "up": self.up}
        return super().message() | told | names | {"mark": self.mark, "colours": list(COLOURS)}

    def paint(self, ax: Axes) -> None:
        for g, (name, colour) in enumerate(zip(self.groups, COLOURS, strict=False)):
            mine = np.asarray(self.group) == g
            ax.plot(*self.xy[mine].T, "o", markersize=4, color=colour, label=name)
            ax.quiver(*self.xy[mine].T, *self.arrows[mine].T, angles="xy", scale_units="xy", scale=1, color=colour,
                      width=0.003, alpha=0.6)  # fmt: skip
        if self.mark is not None:
            ax.plot(*self.xy[self.mark], "o", markersize=11, fillstyle="none", color="black")
        ax.set(xlim=(-self.reach[0], self.reach[0]), ylim=(-self.reach[1], self.reach[1]))
        ax.set_xlabel(self.across, fontsize=8)
        ax.set_ylabel(self.up, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7)


@dataclass
class Boxes(Panel):
    """A diagram: ``boxes`` (label, x, y, width, height, colour) on a sheet of ``size``; ``lines`` are arrows
    ``(x, y, x, y, ...)``, with corners where there are more than two places.
    """

    boxes: Sequence[tuple[str, float, float, float, float, str]]
    lines: Sequence[tuple[float, ...]]
    size: tuple[float, float]
    mark: int = 0
    kind = "boxes"

    def message(self) -> dict[str, Any]:
        told = {"boxes": [list(b) for b in self.boxes], "lines": [list(line) for line in self.lines]}
        return super().message() | told | {"size": list(self.size), "mark": self.mark}

    def paint(self, ax: Axes) -> None:
        quiet(ax).set(xlim=(0, self.size[0]), ylim=(self.size[1], 0), aspect="equal")
        arrows(ax, self.lines, "0.5")
        for i, (label, x, y, w, h, colour) in enumerate(self.boxes):
            edge = {"edgecolor": "black", "linewidth": 2} if i == self.mark else {"edgecolor": colour, "linewidth": 1}
            ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=3", facecolor=f"{colour}33",
                                        **edge))  # fmt: skip
            ax.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=6)
