"""A flow in the plane: particles on their way from noise to the data, and the points that they foresee."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fluxedu.errors import InstrumentError
from fluxedu.widgets.controls import Choice, clock
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.panels import Points


def walk(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Euler's way through ``velocity(x, t)``: states ``[N + 1, P, 2]``, and at each the velocity (at the end: none)."""
    states, velocities = [x], []
    for t, after in zip(times, times[1:], strict=False):
        velocities.append(velocity(states[-1], t))
        states.append(states[-1] + (after - t) * velocities[-1])
    return torch.stack(states), torch.stack([*velocities, torch.zeros_like(x)])


def particles_view(
    xy: np.ndarray, v: np.ndarray, times: Sequence[float], group: Sequence[int], groups: Sequence[str], step: int,
    particle: int,
) -> View:  # fmt: skip
    """Particles ``xy [N + 1, P, 2]`` with velocities ``v`` at one step; beside, the points foreseen, ``x - t v``."""
    t = times[step]
    foreseen = xy[step] - t * v[step]
    reach = (float(np.abs(xy).max()) * 1.08,) * 2
    no_arrows = np.zeros_like(foreseen)
    panels = [
        Points(
            f"t = {t:.2f}: where the particles are, and which way they go", xy[step], -0.2 * t * v[step], group, groups,
            reach, "x", "y", particle, pointer="particle",
        ),
        Points(
            "where each would end if it went straight on", foreseen, no_arrows, group, groups, reach, "x", "y",
            particle, pointer="particle",
        ),
    ]  # fmt: skip
    apart = float(np.sqrt(np.square(foreseen - foreseen.mean(0)).sum(-1).mean()))
    path = xy[:, particle]
    straight = np.linalg.norm(path[-1] - path[0])
    detour = np.linalg.norm(np.diff(path, axis=0), axis=-1).sum() / max(straight, 1e-12)
    return View(
        panels,
        f"t = {t:.2f}: what the particles foresee is spread by {apart:.1f} around its middle. "
        f"Particle {particle}'s whole path is {detour:.2f} times as long as a straight one.",
    )


@torch.no_grad()
def particles(
    fields: Mapping[str, Callable[[Tensor, float], Tensor]], data: Tensor, *, count: int = 60, steps: int = 40,
    seed: int = 0,
) -> Explorer:  # fmt: skip
    """The same ``count`` noises through each of ``fields``, name -> ``velocity(x [P, 2], t) -> [P, 2]``.

    A particle has the colour of the point of ``data [K, 2]`` that it ends nearest to, of six points at most.
    """
    if not fields or count < 1 or steps < 1:
        raise InstrumentError("give at least one field, one particle and one step.")
    if data.ndim != 2 or data.shape[1] != 2 or not 1 <= len(data) <= 6:
        raise InstrumentError(f"the data are one to six points [K, 2], not {list(data.shape)}.")
    times = torch.linspace(1, 0, steps + 1).tolist()
    start = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    runs = []
    for velocity in fields.values():
        xy, v = (part.numpy(force=True) for part in walk(velocity, start, times))
        runs.append((xy, v, torch.cdist(torch.from_numpy(xy[-1]), data.cpu()).argmin(-1).tolist()))
    groups = [f"to point {k}" for k in range(len(data))]

    def draw(field: int, step: int, particle: int) -> View:
        xy, v, group = runs[field]
        return particles_view(xy, v, times, group, groups, step, particle)

    controls = [
        Choice("field", "field", list(fields)),
        clock(times, steps // 2),
    ]
    return Explorer("Particles", controls, draw, {"particle": 0}, widths=[3.6, 3.6])
