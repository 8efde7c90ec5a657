"""Panels, the parts of a view: images, curves, points and boxes; and numbers as 8-bit colours.

Each panel is drawn twice: by the browser, from a few bytes, and by matplotlib, for a page without a kernel. A panel
with a ``pointer`` is also a control: pointing at a cell, a point or a box sets the state of that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from textwrap import fill
from typing import Any, ClassVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from fluxedu.errors import InstrumentError, check_choice
from fluxedu.plots import COLOURS, DIVERGING, SEQUENTIAL, blend, hide_axes, overlay_ramp, to_array, to_pixels

RGB = np.ndarray  # uint8 [height, width, 3]


class HeatMap(np.ndarray):
    """An 8-bit image of a table of numbers that remembers the numbers, so that a page can show them at the pointer.

    ``values``: the table, [rows, columns] · ``note``: what is special about its colour scale · ``key_colours``: its
    colours from the lowest to the largest, if they belong to no colour map. All survive :func:`upscale` and
    :func:`resize_table`.
    """

    values: np.ndarray | None = None
    note: str = ""
    key_colours: Sequence[str] = ()

    def __array_finalize__(self, other: Any) -> None:
        for name in ("values", "note", "key_colours"):
            setattr(self, name, getattr(other, name, getattr(HeatMap, name)))


def _heat_map(image: RGB, values: np.ndarray, note: str = "", key_colours: Sequence[str] = ()) -> HeatMap:
    made = image.view(HeatMap)
    made.values, made.note, made.key_colours = values, note, key_colours
    return made


# ---------------------------------------------------------------- numbers as colours: a look-up takes less than 1 ms


@cache
def colour_table(name: str) -> np.ndarray:
    """A matplotlib colour map as 256 rows of 8-bit RGB."""
    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


#: how :func:`sequential` spreads its colours over the numbers -> what the key says about it
SCALES = {
    "linear": "",
    "log": "logarithmic colour scale over a factor of 1000",
    "row": "each row has its own colour scale, up to its largest value",
}


def sequential(values, vmax: float | None = None, name: str = SEQUENTIAL, scale: str = "linear") -> RGB:
    """``[h, w]`` numbers from 0 to ``vmax`` (by default the largest) as colours, one pixel per number.

    scale: "linear"; "log", from a thousandth of ``vmax`` up; or "row", where each row has its own ``vmax``, for tables
    in which one row would leave the others dark. Raises InstrumentError for another one.
    """
    check_choice("scale", scale, SCALES, error=InstrumentError)
    x = to_array(values)
    top = (float(x.max()) if x.size else 0.0) if vmax is None else vmax
    share = x / np.maximum(x.max(-1, keepdims=True) if scale == "row" else top, 1e-12)
    if scale == "log":
        share = 1 + np.log10(np.clip(share, 1e-3, 1)) / 3
    return _heat_map(colour_table(name)[(np.clip(share, 0, 1) * 255).astype(np.uint8)], x, SCALES[scale])


def diverging(values, vmax: float | None = None) -> RGB:
    """``[h, w]`` numbers from ``-vmax`` (blue) over 0 (white) to ``vmax`` (red), one pixel per number."""
    x = to_array(values)
    vmax = float(np.abs(x).max()) if vmax is None else vmax
    return _heat_map(np.asarray(sequential(x / max(vmax, 1e-12) + 1, 2.0, DIVERGING)), x)


def between(values, low: float, high: float, name: str = "viridis") -> RGB:
    """``[h, w]`` numbers from ``low`` to ``high`` as colours, one pixel per number: for numbers that are far from 0."""
    x = to_array(values)
    return _heat_map(np.asarray(sequential(x - low, max(high - low, 1e-12), name)), x)


def whole_percentages(shares) -> list[int]:
    """Shares of a whole, which sum to 1, as whole percentages that sum to 100: those cut off most are rounded up.

    >>> whole_percentages([0.333, 0.333, 0.334])
    [33, 33, 34]
    """
    percentages = 100 * to_array(shares).astype(float)
    found = np.floor(percentages).astype(int)
    found[np.argsort(found - percentages, kind="stable")[: 100 - int(found.sum())]] += 1
    return found.tolist()


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


def overlay(image: RGB, weights, vmax: float | None = None) -> RGB:
    """Weights ``[rows, columns]`` over a darkened image; the larger a weight, the brighter and more opaque its cell."""
    w = to_array(weights)
    share = w / max(float(w.max()) if vmax is None else vmax, 1e-12)
    height, width = image.shape[:2]
    rows, columns = np.arange(height) * w.shape[0] // height, np.arange(width) * w.shape[1] // width
    picture = np.asarray(image)
    return _heat_map(blend(picture, share[rows][:, columns]), w, key_colours=overlay_colours(picture))


def overlay_colours(image: RGB | None = None) -> list[str]:
    """Nine colours for the key of :func:`overlay`, as they look over the mean colour of ``image``, or over grey."""
    mean = np.full(3, 127.5) if image is None else np.asarray(image).reshape(-1, 3).mean(0)
    return ["#" + bytes(row).hex() for row in overlay_ramp(9, mean)]


def rounded(values) -> list[float]:
    """Numbers as a list, rounded to four significant digits to keep messages short."""
    return [float(f"{v:.4g}") for v in np.asarray(values, float).ravel()]


# ---------------------------------------------------------------- panels

FONT = 10.5  # points in a static figure: 11.7 px at its 80 dots per inch
MAX_LABELS = 10  # along one side of a panel in a static figure


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


#: of a larger table, every second, third, ... row and column is sent to the page
MAX_SIDE = 192


@dataclass
class Pixels(Panel):
    """An 8-bit image. ``cells``: rows and columns of cells that can be pointed at · ``mark``: the marked cell ·
    ``key``: labels of the two ends of the colour scale · ``colours``: the name of its colour map, or its colours ·
    ``rows``, ``columns``: labels of the rows and columns of cells · ``values``: the numbers behind the colours, shown
    at the pointer; an image from :func:`sequential`, :func:`diverging` or :func:`overlay` brings its own · ``unit``:
    what they measure · ``axes``: what one row and one column is · ``note``: a remark below the colour scale.
    """

    image: RGB
    cells: tuple[int, int] = (1, 1)
    mark: tuple[int, int] | None = None
    key: tuple[str, str] | None = None
    colours: str | Sequence[str] = SEQUENTIAL
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    values: np.ndarray | None = None
    unit: str = ""
    axes: tuple[str, str] = ("row", "column")
    note: str = ""
    kind = "pixels"

    def __post_init__(self):
        if self.values is None:
            self.values = getattr(self.image, "values", None)
        self.note = self.note or getattr(self.image, "note", "")
        self.colours = getattr(self.image, "key_colours", ()) or self.colours

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
        """As of every panel. Pixels are RGB bytes; values are 32-bit floats, and null if there are none."""
        values = None if self.values is None else to_array(self.values)
        if values is not None:
            values = values[:: -(-values.shape[0] // MAX_SIDE), :: -(-values.shape[1] // MAX_SIDE)]
        message = super().message() | {
            "height": self.image.shape[0],
            "width": self.image.shape[1],
            "data": np.ascontiguousarray(self.image, np.uint8).tobytes(),
            "colours": self._key_colours() if self.key else [],
            "rows": list(map(str, self.rows)),
            "columns": list(map(str, self.columns)),
            "values": None if values is None else np.ascontiguousarray(values, "<f4").tobytes(),
            "table": None if values is None else list(values.shape),
        }
        del message["image"]
        return message

    def paint(self, ax: Axes) -> None:
        height, width = self.image.shape[:2]
        smooth = "nearest" if self.values is not None else "antialiased"
        hide_axes(ax).imshow(np.asarray(self.image), interpolation=smooth)
        for names, side, axis in ((self.rows, height, ax.yaxis), (self.columns, width, ax.xaxis)):
            if names:
                every = -(-len(names) // MAX_LABELS)
                places = [(i + 0.5) * side / len(names) - 0.5 for i in range(0, len(names), every)]
                axis.set_ticks(places, [fill(str(name), 30) for name in names[::every]], fontsize=FONT)
        long_names = max((len(str(name)) for name in self.columns), default=0) * len(self.columns) > 26
        ax.tick_params(length=0, top=False, labeltop=bool(self.columns), labelbottom=False)
        ax.tick_params(axis="x", labelrotation=90 if long_names else 0)
        if self.mark is not None:
            h, w = height / self.cells[0], width / self.cells[1]
            corner = (self.mark[1] * w - 0.5, self.mark[0] * h - 0.5)
            ax.add_patch(Rectangle(corner, w, h, fill=False, edgecolor="black", linewidth=3.0))
            ax.add_patch(Rectangle(corner, w, h, fill=False, edgecolor="white", linewidth=1.2))
        if self.key is not None:
            strip = ax.inset_axes((0.1, -0.09, 0.8, 0.05))
            colours = LinearSegmentedColormap.from_list("key", self._key_colours())
            strip.imshow(np.arange(256)[None], cmap=colours, aspect="auto")
            strip.set(yticks=[], xticks=[0, 255], xticklabels=self.key)
            for label, side in zip(strip.get_xticklabels(), ("left", "right"), strict=True):
                label.set_horizontalalignment(side)
            strip.tick_params(labelsize=FONT, length=0)
            remark = fill(", ".join(filter(None, [self.unit, self.note])), 32)
            strip.set_xlabel(remark, fontsize=FONT, labelpad=1)
            ax.set_xlabel("\n" * (3 + remark.count("\n")), fontsize=FONT)  # room for the strip


def difference_panel(before: RGB, after: RGB) -> Pixels:
    """Where ``after`` is brighter or darker than ``before``."""
    difference = (after.astype(float) - before).mean(-1) / 255
    title = "Difference: brighter (red) or darker (blue)"
    unit = "change of brightness, as a share of its range"
    return Pixels(title, diverging(difference, 1.0), key=("-1", "1"), colours=DIVERGING, unit=unit)


def _label_axes(ax: Axes, x_label: str, y_label: str) -> None:
    ax.set_xlabel(x_label, fontsize=FONT)
    ax.set_ylabel(y_label, fontsize=FONT)
    ax.tick_params(labelsize=FONT)
    ax.legend(fontsize=FONT, frameon=False, handlelength=1.2, labelspacing=0.2)


@dataclass
class Lines(Panel):
    """Curves. ``series``: name -> values, one per number in ``x`` · ``mark``: the x of the current state ·
    ``x_names``: a name for each number in ``x`` · ``units``: series -> what it measures, where that differs between
    series; a page then has one chart for each unit, and ``y_label`` for the rest · ``log``: a logarithmic scale ·
    ``dashed``: the series whose curves are dashed, where curves may lie on each other.
    """

    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    x_label: str = ""
    y_label: str = ""
    mark: float | None = None
    x_names: Sequence[str] = ()
    units: Mapping[str, str] = field(default_factory=dict)
    log: bool = False
    dashed: Sequence[str] = ()
    kind = "lines"

    def message(self) -> dict[str, Any]:
        series = [
            {"name": name, "y": rounded(y), "unit": self.units.get(name, self.y_label)}
            for name, y in self.series.items()
        ]
        message = super().message() | {"x": rounded(self.x), "series": series, "colours": COLOURS}
        message["x_names"], message["dashed"] = list(map(str, self.x_names)), list(self.dashed)
        del message["units"]
        return message

    def paint(self, ax: Axes) -> None:
        for (name, y), colour in zip(self.series.items(), COLOURS, strict=False):
            unit = f" ({self.units[name]})" if name in self.units else ""
            ax.plot(self.x, y, "--" if name in self.dashed else "-", label=f"{name}{unit}", color=colour)
        if self.mark is not None:
            ax.axvline(self.mark, color="0.5", linewidth=1)
        if self.x[0] != self.x[-1]:
            ax.set_xlim(self.x[0], self.x[-1])  # in the order of x: time runs from 1 to 0
        if self.log:
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=min(0.0, *(min(y) for y in self.series.values())))
        if self.x_names:
            every = -(-len(self.x_names) // MAX_LABELS)
            ax.set_xticks(list(self.x)[::every], list(self.x_names)[::every], rotation=90)
        _label_axes(ax, self.x_label, self.y_label)


@dataclass
class Points(Panel):
    """Points ``xy [N, 2]`` with ``arrows [N, 2]``, coloured by ``group``, an index into the names ``groups``.

    ``limits``: where the axes begin and end, ``((x0, x1), (y0, y1))``, or ``(a, b)`` for -a to a and -b to b; the same
    in all views, so that only the points move · ``unit``: what both axes measure · ``trails [K, N, 2]``: where the
    points were before, the earliest first.
    """

    xy: np.ndarray
    arrows: np.ndarray
    group: Sequence[int]
    groups: Sequence[str]
    limits: tuple[float, float] | tuple[tuple[float, float], tuple[float, float]]
    x_label: str = ""
    y_label: str = ""
    mark: int | None = None
    unit: str = ""
    trails: np.ndarray | None = None
    kind = "points"

    @property
    def extent(self) -> int:
        return len(self.group)

    def _limits(self) -> list[list[float]]:
        return [rounded(ends) if np.ndim(ends) else rounded([-ends, ends]) for ends in self.limits]

    def message(self) -> dict[str, Any]:
        points = {"xy": rounded(self.xy), "arrows": rounded(self.arrows), "group": list(map(int, self.group))}
        trails = [] if self.trails is None else [rounded(trail) for trail in np.swapaxes(self.trails, 0, 1)]
        more = {"groups": list(self.groups), "colours": COLOURS, "limits": self._limits(), "trails": trails}
        return super().message() | points | more

    def paint(self, ax: Axes) -> None:
        for g, (name, colour) in enumerate(zip(self.groups, COLOURS, strict=False)):
            mine = np.asarray(self.group) == g
            (x, y), (u, v) = self.xy[mine].T, self.arrows[mine].T
            if self.trails is not None:
                ax.plot(*np.moveaxis(self.trails[:, mine], -1, 0), color=colour, alpha=0.35, linewidth=1)
            ax.plot(x, y, "o", markersize=4, color=colour, label=name)
            style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.003}
            ax.quiver(x, y, u, v, color=colour, alpha=0.6, **style)
        if self.mark is not None:
            ax.plot(*self.xy[self.mark], "o", markersize=11, fillstyle="none", color="black")
        xlim, ylim = self._limits()
        ax.set(xlim=xlim, ylim=ylim)
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
            if len(label) * 6.2 <= w and h >= 11:  # in units of the drawing, about as a page shows it
                ax.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=FONT)
