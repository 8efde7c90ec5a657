"""An explorer: a pure function from a state to a view, and the thin widget that wires the two to a page.

    Explorer("title", controls, draw)       # draw(**state) -> View

The state is a few whole numbers, one a control or pointer. A move in the browser sets it, ``draw`` is called, and
the view goes back as bytes to be painted: nothing else crosses. All explorers share one front end,
``explorer.js``, which fetches nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from textwrap import fill
from uuid import uuid4

import anywidget
import numpy as np
import traitlets
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from fluxedu.errors import InstrumentError
from fluxedu.plots.canvas import quiet
from fluxedu.widgets.controls import Control
from fluxedu.widgets.panels import Panel, plain

HERE = Path(__file__).parent
SHADE = "#e69f00"  # of chips


@dataclass
class View:
    """What one state looks like: ``panels`` side by side, one sentence under them, and how strongly each place of a
    chips control is shaded, in [0, 1].
    """

    panels: Sequence[Panel]
    text: str = ""
    shades: Mapping[str, Sequence[float]] = field(default_factory=dict)


class Explorer(anywidget.AnyWidget):
    """``explorer`` at the end of a cell shows it; ``explorer.set(step=3)`` moves it; ``explorer.figure()`` is the
    present view for a page without a kernel.

    pointers: where the pointers of panels stand at first · widths: of the panels in the static figure, in inches.
    """

    _esm = (HERE / "explorer.js").read_text(encoding="utf-8")
    _css = (HERE / "explorer.css").read_text(encoding="utf-8")
    title = traitlets.Unicode().tag(sync=True)
    controls = traitlets.List().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    still = traitlets.Unicode().tag(sync=True)  # the class of the static figure that the live one hides

    def __init__(
        self,
        title: str,
        controls: Sequence[Control],
        draw: Callable[..., View],
        pointers: Mapping[str, int | tuple[int, int]] | None = None,
        widths: Sequence[float] | None = None,
    ):
        self.draw, self.known, self.widths = draw, {c.name: c for c in controls}, widths
        self.pointers, self.extents = dict(pointers or {}), {}
        start = {c.name: c.start for c in controls} | self.pointers
        told, still = [c.message() for c in controls], f"fluxedu-{uuid4().hex[:12]}"
        super().__init__(title=title, controls=told, state=start | {"moves": 0}, still=still)
        self.now()  # what is wrong with the first view is raised here
        self._redraw()
        self.observe(self._redraw, "state")

    # -- by hand

    @property
    def values(self) -> dict[str, int | tuple[int, ...]]:
        """The state as ``draw`` takes it."""
        given = ((name, v) for name, v in self.state.items() if name in self.known or name in self.pointers)
        return {name: tuple(map(int, v)) if isinstance(v, (list, tuple)) else int(v) for name, v in given}

    def set(self, **moves) -> Explorer:
        """Move controls (a label, a value or a place) and pointers; raises InstrumentError for what is not there."""
        for name, value in moves.items():
            if name in self.known:
                moves[name] = self.known[name].place(value)
            elif name not in self.pointers:
                raise InstrumentError(f"{self.title} has {', '.join([*self.known, *self.pointers])}, not {name!r}.")
        self._drawn(self.values | moves)  # what cannot be drawn is refused before anything moves
        self.state = self.state | moves
        return self

    def now(self) -> View:
        """The present view."""
        return self._drawn(self.values)

    def _drawn(self, values: dict) -> View:
        for name, extent in self.extents.items():
            _inside(name, values[name], extent)
        view = self.draw(**values)
        told = ((p.pointer, p.extent) for p in view.panels if p.pointer and p.extent is not None)
        self.extents = dict(told)
        return view

    def _redraw(self, _=None) -> None:
        """Answer a move, whatever comes of it: a page that is not answered asks no more."""
        moves = self.state.get("moves", 0)
        try:
            view = self.now()
        except InstrumentError as error:
            self.view = self.view | {"text": str(error), "moves": moves}
        except Exception as error:  # noqa: BLE001 - said on the page, since nobody sees a kernel's log
            self.view = self.view | {"text": f"This cannot be shown: {type(error).__name__}, {error}.", "moves": moves}
        else:
            shades = {name: plain(np.clip(row, 0, 1)) for name, row in view.shades.items()}
            panels = [panel.message() for panel in view.panels]
            self.view = {"moves": moves, "text": view.text, "panels": panels, "shades": shades}

    # -- without a kernel

    def figure(self) -> Figure:
        """The present view as a matplotlib figure."""
        view = self.now()
        widths = list(self.widths or [3.0] * len(view.panels))
        rows = [name for name in view.shades if name in self.known]
        high = [0.3 + 0.25 * len(_lines_of(self.known[name].labels)) for name in rows]
        fig = Figure(figsize=(sum(widths) + 0.4, max(3.0, min(widths)) + 0.6 + sum(high)), layout="constrained")
        parts = fig.subfigures(1 + len(rows), 1, height_ratios=[*high, 3.4], squeeze=False)[:, 0]
        for part, name in zip(parts, rows, strict=False):
            _strip(part.subplots(), self.known[name], view.shades[name], self.values[name])
        axes = parts[-1].subplots(1, len(view.panels), squeeze=False, width_ratios=widths)[0]
        for panel, ax, width in zip(view.panels, axes, widths, strict=True):
            panel.paint(ax)
            ax.set_title(fill(panel.title, int(width * 13)), fontsize=9)
        chosen = [f"{c.label}: {c.labels[self.values[n]]}" for n, c in self.known.items() if n not in rows]
        fig.suptitle(fill("   ·   ".join([self.title, *chosen]), int(sum(widths) * 14)), fontsize=9)
        fig.supxlabel(fill(view.text, int(sum(widths) * 15)), fontsize=8)
        return fig

    def _ipython_display_(self) -> None:
        """First the static figure, which the live one hides when it arrives, then the widget."""
        from IPython.display import display

        drawn, png = io.BytesIO(), io.BytesIO()
        self.figure().savefig(drawn, format="png", dpi=80)
        small = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)  # a third of the bytes
        small.save(png, "PNG")
        image = base64.b64encode(png.getvalue()).decode()
        alt = escape(f"{self.title}: {self.view['text']}", quote=True)
        still = f'<img class="fluxedu-still {self.still}" alt="{alt}" src="data:image/png;base64,{image}">'
        display({"text/html": still, "text/plain": f"{self!r}, as a picture"}, raw=True)
        display(self._repr_mimebundle_()[0] | {"text/plain": repr(self)}, raw=True)

    def __repr__(self) -> str:
        return f"<{self.title}: an explorer>"


def _inside(name: str, place: int | tuple[int, ...], extent: int | tuple[int, int]) -> None:
    """Raises InstrumentError for a pointer outside its panel."""
    where, ends = (v if isinstance(v, tuple) else (v,) for v in (place, extent))
    if len(where) != len(ends) or not all(0 <= i < n for i, n in zip(where, ends, strict=True)):
        most = " x ".join(map(str, ends))
        raise InstrumentError(f"{name} is one of {most} places, counted from 0, and none is {place!r}.")


def _lines_of(labels: Sequence[str], most: int = 90) -> list[list[int]]:
    """Places in lines of about ``most`` letters."""
    lines, length = [[]], 0
    for i, label in enumerate(labels):
        if lines[-1] and length + len(label) + 1.5 > most:
            lines.append([])
            length = 0
        lines[-1].append(i)
        length += len(label) + 1.5
    return lines


def _strip(ax, control: Control, shades: Sequence[float], chosen: int) -> None:
    """A chips control as lines of shaded words."""
    lines = _lines_of(control.labels)
    quiet(ax).set(xlim=(0, 1), ylim=(len(lines), 0))
    ax.set_title(control.label, fontsize=8, loc="left")
    widest = max(sum(len(control.labels[i]) + 1.5 for i in line) for line in lines)
    for row, line in enumerate(lines):
        at = 0.0
        for i in line:
            wide = (len(control.labels[i]) + 1.5) / widest
            shade = to_rgba(SHADE, float(np.clip(shades[i], 0, 1)))
            box = {"facecolor": shade, "edgecolor": "black" if i == chosen else "0.8", "boxstyle": "round,pad=0.2"}
            ax.text(at + wide / 2, row + 0.5, control.labels[i], ha="center", va="center", fontsize=7, bbox=box)
            at += wide
