"""Images over numbers of steps and guidance scales, and their schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log

import numpy as np
import torch

from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.lenses.run import check_one_prompt, few_steps_note
from fluxedu.progress import progress_bar
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, Try, View, check_request, explorer, number_list
from fluxedu.widgets.panels import RGB, Lines, Pixels, contact_sheet, to_rgb


def shifted(pipe: FluxPipeline, shift: float) -> FluxPipeline:
    """The same networks with another time shift, ``e^mu``, for images of any size."""
    if not shift > 0:
        raise InstrumentError(f"shift must be above 0 (1 means no shift), not {describe(shift)}.")
    defaults = replace(pipe.defaults, shift=True, shift_ends=(log(shift), log(shift)))
    return FluxPipeline(pipe.prompt_encoder, pipe.flux, pipe.autoencoder, defaults, pipe.size)


def grid_view(
    images: Sequence[Sequence[RGB]],
    distances: np.ndarray,
    times: Sequence[Sequence[float]],
    steps: Sequence[int],
    guidance_scales: Sequence[float],
    cell: tuple[int, int],
) -> View:
    """A contact sheet (rows: numbers of steps, columns: guidance scales), one of its images, and that one's schedule.

    ``distances [steps, scales]``: of each latent from the one with most steps at the same scale · ``times``: the
    schedule of each number of steps.
    """
    row, column = cell
    schedule = list(times[row])
    even = np.linspace(schedule[0], 0, len(schedule)).tolist()
    panels = [
        Pixels(
            "Images by number of steps (rows) and guidance scale (columns)", contact_sheet(images),
            (len(steps), len(guidance_scales)), cell, rows=[str(n) for n in steps],
            columns=[f"{s:g}" for s in guidance_scales], axes=("steps", "guidance scale"), pointer="cell",
        ),
        Pixels(f"{steps[row]} steps, guidance scale {guidance_scales[column]:g}", images[row][column]),
        Lines("Schedule: the time after each step", np.linspace(0, 1, len(schedule)).tolist(),
              {"this schedule": schedule, "even steps": even}, "share of the steps done",
              "time t (1 = noise, 0 = image)"),
    ]  # fmt: skip
    text = f"This latent differs by {distances[row, column]:.0%} of its norm from the one after {steps[-1]} steps"
    return View(panels, f"{text} at the same guidance scale.")


@explorer(example=lambda pipe: grid(pipe, EXAMPLE_PROMPT, steps=[1, 8], guidance_scales=[1.0, 6.0], progress=False))
def grid(
    pipe: FluxPipeline,
    prompt: str,
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 16),
    guidance_scales: Sequence[float] = (1.0, 3.0, 6.0),
    shifts: Sequence[float] = (1.0, 3.0),
    **request,
) -> Explorer:
    """Draw ``prompt`` with every pair of ``steps`` and ``guidance_scales``, under each time ``shift``.

    A shift of 1 takes even steps; a larger one takes more of them near the noise, ``t -> s t / (1 + (s - 1) t)``.
    This takes one run for each image, 30 by default: about 4 seconds on the miniature. ``request``: as for the
    pipeline.
    """
    check_one_prompt(prompt)
    steps, guidance_scales = sorted(number_list("steps", steps, 1)), number_list("guidance_scales", guidance_scales, 0)
    shifts = number_list("shifts", shifts, 0)
    check_request(request, "steps", "guidance", "trajectory")
    tables, show = [], request.get("progress", True) is not False
    with progress_bar(
        total=len(shifts) * len(steps) * len(guidance_scales), desc="grid", leave=False, show=show
    ) as bar:
        for shift in shifts:
            images, latents, times = [], [], []
            for n in steps:
                outs = []
                for scale in guidance_scales:
                    settings = request | {"steps": n, "guidance": scale, "progress": False}
                    outs.append(shifted(pipe, shift)(prompt, **settings))
                    bar.update()
                images.append([to_rgb(out.images[0]) for out in outs])
                latents.append(torch.stack([out.latents[0].float().flatten() for out in outs]))
                times.append(outs[0].trajectory.times.tolist())
            latents = torch.stack(latents)  # [steps, scales, numbers]
            distances = (latents - latents[-1]).norm(dim=-1) / latents[-1].norm(dim=-1)
            tables.append((images, distances.numpy(force=True), times))

    def draw(shift: int, cell: tuple[int, int]) -> View:
        view = grid_view(*tables[shift], steps, guidance_scales, cell)
        return replace(view, text=view.text + few_steps_note(pipe, {"steps": steps[cell[0]]}))

    last, some, middle = len(steps) - 1, len(steps) // 2, len(guidance_scales) // 2
    few = "one step" if steps[0] == 1 else f"{steps[0]} steps"
    return Explorer(
        "How many steps and how much guidance does an image need?",
        [Choice("shift", "time shift", [f"{s:g}" for s in shifts], len(shifts) - 1, shifts)],
        draw,
        {"cell": (last, middle)},
        widths=[3.6, 2.6, 3.0],
        instruction="Point at an image in the table to see it large, with the times of its steps.",
        tries=[
            Try(f"What can the model draw in {few}?", cell=(0, middle)),
            Try(f"What changes at guidance scale {guidance_scales[0]:g}?", cell=(last, 0)),
            Try(f"Does the schedule matter with {steps[some]} steps?", shift=f"{shifts[0]:g}", cell=(some, middle)),
        ],
    )
