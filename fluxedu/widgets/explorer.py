"""An explorer: a pure function from a state to a view, and the notebook widget that connects it to a page.

    @explorer(example=lambda pipe: brightness(pipe, "a red circle"))
    def brightness(pipe, prompt):
        image = to_rgb(pipe(prompt).images[0])
        controls = [Slider("percent", "brightness", ["50%", "100%"])]
        return Explorer("How bright is the image?", controls, lambda percent: View([Pixels("image", image ...)]))

The state is one integer (or pair of integers) per control and per pointer of a panel. A move in the browser changes
the state, ``draw(**state)`` computes the view, and the view returns as bytes that the browser paints. All explorers
share one front end, ``static/explorer.js``, which loads nothing from the network.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import update_wrapper, wraps
from html import escape
from inspect import signature
from numbers import Integral
from pathlib import Path
from textwrap import fill
from types import ModuleType
from typing import Any, ClassVar, NamedTuple
from uuid import uuid4

import anywidget
import numpy as np
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from PIL import Image

from fluxedu.errors import InstrumentError, checked, describe
from fluxedu.figure import Figure
from fluxedu.nano.shipped import SHIPPED
from fluxedu.plots import hide_axes
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.panels import FONT, Panel, rounded
from fluxedu.widgets.reruns import close_former

STATIC = Path(__file__).parent / "static"
CHIP_COLOUR = "#e69f00"
EXAMPLE_PROMPT = "a red circle left of a blue square"

# ---------------------------------------------------------------- registration


class Registration(NamedTuple):
    """``function`` makes the explorer; ``example`` makes a small one from the miniature, as the tests do."""

    function: Callable[..., Explorer]
    example: Callable[[FluxPipeline], Explorer]


EXPLORERS: dict[str, Registration] = {}


class ExplorerModule(ModuleType):
    """A module that can be called: ``fluxedu.widgets.solvers(...)`` calls the function ``solvers`` defined in it."""

    def __call__(self, *args, **kwargs) -> Explorer:
        return self.__wrapped__(*args, **kwargs)


def explorer(example: Callable[[FluxPipeline], Explorer]) -> Callable:
    """Decorator that registers a function as an explorer, under its own name.

    If the function's module in this package has the same name, the module becomes callable as well: its class is set
    to :class:`ExplorerModule`, as the Python data model allows, and it takes on the function's docstring and signature.
    """

    def register(function: Callable[..., Explorer]) -> Callable[..., Explorer]:
        function = _with_call(checked(InstrumentError)(function))
        EXPLORERS[function.__name__] = Registration(function, example)
        if function.__module__ == f"{__package__}.{function.__name__}":
            module = sys.modules[function.__module__]
            module.__class__ = ExplorerModule
            update_wrapper(module, function, assigned=("__doc__",), updated=())  # sets __wrapped__ too
        return function

    return register


def _with_call(function: Callable[..., Explorer]) -> Callable[..., Explorer]:
    """``function``, whose explorers remember the call, with which a web page makes the same explorer without Python.

    Only calls are remembered that a page can repeat: with the miniature, and arguments that JSON can express.
    """
    parameters = signature(function)

    @wraps(function)
    def call(*args, **kwargs) -> Explorer:
        made = function(*args, **kwargs)
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments | bound.arguments.get("request", {})
        pipe = arguments.pop("pipe", None)
        arguments.pop("request", None)
        if made.call is not None or pipe is None or not _is_miniature(pipe):
            return made
        try:
            made.call = {"name": function.__name__, "args": json.loads(json.dumps(arguments))}
        except (TypeError, ValueError):
            made.call = None
        return made

    return call


def _is_miniature(pipe: FluxPipeline) -> bool:
    """Whether this is the model that the web page runs, as it ships."""
    return pipe.defaults == SHIPPED["nano"].sampling and pipe.lora is None and pipe.redux is None


# ---------------------------------------------------------------- controls


@dataclass(frozen=True)
class Control:
    """A list of options, one of which is chosen; its state is the index of that option.

    ``labels``: the options as shown · ``start``: the index at first · ``values``: the number behind each option, if it
    has one; ``Explorer.set`` then takes a number as such a value, not as an index.
    """

    name: str
    label: str
    labels: Sequence[str]
    start: int = 0
    values: Sequence[float | None] | None = None
    kind: ClassVar[str]

    def message(self) -> dict[str, Any]:
        """The control as the browser receives it."""
        return {"kind": self.kind, "name": self.name, "label": self.label, "labels": list(map(str, self.labels))}

    def index(self, option: int | float | str) -> int:
        """Index of an option, given its label, its value or (without values) the index itself."""
        labels, found = list(map(str, self.labels)), []
        if isinstance(option, str):
            bare = [label.lstrip("▁") for label in labels]
            found = [i for i, label in enumerate(labels) if label == option]
            found += [i for i, label in enumerate(bare) if label == option]
        elif self.values is not None:
            found = [i for i, value in enumerate(self.values) if value is not None and value == option]
        elif isinstance(option, Integral) and not isinstance(option, bool) and -len(labels) <= option < len(labels):
            found = [int(option) % len(labels)]
        if not found:
            shown = ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
            raise InstrumentError(f"{self.name} must be one of {len(labels)} options ({shown}), not {option!r}.")
        return found[0]


class Slider(Control):
    """Options in an order, such as steps."""

    kind = "slider"


class Choice(Control):
    """Options without an order, in a drop-down list."""

    kind = "choice"


class Chips(Control):
    """Options side by side, such as the words of a prompt; pointing at one chooses it. A view may shade them."""

    kind = "chips"


class Vote(Control):
    """Left, the same or right, by button or by the keys left, down and right; option 0 means no answer yet.

    The state is the pair (number of the question, answer), so that a key pressed twice answers only one question.
    """

    kind = "vote"


def time_slider(times: Sequence[float], start: int) -> Slider:
    """The slider ``step`` over the times of a run; a second model evaluation at the same time is marked as such."""
    labels = [f"t = {t:.2f}" + (" (again)" if t in times[:i] else "") for i, t in enumerate(times)]
    return Slider("step", "time", labels, start)


# ---------------------------------------------------------------- checks of arguments


def check_request(request: dict[str, Any], *reserved: str) -> dict[str, Any]:
    """``request`` if it asks for one image; raises for several seeds and for arguments that the explorer sets."""
    for name in reserved:
        if name in request:
            raise InstrumentError(f"{name} is set by the explorer itself; leave it out.")
    if not isinstance(request.get("seed", 0), int):
        raise InstrumentError(f"an explorer shows one image at a time; give one seed, not {request['seed']!r}.")
    return request


def prompt_list(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list; raises unless they are different strings."""
    found = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Sequence) else []
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise InstrumentError(f"prompts must be a prompt or a list of prompts, not {describe(prompts)}.")
    if len(set(found)) < len(found):
        raise InstrumentError("the prompts must be different from each other.")
    return found


def number_list(name: str, value: Any, low: float) -> list:
    """One number or several as a list; raises unless they are finite and at least ``low``."""
    found = list(value) if isinstance(value, (Sequence, range)) and not isinstance(value, str) else [value]
    for x in found or [None]:
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not low <= x < float("inf"):
            raise InstrumentError(f"{name} must be a number of at least {low:g}, or a list of them, not {value!r}.")
    return found


# ---------------------------------------------------------------- the widget


class Try:
    """A suggestion, shown as a button "Try: ...": ``Try("What changes without head 2?", head=2, block="double.0")``.

    label: what the button says, best as a question · moves: what the button sets, as :meth:`Explorer.set` takes it.
    """

    def __init__(self, label: str, **moves):
        self.label, self.moves = label, moves

    def __repr__(self) -> str:
        return f"Try({', '.join([repr(self.label), *(f'{name}={value!r}' for name, value in self.moves.items())])})"


@dataclass
class View:
    """What one state shows: ``panels`` side by side, a sentence below them, and the shade of each option of a
    :class:`Chips` control (its name -> numbers in [0, 1]).
    """

    panels: Sequence[Panel]
    text: str = ""
    shades: Mapping[str, Sequence[float]] = field(default_factory=dict)


class Explorer(anywidget.AnyWidget):
    """At the end of a cell, an explorer shows itself; ``explorer.set(step=3)`` moves it, and ``explorer.figure()`` is
    its current view as a matplotlib figure.

    title: the question that the explorer answers · pointers: initial positions of the panels' pointers · widths: of the
    panels in that figure, in inches · instruction: one line on what to do first · tries: two or three suggestions, each
    a button · play: name of the control, usually time, that the play button runs through, or of a pointer
    (row, column), of which it runs through the columns · data: what panels need that never changes, sent once.

    Raises InstrumentError if a try or ``play`` names a control or an option that there is not.
    """

    _esm = (STATIC / "explorer.js").read_text(encoding="utf-8")
    _css = (STATIC / "explorer.css").read_text(encoding="utf-8")
    title = traitlets.Unicode().tag(sync=True)
    controls = traitlets.List().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    instruction = traitlets.Unicode().tag(sync=True)
    tries = traitlets.List().tag(sync=True)  # {"label": ..., "moves": what it changes in the state}
    play = traitlets.Unicode().tag(sync=True)  # name of a control, or empty
    data = traitlets.Dict().tag(sync=True)
    first = traitlets.Dict().tag(sync=True)  # the state that the reset button goes back to
    still = traitlets.Unicode().tag(sync=True)  # CSS class of the static figure, which the live one hides
    call: dict[str, Any] | None = None  # name and arguments of the call that made it, if a web page can repeat it

    def __init__(
        self,
        title: str,
        controls: Sequence[Control],
        draw: Callable[..., View],
        pointers: Mapping[str, int | tuple[int, int]] | None = None,
        widths: Sequence[float] | None = None,
        *,
        instruction: str = "",
        tries: Sequence[Try] = (),
        play: str | None = None,
        data: Mapping[str, Any] | None = None,
    ):
        self.draw, self.control, self.widths = draw, {c.name: c for c in controls}, widths
        self.pointers, self.extents = dict(pointers or {}), {}
        pairs = [name for name, position in self.pointers.items() if isinstance(position, (tuple, list))]
        if play is not None and play not in [*self.control, *pairs]:
            names = ", ".join([*self.control, *pairs])
            raise InstrumentError(f"play must be the name of a control or of a pair ({names}), not {play!r}.")
        first = {c.name: c.start for c in controls} | self.pointers
        view = self._message(self._view_of(first))  # an error in the first view is raised here
        buttons = [{"label": t.label, "moves": self._state_of(t.moves)} for t in tries]
        # with one seed or one step a suggestion may have nothing to change
        buttons = [b for b in buttons if any(np.any(np.not_equal(first[n], v)) for n, v in b["moves"].items())]
        name = uuid4().hex
        self._is_made = False
        super().__init__(
            title=title,
            instruction=instruction,
            controls=[c.message() for c in controls],
            tries=buttons,
            play=play or "",
            data=dict(data or {}),
            first=first,
            state=first | {"moves": 0},
            view=view | {"moves": 0},
            still=f"fluxedu-{name}",
            model_id=name,  # the page finds the model by it
        )
        self._is_made = True
        self.observe(self._redraw, "state")

    def open(self) -> None:
        """Connect to the page. This is put off until the explorer is displayed, and then the first message has its
        view and all moves made before: a page on a slow machine would lose what comes in a second message.
        """
        if self._is_made:
            super().open()

    @property
    def model_id(self) -> str:
        """The id by which the page knows the explorer; asking for it connects to the page."""
        self.open()
        return super().model_id

    @property
    def values(self) -> dict[str, int | tuple[int, ...]]:
        """The state as ``draw`` takes it."""
        mine = ((name, v) for name, v in self.state.items() if name in self.control or name in self.pointers)
        return {name: tuple(map(int, v)) if isinstance(v, (list, tuple)) else int(v) for name, v in mine}

    def _state_of(self, moves: Mapping[str, Any]) -> dict[str, int | tuple[int, ...]]:
        """Moves as they change the state: labels and values as indices."""
        state = {}
        for name, value in moves.items():
            if name not in self.control and name not in self.pointers:
                names = ", ".join([*self.control, *self.pointers])
                raise InstrumentError(f"this explorer has {names}, but no {name!r}.")
            state[name] = self.control[name].index(value) if name in self.control else value
            if name in self.extents:
                _check_pointer(name, value, self.extents[name])
        return state

    def set(self, **moves) -> Explorer:
        """Move controls (to a label, value or index) and pointers; raises InstrumentError if there is no such move."""
        moves = self._state_of(moves)
        self._view_of(self.values | moves)  # raises before anything moves
        self.state = self.state | moves
        return self

    def current_view(self) -> View:
        return self._view_of(self.values)

    def _view_of(self, values: dict) -> View:
        for name, extent in self.extents.items():
            _check_pointer(name, values[name], extent)
        return self.draw(**values)

    def _message(self, view: View) -> dict[str, Any]:
        """A view as the browser receives it."""
        self.extents = {p.pointer: p.extent for p in view.panels if p.pointer and p.extent is not None}
        shades = {name: rounded(np.clip(row, 0, 1)) for name, row in view.shades.items()}
        return {"text": view.text, "panels": [panel.message() for panel in view.panels], "shades": shades}

    def _redraw(self, _=None) -> None:
        """Answer a move. An error is answered too, as text: the page waits for an answer before its next move."""
        try:
            self.view = self._message(self.current_view()) | {"moves": self.state.get("moves", 0)}
        except Exception as error:  # shown on the page, since nobody reads the kernel's log
            known = isinstance(error, InstrumentError)
            text = str(error) if known else f"This cannot be shown: {type(error).__name__}, {error}."
            self.view = self.view | {"text": text, "moves": self.state.get("moves", 0)}

    def figure(self) -> Figure:
        """The current view as a matplotlib figure, for a page without a kernel."""
        view = self.current_view()
        widths = list(self.widths or [3.0] * len(view.panels))
        chips = [name for name in view.shades if name in self.control]
        rows = _panel_rows(widths)
        width = max(sum(widths[i] for i in row) for row in rows) + 0.3
        letters = int(width * 13)  # that fit in a line
        chosen = [f"{c.label}: {c.labels[self.values[n]]}" for n, c in self.control.items() if n not in chips]
        head = "\n".join([fill(self.title, letters - 10), *filter(None, [fill("   ·   ".join(chosen), letters)])])
        text = fill(view.text, letters)
        heights = [0.3 + 0.28 * len(_wrap_chips(self.control[name].labels, int(width * 10))) for name in chips]
        heights += [min(3.4, max(2.6, min(widths[i] for i in row))) + 0.9 for row in rows]
        lines = 0.2 * (head.count("\n") + text.count("\n") + 2)
        fig = Figure(figsize=(width, sum(heights) + lines), layout="constrained")
        parts = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, name in zip(parts, chips, strict=False):
            _draw_chips(part.subplots(), self.control[name], view.shades[name], self.values[name], int(width * 10))
        for part, row in zip(parts[len(chips) :], rows, strict=True):
            axes = part.subplots(1, len(row), squeeze=False, width_ratios=[widths[i] for i in row])[0]
            for i, ax in zip(row, axes, strict=True):
                view.panels[i].paint(ax)
                ax.set_title(fill(view.panels[i].title, int(widths[i] * 11)), fontsize=FONT)
        fig.suptitle(head, fontsize=FONT + 1)
        fig.supxlabel(text, fontsize=FONT)
        return fig

    def _ipython_display_(self) -> None:
        """Show the static figure and then the widget, which hides the figure once it is live. What a former run of the
        cell has shown is closed.
        """
        from IPython.display import display

        close_former(self)
        drawn, png = io.BytesIO(), io.BytesIO()
        self.figure().savefig(drawn, format="png", dpi=80)
        small = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)  # a third of the bytes
        small.save(png, "PNG")
        image = base64.b64encode(png.getvalue()).decode()
        alt = escape(f"{self.title} {self.view['text']}", quote=True)
        call = f' data-fluxedu="{escape(self._repeatable(), quote=True)}"' if self.call else ""
        still = f'<img class="fluxedu-still {self.still}" alt="{alt}"{call} src="data:image/png;base64,{image}">'
        scrolled = f'<div style="overflow-x:auto">{still}</div>'  # on a telephone its text keeps its size
        display({"text/html": scrolled, "text/plain": f"{self!r}, as a static figure"}, raw=True)
        display(self._repr_mimebundle_()[0] | {"text/plain": repr(self)}, raw=True)

    def _repeatable(self) -> str:
        """What the site needs to show this explorer live, as JSON: its call, its texts and its state."""
        names = ("title", "instruction", "controls", "tries", "play", "first")
        message = {name: getattr(self, name) for name in names}
        return json.dumps(self.call | message | {"state": self.values}, separators=(",", ":"), ensure_ascii=False)

    def close(self) -> None:
        """Disconnect from the page, and free what the explorer holds."""
        super().close()
        self.draw, self.view = _closed, {}

    def __repr__(self) -> str:
        return f"<Explorer: {self.title}>"


def _closed(**_) -> View:
    raise InstrumentError("this explorer is closed, since its cell ran again; make a new one.")


def _check_pointer(name: str, position: int | tuple[int, ...], extent: int | tuple[int, int]) -> None:
    """Raises InstrumentError for a pointer outside its panel."""
    indices, ends = (v if isinstance(v, tuple) else (v,) for v in (position, extent))
    if len(indices) != len(ends) or not all(0 <= i < n for i, n in zip(indices, ends, strict=True)):
        size = " x ".join(map(str, ends))
        raise InstrumentError(f"{name} must be an index into {size}, counted from 0, not {position!r}.")


def _panel_rows(widths: Sequence[float], most: float = 8.6) -> list[list[int]]:
    """Indices of panels, broken into rows at most ``most`` inches wide: wider ones would be shrunk by a page."""
    rows: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if rows[-1] and sum(widths[j] for j in rows[-1]) + width > most:
            rows.append([])
        rows[-1].append(i)
    return rows


def _wrap_chips(labels: Sequence[str], max_letters: int) -> list[list[int]]:
    """Indices of the labels, broken into lines of about ``max_letters``."""
    lines, length = [[]], 0
    for i, label in enumerate(labels):
        if lines[-1] and length + len(label) + 1.5 > max_letters:
            lines.append([])
            length = 0
        lines[-1].append(i)
        length += len(label) + 1.5
    return lines


def _draw_chips(ax: Axes, control: Control, shades: Sequence[float], chosen: int, letters: int) -> None:
    """A chips control as lines of shaded words, ``letters`` long."""
    lines = _wrap_chips(control.labels, letters)
    hide_axes(ax).set(xlim=(0, 1), ylim=(len(lines), 0))
    ax.set_title(control.label, fontsize=FONT, loc="left")
    widest = max(letters, *(sum(len(control.labels[i]) + 1.5 for i in line) for line in lines))
    for row, line in enumerate(lines):
        x = 0.0
        for i in line:
            width = (len(control.labels[i]) + 1.5) / widest
            shade = to_rgba(CHIP_COLOUR, float(np.clip(shades[i], 0, 1)))
            box = {"facecolor": shade, "edgecolor": "black" if i == chosen else "0.8", "boxstyle": "round,pad=0.2"}
            label = control.labels[i].replace("▁", "")  # T5 marks the beginning of a word with it
            ax.text(x + width / 2, row + 0.5, label, ha="center", va="center", fontsize=FONT, bbox=box)
            x += width
