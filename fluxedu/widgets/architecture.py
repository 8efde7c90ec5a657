"""The diagram of the model: every part, the sites of each, and the values that passed through them during a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fluxedu.errors import InstrumentError
from fluxedu.instruments import recorder
from fluxedu.instruments.catalogue import EVERYTHING, Site, sites
from fluxedu.instruments.lenses.run import run_recorded
from fluxedu.instruments.named import Named
from fluxedu.instruments.parts import Part, parts
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import MapView, Value, to_named
from fluxedu.plots import PART_COLOURS
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.solvers import from_strength
from fluxedu.sampling.step_context import Steps
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Explorer, View, check_request, explorer, time_slider
from fluxedu.widgets.panels import Boxes, Pixels, diverging, resize_table, sequential

ROWS, COLUMNS, TILES = 256, 640, 16  # the largest table kept of one value
GREY = "#888888"  # sites that the run did not pass through

# ---------------------------------------------------------------- the diagram

Box = tuple[str, float, float, float, float, str]  # label, x, y, width, height, colour
Arrow = tuple[float, ...]  # x, y, x, y, ...: a line through these points with its head at the last one

BOX_WIDTH, BOX_HEIGHT, GAP, WIDTH, MARGIN = 104.0, 24.0, 22.0, 476.0, 14.0
BLOCKS_PER_ROW = 19


def diagram(model_parts: Sequence[Part]) -> tuple[list[Box], list[Arrow], tuple[float, float]]:
    """Boxes, arrows and size of the model's diagram, with at most 19 blocks per row.

    On the right, arrows from ``vec`` to everything it modulates: each row of blocks and the last layer. On the left,
    the loop of sampling: the solver's result is the next input.
    """
    rects = _layout(model_parts)
    boxes = []
    for part in model_parts:
        x, y, w = rects[part.name]
        short = part.title.removeprefix("Autoencoder: ").replace("-stream block", "").replace(" text encoder", "")
        label = short if w > 40 else part.name.split(".")[1]
        boxes.append((label, x + 1, y, w, BOX_HEIGHT, PART_COLOURS[part.kind]))
    blocks = [part.name for part in model_parts if "." in part.name]
    arrows = []
    chain = ["in", *blocks, "final", "solver", "image"]
    branches = [("t5", "in"), ("noise", "in"), ("encoder", "noise"), ("clip", "vec")]
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


def architecture_view(
    model_parts: Sequence[Part],
    sites_of: Mapping[str, Sequence[Site]],
    tables: Mapping[str, Named],
    summaries: Mapping[str, Named],
    time: float,
    part: int,
    site: int,
) -> View:
    """The diagram, the sites of one part, and the value of one site at ``time``.

    ``sites_of``: part -> its sites · ``tables``, ``summaries``: site -> :func:`as_table` and the four numbers of
    ``reduce="summary"``, with an axis ``step``, labelled by time, if there are several.
    """
    chosen_part = model_parts[part]
    here = sites_of[chosen_part.name]
    chosen = here[min(site, len(here) - 1)]
    boxes, arrows, size = diagram(model_parts)
    site_boxes = []
    for i, s in enumerate(here):
        colour = PART_COLOURS[chosen_part.kind] if s.name in tables else GREY
        label = s.name.removeprefix(f"{chosen_part.name}.")
        site_boxes.append((label, 2 + i % 3 * 150, 4 + i // 3 * 22, 146, 18, colour))
    height = 8 + 22 * -(-len(here) // 3)
    title = f"{chosen_part.title}: {len(here)} sites"
    panels = [
        Boxes("The model: choose a part", boxes, arrows, size, part, pointer="part"),
        Boxes(title, site_boxes, [], (454, height), here.index(chosen), pointer="site"),
        _value_panel(chosen, tables.get(chosen.name), time),
    ]
    return View(panels, f"{chosen_part.text} · {_describe_site(chosen, summaries.get(chosen.name), time)}")


def _value_panel(site: Site, table: Named | None, time: float) -> Pixels:
    x = None if table is None else at_time(table, time)
    if x is None:
        when = "in this run" if table is None else "at this time"
        return Pixels(f"{site.name}: no value of the prompted pass {when}", np.full((64, 128, 3), 235, np.uint8))
    vmax = float(table.tensor.abs().max())  # one scale for all times
    title = f"{site.name}: rows are {x.axes[0]}, columns are {x.axes[1]}"
    if float(table.tensor.min()) >= 0:
        return Pixels(title, resize_table(sequential(x.tensor, vmax), 256, 640), key=("0", f"{vmax:.3g}"))
    image = resize_table(diverging(x.tensor, vmax), 256, 640)
    return Pixels(title, image, key=(f"{-vmax:.3g}", f"{vmax:.3g}"), colours="RdBu_r")


def _describe_site(site: Site, summary: Named | None, time: float) -> str:
    text = f"{site.name} [{', '.join(map(str, site.shape))}]: {site.meaning} ({site.source})."
    numbers = None if summary is None else at_time(summary, time)
    if numbers is None:
        return text
    mean, std, low, high = numbers.tensor.tolist()
    if site.name.endswith(".map"):  # the summary of a map is of its sums over queries
        return f"{text} Here a token receives {low:.3g} to {high:.3g} times an equal share of attention."
    return f"{text} Here: mean {mean:.3g}, standard deviation {std:.3g}, from {low:.3g} to {high:.3g}."


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


@explorer(example=lambda pipe: architecture(pipe, EXAMPLE_PROMPT, steps=3, progress=False))
def architecture(pipe: FluxPipeline, prompt: str, *, at_steps: Steps = None, **request) -> Explorer:
    """Every site of the model on its diagram, with the values that passed through it while ``prompt`` was drawn.

    at_steps: steps to record; by default six, or as many as the recorder's budget allows (one for FLUX.1-dev at
    1024 x 1024) · ``request``: as for the pipeline. With classifier-free guidance, the prompted pass is shown. Colours
    have one scale over all recorded steps.
    """
    if at_steps is None:
        at_steps = _some_steps(pipe, check_request(request), _steps_within_budget(pipe))
    with record(*EVERYTHING, steps=at_steps, reduce="summary", passes="prompted") as summary_recorder:
        _, table_recorder = run_recorded(pipe, prompt, *EVERYTHING, options=request, steps=at_steps, reduce=as_table)
    tables = {name: table_recorder[name] for name in table_recorder}
    summaries = {name: summary_recorder[name] for name in summary_recorder}
    if "sample.x" not in tables:
        raise InstrumentError("the run has no such step, so there is nothing to show.")
    model_parts, every = parts(pipe), sites(pipe)
    sites_of = {part.name: [s for s in every if part.has(s.name)] for part in model_parts}
    times = tables["sample.x"].coords["step"]

    def draw(step: int, part: int, site: int) -> View:
        return architecture_view(model_parts, sites_of, tables, summaries, times[step], part, site)

    part = [part.name for part in model_parts].index("single.0")
    site = [s.name for s in sites_of["single.0"]].index("single.0.attn.map")
    title, pointers = "What does each part of the model compute?", {"part": part, "site": site}
    return Explorer(title, [time_slider(times, len(times) // 2)], draw, pointers, widths=[4.6, 4.4, 3.2])
