"""One recorded run, and its blocks in order: what every lens begins with."""

from __future__ import annotations

import re

import torch

from fluxedu.instruments.errors import InstrumentError
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.sampling.pipeline import FluxPipeline, Output

BLOCK = re.compile(r"(double|single)\.(\d+)")


def blocks_of(pipe: FluxPipeline) -> list[str]:
    """``double.0, ..., single.0, ...`` in the order in which they run."""
    c = pipe.flux.config
    return [f"double.{i}" for i in range(c.depth)] + [f"single.{i}" for i in range(c.depth_single_blocks)]


def one_prompt(prompt: str) -> str:
    """The prompt; raises InstrumentError for several."""
    if not isinstance(prompt, str):
        raise InstrumentError(f"a lens looks at one prompt at a time, not at {prompt!r}.")
    return prompt


def recorded(pipe: FluxPipeline, prompt: str, *globs: str, asked: dict, **how) -> tuple[Output, record]:
    """Draw one picture with a recorder on; with classifier-free guidance, the prompted pass is kept."""
    with record(*globs, passes="prompted", **how) as rec:
        out = pipe(one_prompt(prompt), **asked)
    if len(out.images) != 1:
        raise InstrumentError("a lens looks at one picture at a time; give one seed.")
    return out, rec


def by_block(rec: record, pipe: FluxPipeline, site: str) -> Named:
    """The values of a site of every block that has it, stacked: axis ``block``, labelled by name."""
    names = [b for b in blocks_of(pipe) if f"{b}.{site}" in rec]
    values = [rec[f"{b}.{site}"] for b in names]
    if not values:
        raise InstrumentError("the run has no such step, so there is nothing to look at.")
    return Named(
        torch.stack([v.tensor for v in values]), ("block", *values[0].axes), values[0].coords | {"block": names}
    )


def grid(pipe: FluxPipeline, out: Output) -> tuple[int, int]:
    """Rows and columns of patches of the picture that was drawn."""
    _, _, height, width = out.latents.shape
    return height // 2, width // 2


def as_picture(value: Named, axis: str, rows: int, columns: int) -> Named:
    """Unfold the axis of image tokens into ``row`` and ``column``."""
    at = value.axis(axis)
    axes = (*value.axes[:at], "row", "column", *value.axes[at + 1 :])
    return Named(value.tensor.unflatten(at, (rows, columns)), axes, value.coords)
