"""Notebook 00: an image from a sentence."""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes
from fluxedu.sampling.solvers import schedule


def _states() -> list[tuple]:
    g = torch.Generator().manual_seed(1)
    shapes = {0.7: (2, 3, 4), 0.25: (1, 64, 64), 1.0: (1, 5, 2)}
    return [(torch.randn(shape, generator=g), torch.randn(shape, generator=g), t) for t, shape in shapes.items()]


@exercise(
    "picture.predicted_x0",
    minutes=3,
    difficulty=1,
    cases=_states,
    hints=(
        "Put x = (1 - t) x0 + t x1 and v = x1 - x0 side by side, and find a multiple of v that removes x1.",
        "x contains x1 with the factor t, and v contains it with the factor 1.",
        "`x - t * v`: the noise cancels, and (1 - t) x0 + t x0 = x0 is left.",
    ),
)
def predicted_x0(x: Tensor, v: Tensor, t: float) -> Tensor:
    """The image that the velocity `v` predicts for the state `x` at time `t`: what remains without the noise.

    All tensors have one shape, such as `[1, 64, 64]`.
    """
    return x - t * v


@mistakes(
    "picture.predicted_x0",
    ("no t", "you subtract the whole velocity; at time t only the share t of the state is noise."),
    ("plus", "that adds noise: the velocity points from the image to the noise, so subtract it."),
    ("1 - t", "that moves by 1 - t; the image lies at time 0, so the distance from t is t."),
    ("divided", "the noise is already gone after the subtraction; do not divide by 1 - t as well."),
)
def _predicted_x0(mistake: str, x: Tensor, v: Tensor, t: float) -> Tensor:
    factor = {"no t": 1.0, "plus": -t, "1 - t": 1 - t}.get(mistake, t)
    return (x - factor * v) / (max(1 - t, 1e-3) if mistake == "divided" else 1)


def _fields() -> list[tuple]:
    def velocity(x: Tensor, t: float) -> Tensor:
        return x.sin() + (2 * t) ** 2

    g = torch.Generator().manual_seed(2)
    return [
        (velocity, torch.randn(2, 3, generator=g), [1.0, 0.8, 0.3, 0.0]),
        (velocity, torch.randn(1, 64, 64, generator=g), schedule(20, 4096).tolist()),
        (velocity, torch.randn(3, 1, 2, generator=g), [0.5, 0.2]),
    ]


@exercise(
    "picture.euler",
    minutes=9,
    difficulty=2,
    cases=_fields,
    hints=(
        "Go through the pairs of neighbouring times. Each step computes the velocity at the state and time where it "
        "begins.",
        "`zip(times, times[1:])` gives the pairs (t, t_next). The step is `(t_next - t) * velocity(x, t)`; t_next is "
        "the smaller one.",
        "Start with `states = [x]`; in the loop, `x = x + (t_next - t) * velocity(x, t)`, then `states.append(x)`.",
    ),
)
def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: list[float]) -> list[Tensor]:
    """Euler's method: follow `velocity(x, t)` from the state `x` at `times[0]` to `times[-1]`.

    A step from `t` to `t_next` adds `(t_next - t)` times the velocity at its beginning. Return a list of all states,
    one per time; the first is `x` itself.
    """
    states = [x]
    for t, t_next in zip(times, times[1:]):  # noqa: B905
        x = x + (t_next - t) * velocity(x, t)
        states.append(x)
    return states


@mistakes(
    "picture.euler",
    ("sign", "your steps go the wrong way: t_next - t is negative, because the time decreases."),
    ("late", "you take the velocity at t_next; Euler's method takes it at t, where the step begins."),
    ("even", "your steps all have the same length; this schedule is shifted, so use the difference of the two times."),
    ("fixed", "you evaluate the velocity at the first state again and again; evaluate it at the current state."),
    ("from start", "every step of yours starts from the first state; start from the state of the step before."),
    ("to zero", "each of your steps goes all the way to t = 0, so every state is a predicted x0."),
)
def _euler(mistake: str, velocity: Callable, x: Tensor, times: list[float]) -> list[Tensor]:
    states = [x]
    for t, t_next in zip(times, times[1:], strict=False):
        v = velocity(states[0] if mistake == "fixed" else x, t_next if mistake == "late" else t)
        step = {"sign": t - t_next, "even": (times[-1] - times[0]) / (len(times) - 1), "to zero": -t}
        moved = (states[0] if mistake == "from start" else x) + step.get(mistake, t_next - t) * v
        states.append(moved)
        x = x + (t_next - t) * v if mistake == "to zero" else moved
    return states
