"""The map of the model: every site of every part of the diagram, and what went by there in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fluxedu.instruments.catalogue import Site, sites
from fluxedu.instruments.lenses.run import recorded
from fluxedu.instruments.named import Named
from fluxedu.instruments.parts import Part, parts
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import MapView, Value, made
from fluxedu.plots.canvas import SHADES
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.controls import Slider
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import enlarged, heat, two_sided
from fluxedu.widgets.panels import Boxes, Pixels

ROWS, COLUMNS, TILES = 256, 640, 16  # how much of a value is kept to be looked at
Box = tuple[str, float, float, float, float, str]
GREY = "#888888"


def as_table(value: Value) -> Named:
    """Any site's value of one picture as ``[rows, columns]`` to look at.

    A map is averaged over heads; heads stand side by side, channels of a picture as tiles (the first 16); of what
    is larger than ROWS x COLUMNS every second, third, ... number is kept. With guidance, the prompted pass.
    """
    x = value.head_mean() if isinstance(value, MapView) else made(value)
    x = x.at(batch=-1) if "batch" in x.axes else x.at(one=0)
    axes, table = x.axes, (x.tensor.angle() if x.tensor.is_complex() else x.tensor).float()
    if table.ndim == 1:
        axes, table = ("vector", *axes), table[None]
    if table.ndim == 3 and axes[0] == "head":
        axes, table = (axes[1], f"{axes[2]}, a head after the other"), torch.cat(list(table), dim=1)
    elif table.ndim == 3:
        thin = max(1, -(-table.shape[-1] * 4 // ROWS))
        tiles = list(table[:TILES, ::thin, ::thin])
        across = max(1, round(len(tiles) ** 0.5))
        tiles += [torch.zeros_like(tiles[0])] * (-len(tiles) % across)
        rows = [torch.cat(tiles[i : i + across], dim=1) for i in range(0, len(tiles), across)]
        axes, table = ("row", f"column; {min(TILES, x.shape[0])} of {x.shape[0]} channels as tiles"), torch.cat(rows)
    down, along = (-(-n // most) for n, most in zip(table.shape, (ROWS, COLUMNS), strict=True))
    return Named(table[::down, ::along], tuple("vector" if a == "one" else a for a in axes))


def diagram(those: Sequence[Part]) -> tuple[list[Box], list[tuple[float, float, float, float]], tuple[float, float]]:
    """Boxes, lines and size of the model's diagram; blocks in rows of at most nineteen."""
    wide, high, gap, width = 104.0, 24.0, 22.0, 476.0
    places: dict[str, tuple[float, float, float]] = {}  # x, y, width
    for i, name in enumerate(("t5", "noise", "encoder", "clip")):
        places[name] = (i * (wide + 20), 4, wide)
    places["in"], places["vec"] = (0, 4 + high + gap, 2 * wide + 20), (3 * (wide + 20), 4 + high + gap, wide)
    y = 4 + 2 * (high + gap)
    for kind in ("double", "single"):
        names = [part.name for part in those if part.name.startswith(f"{kind}.")]
        for first in range(0, len(names), 19):
            row = names[first : first + 19]
            each = min(wide, (width - 4 * (len(row) - 1)) / len(row))
            for i, name in enumerate(row):
                places[name] = (i * (each + 4), y, each)
            y += high + gap
    for i, name in enumerate(("final", "solver", "image")):
        places[name] = (i * (wide + 20), y, wide)
    boxes = [_box(part, *places[part.name], high) for part in those]
    middle = {name: (x + w / 2, top) for name, (x, top, w) in places.items()}
    order = [part.name for part in those if "." in part.name]
    ways = [("t5", "in"), ("noise", "in"), ("encoder", "noise"), ("clip", "vec"), ("in", order[0]),
            ("vec", order[0]), *zip(order, order[1:], strict=False), (order[-1], "final"), ("final", "solver"),
            ("solver", "image")]  # fmt: skip
    return boxes, [_way(middle, places, a, b, high) for a, b in ways], (width + 2, y + high + 4)


def _box(part: Part, x: float, y: float, w: float, h: float) -> Box:
    short = part.title.removeprefix("Autoencoder: ").replace("-stream block", "").replace(" text encoder", "")
    label = short if w > 40 else part.name.split(".")[1]
    return (label, x + 1, y, w, h, SHADES[part.kind])


def _way(middle, places, a: str, b: str, high: float) -> tuple[float, float, float, float]:
    """A line from a part to the next: down, or across where they stand beside each other."""
    (xa, ya), (xb, yb) = middle[a], middle[b]
    if ya == yb:
        first, second = (places[name][0] for name in (a, b))
        ends = (first + places[a][2], second) if xa < xb else (first, second + places[b][2])
        return (ends[0], ya + high / 2, ends[1], yb + high / 2)
    return (xa, ya + high, xb, yb)


def architecture_view(
    those: Sequence[Part],
    known: Mapping[str, Sequence[Site]],
    tables: Mapping[str, Named],
    numbers: Mapping[str, Named],
    step: int,
    part: int,
    site: int,
) -> View:
    """The diagram, the sites of one part, and one site's value at one of the kept steps.

    ``known``: part -> its sites · ``tables``, ``numbers``: site -> :func:`as_table` and the summary, with an axis
    ``step`` where there are several.
    """
    here = known[those[part].name]
    chosen = here[min(site, len(here) - 1)]
    boxes, lines, size = diagram(those)
    shade = SHADES[those[part].kind]
    grid = [(s.name.removeprefix(f"{those[part].name}."), 2 + i % 3 * 150, 4 + i // 3 * 22, 146, 18,
             shade if s.name in tables else GREY) for i, s in enumerate(here)]  # fmt: skip
    kind = those[part].title
    panels = [
        Boxes("the model: choose a part", boxes, lines, size, part, pointer="part"),
        Boxes(f"{kind}: {len(here)} sites", grid, [], (454, 8 + 22 * -(-len(here) // 3)), here.index(chosen),
              pointer="site"),
        _value(chosen, tables.get(chosen.name), step),
    ]  # fmt: skip
    return View(panels, _said(chosen, numbers.get(chosen.name), step))


def _at(value: Named, step: int) -> Named:
    return value.at(step=min(step, value.sizes["step"] - 1)) if "step" in value.axes else value


def _value(site: Site, table: Named | None, step: int) -> Pixels:
    if table is None:
        return Pixels(f"{site.name}: nothing passed here in this run", np.full((64, 128, 3), 235, np.uint8))
    x = _at(table, step)
    most = float(x.tensor.abs().max())
    shown, low = (heat(x.tensor, most), 0.0) if float(x.tensor.min()) >= 0 else (two_sided(x.tensor, most), -most)
    colours = "magma" if low == 0 else "RdBu_r"
    key = (f"{low:.3g}", f"{most:.3g}")
    return Pixels(f"rows: {x.axes[0]} · columns: {x.axes[1]}", enlarged(shown, 200, 300), key=key, colours=colours)


def _said(site: Site, numbers: Named | None, step: int) -> str:
    said = f"{site.name} [{', '.join(map(str, site.shape))}]: {site.meaning} ({site.source})."
    if numbers is None:
        return said
    mean, spread, least, most = _at(numbers, step).tensor.tolist()
    return f"{said} Here: mean {mean:.3g}, spread {spread:.3g}, from {least:.3g} to {most:.3g}."


def architecture(pipe: FluxPipeline, prompt: str, *, at_steps: Sequence[int] | None = None, **asked) -> Explorer:
    """Every site of the model on its diagram, with what passed there while ``prompt`` was drawn.

    at_steps: which steps to keep, six of them if not said · ``asked``: as for the pipeline.
    """
    count = asked.get("steps") or pipe.defaults.steps
    at_steps = sorted({round(i * (count - 1) / 5) for i in range(6)}) if at_steps is None else list(at_steps)
    with record("*", steps=at_steps, reduce="summary", passes="prompted") as summed:
        _, rec = recorded(pipe, prompt, "*", asked=asked, steps=at_steps, reduce=as_table)
    tables, numbers = ({name: r[name] for name in r} for r in (rec, summed))
    those, every = parts(pipe), sites(pipe)
    known = {part.name: [s for s in every if part.has(s.name)] for part in those}
    times = tables["sample.x"].coords["step"]

    def draw(step: int, part: int, site: int) -> View:
        return architecture_view(those, known, tables, numbers, step, part, site)

    control = Slider("step", "time", [f"t = {t:.2f}" for t in times], len(times) // 2)
    start = [part.name for part in those].index("single.0")
    return Explorer("The model", [control], draw, {"part": start, "site": 0}, widths=[4.6, 4.4, 3.2])
