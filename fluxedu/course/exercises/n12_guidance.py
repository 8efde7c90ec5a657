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
        "The difference of the two velocities is what the prompt changes. Go further in that direction.",
        "Scale 0 must give the negative velocity, scale 1 the prompted one; it is a straight line through both.",
        "Begin at `negative` and add `scale` times the way from it to `prompted`.",
    ),
)
def guide(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    """The guided velocity: on the line from `negative` through `prompted`, `scale` times as far as `prompted`.

    Both are `[B, N, D]`, the network's answers without and with the prompt.
    """
    return negative + scale * (prompted - negative)


@wrong("guidance.guide", "it begins at the prompted velocity; then scale 0 would be no guidance, and here 1 is.")
def _from_prompted(negative, prompted, scale):
    return prompted + scale * (prompted - negative)


@wrong("guidance.guide", "the two have changed places: it leads away from the prompt.")
def _away(negative, prompted, scale):
    return prompted + scale * (negative - prompted)


@wrong("guidance.guide", "the difference alone is no velocity; it is added to the negative one.")
def _difference(negative, prompted, scale):
    return scale * (prompted - negative)


@wrong("guidance.guide", "the prompted velocity is scaled, but the negative one is not taken away from it.")
def _not_taken(negative, prompted, scale):
    return negative + scale * prompted


def _networks() -> list[tuple]:
    def ask(x: Tensor, text: Tensor) -> Tensor:
        return x.cos() + text.exp().mean(dim=-1).view(-1, 1, 1) * x

    g = torch.Generator().manual_seed(13)
    made = [(ask, *(torch.randn(*s, generator=g) for s in ((b, 3, 4), (b, 5), (b, 5))), 2.5) for b in (1, 2)]
    return made


def _one_by_one(ask: Callable, x: Tensor, empty: Tensor, said: Tensor, scale: float) -> Tensor:
    rows = zip(x.split(1), empty.split(1), said.split(1), strict=True)
    return torch.cat([library.guide(ask(a, e), ask(a, s), scale) for a, e, s in rows])


def _counted(answer: Callable, ask: Callable, *given) -> tuple[Tensor, int]:
    """The answer, and how often the network was asked; of the reference, which asks a picture at a time, once."""
    asked = []
    said = answer(lambda *x: asked.append(1) or ask(*x), *given)
    return said, 1 if answer is _one_by_one else len(asked)


@exercise(
    "guidance.two",
    minutes=10,
    difficulty=2,
    cases=_networks,
    call=_counted,
    against=_one_by_one,
    hints=(
        "The same state twice, once with each text: the rows of a batch know nothing of each other.",
        "`torch.cat([x, x])` is a batch of twice the size; put the texts together in the same way, and take the answer "
        "apart again with `chunk(2)`.",
        "`negative, prompted = ask(torch.cat([x, x]), torch.cat([empty, said])).chunk(2)`, then your `guide`.",
    ),
)
def two(ask: Callable, x: Tensor, empty: Tensor, said: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance with a single call of the network, `ask(x, text)`.

    x `[B, N, D]` is the state; `empty [B, T]` and `said [B, T]` are the texts, the prompt in `said`. Put both questions
    into one batch of `2 B` rows.
    """
    answers = ask(torch.cat([x, x]), torch.cat([empty, said]))  # [2 B, N, D]
    negative, prompted = answers.chunk(2)  # [B, N, D] each
    return negative + scale * (prompted - negative)


@wrong("guidance.two", "the halves have changed places: the first half of the answer belongs to the first half asked.")
def _halves(ask, x, empty, said, scale):
    prompted, negative = ask(torch.cat([x, x]), torch.cat([empty, said])).chunk(2)
    return negative + scale * (prompted - negative)


@wrong("guidance.two", "both halves were asked with the prompt, so that there is nothing to guide by.")
def _both_said(ask, x, empty, said, scale):
    return ask(x, said)


@wrong("guidance.two", "the network is asked twice; one call with twice the rows does it.")
def _two_calls(ask, x, empty, said, scale):
    return library.guide(ask(x, empty), ask(x, said), scale)


@wrong("guidance.two", "the texts are mixed before the network is asked; its answers are what is to be mixed.")
def _mixed_texts(ask, x, empty, said, scale):
    return ask(x, empty + scale * (said - empty))


@wrong("guidance.two", "it begins at the prompted velocity, so that the scale is one too many.")
def _one_more(ask, x, empty, said, scale):
    return two(ask, x, empty, said, scale + 1)


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
        "It is a question of two comparisons.",
        "Python can say both at once: `a <= b <= c`.",
        "`low, high = interval`, and then `low <= t <= high`.",
    ),
)
def within(t: float, interval: tuple[float, float]) -> bool:
    """Is guidance on at time `t`? `interval` is (low, high), both ends in it; t = 1 is noise."""
    low, high = interval
    return low <= t <= high


@wrong("guidance.within", "times are counted from the picture's end as 1 here; in FLUX t = 1 is the noise.")
def _counted_back(t, interval):
    return interval[0] <= 1 - t <= interval[1]


@wrong("guidance.within", "it is on outside the interval, and off inside.")
def _outside(t, interval):
    return not interval[0] <= t <= interval[1]


@wrong("guidance.within", "the ends do not belong to your interval; they should.")
def _open(t, interval):
    return interval[0] < t < interval[1]


@wrong("guidance.within", "only the upper end is looked at.")
def _one_end(t, interval):
    return t <= interval[1]


def _by_projection(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    """Row by row, with least squares in place of a formula."""
    rows = []
    for n, p in zip(negative, prompted, strict=True):
        share = torch.linalg.lstsq(n.reshape(-1, 1).double(), p.reshape(-1, 1).double()).solution.item()
        rows.append(library.guide(share * n, p, scale))
    return torch.stack(rows)


def _pictures() -> list[tuple]:
    g = torch.Generator().manual_seed(14)
    shapes = ((2, 3, 4), 4.0), ((1, 5, 4), 0.3), ((3, 2, 6), 7.0)
    return [(*(torch.randn(shape, generator=g) + 0.5 for _ in range(2)), scale) for shape, scale in shapes]


@exercise(
    "guidance.fitted",
    minutes=12,
    difficulty=3,
    cases=_pictures,
    against=_by_projection,
    hints=(
        "Which multiple of one vector is nearest to another? The foot of the perpendicular: dot product over square.",
        "Each picture has its own multiple: sum over all axes but the first, and keep them for broadcasting.",
        "`share = (prompted * negative).flatten(1).sum(1) / negative.flatten(1).square().sum(1)`, as `[B, 1, 1]`; then "
        "guide from `share * negative`.",
    ),
)
def fitted(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    """Guidance from a rescaled start (CFG-Zero*): `negative` times the number that brings it nearest to `prompted`.

    One number for each picture of the batch `[B, N, D]`, by least squares. From there, guide as before.
    """
    inner = (prompted * negative).flatten(1).sum(1)  # [B]
    share = inner / negative.flatten(1).square().sum(1)  # [B]
    start = share.view(-1, *[1] * (negative.ndim - 1)) * negative
    return start + scale * (prompted - start)


@wrong("guidance.fitted", "one number was fitted for the whole batch; each picture needs its own.")
def _one_for_all(negative, prompted, scale):
    start = (prompted * negative).sum() / negative.square().sum() * negative
    return start + scale * (prompted - start)


@wrong("guidance.fitted", "the dot product is divided by the prompted one's square; it is the negative that is scaled.")
def _other_square(negative, prompted, scale):
    share = (prompted * negative).flatten(1).sum(1) / prompted.flatten(1).square().sum(1)
    start = share.view(-1, *[1] * (negative.ndim - 1)) * negative
    return start + scale * (prompted - start)


@wrong("guidance.fitted", "that is plain guidance: the negative velocity is to be rescaled first.")
def _plain(negative, prompted, scale):
    return library.guide(negative, prompted, scale)


@wrong("guidance.fitted", "it begins at the rescaled velocity, but the difference is still from the old one.")
def _half_done(negative, prompted, scale):
    share = (prompted * negative).flatten(1).sum(1) / negative.flatten(1).square().sum(1)
    return share.view(-1, *[1] * (negative.ndim - 1)) * negative + scale * (prompted - negative)
