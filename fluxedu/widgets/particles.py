"""A flow in the plane: particles on their way from noise to the data, and the x0 that each of them predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fluxedu.errors import InstrumentError, check_integer
from fluxedu.widgets.explorer import Choice, Explorer, Try, View, explorer, time_slider
from fluxedu.widgets.panels import Points


def euler_path(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Euler's method with ``velocity(x, t)``: the states ``[N + 1, P, 2]`` and the velocity at each (0 at the end)."""
    states, velocities = [x], []
    for t, after in zip(times, times[1:], strict=False):
        velocities.append(velocity(states[-1], t))
        states.append(states[-1] + (after - t) * velocities[-1])
    return torch.stack(states), torch.stack([*velocities, torch.zeros_like(x)])


def particles_view(
    xy: np.ndarray,
    v: np.ndarray,
    times: Sequence[float],
    group: Sequence[int],
    groups: Sequence[str],
    step: int,
    particle: int,
) -> View:
    """Particles ``xy [N + 1, P, 2]`` with velocities ``v`` at one step, and next to them the predicted x0, x - t v."""
    t = times[step]
    x0 = xy[step] - t * v[step]
    limits = (float(np.abs(xy).max()) * 1.08,) * 2
    panels = [
        Points(f"Particles at t = {t:.2f}, with a fifth of their predicted path", xy[step], -0.2 * t * v[step], group,
               groups, limits, "x", "y", particle, pointer="particle"),
        Points("Predicted x0: the end of each path if it stayed straight", x0, np.zeros_like(x0), group, groups, limits,
               "x", "y", particle, pointer="particle"),
    ]  # fmt: skip
    spread = float(np.sqrt(np.square(x0 - x0.mean(0)).sum(-1).mean()))
    path = xy[:, particle]
    length = np.linalg.norm(np.diff(path, axis=0), axis=-1).sum() / max(np.linalg.norm(path[-1] - path[0]), 1e-12)
    return View(
        panels,
        f"t = {t:.2f}: the predicted x0 of the particles have a spread of {spread:.1f} around their mean. "
        f"The whole path of particle {particle} is {length:.2f} times as long as a straight line.",
    )


@explorer(example=lambda pipe: particles({"to one point": lambda x, t: x / t}, torch.zeros(1, 2), count=6, steps=4))
@torch.no_grad()
def particles(
    fields: Mapping[str, Callable[[Tensor, float], Tensor]],
    data: Tensor,
    *,
    count: int = 60,
    steps: int = 40,
    seed: int = 0,
) -> Explorer:
    """The same ``count`` samples of noise carried by each of ``fields``, name -> ``velocity(x [P, 2], t) -> [P, 2]``.

    A particle has the colour of the point of ``data [K, 2]`` that it ends nearest to; there may be six points. This
    takes ``steps`` evaluations of each field, and no run of a model.
    """
    for name, value in (("count", count), ("steps", steps)):
        check_integer(name, value, 1, 1000, error=InstrumentError)
    seed = check_integer("seed", seed, 0, 2**63 - 1, error=InstrumentError)
    if not fields:
        raise InstrumentError("give at least one field.")
    if data.ndim != 2 or data.shape[1] != 2 or not 1 <= len(data) <= 6:
        raise InstrumentError(f"data must be one to six points [K, 2], not of shape {list(data.shape)}.")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float32, device="cpu").tolist()
    noise = torch.randn(count, 2, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu")
    runs = []
    for velocity in fields.values():
        states, velocities = euler_path(velocity, noise, times)
        nearest = torch.cdist(states[-1].cpu(), data.cpu()).argmin(-1).tolist()
        runs.append((states.numpy(force=True), velocities.numpy(force=True), nearest))
    groups = [f"ends near point {k}" for k in range(len(data))]

    def draw(field: int, step: int, particle: int) -> View:
        xy, v, group = runs[field]
        return particles_view(xy, v, times, group, groups, step, particle)

    controls = [Choice("field", "velocity field", list(fields)), time_slider(times, steps // 2)]
    return Explorer(
        "How does a flow carry noise to data?",
        controls,
        draw,
        {"particle": 0},
        widths=[3.6, 3.6],
        instruction="Press play: the particles move from noise (t = 1) to the data (t = 0). Point at one to follow it.",
        tries=[
            Try("Where does the flow lead each particle at first?", step=0),
            Try("Where have they all arrived?", step=-1),
            *[Try(f"Does “{name}” carry them in the same way?", field=name) for name in list(fields)[1:2]],
        ],
        play="step",
    )
