"""Solvers: how to walk along the velocity from noise to picture.

The flow is the differential equation ``dx/dt = v(x, t)``; sampling is integrating it from t = 1 to
t = 0. Steps are negative: ``dt = t_next - t``, so ``x + dt * v`` goes *against* the velocity, away
from the noise.

A solver is ``step(x, t, t_next, velocity) -> (x_next, v)`` where ``velocity(x, t)`` asks the network
and ``v`` is the velocity at the step's beginning.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def euler(x: Tensor, t: float, t_next: float, velocity: Velocity) -> tuple[Tensor, Tensor]:
    """Follow the tangent: one question a step."""
    v = velocity(x, t)
    return x + (t_next - t) * v, v


def midpoint(x: Tensor, t: float, t_next: float, velocity: Velocity) -> tuple[Tensor, Tensor]:
    """Go half way, ask again there, and take the whole step with that answer: two questions."""
    v = velocity(x, t)
    half = (t + t_next) / 2
    return x + (t_next - t) * velocity(x + (half - t) * v, half), v


def heun(x: Tensor, t: float, t_next: float, velocity: Velocity) -> tuple[Tensor, Tensor]:
    """Average the slopes at both ends: two questions a step."""
    v = velocity(x, t)
    ahead = velocity(x + (t_next - t) * v, t_next)
    return x + (t_next - t) * 0.5 * (v + ahead), v


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun}


def times_asked(solver: str, times: list[float]) -> list[float]:
    """Every time at which the network is asked, in order: what can be planned ahead of the loop."""
    asked: list[float] = []
    for t, t_next in zip(times, times[1:], strict=False):
        second = {"euler": [], "midpoint": [(t + t_next) / 2], "heun": [t_next]}[solver]
        asked += [t, *second]
    return asked
