"""The flow as particles: the same noises under several prompts, on their way from one cloud to their pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.asked import checked, numbers, prompts_of
from fluxedu.widgets.controls import clock
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import Pixels8, picture
from fluxedu.widgets.panels import Pixels, Points


def plane(ends: Tensor, group: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The middle of ``ends [P, D]`` and two directions ``[2, D]``, of length 1 and at right angles.

    The first leads from the first group's middle to the second's; along the second (and along the first, if there is
    one group) the ends differ most.
    """
    middle, which = ends.mean(0), torch.as_tensor(group)
    rest, found = ends - middle, []
    if which.max() > 0:
        between = ends[which == 1].mean(0) - ends[which == 0].mean(0)
        found.append(between / between.norm())
    any_way = torch.Generator().manual_seed(0)
    while len(found) < 2:
        rest = _across(rest, found)
        if float(rest.norm()) < 1e-3 * float(ends.norm()):  # too few pictures: any other direction will do
            rest = _across(torch.randn(1, ends.shape[1], generator=any_way).to(ends), found)
        found.append(torch.linalg.svd(rest, full_matrices=False)[2][0])
    return middle, torch.stack(found)


def _across(rest: Tensor, found: Sequence[Tensor]) -> Tensor:
    """What is left of ``rest [P, D]`` at right angles to all that was found."""
    for direction in found:
        rest = rest - (rest @ direction)[:, None] * direction
    return rest


def velocity_view(
    xy: np.ndarray,
    arrows: np.ndarray,
    group: Sequence[int],
    groups: Sequence[str],
    times: Sequence[float],
    step: int,
    particle: int,
    foreseen: Callable[[int, int], Pixels8],
) -> View:
    """Particles ``xy [N+1, P, 2]`` at one step, each with its arrow ``[N+1, P, 2]``, and ``foreseen(step, particle)``:
    the picture that one of them is on its way to.
    """
    reach = tuple(float(np.abs(xy[..., i]).max()) * 1.08 for i in range(2))
    here = [float(xy[step, np.asarray(group) == g, 0].mean()) for g in range(len(groups))]
    across = "from the first prompt's pictures to the second's" if len(groups) > 1 else "first direction"
    apart = f": the prompts' clouds are {max(here) - min(here):.1f} apart across" if len(groups) > 1 else ""
    panels = [
        Points(
            f"t = {times[step]:.2f}: where each run is, and where it is going", xy[step], arrows[step], group, groups,
            reach, across, "second direction", particle, pointer="particle",
        ),
        Pixels(f"foreseen by run {particle % (len(group) // len(groups))} of “{groups[group[particle]]}”",
               foreseen(step, particle)),
    ]  # fmt: skip
    told = "An arrow leads against the velocity (noise minus picture): a fifth of the way, were it to stay as it is."
    told = told if times[step] > 0 else "Every run is at its picture."
    return View(panels, f"t = {times[step]:.2f}{apart}. {told}")


@torch.no_grad()
def velocity(pipe: FluxPipeline, prompts: Sequence[str], *, seeds: int = 10, steps: int = 10, **asked) -> Explorer:
    """Runs of ``prompts`` from the same ``seeds`` noises, as points on a plane through their pictures.

    Every point and arrow is of a real run, projected; none is interpolated. ``asked`` as for the pipeline.
    """
    prompts = prompts_of(prompts)
    (seeds,), (steps,) = numbers("seeds", seeds, 1), numbers("steps", steps, 1)
    asked = checked(asked, "seed", "trajectory") | {"seed": list(range(seeds)), "steps": steps}
    paths = [pipe(prompt, **asked).trajectory for prompt in prompts]
    times = paths[0].times.tolist()
    x = torch.cat([path.latents for path in paths], dim=1)  # [N+1, P, C, h, w]
    v = torch.cat([path.velocities for path in paths], dim=1)
    v = torch.cat([v, torch.zeros_like(v[:1])])  # at t = 0 there is nowhere to go
    group = [g for g in range(len(prompts)) for _ in range(seeds)]
    middle, directions = plane(x[-1].flatten(1).float(), group)
    xy = ((x.flatten(2).float() - middle) @ directions.T).numpy(force=True)
    left = torch.tensor(times).view(-1, 1, 1).to(v.device)
    arrows = (-0.2 * left * (v.flatten(2).float() @ directions.T)).numpy(force=True)

    @cache
    @torch.no_grad()
    def foreseen(step: int, particle: int) -> Pixels8:
        x0 = x[step, particle] - times[step] * v[step, particle]
        return picture(pipe.autoencoder.decode(x0[None])[0])

    def draw(step: int, particle: int) -> View:
        return velocity_view(xy, arrows, group, prompts, times, step, particle, foreseen)

    control = clock(times, len(times) // 2)
    return Explorer("Velocity", [control], draw, {"particle": 0}, widths=[4.6, 3.0])
