"""The schedule: at which times the network is asked.

Times fall from 1 (noise) to 0 (picture). Evenly spaced they waste steps where little happens; the
shift moves them towards the noise, the more so the more tokens a picture has, since averaging over
many tokens lets even a noisy picture show its layout.

    t' = e^mu / (e^mu + 1/t - 1),      mu linear in the token count through (256, 0.5), (4096, 1.15)

Source: black-forest-labs/flux, sampling.py; arXiv 2403.03206, section 5.3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
