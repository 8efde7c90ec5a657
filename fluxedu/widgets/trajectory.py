"""A run, step by step: the state, the picture foreseen, the velocity, and where on the schedule one is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluxedu.instruments.lenses.flow import curvature
from fluxedu.instruments.lenses.run import one_prompt
from fluxedu.sampling.pipeline import FluxPipeline, Trajectory
from fluxedu.widgets.asked import checked
from fluxedu.widgets.controls import clock
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import Pixels8, enlarged, heat, picture
from fluxedu.widgets.panels import Lines, Pixels


def trajectory_view(path: Trajectory, states: Sequence[Pixels8], foreseen: Sequence[Pixels8], step: int) -> View:
    """One step of a run of one picture: ``states`` and ``foreseen`` are its latents and x0 estimates, decoded."""
    times = path.times[:-1].tolist()
    speed = path.velocities[step, 0].square().mean(0).sqrt()  # [h, w]
    turned = curvature(path) if len(times) > 2 else None
    here = f"step {step + 1} of {len(times)}, t = {times[step]:.2f}"
    panels = [
        Pixels(f"the state, {here}", states[step]),
        Pixels("the picture foreseen, x - t v", foreseen[step]),
        Pixels("size of the velocity, cell by cell", enlarged(heat(speed), 256), key=("0", f"{speed.max():.1f}")),
    ]  # fmt: skip
    if len(times) > 2:
        turns = turned.coords["step"]
        mark = times[step] if times[step] <= turns[0] else None  # the first step turns from nowhere
        series = {"turn": turned.tensor[:, 0].tolist()}
        panels.append(
            Lines("how fast the velocity turns", turns, series, "time (1 is noise)", "degrees per unit of time", mark)
        )
    text = f"{times[step]:.0%} of the state is noise and {1 - times[step]:.0%} picture; the step goes on to "
    return View(panels, f"{text}t = {float(path.times[step + 1]):.2f}.")


@torch.no_grad()
def trajectory(pipe: FluxPipeline, prompt: str, **asked) -> Explorer:
    """Scrub through a run of ``prompt``; ``asked`` as for the pipeline."""
    out = pipe(one_prompt(prompt), **checked(asked, "trajectory"))
    path = out.trajectory
    states, foreseen = (
        [picture(pipe.autoencoder.decode(x[:1])[0]) for x in latents] for latents in (path.latents[:-1], path.x0)
    )
    times = path.times[:-1].tolist()
    steps = clock(times, len(times) // 3)
    return Explorer("Trajectory", [steps], lambda step: trajectory_view(path, states, foreseen, step))
