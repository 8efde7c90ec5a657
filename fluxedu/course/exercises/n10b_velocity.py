"""Notebook 10b: the trained velocity field."""

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes, wrong


def _data_sets() -> list[tuple]:
    g = torch.Generator().manual_seed(11)
    cases = [
        (torch.randn(5, 2, generator=g), 0.6, torch.randn(3, 2, generator=g)),
        (torch.randn(2, 4, generator=g) * 1.5, 0.9, torch.randn(4, 4, generator=g)),
        (torch.randn(3, 2, generator=g), 0.35, 0.5 * torch.randn(4, 2, generator=g)),
    ]
    points, noise = torch.randn(3, 4096, generator=g), torch.randn(2, 4096, generator=g)  # of the size of a latent
    return [*cases, (0.95 * points[:2] + 0.05 * noise, 0.05, points)]


def _by_bayes(x: Tensor, t: float, points: Tensor) -> Tensor:
    """The reference: for each state the posterior over the points by Bayes' rule, and the mean velocity under it."""
    velocities = []
    for state in x.double():
        noises = (state - (1 - t) * points.double()) / t  # [K, D]: the noise, if point k were the data
        posterior = torch.distributions.Normal(0, 1).log_prob(noises).sum(-1).softmax(0)  # [K]
        velocities.append((posterior[:, None] * (noises - points)).sum(0))
    return torch.stack(velocities).float()


@exercise(
    "flow.best",
    minutes=12,
    difficulty=3,
    cases=_data_sets,
    against=_by_bayes,
    hints=(
        "If you knew which point a state came from, you would know its velocity. You do not, so average over the "
        "points, each weighted by its posterior probability of being the one.",
        "The state is `(1 - t) * point + t * noise`, so its likelihood under a point is proportional to "
        "`exp(-|x - (1 - t) point|**2 / (2 t**2))`. A softmax over the points turns this into probabilities.",
        "`p = (-dist2 / (2 * t**2)).softmax(-1)  # [N, K]`, the expected point is `p @ points`, and the velocity is "
        "`(x - p @ points) / t`.",
    ),
)
def best(x: Tensor, t: float, points: Tensor) -> Tensor:
    """The velocity with the smallest expected loss when the data are just `points [K, D]`, equally likely.

    `x [N, D]` are states at one time `t` in (0, 1]. Return `[N, D]`: for each state, the mean of `noise - point` over
    all pairs (point, noise) that could have produced it. D can be 4,096, and then the exponentials themselves are 0 in
    floating point; a softmax avoids this.
    """
    dist2 = torch.cdist(x, (1 - t) * points).square()  # [N, K], squared distances
    p = (-dist2 / (2 * t**2)).softmax(dim=-1)  # [N, K], the probability of each point given the state
    return (x - p @ points) / t


wrong("flow.best", "you take the most likely point only; the squared error is smallest for the mean over all points.")(
    lambda x, t, points: (x - points[torch.cdist(x, (1 - t) * points).argmin(-1)]) / t
)


@wrong("flow.best", "the distances are to the points themselves; at time t a point is scaled to (1 - t) * point.")
def _unscaled(x, t, points):
    p = (-torch.cdist(x, points).square() / (2 * t**2)).softmax(-1)
    return (x - p @ points) / t


wrong("flow.best", "you give all points the same weight; a state is more likely to come from a point near it.")(
    lambda x, t, points: (x - points.mean(0)) / t
)


@wrong(
    "flow.best", "the squared distance is divided by 2 t; the noise has standard deviation t, so variance t squared."
)
def _not_squared(x, t, points):
    dist2 = torch.cdist(x, (1 - t) * points).square()
    return (x - (-dist2 / (2 * t)).softmax(-1) @ points) / t


@wrong(
    "flow.best",
    "all exponentials become 0 when a point has thousands of numbers, and 0 / 0 is NaN; use `softmax`, which subtracts "
    "the largest exponent first.",
)
def _underflow(x, t, points):
    weights = (-torch.cdist(x, (1 - t) * points).square() / (2 * t**2)).exp()
    return (x - weights / weights.sum(-1, keepdim=True) @ points) / t


def _trajectories() -> list[tuple]:
    g = torch.Generator().manual_seed(12)
    plane = torch.randn(6, 3, 2, generator=g).cumsum(0)
    return [(plane,), (torch.randn(4, 2, 3, 2, 2, generator=g).cumsum(0),)]


def _length(vectors: Tensor) -> Tensor:
    """The length of each sample's vector, `[B, ...] -> [B]`."""
    return torch.linalg.vector_norm(vectors.reshape(len(vectors), -1), dim=1)


def _step_by_step(path: Tensor) -> Tensor:
    return sum(_length(path[i + 1] - path[i]) for i in range(len(path) - 1)) / _length(path[-1] - path[0])


@exercise(
    "flow.detour",
    minutes=5,
    difficulty=1,
    cases=_trajectories,
    against=_step_by_step,
    hints=(
        "Add up the lengths of all steps, then divide by the distance between the two ends.",
        "`path[1:] - path[:-1]` are the steps. Flatten all axes of a sample before you take the length.",
        "`(path[1:] - path[:-1]).flatten(2).norm(dim=-1).sum(0)` is the length of the path, and "
        "`(path[-1] - path[0]).flatten(1).norm(dim=-1)` the distance between its ends.",
    ),
)
def detour(path: Tensor) -> Tensor:
    """The length of a trajectory divided by the distance between its ends: `path [N + 1, B, ...]` -> `[B]`.

    `path` holds the states of a run, step by step, as in `out.trajectory.latents`. A straight trajectory has the
    value 1.
    """
    length = (path[1:] - path[:-1]).flatten(2).norm(dim=-1).sum(0)  # [N, B, D] -> [B]
    return length / (path[-1] - path[0]).flatten(1).norm(dim=-1)


wrong("flow.detour", "you divide by the length of the last state; divide by its distance from the first state.")(
    lambda path: detour(path) * _length(path[-1] - path[0]) / _length(path[-1])
)
wrong(
    "flow.detour", "the ratio is inverted: divide the path's length by the straight distance, which gives at least 1."
)(lambda path: 1 / detour(path))
wrong("flow.detour", "you averaged the steps' lengths; the length of the path is their sum.")(
    lambda path: detour(path) / (len(path) - 1)
)


@wrong("flow.detour", "you added squared lengths; add the lengths themselves.")
def _squares(path):
    length2 = (path[1:] - path[:-1]).flatten(2).square().sum(-1).sum(0)
    return length2 / (path[-1] - path[0]).flatten(1).square().sum(-1)


def _halves() -> list[tuple]:
    g = torch.Generator().manual_seed(16)
    cases = []
    for shape, t in (((2, 3, 4), 0.3), ((1, 16, 16, 16), 0.95), ((2, 3, 4), 1.0)):
        x, v, known = torch.randn(3, *shape, generator=g)
        cases.append((x, t, v, known, torch.rand(shape[-1], generator=g) < 0.5))
    return cases


def _by_correction(x: Tensor, t: float, v: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """The reference: the velocity plus what moves the predicted x0 to the known image."""
    return v + ((x - t * v) - known) / t * mask


@exercise(
    "flow.steer",
    minutes=8,
    difficulty=2,
    cases=_halves,
    against=_by_correction,
    tolerance=1e-4,
    hints=(
        "Go from the velocity to the image that it implies, change the image, and go back to a velocity.",
        "The predicted x0 is `x - t * v`. `torch.where(mask, a, b)` is `a` where the mask is true, and `b` elsewhere.",
        "`x0 = torch.where(mask, known, x - t * v)`; solve `x0 = x - t * v` for the velocity: `(x - x0) / t`.",
    ),
)
def steer(x: Tensor, t: float, v: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """A velocity whose predicted x0 is `known` where `mask` is true, and that of the velocity `v` elsewhere.

    `x`, `v` and `known` have one shape, such as `[B, C, h, w]`; `mask` is boolean, and `torch.where` broadcasts it. `x`
    is the state at the time `t > 0`.
    """
    x0 = torch.where(mask, known, x - t * v)
    return (x - x0) / t


@mistakes(
    "flow.steer",
    ("exchanged", "the mask is reversed: the known image belongs where the mask is true."),
    ("image", "you return the changed image; return the velocity that implies it."),
    ("known", "where the mask is true you return the known image as a velocity; its velocity is (x - known) / t."),
    ("whole", "you forget the time: the image lies t times the velocity away from the state."),
    ("sign", "your velocity points towards the image; it points towards the noise, x - x0."),
)
def _steer_with(mistake, x, t, v, known, mask):
    x0 = torch.where(~mask if mistake == "exchanged" else mask, known, x - t * v)
    if mistake == "image":
        return x0
    if mistake == "known":
        return torch.where(mask, known, v)
    if mistake == "whole":
        return torch.where(mask, x - known, v)
    return (x0 - x if mistake == "sign" else x - x0) / t
