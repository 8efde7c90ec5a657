"""Notebook 12: guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, wrong
from fluxedu.sampling import solvers as library


def _velocities() -> list[tuple]:
    g = torch.Generator().manual_seed(12)
    small = torch.randn(2, 3, generator=g), torch.randn(2, 3, generator=g), 4.0
    return [small, (torch.randn(1, 5, 4, generator=g), torch.randn(1, 5, 4, generator=g), 0.3)]


@exercise(
    "guidance.guide",
    minutes=5,
    difficulty=1,
    cases=_velocities,
    against=library.guide,
    hints=(
        "The difference of the two velocities is the effect of the prompt. Go further in that direction.",
        "Scale 0 must give the negative velocity, scale 1 the prompted one; it is a straight line through both.",
        "Start at `negative` and add `scale` times the difference `prompted - negative`.",
    ),
)
def guide(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    """The guided velocity: start at `negative` and go towards `prompted`, `scale` times the distance between them.

    Both are `[B, N, D]`: the network's velocities without and with the prompt.
    """
    return negative + scale * (prompted - negative)


wrong(
    "guidance.guide", "you start at the prompted velocity; then scale 0 would be no guidance, but it is scale 1 here."
)(lambda negative, prompted, scale: prompted + scale * (prompted - negative))
wrong("guidance.guide", "the two velocities are exchanged: the result leads away from the prompt.")(
    lambda negative, prompted, scale: prompted + scale * (negative - prompted)
)
wrong("guidance.guide", "you return the scaled difference alone; it has to be added to the negative velocity.")(
    lambda negative, prompted, scale: scale * (prompted - negative)
)
wrong("guidance.guide", "you scale the prompted velocity without subtracting the negative one from it first.")(
    lambda negative, prompted, scale: negative + scale * prompted
)


def _networks() -> list[tuple]:
    def network(x: Tensor, text: Tensor) -> Tensor:
        return x.cos() + text.exp().mean(dim=-1).view(-1, 1, 1) * x

    g = torch.Generator().manual_seed(13)
    cases = []
    for b in (1, 2):
        x, empty, prompt = (torch.randn(*shape, generator=g) for shape in ((b, 3, 4), (b, 5), (b, 5)))
        cases.append((network, x, empty, prompt, 2.5))
    return cases


def _one_by_one(network: Callable, x: Tensor, empty: Tensor, prompt: Tensor, scale: float) -> Tensor:
    """The reference: one sample and one text at a time."""
    rows = zip(x.split(1), empty.split(1), prompt.split(1), strict=True)
    return torch.cat([library.guide(network(a, e), network(a, p), scale) for a, e, p in rows])


def _with_count(answer: Callable, network: Callable, *inputs) -> tuple[Tensor, int]:
    """The result and the number of network calls, which should be 1 (the reference is allowed more)."""
    calls = []
    result = answer(lambda *x: calls.append(1) or network(*x), *inputs)
    return result, 1 if answer is _one_by_one else len(calls)


@exercise(
    "guidance.two",
    minutes=10,
    difficulty=2,
    cases=_networks,
    call=_with_count,
    against=_one_by_one,
    hints=(
        "Use the same state twice, once with each text: the samples of a batch do not influence each other.",
        "`torch.cat([x, x])` is a batch of twice the size. Concatenate the texts in the same way, and split the "
        "result with `chunk(2)`.",
        "`negative, prompted = network(torch.cat([x, x]), torch.cat([empty, prompt])).chunk(2)`, then your `guide`.",
    ),
)
def two(network: Callable, x: Tensor, empty: Tensor, prompt: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance with a single call of the network, `network(x, text)`.

    `x [B, N, D]` is the state. `empty [B, T]` is the encoded empty prompt, `prompt [B, T]` the encoded prompt. Put both
    evaluations into one batch of `2 B` samples.
    """
    velocities = network(torch.cat([x, x]), torch.cat([empty, prompt]))  # [2 B, N, D]
    negative, prompted = velocities.chunk(2)  # [B, N, D] each
    return negative + scale * (prompted - negative)


wrong(
    "guidance.two", "the halves of the output are exchanged: they have the order in which you concatenated the inputs."
)(lambda network, x, empty, prompt, scale: two(network, x, prompt, empty, scale))
wrong("guidance.two", "both halves were evaluated with the prompt, so their difference is 0.")(
    lambda network, x, empty, prompt, scale: network(x, prompt)
)
wrong("guidance.two", "the network is called twice; make it one call with twice as many samples.")(
    lambda network, x, empty, prompt, scale: library.guide(network(x, empty), network(x, prompt), scale)
)
wrong("guidance.two", "you combine the texts before the network runs; combine its outputs instead.")(
    lambda network, x, empty, prompt, scale: network(x, empty + scale * (prompt - empty))
)
wrong("guidance.two", "you start at the prompted velocity, which makes the scale one too large.")(
    lambda network, x, empty, prompt, scale: two(network, x, empty, prompt, scale + 1)
)


def _intervals() -> list[tuple]:
    return [(t, low, high) for low, high in ((0.3, 0.8), (0.0, 0.5), (0.25, 1.0)) for t in (0.1, 0.25, 0.5, 0.8, 0.95)]


@exercise(
    "guidance.within",
    minutes=4,
    difficulty=1,
    cases=_intervals,
    call=lambda answer, t, low, high: bool(answer(t, (low, high))),
    against=lambda t, interval: library.active(t, interval),
    tolerance=0,
    hints=(
        "The condition consists of two comparisons.",
        "Python can chain them: `a <= b <= c`.",
        "`low, high = interval`, and then `low <= t <= high`.",
    ),
)
def within(t: float, interval: tuple[float, float]) -> bool:
    """Is guidance on at time `t`? `interval` is (low, high), and includes both ends; t = 1 is noise."""
    low, high = interval
    return low <= t <= high


wrong("guidance.within", "your times are counted with the image as 1; in FLUX t = 1 is the noise.")(
    lambda t, interval: interval[0] <= 1 - t <= interval[1]
)
wrong("guidance.within", "guidance is on outside the interval and off inside; it should be the other way round.")(
    lambda t, interval: not interval[0] <= t <= interval[1]
)
wrong("guidance.within", "your interval excludes its ends; it should include them.")(
    lambda t, interval: interval[0] < t < interval[1]
)
wrong("guidance.within", "only the upper end is checked.")(lambda t, interval: t <= interval[1])
