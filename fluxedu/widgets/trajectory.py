"""A run step by step: the state, the predicted x0, the velocity, and how straight the path is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fluxedu.instruments.lenses.flow import curvature
from fluxedu.instruments.lenses.run import check_one_prompt, enough_steps, few_steps_note
from fluxedu.plots import TIME_LABEL
from fluxedu.sampling.pipeline import FluxPipeline, Trajectory
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Explorer, Try, View, check_request, explorer, time_slider
from fluxedu.widgets.panels import RGB, Lines, Pixels, sequential, to_rgb, upscale


def trajectory_view(path: Trajectory, states: Sequence[RGB], predictions: Sequence[RGB], step: int) -> View:
    """One step of a run of one image; ``states``, ``predictions``: its latents and predicted x0, decoded."""
    times = path.times[:-1].tolist()
    speed = path.velocities[step, 0].square().mean(0).sqrt()  # [h, w]
    panels = [
        Pixels(f"State before step {step + 1} of {len(times)}, t = {times[step]:.2f}, decoded", states[step]),
        Pixels("Predicted x0, decoded", predictions[step]),
        Pixels(
            "Size of the velocity in each cell",
            upscale(sequential(speed), 256),
            key=("0", f"{speed.max():.1f}"),
            unit="root mean square over channels",
        ),
    ]
    if len(times) > 2:
        angles = curvature(path)
        angle_times = angles.coords["step"]
        mark = times[step] if times[step] <= angle_times[0] else None  # the first step has no velocity before it
        panels.append(
            Lines("How fast the velocity changes direction", angle_times, {"angle": angles.tensor[:, 0].tolist()},
                  TIME_LABEL, "degrees per unit of time", mark)
        )  # fmt: skip
    noise = round(100 * times[step])
    text = f"The state is {noise}% noise and {100 - noise}% image; this step leads to "
    return View(panels, f"{text}t = {float(path.times[step + 1]):.2f}.")


@explorer(example=lambda pipe: trajectory(pipe, EXAMPLE_PROMPT, steps=enough_steps(pipe), progress=False))
@torch.no_grad()
def trajectory(pipe: FluxPipeline, prompt: str, **request) -> Explorer:
    """Move through the steps of a run of ``prompt``; ``request``: as for the pipeline.

    This takes one run, and decodes the state and the predicted x0 of every step.
    """
    path = pipe(check_one_prompt(prompt), **check_request(request, "trajectory")).trajectory
    states = [to_rgb(pipe.autoencoder.decode(x[:1])[0]) for x in path.latents[:-1]]
    predictions = [to_rgb(pipe.autoencoder.decode(x[:1])[0]) for x in path.x0]
    times = path.times[:-1].tolist()
    note = few_steps_note(pipe, request)

    def draw(step: int) -> View:
        view = trajectory_view(path, states, predictions, step)
        return replace(view, text=view.text + note)

    return Explorer(
        "How does an image emerge from noise?",
        [time_slider(times, len(times) // 3)],
        draw,
        instruction="Press play, and compare the state with the image that the model predicts from it (x0).",
        tries=[
            Try("What does the model predict from pure noise?", step=0),
            Try("After half of the steps, what is already decided?", step=len(times) // 2),
            Try("What does the last step still change?", step=-1),
        ],
        play="step",
    )
