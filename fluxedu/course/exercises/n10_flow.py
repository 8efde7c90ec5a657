"""Notebook 10: rectified flow."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.course.exercise import exercise, wrong


def _pairs() -> list[tuple]:
    g = torch.Generator().manual_seed(10)
    flat = torch.randn(3, 2, generator=g) + 1, torch.randn(3, 2, generator=g), torch.tensor([0.2, 0.5, 0.9])
    latents = torch.randn(2, 3, 4, 5, generator=g), torch.randn(2, 3, 4, 5, generator=g), torch.tensor([0.1, 0.7])
    return [flat, latents]


def _lerp(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [(torch.lerp(a, b, w), torch.sub(b, a)) for a, b, w in zip(x0, noise, t, strict=True)]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


@exercise(
    "flow.between",
    minutes=6,
    difficulty=1,
    cases=_pairs,
    against=_lerp,
    hints=(
        "At t = 0 the state is the picture, at t = 1 the noise, and half way it is half of each.",
        "`t` has one number a picture. To multiply a whole picture by it, it needs as many axes as the picture has.",
        "`t = t.view(-1, *[1] * (x0.ndim - 1))`, then `(1 - t) * x0 + t * noise`; the velocity is its derivative by t.",
    ),
)
def between(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The state at time `t [B]` on the straight line from `x0 [B, ...]` to `noise [B, ...]`, and its velocity.

    Gives two tensors of the shape of `x0`. Time 0 is the picture, time 1 the noise; the velocity is the change of the
    state per unit of time.
    """
    t = t.view(-1, *[1] * (x0.ndim - 1))  # [B] -> [B, 1, ...]
    return (1 - t) * x0 + t * noise, noise - x0


@wrong("flow.between", "time runs the other way: here t = 0 is the picture and t = 1 the noise.")
def _reversed(x0, noise, t):
    return between(noise, x0, t)


@wrong("flow.between", "the velocity's sign is turned: the state moves towards the noise as t grows, noise - x0.")
def _wrong_sign(x0, noise, t):
    return between(x0, noise, t)[0], x0 - noise


@wrong("flow.between", "the second is the noise, which older diffusion models predict; a flow predicts noise - x0.")
def _noise(x0, noise, t):
    return between(x0, noise, t)[0], noise


@wrong("flow.between", "the weights are square roots, as in older diffusion models; a straight line needs 1 - t and t.")
def _roots(x0, noise, t):
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return (1 - t).sqrt() * x0 + t.sqrt() * noise, noise - x0


def _fields() -> list[tuple]:
    def field(x: Tensor, t: Tensor) -> Tensor:
        return (1 + t.view(-1, *[1] * (x.ndim - 1))) * x.cos()

    return [(field, *pair) for pair in _pairs()]


def _loss(model: Callable, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    x, v = _lerp(x0, noise, t)
    return F.mse_loss(model(x, t), v)


@exercise(
    "flow.loss",
    minutes=8,
    difficulty=1,
    cases=_fields,
    against=_loss,
    hints=(
        "Put the network on the line between a picture and a noise, tell it the time, and ask which way the line goes.",
        "`between(x0, noise, t)` gives both what the network sees and what it should say.",
        "`x, v = between(x0, noise, t)`, then the mean of `(model(x, t) - v) ** 2`.",
    ),
)
def loss(model: Callable, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """How far `model(x, t)` is from the velocity: one number, the mean of the squared differences.

    `x0 [B, ...]` are pictures, `noise [B, ...]` as many noises, `t [B]` a time for each.
    """
    t_ = t.view(-1, *[1] * (x0.ndim - 1))  # [B] -> [B, 1, ...]
    x, v = (1 - t_) * x0 + t_ * noise, noise - x0
    return (model(x, t) - v).square().mean()


@wrong("flow.loss", "the network sees the clean pictures; it must see the states between picture and noise.")
def _clean(model, x0, noise, t):
    return (model(x0, t) - (noise - x0)).square().mean()


@wrong("flow.loss", "the target is x0 - noise: with t = 1 as noise, the velocity is noise - x0.")
def _target_turned(model, x0, noise, t):
    return (model(_lerp(x0, noise, t)[0], t) + noise - x0).square().mean()


@wrong("flow.loss", "it is a sum; a mean does not grow with the batch and the size of the pictures.")
def _summed(model, x0, noise, t):
    return _loss(model, x0, noise, t) * x0.numel()


@wrong("flow.loss", "the network is told 1 - t; the state and the time it is told must be of the same moment.")
def _other_time(model, x0, noise, t):
    x, v = _lerp(x0, noise, t)
    return F.mse_loss(model(x, 1 - t), v)


def _clouds() -> list[tuple]:
    g = torch.Generator().manual_seed(11)
    plane = torch.randn(5, 2, generator=g), 0.6, torch.randn(3, 2, generator=g)
    space = torch.randn(2, 4, generator=g) * 1.5, 0.9, torch.randn(4, 4, generator=g)
    return [plane, space, (torch.randn(3, 2, generator=g), 0.35, 0.5 * torch.randn(4, 2, generator=g))]


def _by_bayes(x: Tensor, t: float, points: Tensor) -> Tensor:
    """Each point by itself: its chance by the normal density, and the velocity if it were the one."""
    rows = []
    for one in x.double():
        noises = (one - (1 - t) * points.double()) / t
        chance = torch.distributions.Normal(0, 1).log_prob(noises).sum(-1).softmax(0)
        rows.append((chance[:, None] * (noises - points)).sum(0))
    return torch.stack(rows).float()


@exercise(
    "flow.best",
    minutes=15,
    difficulty=3,
    cases=_clouds,
    against=_by_bayes,
    hints=(
        "If you knew which point the state came from, you would know the velocity. You do not, so average over the "
        "points, each by its chance of being the one.",
        "The state is `(1 - t) * point + t * noise`, so its chance under a point falls as "
        "`exp(-|x - (1 - t) point|**2 / (2 t**2))`; a softmax over the points makes chances of these.",
        "`chance = (-far / (2 * t**2)).softmax(-1)  # [N, K]`, the expected point is `chance @ points`, and the "
        "velocity that leads there is `(x - chance @ points) / t`.",
    ),
)
def best(x: Tensor, t: float, points: Tensor) -> Tensor:
    """The velocity of smallest expected loss when the data are just `points [K, D]`, equally likely.

    `x [N, D]` are states at time `t` in (0, 1]. Gives `[N, D]`: the mean of `noise - point` over all the ways in which
    a state like this can have come about.
    """
    far = torch.cdist(x, (1 - t) * points).square()  # [N, K]
    chance = (-far / (2 * t**2)).softmax(dim=-1)  # [N, K]
    return (x - chance @ points) / t


@wrong("flow.best", "it takes the likeliest point; the smallest squared error is that of the mean over all of them.")
def _likeliest(x, t, points):
    return (x - points[torch.cdist(x, (1 - t) * points).argmin(-1)]) / t


@wrong("flow.best", "the distances are to the points themselves; at time t a point has shrunk to (1 - t) * point.")
def _unshrunk(x, t, points):
    chance = (-torch.cdist(x, points).square() / (2 * t**2)).softmax(-1)
    return (x - chance @ points) / t


@wrong("flow.best", "all points count alike; the ones near the state are likelier to be where it came from.")
def _plain_mean(x, t, points):
    return (x - points.mean(0)) / t


@wrong("flow.best", "the squared distance is divided by 2 t; the noise has spread t, so its variance is t squared.")
def _spread(x, t, points):
    far = torch.cdist(x, (1 - t) * points).square()
    return (x - (-far / (2 * t)).softmax(-1) @ points) / t


def _paths() -> list[tuple]:
    g = torch.Generator().manual_seed(12)
    bent = torch.randn(6, 3, 2, generator=g).cumsum(0)
    return [(bent,), (torch.randn(4, 2, 3, 2, 2, generator=g).cumsum(0),)]


def _by_steps(path: Tensor) -> Tensor:
    pairs = zip(path[:-1], path[1:], strict=True)
    walked = sum(torch.linalg.vector_norm((b - a).reshape(len(a), -1), dim=1) for a, b in pairs)
    return walked / torch.linalg.vector_norm((path[-1] - path[0]).reshape(path.shape[1], -1), dim=1)


@exercise(
    "flow.detour",
    minutes=6,
    difficulty=1,
    cases=_paths,
    against=_by_steps,
    hints=(
        "Walk along the path and add up the lengths of the steps; then compare with the straight way.",
        "`path[1:] - path[:-1]` are the steps; flatten what belongs to one picture before taking the length.",
        "`(path[1:] - path[:-1]).flatten(2).norm(dim=-1).sum(0)` is the way walked, and "
        "`(path[-1] - path[0]).flatten(1).norm(dim=-1)` the straight one.",
    ),
)
def detour(path: Tensor) -> Tensor:
    """How many times as long is a path as the straight line between its ends? `path [N + 1, B, ...]` -> `[B]`.

    The states of a run, step by step, as in `out.trajectory.latents`; one number a picture, 1 being straight.
    """
    walked = (path[1:] - path[:-1]).flatten(2).norm(dim=-1).sum(0)  # [N, B, D] -> [B]
    return walked / (path[-1] - path[0]).flatten(1).norm(dim=-1)


@wrong("flow.detour", "you measured from the last state back to 0; the straight line goes from the first to the last.")
def _from_zero(path):
    return detour(path) * (path[-1] - path[0]).flatten(1).norm(dim=-1) / path[-1].flatten(1).norm(dim=-1)


@wrong("flow.detour", "it is upside down: the way walked over the straight one, so that a detour is above 1.")
def _upside_down(path):
    return 1 / detour(path)


@wrong("flow.detour", "you averaged the steps; the way walked is their sum.")
def _mean_step(path):
    return detour(path) / (len(path) - 1)


@wrong("flow.detour", "the squares of the lengths were added; lengths themselves add up to a way.")
def _squares(path):
    walked = (path[1:] - path[:-1]).flatten(2).square().sum(-1).sum(0)
    return walked / (path[-1] - path[0]).flatten(1).square().sum(-1)
