"""Notebook 15b: how sure are we?"""

import math

import numpy as np
import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes


def _draws() -> list[tuple]:
    g = torch.Generator().manual_seed(16)
    shared = torch.randn(1, 401, 1, generator=g)
    draws = torch.randn(2, 401, 4, generator=g).exp() * torch.tensor([0.2, 0.5, 1.0, 0.3]) + 2 * shared
    return [(draws[0], 0.95), (draws[1, :, :3], 0.8)]


def _by_sorting(draws: Tensor, level: float) -> Tensor:
    """The reference: powers of 10, and quantiles by sorting and linear interpolation."""
    elo = 1000 + 400 * math.log10(math.e) * (draws.double().numpy() - draws.double().numpy().mean(1, keepdims=True))
    ordered, cut = np.sort(elo, axis=0), (1 - level) / 2 * (len(elo) - 1)
    k, rest = int(cut + 1e-9), cut - int(cut + 1e-9)
    low = (1 - rest) * ordered[k] + rest * ordered[k + 1]
    high = (1 - rest) * ordered[-1 - k] + rest * ordered[-2 - k]
    return torch.tensor(np.stack([low, high], axis=1)).float()


@exercise(
    "arena.interval",
    minutes=8,
    gradient=False,  # NumPy will do as well
    difficulty=2,
    cases=_draws,
    against=_by_sorting,
    hints=(
        "Three steps: subtract the mean of each draw, since only differences matter; convert strengths to Elo points; "
        "take a quantile at each end.",
        "400 points mean odds of ten to one, and one unit of strength means e to one, so a unit is `400 / log(10)` "
        "points. For a level of 0.95, 0.025 is cut off at each end.",
        "`points = 1000 + 400 / math.log(10) * (draws - draws.mean(1, keepdim=True))`, then `torch.quantile(points, "
        "torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0).T`.",
    ),
)
def interval(draws: Tensor, level: float) -> Tensor:
    """The ends of each model's interval in Elo, `[M, 2]`, from `draws [R, M]`: strengths fitted to R resampled votes.

    Shift each draw so that the mean of its models is 1000. `level` is the fraction of draws inside the interval.
    """
    points = 1000 + 400 / math.log(10) * (draws - draws.mean(1, keepdim=True))  # [R, M]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2])
    return torch.quantile(points, ends, dim=0).T  # [M, 2]


@mistakes(
    "arena.interval",
    ("no mean", "the mean of each draw is not subtracted; a constant that all models share has no meaning."),
    ("mean of draws", "you take the mean over the draws, so every model is at 1000; take it over the models."),
    ("one mean", "you subtract one mean of everything; each draw has its own mean over the models."),
    ("times 400", "you multiply strengths by 400; strengths are powers of e, Elo points powers of 10."),
    ("cut twice", "each end cuts off all of 1 - level, so the interval is too narrow; cut off half at each end."),
    (
        "normal",
        "mean and 1.96 standard deviations suit a normal distribution; these draws are skewed, so use their quantiles.",
    ),
)
def _interval_with(mistake, draws, level):
    mean = draws.mean(1, keepdim=True)
    if mistake == "no mean":
        mean = 0
    if mistake == "mean of draws":
        mean = draws.mean(0)
    if mistake == "one mean":
        mean = draws.mean()
    points = 1000 + (400 if mistake == "times 400" else 400 / math.log(10)) * (draws - mean)
    if mistake == "normal":
        return torch.stack([points.mean(0) - 1.96 * points.std(0), points.mean(0) + 1.96 * points.std(0)], dim=1)
    cut = 1 - level if mistake == "cut twice" else (1 - level) / 2
    return torch.quantile(points, torch.tensor([cut, 1 - cut]), dim=0).T


def _covariances() -> list[tuple]:
    g, cases = torch.Generator().manual_seed(17), []
    for models, p, i, j in ((3, 0.5, 0, 2), (5, 0.9, 3, 1), (4, 0.2, 1, 0)):
        root = torch.randn(models, models, generator=g)
        centre = torch.eye(models) - 1 / models  # subtracts the mean, as in the notebook
        cases.append((centre @ (root @ root.T + 0.3 * torch.eye(models)) @ centre, p, i, j))
    return cases


def _by_inverse(covariance: Tensor, p: float, i: int, j: int) -> float:
    """The reference, without a formula: add the vote to the information, and (pseudo-)invert again."""
    c = covariance.double()
    d = torch.zeros(len(c), dtype=torch.float64)
    d[i], d[j] = 1, -1
    information = torch.linalg.pinv(c, rtol=1e-5, hermitian=True) + p * (1 - p) * torch.outer(d, d)
    return float(c.trace() - torch.linalg.pinv(information, rtol=1e-5, hermitian=True).trace())


@exercise(
    "arena.gain",
    minutes=10,
    gradient=False,  # NumPy will do as well
    difficulty=3,
    cases=_covariances,
    against=_by_inverse,
    tolerance=1e-4,  # the answer is in float32, and the reference inverts twice
    hints=(
        "A vote adds `w d d^T` to the information, with w = p (1 - p), where d is 1 at i, -1 at j and 0 elsewhere. The "
        "Sherman-Morrison formula gives the new inverse without inverting anything: "
        "(A + u u^T)^-1 = A^-1 - A^-1 u u^T A^-1 / (1 + u^T A^-1 u).",
        "The covariance decreases by `w (C d)(C d)^T / (1 + w d^T C d)`. Return the trace of this; the trace of "
        "`u u^T` is `u @ u`.",
        "`c_d = covariance[:, i] - covariance[:, j]`, `d_c_d = c_d[i] - c_d[j]`, and then "
        "`w * c_d @ c_d / (1 + w * d_c_d)`.",
    ),
)
def gain(covariance: Tensor, p: float, i: int, j: int) -> Tensor:
    """By how much one more vote on i and j reduces the summed variance of the strengths: one number.

    `covariance [M, M]` is the covariance of the strengths around their mean: symmetric, and without an inverse, since
    its rows sum to 0. `p` is the probability that i is preferred. A vote adds the information `p (1 - p)` about the
    difference `s_i - s_j`.
    """
    w = p * (1 - p)
    c_d = covariance[:, i] - covariance[:, j]  # [M]: C d
    d_c_d = c_d[i] - c_d[j]  # d^T C d, the variance of the difference
    return w * c_d @ c_d / (1 + w * d_c_d)


@mistakes(
    "arena.gain",
    (
        "one difference",
        "that is the variance of one difference; a vote also informs about the models that were compared with i or j.",
    ),
    ("undivided", "the division by 1 + w d^T C d is missing, so a vote could remove more variance than there is."),
    ("certain", "every vote counts the same in your answer; a predictable one adds less information, p (1 - p)."),
    ("sum", "your d is 1 at both models; a vote compares a difference, so it is 1 and -1."),
)
def _gain_with(mistake, covariance, p, i, j):
    w = 1 / 4 if mistake == "certain" else p * (1 - p)
    sign = 1 if mistake == "sum" else -1
    c_d = covariance[:, i] + sign * covariance[:, j]
    d_c_d = c_d[i] + sign * c_d[j]
    if mistake == "one difference":
        return w * d_c_d**2 / (1 + w * d_c_d)
    return w * c_d @ c_d / (1 if mistake == "undivided" else 1 + w * d_c_d)
