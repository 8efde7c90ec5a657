"""The map of the model: every site of every part of the diagram, and what went by there in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fluxedu.errors import InstrumentError
from fluxedu.instruments import recorder
from fluxedu.instruments.catalogue import Site, sites
from fluxedu.instruments.lenses.run import recorded
from fluxedu.instruments.named import Named
from fluxedu.instruments.parts import Part, parts
from fluxedu.instruments.recorder import Steps, record
from fluxedu.instruments.reductions import MapView, Value, made
from fluxedu.plots.canvas import SHADES
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.asked import checked, some_steps
from fluxedu.widgets.controls import clock
from fluxedu.widgets.diagram import diagram
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import heat, stretched, two_sided
from fluxedu.widgets.panels import Boxes, Pixels

ROWS, COLUMNS, TILES = 256, 640, 16  # how much of a value is kept to be looked at
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
    said = tuple("vector" if a == "one" else a for a in axes)
    named = (a if by == 1 else f"{a}, one in {by}" for a, by in zip(said, (down, along), strict=True))
    return Named(table[::down, ::along], tuple(named))


def architecture_view(
    those: Sequence[Part],
    known: Mapping[str, Sequence[Site]],
    tables: Mapping[str, Named],
    numbers: Mapping[str, Named],
    time: float,
    part: int,
    site: int,
) -> View:
    """The diagram, the sites of one part, and one site's value at ``time``.

    ``known``: part -> its sites · ``tables``, ``numbers``: site -> :func:`as_table` and the summary, with an axis
    ``step``, labelled by time, where there are several.
    """
    here = known[those[part].name]
    chosen = here[min(site, len(here) - 1)]
    boxes, lines, size = diagram(those)
    shade = SHADES[those[part].kind]
    grid = [(s.name.removeprefix(f"{those[part].name}."), 2 + i % 3 * 150, 4 + i // 3 * 22, 146, 18,
             shade if s.name in tables else GREY) for i, s in enumerate(here)]  # fmt: skip
    high = 8 + 22 * -(-len(here) // 3)
    panels = [
        Boxes("the model: choose a part", boxes, lines, size, part, pointer="part"),
        Boxes(f"{those[part].title}: {len(here)} sites", grid, [], (454, high), here.index(chosen), pointer="site"),
        _value(chosen, tables.get(chosen.name), time),
    ]
    return View(panels, f"{those[part].text} · {_said(chosen, numbers.get(chosen.name), time)}")


def at_time(value: Named, time: float) -> Named | None:
    """What passed at ``time``: of several calls the last, of several questions at one time the first; None if nothing
    did.
    """
    value = value.at(call=-1) if "call" in value.axes else value
    if "step" not in value.axes:
        return value
    places = [i for i, t in enumerate(value.coords["step"]) if abs(t - time) < 1e-6]
    return value.at(step=places[0]) if places else None


def _value(site: Site, table: Named | None, time: float) -> Pixels:
    x = None if table is None else at_time(table, time)
    if x is None:
        when = "" if table is None else " at this time"
        return Pixels(f"{site.name}: nothing of the prompt's pass went by{when}", np.full((64, 128, 3), 235, np.uint8))
    most = float(table.tensor.abs().max())  # one scale for all times
    positive = float(table.tensor.min()) >= 0
    shown = heat(x.tensor, most) if positive else two_sided(x.tensor, most)
    key = ("0" if positive else f"{-most:.3g}", f"{most:.3g}")
    title = f"{site.name}: rows are {x.axes[0]}, columns {x.axes[1]}"
    return Pixels(title, stretched(shown, 256, 640), key=key, colours="magma" if positive else "RdBu_r")


def _said(site: Site, numbers: Named | None, time: float) -> str:
    said = f"{site.name} [{', '.join(map(str, site.shape))}]: {site.meaning} ({site.source})."
    here = None if numbers is None else at_time(numbers, time)
    if here is None:
        return said
    mean, spread, least, most = here.tensor.tolist()
    if site.name.endswith(".map"):  # of a map the table is summed over queries
        return f"{said} Here: a token is looked at, 1 being an equal share, {least:.3g} to {most:.3g}."
    return f"{said} Here: mean {mean:.3g}, spread {spread:.3g}, from {least:.3g} to {most:.3g}."


def _room(pipe: FluxPipeline) -> int:
    """How many steps, up to six, the recorder's budget has room for, were every table as large as they get."""
    tables = [site.name for site in sites(pipe) if site.shape[-2:-1] != (1,) and len(site.shape) > 2]
    once = sum(name.startswith(("t5.", "clip.", "ae.")) for name in tables)
    room = recorder.BUDGET // (4 * ROWS * COLUMNS) - once
    return max(1, min(6, room // max(len(tables) - once, 1)))


def architecture(pipe: FluxPipeline, prompt: str, *, at_steps: Steps = None, **asked) -> Explorer:
    """Every site of the model on its diagram, with what passed there while ``prompt`` was drawn.

    at_steps: which steps to keep, if not said six of them, or as many as the recorder's budget has room for (of
    FLUX.1-dev at 1024 x 1024, two) · ``asked``: as for the pipeline. With classifier-free guidance, the prompted pass
    is shown. Colours have one scale over all kept steps.
    """
    at_steps = some_steps(pipe, checked(asked), _room(pipe)) if at_steps is None else at_steps
    with record("*", steps=at_steps, reduce="summary", passes="prompted") as summed:
        _, rec = recorded(pipe, prompt, "*", asked=asked, steps=at_steps, reduce=as_table)
    tables, numbers = ({name: r[name] for name in r} for r in (rec, summed))
    if "sample.x" not in tables:
        raise InstrumentError("the run has no such step, so there is nothing to look at.")
    those, every = parts(pipe), sites(pipe)
    known = {part.name: [s for s in every if part.has(s.name)] for part in those}
    times = tables["sample.x"].coords["step"]

    def draw(step: int, part: int, site: int) -> View:
        return architecture_view(those, known, tables, numbers, times[step], part, site)

    control = clock(times, len(times) // 2)
    part = [part.name for part in those].index("single.0")
    site = [s.name for s in known["single.0"]].index("single.0.attn.map")
    return Explorer("The model", [control], draw, {"part": part, "site": site}, widths=[4.6, 4.4, 3.2])
