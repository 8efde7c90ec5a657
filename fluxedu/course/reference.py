"""The solver of order 4 that notebook 11 takes as the exact solution."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fluxedu.sampling.solvers import Solver


def runge_kutta_step(x: Tensor, t: float, t_next: float, velocity: Callable) -> tuple[Tensor, Tensor]:
    """One step of the classical Runge-Kutta method, with four evaluations of ``velocity(x, t)``."""
    h, middle = t_next - t, (t + t_next) / 2
    v1 = velocity(x, t)
    v2 = velocity(x + h / 2 * v1, middle)
    v3 = velocity(x + h / 2 * v2, middle)
    v4 = velocity(x + h * v3, t_next)
    return x + h * (v1 + 2 * v2 + 2 * v3 + v4) / 6, v1


RUNGE_KUTTA = Solver(runge_kutta_step, stages=(0, 1 / 2, 1 / 2, 1))
