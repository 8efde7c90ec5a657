"""From noise to image: the schedule of times, the solvers that walk along it, and guidance.

Sampling integrates ``dx/dt = v(x, t)`` from t = 1 (noise) to t = 0 (image). Steps are negative, ``dt = t_next - t``, so
``x + dt * v`` moves *against* the predicted velocity, away from the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxedu.errors import RequestError, check_integer, check_number, checked, describe
from fluxedu.sampling.limits import MAX_STEPS

VelocityFunction = Callable[[Tensor, float], Tensor]
Step = Callable[[Tensor, float, float, VelocityFunction], tuple[Tensor, Tensor]]

# ---------------------------------------------------------------- solvers


@dataclass(frozen=True)
class Solver:
    """A method of integration, to be registered under a name in :data:`SOLVERS`.

    step: ``step(x, t, t_next, velocity) -> (x_next, v)``, where ``velocity(x, t)`` evaluates the model and ``v`` is the
    velocity at the beginning of the step. t runs from 1 (noise) to 0 (image), so ``dt = t_next - t`` is negative ·
    stages: the times at which ``step`` evaluates the velocity, in order, as fractions of the step (0 is its beginning,
    1 its end). The modulation at these times is computed ahead of the loop, at other times only when it is needed::

        fe.sampling.SOLVERS["ralston"] = fe.sampling.Solver(ralston, stages=(0, 2 / 3))
        pipe("a red circle", solver="ralston")
    """

    step: Step
    stages: tuple[float, ...] = (0,)

    def __call__(self, x: Tensor, t: float, t_next: float, velocity: VelocityFunction) -> tuple[Tensor, Tensor]:
        return self.checked(self.step(x, t, t_next, velocity), x)

    def checked(self, result: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """What ``step`` returned; raises RequestError unless it is two tensors of x's shape."""
        if isinstance(result, tuple) and [getattr(part, "shape", None) for part in result] == [x.shape, x.shape]:
            return result
        raise RequestError(
            f"a solver's step must return (x_next, v), two tensors of shape {list(x.shape)}, not {describe(result)}."
        )

    def evaluation_times(self, times: list[float]) -> list[float]:
        """Every time at which the model is evaluated on a schedule, in order."""
        steps = zip(times, times[1:], strict=False)
        return [(1 - stage) * t + stage * t_next for t, t_next in steps for stage in self.stages]


def euler(x: Tensor, t: float, t_next: float, velocity: VelocityFunction) -> tuple[Tensor, Tensor]:
    """Follow the tangent: one model evaluation per step."""
    v = velocity(x, t)
    return x + (t_next - t) * v, v


def midpoint(x: Tensor, t: float, t_next: float, velocity: VelocityFunction) -> tuple[Tensor, Tensor]:
    """Take half a step, evaluate the velocity there, and use it for the whole step: two evaluations per step."""
    v = velocity(x, t)
    t_half = (t + t_next) / 2
    return x + (t_next - t) * velocity(x + (t_half - t) * v, t_half), v


def heun(x: Tensor, t: float, t_next: float, velocity: VelocityFunction) -> tuple[Tensor, Tensor]:
    """Average the velocities at both ends of the step: two evaluations per step."""
    v = velocity(x, t)
    v_next = velocity(x + (t_next - t) * v, t_next)
    return x + (t_next - t) * 0.5 * (v + v_next), v


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler),
    "midpoint": Solver(midpoint, stages=(0, 1 / 2)),
    "heun": Solver(heun, stages=(0, 1)),
}


def get_solver(name: str) -> Solver:
    """The registered solver; a plain step function in the registry counts as evaluating the model once per step."""
    found = SOLVERS[name]
    return found if isinstance(found, Solver) else Solver(found)


# ---------------------------------------------------------------- schedule: source black-forest-labs/flux, sampling.py


@checked(RequestError)
def shift_amount(tokens: int, base: tuple[int, float] = (256, 0.5), top: tuple[int, float] = (4096, 1.15)) -> float:
    """``mu`` for an image of ``tokens`` tokens: linear through (tokens, mu) = ``base`` and ``top``, not clamped."""
    (n0, mu0), (n1, mu1) = base, top
    for number in (tokens, n0, mu0, n1, mu1):
        check_number("every number of shift_amount", number, -1e9, 1e9)
    if n0 == n1:
        raise RequestError(f"base and top must be at different numbers of tokens, not both at {n0}.")
    return mu0 + (tokens - n0) * (mu1 - mu0) / (n1 - n0)


@checked(RequestError)
def shift_times(times: Tensor, mu: float) -> Tensor:
    """Move times in [0, 1] towards 1 (noise), ``e^mu / (e^mu + 1/t - 1)``; 0 and 1 stay where they are."""
    # a tensor, because number / tensor is rounded twice in PyTorch
    check_number("mu", mu, -80, 80, "as e^mu overflows beyond")
    if not times.is_floating_point():
        raise RequestError(f"times must be floating-point numbers, not {times.dtype}.")
    factor = torch.tensor(math.exp(mu), dtype=times.dtype, device=times.device)
    return factor / (factor + (1 / times - 1))  # at t = 0: 1 / 0 is inf, and factor / inf is 0


@checked(RequestError)
def schedule(steps: int, tokens: int, shift: bool = True, ends: tuple[float, float] = (0.5, 1.15)) -> Tensor:
    """The times of a run: ``[steps + 1]`` from 1 down to 0, float32.

    The time is 1 for noise and 0 for the image. Large images have more tokens and need more steps near t = 1, since the
    same noise hides less of a large image; ``shift`` moves the uniform times there. schnell's times are not shifted.
    ``ends``: ``mu`` at 256 and at 4096 tokens (diffusers' ``base_shift`` and ``max_shift``).

    Equal to diffusers' to the last bit: the network multiplies a time by 1000, and an error in its last bit changes
    the image by about 1e-6. Raises RequestError for fewer than one step or more than 1000.
    """
    check_integer("steps", steps, 1, MAX_STEPS)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu").float()  # rounded once
    return shift_times(times, shift_amount(tokens, (256, ends[0]), (4096, ends[1]))) if shift else times


def from_strength(times: Tensor, strength: float) -> Tensor:
    """The part of a schedule that image-to-image runs: the last ``strength`` (0 to 1) of its steps, at least one.

    At strength 1 the whole schedule runs and nothing of the image is kept; at a small strength the run starts late and
    keeps most of the image. The number of steps is rounded as in diffusers.
    """
    if not 0 < strength <= 1:
        raise RequestError(f"strength must be above 0 and at most 1, not {strength!r}.")
    steps = len(times) - 1
    skipped = int(steps - steps * strength)
    return times[skipped:]


# ---------------------------------------------------------------- guidance


@checked(RequestError)
def guide(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance.

    The velocity is extrapolated from the velocity for the negative prompt through the velocity for the prompt:
    ``v = v_negative + scale * (v_prompted - v_negative)``; scale 1 is no guidance (arXiv 2207.12598). It needs two
    forward passes, done as one batch of twice the size. FLUX.1-dev does not need them: it was distilled with the
    guidance scale as an *input* (``guidance_embed``).
    """
    check_number("scale", scale, -1e30, 1e30)
    if (negative.shape, negative.device) != (prompted.shape, prompted.device):
        both = f"{list(negative.shape)} on {negative.device} and {list(prompted.shape)} on {prompted.device}"
        raise RequestError(f"the velocities must have the same shape and device, not {both}.")
    return negative + scale * (prompted - negative)


def active(t: float, interval: tuple[float, float]) -> bool:
    """Whether classifier-free guidance is on at time ``t``. It helps most in the middle of a run (arXiv 2404.07724)."""
    low, high = interval
    return low <= t <= high
