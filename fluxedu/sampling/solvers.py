"""Solvers: how to walk along the velocity from noise to picture.

The flow is the differential equation ``dx/dt = v(x, t)``; sampling is integrating it from t = 1 to
t = 0. Steps are negative: ``dt = t_next - t``, so ``x + dt * v`` goes *against* the velocity, away
from the noise.

A solver is ``step(x, t, t_next, velocity) -> (x_next, v)`` where ``velocity(x, t)`` asks the network
and ``v`` is the velocity at the step's beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
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


def evaluation_times(solver: str, times: list[float]) -> list[float]:
    """Every time at which the network is asked, in order: what can be planned ahead of the loop."""
    asked: list[float] = []
    for t, t_next in zip(times, times[1:], strict=False):
        second = {"euler": [], "midpoint": [(t + t_next) / 2], "heun": [t_next]}[solver]
        asked += [t, *second]
    return asked


# ------------------------------------------------------------ sampling/solvers.py
# The schedule: at which times the network is asked.
#
# Times fall from 1 (noise) to 0 (picture). Evenly spaced they waste steps where little happens; the
# shift moves them towards the noise, the more so the more tokens a picture has, since averaging over
# many tokens lets even a noisy picture show its layout.
#
#     t' = e^mu / (e^mu + 1/t - 1),      mu linear in the token count through (256, 0.5), (4096, 1.15)
#
# Source: black-forest-labs/flux, sampling.py; arXiv 2403.03206, section 5.3.2.
#


def shift_amount(tokens: int, base: tuple[int, float] = (256, 0.5), top: tuple[int, float] = (4096, 1.15)) -> float:
    """``mu`` for a picture of so many image tokens; a straight line, not clamped at its ends."""
    (n0, mu0), (n1, mu1) = base, top
    return mu0 + (tokens - n0) * (mu1 - mu0) / (n1 - n0)


def shift_times(times: Tensor, mu: float) -> Tensor:
    """Push times in [0, 1] towards 1; 0 and 1 stay where they are."""
    push = torch.tensor(math.exp(mu), dtype=times.dtype)  # a tensor: torch rounds number / tensor twice
    return push / (push + (1 / times - 1))  # at 0: 1 / 0 is inf, and push / inf is 0


def schedule(steps: int, tokens: int, shift: bool = True, ends: tuple[float, float] = (0.5, 1.15)) -> Tensor:
    """The times of a run: ``[steps + 1]`` from 1 down to 0, float32.

    ``ends``: ``mu`` at 256 and at 4096 tokens (diffusers' ``base_shift`` and ``max_shift``).

    To the last bit those of diffusers: the network multiplies a time by 1000, and what is lost in the
    last bit of it comes back as 1e-6 in the picture. Raises ValueError for fewer than one step.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}.")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).float()  # rounded once
    return shift_times(times, shift_amount(tokens, (256, ends[0]), (4096, ends[1]))) if shift else times


def from_strength(times: Tensor, strength: float) -> Tensor:
    """The part of a schedule that image-to-image runs: the last ``strength`` share of its steps.

    Strength 1 is the whole run (nothing of the picture is kept), small strengths begin late and keep
    much. At least one step is run.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength!r}.")
    steps = len(times) - 1
    first = int(max(steps - min(steps * strength, steps), 0))  # as diffusers counts
    return times[min(first, steps - 1) :]


# ------------------------------------------------------------ sampling/solvers.py
# Guidance: paying more heed to the prompt than the network would by itself.
#
# There are two kinds. FLUX.1-dev was distilled with the strength as an *input* (``guidance_embed``): one
# pass a step. The classic kind, classifier-free guidance, asks twice, with and without the prompt, and
# goes further in the direction in which the prompt moves the answer (arXiv 2207.12598):
#
#     v = v_negative + scale * (v_prompt - v_negative)
#
# Scale 1 is no guidance. The two passes are one batch of twice the size.
#


def guide(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    """The guided velocity."""
    return negative + scale * (prompted - negative)


def doubled(x: Tensor) -> Tensor:
    """The batch for both passes: first the negative half, then the prompted half."""
    return torch.cat([x, x])


def active(t: float, interval: tuple[float, float]) -> bool:
    """Is guidance on at time ``t``? It helps most in the middle of the run (arXiv 2404.07724)."""
    low, high = interval
    return low <= t <= high
