"""Runs as particles: the same noise under several prompts, projected to a plane, on the way to the final images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.errors import InstrumentError, check_integer
from fluxedu.instruments.lenses.run import enough_steps, few_steps_note
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import (
    EXAMPLE_PROMPT,
    Explorer,
    Try,
    View,
    check_request,
    explorer,
    prompt_list,
    time_slider,
)
from fluxedu.widgets.panels import RGB, Pixels, Points, to_rgb


def plane(ends: Tensor, group: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean of ``ends [P, D]`` and two orthonormal directions ``[2, D]``.

    The first leads from the mean of group 0 to the mean of group 1. Along the second (and the first, if there is only
    one group) the ends vary most.
    """
    mean, which = ends.mean(0), torch.as_tensor(group, device=ends.device)
    rest, directions = ends - mean, ends[:0]
    if which.max() > 0:
        between = ends[which == 1].mean(0) - ends[which == 0].mean(0)
        directions = F.normalize(between[None], dim=-1)
    generator = torch.Generator().manual_seed(0)
    while len(directions) < 2:
        rest = rest - rest @ directions.T @ directions  # what is orthogonal to the directions so far
        if float(rest.norm()) < 1e-3 * float(ends.norm()):  # too few images: any other direction will do
            random = torch.randn(1, ends.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(ends)
            rest = random - random @ directions.T @ directions
        widest = torch.linalg.svd(rest, full_matrices=False)[2][:1]
        widest = -widest if float(rest[0] @ widest[0]) < 0 else widest  # an SVD may give either sign
        directions = torch.cat([directions, widest])
    return mean, directions


def velocity_view(
    xy: np.ndarray,
    arrows: np.ndarray,
    group: Sequence[int],
    prompts: Sequence[str],
    times: Sequence[float],
    step: int,
    particle: int,
    prediction: Callable[[int, int], RGB],
) -> View:
    """Particles ``xy [N+1, P, 2]`` at one step with their ``arrows [N+1, P, 2]``, and the predicted x0 of one of them,
    decoded by ``prediction(step, particle)``.
    """
    low, high = xy.min((0, 1)), xy.max((0, 1))
    margin = 0.06 * (high - low) + 1e-6
    t, limits = times[step], tuple(zip((low - margin).tolist(), (high + margin).tolist(), strict=True))
    x_label, distance = "direction in which the images differ most", ""
    if len(prompts) > 1:
        means = [float(xy[step, np.asarray(group) == g, 0].mean()) for g in range(len(prompts))]
        x_label = "from the first prompt's images to the second's"
        distance = f" The means of the prompts are {max(means) - min(means):.1f} apart in the horizontal direction."
    seed = particle % (len(group) // len(prompts))
    panels = [
        Points(f"State and direction of each run, t = {t:.2f}", xy[step], arrows[step], group, prompts, limits, x_label,
               "at right angles: where they differ most", particle, trails=xy[: step + 1], pointer="particle"),
        Pixels(f"Predicted x0 of seed {seed}, “{prompts[group[particle]]}”", prediction(step, particle)),
    ]  # fmt: skip
    text = (
        "Each arrow is a fifth of the way that remains if the velocity stays as it is; the line behind a point is its "
        "path so far. The vertical direction is at right angles to the horizontal one, where the images differ most."
    )
    return View(panels, f"t = {t:.2f}.{distance} {text if t > 0 else 'Every run has reached its image.'}")


@explorer(
    example=lambda pipe: velocity(
        pipe, [EXAMPLE_PROMPT, "a green star"], seeds=2, steps=enough_steps(pipe), progress=False
    )
)
@torch.no_grad()
def velocity(
    pipe: FluxPipeline, prompts: str | Sequence[str], *, seeds: int = 10, steps: int = 10, **request
) -> Explorer:
    """Runs of ``prompts`` from the same ``seeds`` samples of noise, as points on a plane through their images.

    Every point and arrow belongs to a real run and is projected; none is interpolated. This takes ``prompts x seeds``
    runs, several at once. ``request``: as for the pipeline.
    """
    prompts = prompt_list(prompts)
    check_integer("seeds", seeds, 1, 1000, error=InstrumentError)
    request = check_request(request, "seed", "trajectory") | {"seed": list(range(seeds)), "steps": steps}
    paths = [pipe(prompt, **request).trajectory for prompt in prompts]
    times = paths[0].times.tolist()
    x = torch.cat([path.latents for path in paths], dim=1)  # [N+1, P, C, h, w]
    v = torch.cat([path.velocities for path in paths], dim=1)
    v = torch.cat([v, torch.zeros_like(v[:1])])  # at t = 0 the path has ended
    group = [g for g in range(len(prompts)) for _ in range(seeds)]
    mean, directions = plane(x[-1].flatten(1).float(), group)
    xy = ((x.flatten(2).float() - mean) @ directions.T).numpy(force=True)
    remaining = torch.tensor(times, dtype=torch.float32, device=v.device).view(-1, 1, 1)
    arrows = (-0.2 * remaining * (v.flatten(2).float() @ directions.T)).numpy(force=True)

    @cache
    @torch.no_grad()
    def prediction(step: int, particle: int) -> RGB:
        x0 = x[step, particle] - times[step] * v[step, particle]
        return to_rgb(pipe.autoencoder.decode(x0[None])[0])

    def draw(step: int, particle: int) -> View:
        view = velocity_view(xy, arrows, group, prompts, times, step, particle, prediction)
        return replace(view, text=view.text + note)

    note, other = few_steps_note(pipe, request), len(group) - seeds  # the first run of the last prompt
    return Explorer(
        "Where does the velocity lead each run?",
        [time_slider(times, len(times) // 2)],
        draw,
        {"particle": 0},
        widths=[4.6, 3.0],
        instruction="Press play: each point is a run. Point at one to see the image that the model predicts for it.",
        tries=[
            Try("Do the prompts pull apart at the first step?", step=0),
            Try("What becomes of the same noise under the last prompt?", particle=other),
            Try("Where have all runs arrived?", step=-1),
        ],
        play="step",
    )
