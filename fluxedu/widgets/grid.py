"""How few steps will do, and what guidance buys: pictures over steps and strength, and their schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log

import numpy as np
import torch
from tqdm.auto import tqdm

from fluxedu.errors import InstrumentError
from fluxedu.instruments.lenses.run import one_prompt
from fluxedu.sampling.pipeline import FluxPipeline, Output
from fluxedu.widgets.asked import checked, numbers
from fluxedu.widgets.controls import Choice
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import Pixels8, picture
from fluxedu.widgets.panels import Lines, Pixels


def sheet(pictures: Sequence[Sequence[Pixels8]]) -> Pixels8:
    """Rows of pictures as one, every one at half its size."""
    small = [[p[: p.shape[0] // 2 * 2 : 2, : p.shape[1] // 2 * 2 : 2] for p in row] for row in pictures]
    return np.concatenate([np.concatenate(row, axis=1) for row in small], axis=0)


def grid_view(
    pictures: Sequence[Sequence[Pixels8]],
    far: np.ndarray,
    times: Sequence[Sequence[float]],
    steps: Sequence[int],
    strengths: Sequence[float],
    cell: tuple[int, int],
) -> View:
    """A contact sheet (a row a number of steps, a column a strength), one picture of it, and its schedule.

    ``far [steps, strengths]``: how far each latent is from the one of most steps at the same strength · ``times``:
    the schedule of each number of steps.
    """
    row, column = cell
    clock = list(times[row])
    panels = [
        Pixels(
            "a row a number of steps, a column a strength", sheet(pictures), (len(steps), len(strengths)), cell,
            rows=[str(n) for n in steps], columns=[f"{s:g}" for s in strengths], pointer="cell",
        ),
        Pixels(f"{steps[row]} steps, strength {strengths[column]:g}", pictures[row][column]),
        Lines(
            "the schedule", np.linspace(0, 1, len(clock)).tolist(),
            {"time": clock, "even steps": np.linspace(clock[0], 0, len(clock)).tolist()}, "share of the steps done",
            "t",
        ),
    ]  # fmt: skip
    return View(panels, f"The latent is {far[row, column]:.0%} of its length away from the one of {steps[-1]} steps at "
                        f"the same strength.")  # fmt: skip


def shifted(pipe: FluxPipeline, shift: float) -> FluxPipeline:
    """The same networks with another schedule: ``shift`` is ``e^mu`` for pictures of any size."""
    if not shift > 0:
        raise InstrumentError(f"a time shift must be above 0 (1 is none), not {shift!r}.")
    defaults = replace(pipe.defaults, shift=True, shift_ends=(log(shift), log(shift)))
    return FluxPipeline(pipe.prompt_encoder, pipe.flux, pipe.autoencoder, defaults, pipe.size)


def _one(pipe: FluxPipeline, prompt: str, steps: int, strength: float, asked: dict, bar: tqdm) -> Output:
    bar.update()
    return pipe(prompt, **(asked | {"steps": steps, "guidance": strength, "progress": False}))


def grid(
    pipe: FluxPipeline,
    prompt: str,
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 20),
    strengths: Sequence[float] = (1.0, 2.0, 3.5, 6.0, 10.0),
    shifts: Sequence[float] = (1.0, 3.0),
    **asked,
) -> Explorer:
    """Draw ``prompt`` at every pair of ``steps`` and guidance ``strengths``, under each time ``shift``, then look.

    A shift of 1 takes even steps; larger ones spend more of them near the noise: ``t -> s t / (1 + (s - 1) t)``.
    ``asked`` as for the pipeline.
    """
    one_prompt(prompt)
    steps, strengths = sorted(numbers("steps", steps, 1)), numbers("strengths", strengths, 0)
    shifts = numbers("shifts", shifts, 0)
    checked(asked, "steps", "guidance", "trajectory")
    tables = []
    with tqdm(total=len(shifts) * len(steps) * len(strengths), desc="grid", delay=1, leave=False) as bar:
        for shift in shifts:
            outs = [[_one(shifted(pipe, shift), prompt, n, g, asked, bar) for g in strengths] for n in steps]
            latents = torch.stack([torch.stack([out.latents[0] for out in row]) for row in outs]).flatten(2)
            latents = latents.float()
            far = (latents - latents[-1]).norm(dim=-1) / latents[-1].norm(dim=-1)
            pictures = [[picture(out.images[0]) for out in row] for row in outs]
            tables.append((pictures, far.numpy(force=True), [row[0].trajectory.times.tolist() for row in outs]))

    def draw(shift: int, cell: tuple[int, int]) -> View:
        return grid_view(*tables[shift], steps, strengths, cell)

    start = len(shifts) - 1
    control = Choice("shift", "time shift", [f"{s:g}" for s in shifts], start, shifts)
    return Explorer("Steps and guidance", [control], draw, {"cell": (len(steps) - 1, len(strengths) // 2)},
                    widths=[3.6, 2.6, 3.0])  # fmt: skip
