"""Notebook 11: sampling."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.sampling import solvers
from fluxedu.sampling.solvers import schedule as library_schedule
from fluxedu.sampling.solvers import shift_amount


@exercise(
    "sampling.mu",
    minutes=5,
    difficulty=1,
    cases=lambda: [(256,), (4096,), (64,), (1050,), (8160,)],
    against=shift_amount,
    hints=(
        "Two points determine a straight line; the line continues beyond them.",
        "The slope is `(1.15 - 0.5) / (4096 - 256)`.",
        "`0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)`.",
    ),
)
def mu(tokens: int) -> float:
    """How strongly FLUX shifts the times, for an image of `tokens` image tokens.

    A straight line through 0.5 at 256 tokens and 1.15 at 4,096 tokens. It is not clamped at either end.
    """
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


wrong("sampling.mu", "you clamp at 0.5 and 1.15; the line continues: 8,160 tokens give more than 1.15.")(
    lambda tokens: min(max(mu(tokens), 0.5), 1.15)
)
wrong("sampling.mu", "your line has 0.5 at 0 tokens; it has 0.5 at 256.")(
    lambda tokens: 0.5 + tokens * (1.15 - 0.5) / (4096 - 256)
)
wrong("sampling.mu", "you count latent cells, four per token; the line is a function of tokens.")(
    lambda tokens: mu(4 * tokens)
)
wrong("sampling.mu", "you return e to the mu, the factor of the odds; return mu itself.")(
    lambda tokens: math.exp(mu(tokens))
)


@exercise(
    "sampling.schedule",
    minutes=8,
    difficulty=1,
    cases=lambda: [(4, 1.15), (7, 0.4), (1, 0.8), (20, 0.0)],
    against=lambda steps, mu: library_schedule(steps, 256, ends=(mu, mu)),
    hints=(
        "Begin with evenly spaced times from 1 down to 0, one more than there are steps. Then shift each towards 1.",
        "`torch.linspace(1, 0, steps + 1)`. The shift multiplies the odds t : (1 - t) by e to the mu.",
        "With `s = exp(mu)` it is `s * t / (1 + (s - 1) * t)`: the same formula without a division by 0.",
    ),
)
def schedule(steps: int, mu: float) -> Tensor:
    """The times of a run, `[steps + 1]`, from 1 down to 0.

    Evenly spaced, then each shifted towards the noise: t becomes `e**mu / (e**mu + (1 / t - 1))`, and 0 stays 0.
    """
    t, s = torch.linspace(1, 0, steps + 1), math.exp(mu)  # [steps + 1]
    return s * t / (1 + (s - 1) * t)


wrong("sampling.schedule", "the shift is applied twice, which moves nearly all steps close to the noise.")(
    lambda steps, mu: schedule(steps, 2 * mu)
)


@wrong("sampling.schedule", "the factor is e to the mu, not mu itself.")
def _not_exp(steps, mu):
    t = torch.linspace(1, 0, steps + 1)
    return torch.where(t > 0, mu * t / (1 + (mu - 1) * t).clamp(min=1e-9), t)


wrong("sampling.schedule", "the shift goes the wrong way: more of the times should lie near 1, the noise.")(
    lambda steps, mu: schedule(steps, -mu)
)


@wrong("sampling.schedule", "your even times end at 1 / 1000, followed by a 0; they must reach 0 in even steps.")
def _thousandth(steps, mu):
    t, s = torch.cat([torch.linspace(1, 1e-3, steps), torch.zeros(1)]), math.exp(mu)
    return s * t / (1 + (s - 1) * t)


wrong("sampling.schedule", "the shift is missing: these are the even times.")(
    lambda steps, mu: torch.linspace(1, 0, steps + 1)
)


def _steps() -> list[tuple]:
    def velocity(x: Tensor, t: float) -> Tensor:
        return x * x.sin() + (2 * t) ** 2

    g = torch.Generator().manual_seed(11)
    return [
        (torch.randn(3, 2, generator=g), 0.9, 0.6, velocity),
        (torch.randn(1, 5, 4, generator=g), 0.4, 0.0, velocity),
    ]


@exercise(
    "sampling.midpoint",
    minutes=8,
    difficulty=2,
    cases=_steps,
    against=solvers.midpoint,
    hints=(
        "Follow the velocity for half of the step, and evaluate the network at that state and that time.",
        "The middle time is `(t + t_next) / 2`. The velocity found there is used for the whole step.",
        "`v = velocity(x, t)`, `x_mid = x + (t_mid - t) * v`, `x + (t_next - t) * velocity(x_mid, t_mid)`.",
    ),
)
def midpoint(x: Tensor, t: float, t_next: float, velocity: Callable) -> tuple[Tensor, Tensor]:
    """One step of the midpoint method from `t` to `t_next`, with two evaluations of `velocity(x, t)`.

    Take half a step with the first velocity, evaluate again there, and take the whole step from `x` with that second
    velocity. Return the new state, and the velocity at the start of the step, which the pipeline stores in its
    trajectory.
    """
    v = velocity(x, t)
    t_mid = (t + t_next) / 2
    x_mid = x + (t_mid - t) * v
    return x + (t_next - t) * velocity(x_mid, t_mid), v


@mistakes(
    "sampling.midpoint",
    ("old time", "your second evaluation is at the middle state, but at the time t; use the middle time as well."),
    ("starts at the middle", "your last step starts at the middle state; the whole step starts at x."),
    ("two Euler steps", "these are two Euler steps of half the length; midpoint starts again from x."),
    ("sign", "your step goes towards the noise: use t_next - t, which is negative."),
)
def _midpoint_with(mistake, x, t, t_next, velocity):
    v, t_mid = velocity(x, t), (t + t_next) / 2
    sign = -1 if mistake == "sign" else 1
    x_mid = x + sign * (t_mid - t) * v
    v_mid = velocity(x_mid, t if mistake == "old time" else t_mid)
    if mistake == "two Euler steps":
        return x_mid + (t_next - t_mid) * v_mid, v
    start = x_mid if mistake == "starts at the middle" else x
    return start + sign * (t_next - t) * v_mid, v


@exercise(
    "sampling.heun",
    minutes=6,
    difficulty=2,
    cases=_steps,
    against=solvers.heun,
    hints=(
        "Take an Euler step as a trial, evaluate the network where it ends, and use the mean of both velocities.",
        "The second evaluation is at time `t_next`, at the state that the Euler step reaches.",
        "`v = velocity(x, t)`, `v_end = velocity(x + (t_next - t) * v, t_next)`, `x + (t_next - t) * (v + v_end) / 2`.",
    ),
)
def heun(x: Tensor, t: float, t_next: float, velocity: Callable) -> tuple[Tensor, Tensor]:
    """One step of Heun's method from `t` to `t_next`: use the mean of two velocities.

    One is the velocity at `x`, the other that at the state where an Euler step from `x` ends. Return the new state,
    and the velocity at the start of the step.
    """
    v = velocity(x, t)
    v_end = velocity(x + (t_next - t) * v, t_next)
    return x + (t_next - t) * (v + v_end) / 2, v


@mistakes(
    "sampling.heun",
    ("sum", "the two velocities are added; use their mean, or the step is twice as long."),
    ("old time", "your second evaluation is at the time t; its state belongs to t_next."),
    ("starts at the end", "you continue from the end of the trial step; the step starts at x."),
    ("second velocity only", "only the second velocity is used; Heun takes the mean of both."),
)
def _heun_with(mistake, x, t, t_next, velocity):
    v = velocity(x, t)
    x_end = x + (t_next - t) * v
    v_end = velocity(x_end, t if mistake == "old time" else t_next)
    if mistake == "second velocity only":
        return x + (t_next - t) * v_end, v
    start = x_end if mistake == "starts at the end" else x
    return start + (t_next - t) * (v + v_end) / (1 if mistake == "sum" else 2), v
