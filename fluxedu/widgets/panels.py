"""Panels, the parts of a view: images, curves, points and boxes; and numbers as 8-bit colours.

Each panel is drawn twice: by the browser, from a few bytes, and by matplotlib, for a page without a kernel. A panel
with a ``pointer`` is also a control: pointing at a cell, a point or a box sets the state of that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from fluxedu.plots import COLOURS, DIVERGING, SEQUENTIAL, hide_axes, to_array, to_pixels

RGB = np.ndarray  # uint8 [height, width, 3]

# ---------------------------------------------------------------- numbers as colours: a look-up takes less than 1 ms


@cache
def colour_table(name: str) -> np.ndarray:
    """A matplotlib colour map as 256 rows of 8-bit RGB."""
    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def sequential(values, vmax: float | None = None, name: str = SEQUENTIAL) -> RGB:
    """``[h, w]`` numbers from 0 to ``vmax`` (by default the largest) as colours, one pixel per number."""
    x = to_array(values)
    vmax = float(x.max()) if vmax is None else vmax
    return colour_table(name)[(np.clip(x / max(vmax, 1e-12), 0, 1) * 255).astype(np.uint8)]


def diverging(values, vmax: float | None = None) -> RGB:
    """``[h, w]`` numbers from ``-vmax`` (blue) over 0 (white) to ``vmax`` (red), one pixel per number."""
    x = to_array(values)
    vmax = float(np.abs(x).max()) if vmax is None else vmax
    return sequential(x / max(vmax, 1e-12) + 1, 2.0, DIVERGING)


def to_rgb(image) -> RGB:
    """A PIL image or a tensor ``[3, H, W]`` in [-1, 1] as 8-bit RGB."""
    return (to_pixels(image) * 255).round().astype(np.uint8)


def upscale(image: RGB, side: int) -> RGB:
    """Repeat each pixel, without smoothing, until the longer side is about ``side``."""
    times = max(1, side // max(image.shape[:2]))
    return image.repeat(times, 0).repeat(times, 1)


def downscale(image: Image.Image, side: int) -> Image.Image:
    """Reduce the image by a whole factor until its longer side is at most ``side``."""
    return image.reduce(-(-max(image.size) // side)) if max(image.size) > side else image


def resize_table(table: RGB, height: int, width: int) -> RGB:
    """Stretch a table of colours to about ``height x width``; of a larger one every second, third, ... row is kept."""
    table = table[:: -(-table.shape[0] // height), :: -(-table.shape[1] // width)]
    return table.repeat(max(1, height // table.shape[0]), 0).repeat(max(1, width // table.shape[1]), 1)


def contact_sheet(images: Sequence[Sequence[RGB]]) -> RGB:
    """Rows of images as one image, each at half its size."""
    small = [[x[: x.shape[0] // 2 * 2 : 2, : x.shape[1] // 2 * 2 : 2] for x in row] for row in images]
    return np.concatenate([np.concatenate(row, axis=1) for row in small], axis=0)


#: matrix that takes a colour to three tenths of itself plus two tenths of its grey
_FADE = (0.3 * np.eye(3) + 0.2 / 3).astype(np.float32)


def _blend(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For ``share`` in [0, 1]: the transparency of its colour, and its colour times its opacity."""
    alpha = (share**0.7 * 0.9).astype(np.float32)[..., None]
    return 1 - alpha, sequential(share, 1.0) * alpha


def overlay(image: RGB, weights, vmax: float | None = None) -> RGB:
    """Weights ``[rows, columns]`` over a faded image; the larger a weight, the more opaque its cell."""
    w = to_array(weights)
    share = np.clip(w / max(float(w.max()) if vmax is None else vmax, 1e-12), 0, 1)
    height, width = image.shape[:2]
    rows, columns = np.arange(height) * w.shape[0] // height, np.arange(width) * w.shape[1] // width
    faded = image @ _FADE + np.float32(0.5 * 220)
    transparency, colour = (x.astype(np.float32)[rows][:, columns] for x in _blend(share))
    return (faded * transparency + colour).astype(np.uint8)


def overlay_colours() -> list[str]:
    """Nine colours for the key of :func:`overlay`, as they look on a light background."""
    transparency, colour = _blend(np.linspace(0, 1, 9))
    return ["#" + bytes(row).hex() for row in (210 * transparency + colour).astype(np.uint8)]


def rounded(values) -> list[float]:
    """Numbers as a list, rounded to four significant digits to keep messages short."""
    return [float(f"{v:.4g}") for v in np.asarray(values, float).ravel()]


# ---------------------------------------------------------------- panels


@dataclass
class Panel:
    """``pointer``: the name of the state that pointing at the panel sets, if any."""

    title: str
    pointer: str | None = field(default=None, kw_only=True)
    kind: ClassVar[str]

    @property
    def extent(self) -> int | tuple[int, int] | None:
        """How many things can be pointed at, if that is the same in every view."""
        return None

    def message(self) -> dict[str, Any]:
        """The panel as the browser receives it: its kind and its fields, with arrays as bytes or lists."""
        return {"kind": self.kind} | vars(self)

    def paint(self, ax: Axes) -> None:
        """Draw the panel, without its title, on matplotlib axes."""
        raise NotImplementedError


@dataclass
class Pixels(Panel):
    """An 8-bit image. ``cells``: rows and columns of cells that can be pointed at · ``mark``: the marked cell ·
    ``key``: labels of the two ends of the colour scale · ``colours``: the name of its colour map, or its colours ·
    ``rows``, ``columns``: labels of the rows and columns of cells.
    """

    image: RGB
    cells: tuple[int, int] = (1, 1)
    mark: tuple[int, int] | None = None
    key: tuple[str, str] | None = None
    colours: str | Sequence[str] = SEQUENTIAL
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    kind = "pixels"

    @property
    def extent(self) -> tuple[int, int]:
        return tuple(self.cells)

    def _key_colours(self) -> list[str]:
        if not isinstance(self.colours, str):
            return list(self.colours)
        return [
            "#" + bytes(row).hex() for row in colour_table(self.colours)[np.linspace(0, 255, 9).round().astype(int)]
        ]

    def message(self) -> dict[str, Any]:
        message = super().message() | {
            "height": self.image.shape[0],
            "width": self.image.shape[1],
            "data": np.ascontiguousarray(self.image, np.uint8).tobytes(),
            "colours": self._key_colours() if self.key else [],
            "rows": list(map(str, self.rows)),
            "columns": list(map(str, self.columns)),
        }
        del message["image"]
        return message

    def paint(self, ax: Axes) -> None:
        height, width = self.image.shape[:2]
        hide_axes(ax).imshow(self.image, interpolation="nearest")
        for names, side, axis in ((self.rows, height, ax.yaxis), (self.columns, width, ax.xaxis)):
            if names:
                axis.set_ticks([(i + 0.5) * side / len(names) - 0.5 for i in range(len(names))], names, fontsize=6)
        ax.tick_params(length=0, top=False, labeltop=bool(self.columns), labelbottom=False)
        if self.mark is not None:
            h, w = height / self.cells[0], width / self.cells[1]
            corner = (self.mark[1] * w - 0.5, self.mark[0] * h - 0.5)
            ax.add_patch(Rectangle(corner, w, h, fill=False, edgecolor="black", linewidth=3.0))
            ax.add_patch(Rectangle(corner, w, h, fill=False, edgecolor="white", linewidth=1.2))
        if self.key is not None:
            strip = ax.inset_axes((0.15, -0.09, 0.7, 0.04))
            colours = LinearSegmentedColormap.from_list("key", self._key_colours())
            strip.imshow(np.arange(256)[None], cmap=colours, aspect="auto")
            strip.set(yticks=[], xticks=[0, 255], xticklabels=self.key)
            strip.tick_params(labelsize=7, length=0)


def difference_panel(before: RGB, after: RGB) -> Pixels:
    """Where ``after`` is brighter or darker than ``before``."""
    difference = (after.astype(float) - before).mean(-1) / 255
    title = "Difference: brighter (red) or darker (blue)"
    return Pixels(title, diverging(difference, 1.0), key=("-1", "1"), colours=DIVERGING)


def _label_axes(ax: Axes, x_label: str, y_label: str) -> None:
    ax.set_xlabel(x_label, fontsize=8)
    ax.set_ylabel(y_label, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7)


@dataclass
class Lines(Panel):
    """Curves. ``series``: name -> values, one per number in ``x`` · ``mark``: the x of the current state."""

    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    x_label: str = ""
    y_label: str = ""
    mark: float | None = None
    kind = "lines"

    def message(self) -> dict[str, Any]:
        series = [{"name": name, "y": rounded(y)} for name, y in self.series.items()]
        return super().message() | {"x": rounded(self.x), "series": series, "colours": COLOURS}

    def paint(self, ax: Axes) -> None:
        for (name, y), colour in zip(self.series.items(), COLOURS, strict=False):
            ax.plot(self.x, y, label=name, color=colour)
        if self.mark is not None:
            ax.axvline(self.mark, color="0.5", linewidth=1)
        if self.x[0] != self.x[-1]:
            ax.set_xlim(self.x[0], self.x[-1])  # in the order of x: time runs from 1 to 0
        ax.set_ylim(bottom=min(0.0, *(min(y) for y in self.series.values())))
        _label_axes(ax, self.x_label, self.y_label)


@dataclass
class Points(Panel):
    """Points ``xy [N, 2]`` with ``arrows [N, 2]``, coloured by ``group``, an index into the names ``groups``.

    ``limits``: the axes run from minus these to these numbers, the same in all views, so that only the points move.
    """

    xy: np.ndarray
    arrows: np.ndarray
    group: Sequence[int]
    groups: Sequence[str]
    limits: tuple[float, float]
    x_label: str = ""
    y_label: str = ""
    mark: int | None = None
    kind = "points"

    @property
    def extent(self) -> int:
        return len(self.group)

    def message(self) -> dict[str, Any]:
        points = {"xy": rounded(self.xy), "arrows": rounded(self.arrows), "group": list(map(int, self.group))}
        return super().message() | points | {"groups": list(self.groups), "colours": COLOURS}

    def paint(self, ax: Axes) -> None:
        for g, (name, colour) in enumerate(zip(self.groups, COLOURS, strict=False)):
            mine = np.asarray(self.group) == g
            (x, y), (u, v) = self.xy[mine].T, self.arrows[mine].T
            ax.plot(x, y, "o", markersize=4, color=colour, label=name)
            style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.003}
            ax.quiver(x, y, u, v, color=colour, alpha=0.6, **style)
        if self.mark is not None:
            ax.plot(*self.xy[self.mark], "o", markersize=11, fillstyle="none", color="black")
        ax.set(xlim=(-self.limits[0], self.limits[0]), ylim=(-self.limits[1], self.limits[1]))
        _label_axes(ax, self.x_label, self.y_label)


def draw_arrows(ax: Axes, paths: Sequence[Sequence[float]], color: str) -> None:
    """One thin arrow per path ``(x, y, x, y, ...)``: a line through all points with its head at the last one."""
    for path in paths:
        x, y = path[::2], path[1::2]
        ax.plot(x[:-1], y[:-1], color=color, linewidth=0.8, solid_joinstyle="round")
        arrow = {"arrowstyle": "->", "color": color, "linewidth": 0.8, "shrinkA": 0}
        ax.annotate("", (x[-1], y[-1]), (x[-2], y[-2]), arrowprops=arrow)


@dataclass
class Boxes(Panel):
    """A diagram. ``boxes``: label, x, y, width, height and colour · ``arrows``: paths ``(x, y, x, y, ...)`` with the
    head at the last point · ``size``: of the drawing · ``mark``: index of the chosen box.
    """

    boxes: Sequence[tuple[str, float, float, float, float, str]]
    arrows: Sequence[tuple[float, ...]]
    size: tuple[float, float]
    mark: int = 0
    kind = "boxes"

    def paint(self, ax: Axes) -> None:
        hide_axes(ax).set(xlim=(0, self.size[0]), ylim=(self.size[1], 0), aspect="equal")
        draw_arrows(ax, self.arrows, "0.5")
        for i, (label, x, y, w, h, colour) in enumerate(self.boxes):
            edge = {"edgecolor": "black", "linewidth": 2} if i == self.mark else {"edgecolor": colour, "linewidth": 1}
            style = {"boxstyle": "round,pad=0,rounding_size=3", "facecolor": f"{colour}33"}
            ax.add_patch(FancyBboxPatch((x, y), w, h, **style, **edge))
            ax.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=6)
