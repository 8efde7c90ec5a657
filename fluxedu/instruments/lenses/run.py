"""One recorded run, and its blocks in order: what every lens begins with."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import ExitStack

import torch

from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.sampling.pipeline import FluxPipeline, Output

#: a lens in two halves: it yields the recorder it needs, is sent the run when that is over, and returns what it found
Look = Generator[record, Output, Named]
BLOCK = re.compile(r"(double|single)\.(\d+)")


def blocks_of(pipe: FluxPipeline) -> list[str]:
    """``double.0, ..., single.0, ...`` in the order in which they run."""
    c = pipe.flux.config
    return [f"double.{i}" for i in range(c.depth)] + [f"single.{i}" for i in range(c.depth_single_blocks)]


def one_prompt(prompt: str) -> str:
    """The prompt; raises InstrumentError for several, or for half a character, which no tokenizer can read."""
    if not isinstance(prompt, str) or prompt.encode(errors="ignore").decode() != prompt:
        raise InstrumentError(f"a lens looks at one prompt at a time, not at {describe(prompt)}.")
    return prompt


def how_many(value: int, name: str, most: int, least: int = 1) -> int:
    """A whole number within bounds; raises InstrumentError."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InstrumentError(f"{name}, a whole number from {least} to {most}, not {describe(value)}.")
    return value


def number(value: float, name: str) -> float:
    """A finite number; raises InstrumentError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise InstrumentError(f"{name} is a number, not {describe(value)}.")
    return float(value)


def recorded(pipe: FluxPipeline, prompt: str, *globs: str, asked: dict, **how) -> tuple[Output, record]:
    """Draw one picture with a recorder on; with classifier-free guidance, the prompted pass is kept."""
    with record(*globs, passes="prompted", **how) as rec:
        out = pipe(one_prompt(prompt), **asked)
    one_picture(out)
    return out, rec


def together(pipe: FluxPipeline, prompt: str, looks: Sequence[Look], asked: dict) -> tuple[Output, list[Named]]:
    """Draw one picture for several lenses at once, and what each of them found."""
    with ExitStack() as watching:
        for look in looks:
            watching.enter_context(next(look))
        out = pipe(one_prompt(prompt), **asked)
    one_picture(out)
    found = []
    for look in looks:
        try:
            look.send(out)
        except StopIteration as end:
            found.append(end.value)
    return out, found


def alone(pipe: FluxPipeline, prompt: str, look: Look, asked: dict) -> Named:
    """Draw one picture for one lens."""
    return together(pipe, prompt, [look], asked)[1][0]


def one_picture(out: Output) -> None:
    """Raises InstrumentError for several."""
    if len(out.images) != 1:
        raise InstrumentError("a lens looks at one picture at a time; give one seed.")


def blocks_in(rec: record, pipe: FluxPipeline, site: str) -> list[str]:
    """The blocks of which a site was recorded, in order; raises InstrumentError where there is none."""
    names = [b for b in blocks_of(pipe) if f"{b}.{site}" in rec]
    if not names:
        raise InstrumentError("the run has no such step, so there is nothing to look at.")
    return names


def by_block(rec: record, pipe: FluxPipeline, site: str) -> Named:
    """The values of a site of every block that has it, stacked: axis ``block``, labelled by name."""
    names = blocks_in(rec, pipe, site)
    values = [rec[f"{b}.{site}"] for b in names]
    return Named(
        torch.stack([v.tensor for v in values]), ("block", *values[0].axes), values[0].coords | {"block": names}
    )


def grid(pipe: FluxPipeline, out: Output) -> tuple[int, int]:
    """Rows and columns of patches of the picture that was drawn."""
    _, _, height, width = out.latents.shape
    return height // 2, width // 2


def as_picture(value: Named, axis: str, rows: int, columns: int) -> Named:
    """Unfold the axis of image tokens into ``row`` and ``column``; what a reference adds is left."""
    at = value.axis(axis)
    axes = (*value.axes[:at], "row", "column", *value.axes[at + 1 :])
    return Named(value.tensor.narrow(at, 0, rows * columns).unflatten(at, (rows, columns)), axes, value.coords)
