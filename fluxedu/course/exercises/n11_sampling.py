"""Notebook 11: sampling."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, wrong
from fluxedu.sampling import solvers
from fluxedu.sampling.solvers import schedule as our_schedule
from fluxedu.sampling.solvers import shift_amount


@exercise(
    "sampling.mu",
    minutes=5,
    difficulty=1,
    cases=lambda: [(256,), (4096,), (64,), (1050,), (8160,)],
    against=shift_amount,
    hints=(
        "Two points fix a straight line; the line goes on beyond them.",
        "The slope is the rise over the run, `(1.15 - 0.5) / (4096 - 256)`.",
        "`0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)`.",
    ),
)
def mu(tokens: int) -> float:
    """How strongly FLUX shifts the times of a picture of so many image tokens.

    A straight line through 0.5 at 256 tokens and 1.15 at 4,096 tokens. It is not cut off at either end.
    """
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


@wrong("sampling.mu", "you cut it off at 0.5 and 1.15; the line goes on: 8,160 tokens have more than 1.15.")
def _clamped(tokens):
    return min(max(mu(tokens), 0.5), 1.15)


@wrong("sampling.mu", "the line starts at 0 tokens; it passes through 0.5 at 256.")
def _from_nothing(tokens):
    return 0.5 + tokens * (1.15 - 0.5) / (4096 - 256)


@wrong("sampling.mu", "these are latent cells, four to a token; the line is drawn over tokens.")
def _cells(tokens):
    return mu(4 * tokens)


@wrong("sampling.mu", "that is e to the mu, by which the odds of a time are multiplied; mu itself is asked for.")
def _exponent(tokens):
    return math.exp(mu(tokens))


@exercise(
    "sampling.schedule",
    minutes=8,
    difficulty=1,
    cases=lambda: [(4, 1.15), (7, 0.4), (1, 0.8), (20, 0.0)],
    against=lambda steps, mu: our_schedule(steps, 256, ends=(mu, mu)),
    hints=(
        "Begin with even times, one more than there are steps, from 1 down to 0; then push each towards 1.",
        "`torch.linspace(1, 0, steps + 1)`. The push multiplies the odds t : (1 - t) by e to the mu.",
        "With `s = exp(mu)` it is `s * t / (1 + (s - 1) * t)`, which is the formula without a division by 0.",
    ),
)
def schedule(steps: int, mu: float) -> Tensor:
    """The times of a run, `[steps + 1]`, from 1 down to 0.

    Evenly spaced, then each pushed towards the noise: t becomes `e**mu / (e**mu + (1 / t - 1))`, and 0 stays 0.
    """
    t, s = torch.linspace(1, 0, steps + 1), math.exp(mu)  # [steps + 1]
    return s * t / (1 + (s - 1) * t)


@wrong("sampling.schedule", "the shift is applied twice, which pushes nearly all steps into the noise.")
def _twice(steps, mu):
    return schedule(steps, 2 * mu)


@wrong("sampling.schedule", "the push is e to the mu, not mu itself.")
def _not_exp(steps, mu):
    t = torch.linspace(1, 0, steps + 1)
    return torch.where(t > 0, mu * t / (1 + (mu - 1) * t).clamp(min=1e-9), t)


@wrong("sampling.schedule", "it is pushed the wrong way: more of the times should lie near 1, the noise.")
def _to_the_picture(steps, mu):
    return schedule(steps, -mu)


@wrong("sampling.schedule", "the even times end at 1 / 1000, with a 0 put after them; they reach 0 in even steps.")
def _thousandth(steps, mu):
    t, s = torch.cat([torch.linspace(1, 1e-3, steps), torch.zeros(1)]), math.exp(mu)
    return s * t / (1 + (s - 1) * t)


@wrong("sampling.schedule", "there is no shift in it: these are the even times.")
def _even(steps, mu):
    return torch.linspace(1, 0, steps + 1)


def _steps() -> list[tuple]:
    def curved(x: Tensor, t: float) -> Tensor:
        return x * x.sin() + (2 * t) ** 2

    g = torch.Generator().manual_seed(11)
    return [(torch.randn(3, 2, generator=g), 0.9, 0.6, curved), (torch.randn(1, 5, 4, generator=g), 0.4, 0.0, curved)]


@exercise(
    "sampling.midpoint",
    minutes=8,
    difficulty=2,
    cases=_steps,
    against=solvers.midpoint,
    hints=(
        "Look where the tangent leads in half the time, and ask the network there, at that time.",
        "The time half way is `(t + t_next) / 2`. The answer found there is good for the whole step.",
        "`v = velocity(x, t)`, `there = x + (half - t) * v`, `x + (t_next - t) * velocity(there, half)`.",
    ),
)
def midpoint(x: Tensor, t: float, t_next: float, velocity: Callable) -> tuple[Tensor, Tensor]:
    """One step from `t` to `t_next`: ask `velocity(x, t)`, go half way, ask again, walk the whole step with that.

    Gives the new state, and the velocity at the step's beginning, which the pipeline keeps for its trajectory.
    """
    v = velocity(x, t)
    half = (t + t_next) / 2
    return x + (t_next - t) * velocity(x + (half - t) * v, half), v


@wrong("sampling.midpoint", "you ask for the velocity at the point half way, but tell the network the old time.")
def _old_time(x, t, t_next, velocity):
    v = velocity(x, t)
    return x + (t_next - t) * velocity(x + (t_next - t) / 2 * v, t), v


@wrong("sampling.midpoint", "the second half alone is walked, from half way; the whole step starts at x.")
def _from_half(x, t, t_next, velocity):
    v, half = velocity(x, t), (t + t_next) / 2
    there = x + (half - t) * v
    return there + (t_next - t) * velocity(there, half), v


@wrong("sampling.midpoint", "that is two steps of Euler of half the length; midpoint starts again from x.")
def _two_eulers(x, t, t_next, velocity):
    v, half = velocity(x, t), (t + t_next) / 2
    there = x + (half - t) * v
    return there + (t_next - half) * velocity(there, half), v


@wrong("sampling.midpoint", "that walks towards the noise: t_next - t is negative, and has to be so.")
def _upwards(x, t, t_next, velocity):
    v, half = velocity(x, t), (t + t_next) / 2
    return x + (t - t_next) * velocity(x + (t - half) * v, half), v


@exercise(
    "sampling.heun",
    minutes=8,
    difficulty=2,
    cases=_steps,
    against=solvers.heun,
    hints=(
        "Take Euler's step as a trial, ask where it lands, and walk with the mean of both answers.",
        "The second question is asked at `t_next`, of the state that Euler reaches.",
        "`v = velocity(x, t)`, `ahead = velocity(x + (t_next - t) * v, t_next)`, `x + (t_next - t) * (v + ahead) / 2`.",
    ),
)
def heun(x: Tensor, t: float, t_next: float, velocity: Callable) -> tuple[Tensor, Tensor]:
    """One step from `t` to `t_next` with the mean of two velocities: here, and where Euler's step would land.

    Gives the new state, and the velocity at the step's beginning.
    """
    v = velocity(x, t)
    ahead = velocity(x + (t_next - t) * v, t_next)
    return x + (t_next - t) * (v + ahead) / 2, v


@wrong("sampling.heun", "the two velocities are added; their mean is needed, or the step is twice as long.")
def _added(x, t, t_next, velocity):
    v = velocity(x, t)
    return x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next)), v


@wrong("sampling.heun", "the second question is asked at the old time t; the state it is asked of is of t_next.")
def _asked_early(x, t, t_next, velocity):
    v = velocity(x, t)
    return x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t)) / 2, v


@wrong("sampling.heun", "you walk on from where the trial landed; it was a trial only, and the step starts at x.")
def _walks_on(x, t, t_next, velocity):
    v = velocity(x, t)
    there = x + (t_next - t) * v
    return there + (t_next - t) * (v + velocity(there, t_next)) / 2, v


@wrong("sampling.heun", "the second answer is used alone; Heun takes the mean of both.")
def _second_alone(x, t, t_next, velocity):
    v = velocity(x, t)
    return x + (t_next - t) * velocity(x + (t_next - t) * v, t_next), v
