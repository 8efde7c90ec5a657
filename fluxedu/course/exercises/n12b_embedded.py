"""Notebook 12b: embedded guidance, its distillation, and CFG-Zero*."""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.sampling import solvers as library


class _Teacher(torch.nn.Module):
    """A velocity ``teacher(x, text)`` with a parameter, like a network's."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.factor * torch.tanh(x + text)


class _Student(_Teacher):
    """``student(x, text, scale)``, which also reads the guidance scale."""

    def forward(self, x: Tensor, text: Tensor, scale: float) -> Tensor:
        return super().forward(x, text) + 0.1 * scale * text


def _networks() -> list[tuple]:
    g = torch.Generator().manual_seed(17)
    shapes = ((2, 3), 4.0), ((1, 5, 4), 0.5), ((3, 2, 6), 7.0)
    return [
        (_Student(0.9), _Teacher(1.2), *(torch.randn(shape, generator=g) for _ in range(3)), scale)
        for shape, scale in shapes
    ]


def _loss_and_gradients(answer: Callable, student, teacher, x, text, empty, scale) -> list[Tensor]:
    """The loss, and its gradients with respect to a parameter of the student and one of the teacher."""
    with torch.enable_grad():
        loss = answer(student, teacher, x, text, empty, scale)
        if not isinstance(loss, Tensor) or loss.requires_grad is False:
            raise ValueError("the student gets no gradient from the loss")
        both = torch.autograd.grad(loss, [student.factor, teacher.factor], torch.ones_like(loss), allow_unused=True)
    return [loss.detach(), *(torch.zeros(()) if grad is None else grad for grad in both)]


@exercise(
    "guidance.distil",
    minutes=10,
    difficulty=2,
    cases=_networks,
    call=_loss_and_gradients,
    after="### How a network learns to do it in one pass",
    hints=(
        "The target is what classifier-free guidance computes with the teacher, in two passes.",
        "Only the student is trained, so no gradient may flow through the target: `with torch.no_grad():`.",
        "`negative, prompted = teacher(x, empty), teacher(x, text)`; the target is `negative + scale * (prompted - "
        "negative)`; return the mean squared difference of `student(x, text, scale)` from it.",
    ),
)
def distillation_loss(
    student: Callable, teacher: Callable, x: Tensor, text: Tensor, empty: Tensor, scale: float
) -> Tensor:
    """The loss with which `student(x, text, scale)` learns guidance from `teacher(x, text)`: a mean over all numbers.

    The target is the teacher's velocity with classifier-free guidance; `empty` is the encoded empty prompt. Only the
    student may receive a gradient.
    """
    with torch.no_grad():
        negative, prompted = teacher(x, empty), teacher(x, text)
        target = negative + scale * (prompted - negative)
    return (student(x, text, scale) - target).square().mean()


@mistakes(
    "guidance.distil",
    ("gradient", "a gradient flows into the teacher; compute its velocities under `torch.no_grad()`."),
    ("student", "the student's own velocities are in your target; it must be the teacher's, both of them."),
    ("exchanged", "the teacher's two velocities are exchanged."),
    ("unguided", "your target is the teacher's velocity without guidance, so the student would not learn the scale."),
    ("plus one", "your scale is counted as 1 + w; here scale 1 is the velocity with the prompt."),
    ("sum", "the squares are summed; the loss is their mean."),
    ("absolute", "these are absolute differences; the loss is the mean of squares."),
)
def distilled_with(mistake: str, student, teacher, x, text, empty, scale) -> Tensor:
    with torch.set_grad_enabled(mistake == "gradient" and torch.is_grad_enabled()):
        prompted, negative = teacher(x, text), teacher(x, empty)
        if mistake == "student":
            prompted = student(x, text, scale).detach()
        if mistake == "exchanged":
            prompted, negative = negative, prompted
        if mistake == "plus one":
            scale = scale + 1
        target = prompted if mistake == "unguided" else negative + scale * (prompted - negative)
        scale = scale - (mistake == "plus one")
    error = student(x, text, scale) - target
    if mistake == "absolute":
        return error.abs().mean()
    return error.square().sum() if mistake == "sum" else error.square().mean()


def _by_least_squares(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    """The reference: sample by sample, with a least-squares solver instead of a formula."""
    rows = []
    for n, p in zip(negative, prompted, strict=True):
        factor = torch.linalg.lstsq(n.reshape(-1, 1).double(), p.reshape(-1, 1).double()).solution.item()
        rows.append(library.guide(factor * n, p, scale))
    return torch.stack(rows)


def _batches() -> list[tuple]:
    g = torch.Generator().manual_seed(14)
    shapes = ((2, 3, 4), 4.0), ((1, 5, 4), 0.3), ((3, 2, 6), 7.0)
    return [(*(torch.randn(shape, generator=g) + 0.5 for _ in range(2)), scale) for shape, scale in shapes]


@exercise(
    "guidance.fitted",
    minutes=12,
    difficulty=3,
    cases=_batches,
    against=_by_least_squares,
    hints=(
        "Which multiple of one vector is nearest to another? The orthogonal projection: their dot product divided by "
        "the squared length of the first.",
        "Each sample has its own factor: sum over all axes but the first, and keep those axes for broadcasting.",
        "`factor = (prompted * negative).flatten(1).sum(1) / negative.flatten(1).square().sum(1)`, as `[B, 1, 1]`; "
        "then guide from `factor * negative`.",
    ),
)
def fitted(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    """CFG-Zero*: multiply `negative` by the factor that brings it nearest to `prompted`, then guide from there.

    Return `f * negative + scale * (prompted - f * negative)`. Fit one factor f for each sample of the batch
    `[B, N, D]`, by least squares.
    """
    dot = (prompted * negative).flatten(1).sum(1)  # [B]
    factor = dot / negative.flatten(1).square().sum(1)  # [B]
    start = factor.view(-1, *[1] * (negative.ndim - 1)) * negative
    return start + scale * (prompted - start)


@wrong("guidance.fitted", "you fitted one factor for the whole batch; each sample needs its own.")
def _one_for_all(negative, prompted, scale):
    start = (prompted * negative).sum() / negative.square().sum() * negative
    return start + scale * (prompted - start)


@wrong(
    "guidance.fitted", "you divide by the squared length of prompted; negative is what is scaled, so divide by its own."
)
def _wrong_square(negative, prompted, scale):
    factor = (prompted * negative).flatten(1).sum(1) / prompted.flatten(1).square().sum(1)
    start = factor.view(-1, *[1] * (negative.ndim - 1)) * negative
    return start + scale * (prompted - start)


wrong("guidance.fitted", "that is plain guidance: multiply the negative velocity by its factor first.")(
    lambda negative, prompted, scale: library.guide(negative, prompted, scale)
)
wrong("guidance.fitted", "you start at the rescaled velocity, but your difference still uses the original one.")(
    lambda negative, prompted, scale: fitted(negative, prompted, 0) + scale * (prompted - negative)
)
