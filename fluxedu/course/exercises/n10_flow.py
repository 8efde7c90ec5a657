"""Notebook 10: rectified flow."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.course.exercise import exercise, wrong


def _data_and_noise() -> list[tuple]:
    g = torch.Generator().manual_seed(10)
    plane = torch.randn(3, 2, generator=g) + 1, torch.randn(3, 2, generator=g), torch.tensor([0.2, 0.5, 0.9])
    latents = torch.randn(2, 3, 4, 5, generator=g), torch.randn(2, 3, 4, 5, generator=g), torch.tensor([0.1, 0.7])
    return [plane, latents]


def _by_lerp(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: `torch.lerp`, one sample at a time."""
    x_t = torch.stack([torch.lerp(x0[i], noise[i], t[i]) for i in range(len(x0))])
    return x_t, torch.sub(noise, x0)


@exercise(
    "flow.between",
    minutes=6,
    difficulty=1,
    cases=_data_and_noise,
    against=_by_lerp,
    hints=(
        "At t = 0 the state is the image, at t = 1 it is the noise, and at t = 0.5 it is the mean of both.",
        "`t` has one number per sample. To multiply a whole sample by it, give it as many axes as `x0` has.",
        "`t = t.view(-1, *[1] * (x0.ndim - 1))`, then `(1 - t) * x0 + t * noise`; the velocity is its derivative by t.",
    ),
)
def between(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The state at time `t [B]` on the straight line from `x0 [B, ...]` to `noise [B, ...]`, and its velocity.

    Return two tensors of the shape of `x0`. Time 0 is the image, time 1 the noise. The velocity is the derivative of
    the state with respect to time.
    """
    t = t.view(-1, *[1] * (x0.ndim - 1))  # [B] -> [B, 1, ...]
    return (1 - t) * x0 + t * noise, noise - x0


wrong("flow.between", "your time runs in the opposite direction: here t = 0 is the image and t = 1 the noise.")(
    lambda x0, noise, t: between(noise, x0, t)
)
wrong("flow.between", "the velocity has the wrong sign: the state moves towards the noise as t grows, noise - x0.")(
    lambda x0, noise, t: (between(x0, noise, t)[0], x0 - noise)
)
wrong("flow.between", "you return the noise, which DDPM-style models predict; the velocity of a flow is noise - x0.")(
    lambda x0, noise, t: (between(x0, noise, t)[0], noise)
)


@wrong("flow.between", "your weights are square roots, as in DDPM; a straight line needs the weights 1 - t and t.")
def _roots(x0, noise, t):
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return (1 - t).sqrt() * x0 + t.sqrt() * noise, noise - x0


def _models() -> list[tuple]:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return (1 + t.view(-1, *[1] * (x.ndim - 1))) * x.cos()

    return [(model, *case) for case in _data_and_noise()]


def _mse(model: Callable, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    x_t, v = _by_lerp(x0, noise, t)
    return F.mse_loss(model(x_t, t), v)


@exercise(
    "flow.loss",
    minutes=8,
    difficulty=1,
    cases=_models,
    against=_mse,
    hints=(
        "Give the network a state between image and noise together with its time, and compare its output with the "
        "velocity of that line.",
        "`between(x0, noise, t)` returns both the network's input and its target.",
        "`x_t, v = between(x0, noise, t)`, then the mean of `(model(x_t, t) - v) ** 2`.",
    ),
)
def loss(model: Callable, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The training loss of rectified flow: the mean squared difference of `model(x_t, t)` and the velocity.

    `x0 [B, ...]` are images, `noise [B, ...]` is noise, and `t [B]` has one time per sample. Return one number.
    """
    t_view = t.view(-1, *[1] * (x0.ndim - 1))  # [B] -> [B, 1, ...]
    x_t = (1 - t_view) * x0 + t_view * noise
    v = noise - x0
    return (model(x_t, t) - v).square().mean()


wrong("flow.loss", "the network gets the clean images; it must get the states between image and noise.")(
    lambda model, x0, noise, t: (model(x0, t) - (noise - x0)).square().mean()
)
wrong("flow.loss", "the target is x0 - noise: with t = 1 as noise, the velocity is noise - x0.")(
    lambda model, x0, noise, t: (model(_by_lerp(x0, noise, t)[0], t) + noise - x0).square().mean()
)
wrong("flow.loss", "you return the sum; the mean does not grow with batch size and image size.")(
    lambda model, x0, noise, t: _mse(model, x0, noise, t) * x0.numel()
)
wrong("flow.loss", "the network gets 1 - t as its time; it must be the time t of the state that it gets.")(
    lambda model, x0, noise, t: _mse(lambda x, t: model(x, 1 - t), x0, noise, t)
)


def _data_sets() -> list[tuple]:
    g = torch.Generator().manual_seed(11)
    return [
        (torch.randn(5, 2, generator=g), 0.6, torch.randn(3, 2, generator=g)),
        (torch.randn(2, 4, generator=g) * 1.5, 0.9, torch.randn(4, 4, generator=g)),
        (torch.randn(3, 2, generator=g), 0.35, 0.5 * torch.randn(4, 2, generator=g)),
    ]


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
    minutes=15,
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
    all pairs (point, noise) that could have produced it.
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
    minutes=6,
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
