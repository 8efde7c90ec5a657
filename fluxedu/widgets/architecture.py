"""The map of the model, whose boxes open, with the values that passed through them during a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from fluxedu.errors import InstrumentError
from fluxedu.instruments import recorder
from fluxedu.instruments.catalogue import Site, globs_of_everything, sites
from fluxedu.instruments.lenses.run import run_recorded
from fluxedu.instruments.named import Named
from fluxedu.instruments.parts import Part, parts
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import MapView, Value, to_named
from fluxedu.instruments.wiring import boxes, wiring
from fluxedu.plots import DIVERGING, PART_COLOURS, SEQUENTIAL, hide_axes
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.solvers import from_strength
from fluxedu.sampling.step_context import Steps
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Explorer, Try, View, check_request, explorer, time_slider
from fluxedu.widgets.panels import Boxes, Panel, Pixels, diverging, sequential, to_rgb

ROWS, COLUMNS, TILES = 256, 640, 16  # the largest table kept of one value
NO_VALUE = "This run has no value here."

# ---------------------------------------------------------------- the diagram of the static figure

Box = tuple[str, float, float, float, float, str]  # label, x, y, width, height, colour
Arrow = tuple[float, ...]  # x, y, x, y, ...: a line through these points with its head at the last one

BOX_WIDTH, BOX_HEIGHT, GAP, WIDTH, MARGIN = 104.0, 24.0, 22.0, 476.0, 14.0
BLOCKS_PER_ROW = 19
SHORT = {"t5": "T5", "clip": "CLIP", "encoder": "Encoder", "in": "Image and text input", "vec": "Modulation"}
SHORT |= {"final": "Last layer", "image": "Decoder"}


def diagram(model_parts: Sequence[Part]) -> tuple[list[Box], list[Arrow], tuple[float, float]]:
    """Boxes, arrows and size of the model's diagram, with at most 19 blocks per row.

    On the right, arrows from ``vec`` to everything it modulates: each row of blocks and the last layer. On the left,
    the loop of sampling: the solver's result is the next input.
    """
    rects = _layout(model_parts)
    boxes = []
    for part in model_parts:
        x, y, w = rects[part.name]
        short = SHORT.get(part.name) or part.title.replace("-stream block", "")
        label = short if w > 40 else part.name.split(".")[1]
        boxes.append((label, x + 1, y, w, BOX_HEIGHT, PART_COLOURS[part.kind]))
    blocks = [part.name for part in model_parts if "." in part.name]
    arrows = []
    chain = ["in", *blocks, "final", "solver", "image"]
    branches = [("t5", "in"), ("language_model", "in"), ("noise", "in"), ("encoder", "noise"), ("clip", "vec")]
    branches = [ends for ends in branches if ends[0] in {part.name for part in model_parts}]
    for a, b in [*branches, *zip(chain, chain[1:], strict=False)]:
        (xa, ya, wa), (xb, yb, wb) = rects[a], rects[b]
        if ya == yb:  # side by side
            start, end = (xa + wa, xb) if xa < xb else (xa, xb + wb)
            arrows.append((start, ya + BOX_HEIGHT / 2, end, yb + BOX_HEIGHT / 2))
        else:
            arrows.append((xa + wa / 2, ya + BOX_HEIGHT, xb + wb / 2, yb))
    # modulation: down the right side, to the last block of each row and, from above, to the last layer
    (x, y, w), right = rects["vec"], WIDTH + 2 + 1.6 * MARGIN
    start = (x + w, y + BOX_HEIGHT / 2, right, y + BOX_HEIGHT / 2)
    last_of_row = {rects[name][1]: rects[name] for name in blocks}
    for left, top, w in last_of_row.values():
        arrows.append((*start, right, top + BOX_HEIGHT / 2, left + w + 2, top + BOX_HEIGHT / 2))
    left, top, w = rects["final"]
    arrows.append((*start, right, top - GAP / 3, left + 0.8 * w, top - GAP / 3, left + 0.8 * w, top))
    # the loop: from below the solver, up the left side, to the input
    (x, y, w), (left, top, _) = rects["solver"], rects["in"]
    x, below, middle = x + w / 2, y + BOX_HEIGHT, top + BOX_HEIGHT / 2
    arrows.append((x, below, x, below + 8, 0.4 * MARGIN, below + 8, 0.4 * MARGIN, middle, left, middle))
    height = max(y for _, y, _ in rects.values()) + BOX_HEIGHT + 12
    return boxes, arrows, (WIDTH + 2 + 2 * MARGIN, height)


def _layout(model_parts: Sequence[Part]) -> dict[str, tuple[float, float, float]]:
    """x, y and width of each part."""
    step = BOX_WIDTH + 20
    rects = {name: (MARGIN + i * step, 4, BOX_WIDTH) for i, name in enumerate(("t5", "noise", "encoder", "clip"))}
    rects["language_model"] = rects["t5"]  # FLUX.2 has it in place of T5
    rects["in"] = (MARGIN, 4 + BOX_HEIGHT + GAP, BOX_WIDTH + step)
    rects["vec"] = (MARGIN + 3 * step, 4 + BOX_HEIGHT + GAP, BOX_WIDTH)
    y = 4 + 2 * (BOX_HEIGHT + GAP)
    for kind in ("double", "single"):
        names = [part.name for part in model_parts if part.name.startswith(f"{kind}.")]
        for first in range(0, len(names), BLOCKS_PER_ROW):
            row = names[first : first + BLOCKS_PER_ROW]
            width = min(BOX_WIDTH, (WIDTH - 4 * (len(row) - 1)) / len(row))
            for i, name in enumerate(row):
                rects[name] = (MARGIN + i * (width + 4), y, width)
            y += BOX_HEIGHT + GAP
    for i, name in enumerate(("final", "solver", "image")):
        rects[name] = (MARGIN + i * step, y, BOX_WIDTH)
    return rects


# ---------------------------------------------------------------- values


def as_table(value: Value) -> Named:
    """A site's value for one image, as a matrix ``[rows, columns]`` to show.

    Maps are averaged over heads; other heads stand side by side, and channels of an image as tiles (the first 16). Of
    what is larger than ROWS x COLUMNS, every second, third, ... number is kept. With guidance, the prompted pass.
    """
    x = value.head_mean() if isinstance(value, MapView) else to_named(value)
    x = x.at(batch=-1) if "batch" in x.axes else x.at(one=0)
    axes, table = x.axes, (x.tensor.angle() if x.tensor.is_complex() else x.tensor).float()
    if table.ndim == 1:
        axes, table = ("vector", *axes), table[None]
    if table.ndim == 3 and axes[0] == "head":
        axes, table = (axes[1], f"{axes[2]} of one head after another"), torch.cat(list(table), dim=1)
    elif table.ndim == 3:
        thin = max(1, -(-table.shape[-1] * 4 // ROWS))
        tiles = list(table[:TILES, ::thin, ::thin])
        across = max(1, round(len(tiles) ** 0.5))
        tiles += [torch.zeros_like(tiles[0])] * (-len(tiles) % across)
        rows = [torch.cat(tiles[i : i + across], dim=1) for i in range(0, len(tiles), across)]
        axes, table = ("row", f"column; {min(TILES, x.shape[0])} of {x.shape[0]} channels as tiles"), torch.cat(rows)
    every = [-(-n // limit) for n, limit in zip(table.shape, (ROWS, COLUMNS), strict=True)]
    axes = ["vector" if axis == "one" else axis for axis in axes]
    axes = [axis if n == 1 else f"{axis}, one in {n}" for axis, n in zip(axes, every, strict=True)]
    return Named(table[:: every[0], :: every[1]], tuple(axes))


def at_time(value: Named, time: float) -> Named | None:
    """The value at ``time``: the last of several calls, the first of several evaluations; None if there is none."""
    value = value.at(call=-1) if "call" in value.axes else value
    if "step" not in value.axes:
        return value
    steps = [i for i, t in enumerate(value.coords["step"]) if abs(t - time) < 1e-6]
    return value.at(step=steps[0]) if steps else None


@dataclass
class MapPanel(Panel):
    """The map of the model, with the value of one box. ``ids``: of all boxes, of which ``mark`` is the chosen one ·
    ``step``: index of the time · ``value``: what the box shows, or None · ``text``: a sentence about it · ``parts``: of
    the model, for the static figure.
    """

    ids: Sequence[str]
    mark: int
    step: int
    value: Pixels | None
    text: str
    parts: Sequence[Part]
    kind = "map"

    @property
    def extent(self) -> int:
        return len(self.ids)

    def message(self) -> dict[str, Any]:
        """As of every panel; the ids and the wiring do not change, so they are part of the explorer's ``data``."""
        message = {"kind": self.kind, "title": self.title, "pointer": self.pointer, "mark": self.mark}
        return message | {
            "step": self.step,
            "text": self.text,
            "value": None if self.value is None else self.value.message(),
        }

    def paint(self, ax: Axes) -> None:
        hide_axes(ax)
        boxes, arrows, size = diagram(self.parts)
        chosen = [i for i, part in enumerate(self.parts) if part.has(self.ids[self.mark])]
        Boxes("", boxes, arrows, size, chosen[0] if chosen else -1).paint(ax.inset_axes((0.0, 0.0, 0.54, 0.98)))
        if self.value is not None:
            side = ax.inset_axes((0.62, 0.12, 0.36, 0.76))
            self.value.paint(side)
            side.set_title(fill(self.value.title, 40), fontsize=9)


def value_panel(site: Site, table: Named | None, time: float) -> Pixels | None:
    """The value of a site at ``time``; None if the run has none there."""
    x = None if table is None else at_time(table, time)
    if x is None:
        return None
    vmax = float(table.tensor.abs().max())  # one scale for all times
    title = f"{site.name}: rows are {x.axes[0]}, columns are {x.axes[1]}"
    is_positive = float(table.tensor.min()) >= 0
    image = sequential(x.tensor, vmax) if is_positive else diverging(x.tensor, vmax)
    values = image.values
    if "row" not in site.axes:  # a vector is drawn as a strip; what has rows and columns of cells keeps its shape
        image = image.repeat(max(1, image.shape[1] // (8 * image.shape[0])), 0)
    key = ("0" if is_positive else f"{-vmax:.3g}", f"{vmax:.3g}")
    return Pixels(title, image, key=key, colours=SEQUENTIAL if is_positive else DIVERGING, values=values)


def _describe_site(site: Site, summary: Named | None, time: float) -> str:
    text = f"{site.name} [{', '.join(map(str, site.shape))}]: {site.meaning} ({site.source})."
    numbers = None if summary is None else at_time(summary, time)
    return f"{text} {_describe_numbers(site.name, numbers)}" if numbers is not None else f"{text} {NO_VALUE}"


def _describe_numbers(name: str, numbers: Named) -> str:
    mean, std, low, high = numbers.tensor.tolist()
    if name.endswith(".map"):  # the summary of a map is of its sums over queries
        return f"Here a token receives {low:.3g} to {high:.3g} times an equal share of attention."
    return f"Here: mean {mean:.3g}, standard deviation {std:.3g}, from {low:.3g} to {high:.3g}."


# ---------------------------------------------------------------- the explorer


def _some_steps(pipe: FluxPipeline, request: dict[str, Any], limit: int) -> list[int] | None:
    """At most ``limit`` steps, evenly spaced over those of the run; None (all of them) if their number is unknown."""
    count = request.get("steps") or pipe.defaults.steps
    if not isinstance(count, int) or count < 1:
        return None  # the pipeline's error says what is wrong
    if request.get("image") is not None:
        strength = request.get("strength", 0.6)
        count = len(from_strength(list(range(count + 1)), strength)) - 1 if 0 < strength <= 1 else count
    return sorted({round(i * (count - 1) / max(limit - 1, 1)) for i in range(limit)})


def _steps_within_budget(pipe: FluxPipeline) -> int:
    """How many steps, up to six, fit in the recorder's budget if every table has its largest size."""
    tables = [site.name for site in sites(pipe) if site.shape[-2:-1] != (1,) and len(site.shape) > 2]
    outside = sum(name.startswith(("t5.", "clip.", "ae.")) for name in tables)  # once per run, not per step
    affordable = recorder.BUDGET // (4 * ROWS * COLUMNS) - outside
    return max(1, min(6, affordable // max(len(tables) - outside, 1)))


class Architecture(Explorer):
    """The explorer of the map; in :meth:`set`, a box is named by its site: ``set(box="single.0.attn.map")``."""

    def _state_of(self, moves: Mapping[str, Any]) -> dict[str, int | tuple[int, ...]]:
        if isinstance(name := moves.get("box"), str):
            ids = self.data["ids"]
            if name not in ids:
                near = get_close_matches(name, ids, 3, 0.4)
                advice = f" Similar names: {', '.join(near)}." if near else ""
                raise InstrumentError(f"box must be the name of a site or of a box of the map, not {name!r}.{advice}")
            moves = {**moves, "box": ids.index(name)}
        return super()._state_of(moves)


@explorer(example=lambda pipe: architecture(pipe, EXAMPLE_PROMPT, steps=3, progress=False))
def architecture(pipe: FluxPipeline, prompt: str, *, at_steps: Steps = None, **request) -> Explorer:
    """The map of the model: every box opens down to its formulas, with the values computed while drawing ``prompt``.

    at_steps: steps to record; by default six, or as many as the recorder's budget allows (one for FLUX.1-dev at
    1024 x 1024) · ``request``: as for the pipeline. With classifier-free guidance, the prompted pass is shown. Colours
    have one scale over all recorded steps. ``explorer.set(box="single.0.attn.map")`` chooses a box.
    """
    if at_steps is None:
        at_steps = _some_steps(pipe, check_request(request), _steps_within_budget(pipe))
    every, globs = {site.name: site for site in sites(pipe)}, globs_of_everything(pipe)
    with record(*globs, steps=at_steps, reduce="summary", passes="prompted") as summary_recorder:
        out, table_recorder = run_recorded(pipe, prompt, *globs, options=request, steps=at_steps, reduce=as_table)
    tables = {name: table_recorder[name] for name in table_recorder}
    summaries = {name: summary_recorder[name] for name in summary_recorder}
    if "sample.x" not in tables:
        raise InstrumentError("the run has no such step, so there is nothing to show.")
    model = wiring(pipe)
    found, model_parts = list(boxes(model)), parts(pipe)
    ids = [box["id"] for box in found]
    shown = [box["site"] or box.get("shows") for box in found]
    times = tables["sample.x"].coords["step"]
    picture = to_rgb(out.images[0])

    def value(name: str | None, time: float) -> Pixels | None:
        if name in ("sample.image", "ae.decoder.image"):
            return Pixels("The image", picture)
        return None if name is None else value_panel(every[name], tables.get(name), time)

    def draw(step: int, box: int) -> View:
        site, time = every.get(shown[box]), times[step]
        text = found[box]["text"]
        if site is not None:
            text = _describe_site(site, summaries.get(site.name), time)
        chosen = value(shown[box], time)
        panel = MapPanel("", ids, box, step, chosen, text, model_parts, pointer="box")
        return View([panel], text)

    pictures = [box["site"] or box["shows"] for box in found if box.get("picture")]
    data = {
        "wiring": model,
        "ids": ids,
        "pictures": {name: _pictures([value(name, t) for t in times]) for name in pictures},
        "numbers": {name: _sentences(name, summary, times) for name, summary in summaries.items()},
    }
    return Architecture(
        "What does each part of the model compute?",
        [time_slider(times, len(times) // 2)],
        draw,
        {"box": ids.index("sample.image")},
        widths=[9.6],
        instruction="Click a box to open it and to see its value. Drag or use the arrow keys to look around.",
        tries=[
            Try("Where do text and image meet?", box=ids.index("double.0")),
            Try("What does one attention map look like?", box=ids.index("single.0.attn.map")),
            Try("What does the modulation do?", box=ids.index("double.0.img_mod")),
        ],
        play="step",
        data=data,
    )


def _pictures(panels: Sequence[Pixels | None]) -> list[dict[str, Any] | None]:
    """Small pictures for the overview, one per time; a single one if it does not depend on the time."""
    found = [panel and Pixels("", np.asarray(panel.image)).message() for panel in panels]
    return found[:1] if all(picture == found[0] for picture in found) else found


def _sentences(name: str, summary: Named, times: Sequence[float]) -> list[str]:
    """What hovering over a box says, per time."""
    found = [at_time(summary, time) for time in times]
    return ["" if numbers is None else _describe_numbers(name, numbers).removeprefix("Here: ") for numbers in found]
