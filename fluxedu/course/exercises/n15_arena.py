"""Notebook 15: the arena."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.course.exercise import exercise, wrong


def _tables() -> list[tuple]:
    g = torch.Generator().manual_seed(15)
    cases = []
    for models in (3, 5):
        wins = torch.randint(0, 9, (models, models), generator=g) / 2 + 0.5  # ties are half wins
        cases.append((torch.randn(models, generator=g), wins * (1 - torch.eye(models))))
    return cases


def _by_weights(strengths: Tensor, wins: Tensor) -> Tensor:
    """The same vote by vote: i and j share the chance as e^s_i and e^s_j."""
    weight, total = [math.exp(s) for s in strengths.tolist()], 0.0
    for i, row in enumerate(wins.tolist()):
        total += sum(n * math.log(weight[i] / (weight[i] + weight[j])) for j, n in enumerate(row))
    return torch.tensor(total)


@exercise(
    "arena.likelihood",
    minutes=6,
    difficulty=1,
    cases=_tables,
    against=_by_weights,
    hints=(
        "Every vote has a probability under these strengths. Votes are independent, so the probabilities multiply, and "
        "their logarithms add.",
        "`strengths[:, None] - strengths[None, :]` is the table of all differences, row less column, as `wins` has it.",
        "`gaps = strengths[:, None] - strengths[None, :]`, then `(wins * F.logsigmoid(gaps)).sum()`.",
    ),
)
def likelihood(strengths: Tensor, wins: Tensor) -> Tensor:
    """How probable the votes are, as a logarithm: `strengths [M]`, `wins [M, M]` -> a number.

    `wins[i, j]` says how often i was preferred to j; a tie counts half for each. The model of Bradley and Terry:
    i is preferred to j with probability `sigmoid(strengths[i] - strengths[j])`.
    """
    gaps = strengths[:, None] - strengths[None, :]  # [M, M]: s_i - s_j
    return (wins * F.logsigmoid(gaps)).sum()


@wrong("arena.likelihood", "the difference is the wrong way round: `wins[i, j]` are i's wins, so it is s_i - s_j.")
def _turned(strengths, wins):
    return (wins * F.logsigmoid(strengths[None, :] - strengths[:, None])).sum()


@wrong("arena.likelihood", "these are probabilities; before they are added up, take the logarithm.")
def _no_log(strengths, wins):
    return (wins * torch.sigmoid(strengths[:, None] - strengths[None, :])).sum()


@wrong("arena.likelihood", "every pair counts once; it should count as often as it was voted for.")
def _once(strengths, wins):
    return ((wins > 0) * F.logsigmoid(strengths[:, None] - strengths[None, :])).sum()


@wrong("arena.likelihood", "that is a mean over the votes; the likelihood of all of them is the sum.")
def _mean(strengths, wins):
    return likelihood(strengths, wins) / wins.sum()


@wrong("arena.likelihood", "the sign is turned: that is a loss; the likelihood's logarithm is the sum itself.")
def _loss(strengths, wins):
    return -likelihood(strengths, wins)


def _with_an_anchor() -> list[tuple]:
    return [(0.7 * strengths[:-1], wins) for strengths, wins in _tables()]


def _by_autograd(strengths: Tensor, wins: Tensor) -> Tensor:
    """The same from derivatives that torch takes of the likelihood itself."""

    def height(s: Tensor) -> Tensor:
        return likelihood(torch.cat([s, torch.zeros(1, dtype=s.dtype)]), wins.double())

    with torch.enable_grad():
        start = strengths.double()
        slope = torch.autograd.functional.jacobian(height, start)
        bend = torch.autograd.functional.hessian(height, start)
    return (start - torch.linalg.solve(bend, slope)).float()


@exercise(
    "arena.newton",
    minutes=20,
    difficulty=3,
    cases=_with_an_anchor,
    against=_by_autograd,
    hints=(
        "The slope of the likelihood along s_i is a difference that you can say in words: the wins of i, less the wins "
        "that the strengths let expect, `games * p` with `games = wins + wins.T`.",
        "How the slope changes is the information. A vote on i and j adds `p (1 - p)` to places (i, i) and (j, j), and "
        "takes it away from (i, j) and (j, i): `weights.sum(1).diag() - weights`.",
        "`p = sigmoid(all_s[:, None] - all_s)`, `slope = (wins - games * p).sum(1)`, `weights = games * p * (1 - p)`. "
        "Leave the last player out of both, and return `strengths + torch.linalg.solve(information, slope)`.",
    ),
)
def newton(strengths: Tensor, wins: Tensor) -> Tensor:
    """One Newton step up the likelihood: `strengths [M]`, `wins [M + 1, M + 1]` -> the next strengths `[M]`.

    Only differences matter, so somebody must stand still: the table has one player more, its last, whose strength is
    0 and stays 0. The step is the inverse of the information times the slope.
    """
    everyone = torch.cat([strengths, torch.zeros(1)])  # [M + 1]
    p = torch.sigmoid(everyone[:, None] - everyone[None, :])  # [M + 1, M + 1]
    games = wins + wins.T
    slope = (wins - games * p).sum(1)  # [M + 1]: the wins, less those to be expected
    weights = games * p * (1 - p)
    information = weights.sum(1).diag() - weights  # [M + 1, M + 1]
    return strengths + torch.linalg.solve(information[:-1, :-1], slope[:-1])


def _parts(strengths: Tensor, wins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    everyone = torch.cat([strengths, torch.zeros(1)])
    p = torch.sigmoid(everyone[:, None] - everyone[None, :])
    games = wins + wins.T
    return p, games, (wins - games * p).sum(1)[:-1]


def _information(weights: Tensor) -> Tensor:
    return (weights.sum(1).diag() - weights)[:-1, :-1]


@wrong("arena.newton", "that is a step along the slope; Newton's divides by the information, `linalg.solve`.")
def _slope_only(strengths, wins):
    return strengths + _parts(strengths, wins)[2]


@wrong("arena.newton", "only the information's diagonal is used; a vote on i and j is about both at once.")
def _diagonal(strengths, wins):
    p, games, slope = _parts(strengths, wins)
    return strengths + slope / (games * p * (1 - p)).sum(1)[:-1]


@wrong("arena.newton", "the sign is turned, so that it leads down: the information is the Hessian with a minus.")
def _down(strengths, wins):
    return 2 * strengths - newton(strengths, wins)


@wrong("arena.newton", "every game counts alike in your information; one with a sure winner tells less: p (1 - p).")
def _alike(strengths, wins):
    _, games, slope = _parts(strengths, wins)
    return strengths + torch.linalg.solve(_information(games / 4), slope)


@wrong(
    "arena.newton", "your expected wins come from `wins`, which lacks the games that were lost: use `wins + wins.T`."
)
def _won_games(strengths, wins):
    p, games, _ = _parts(strengths, wins)
    slope = (wins - wins * p).sum(1)[:-1]
    return strengths + torch.linalg.solve(_information(games * p * (1 - p)), slope)


@wrong("arena.newton", "the last player, who stands still at 0, is left out; the games against them count too.")
def _nobody_still(strengths, wins):
    wins = wins[:-1, :-1]
    p = torch.sigmoid(strengths[:, None] - strengths[None, :])
    games = wins + wins.T
    weights = games * p * (1 - p)
    information = weights.sum(1).diag() - weights
    return strengths + torch.linalg.pinv(information) @ (wins - games * p).sum(1)


def _draws() -> list[tuple]:
    g = torch.Generator().manual_seed(16)
    shared = torch.randn(1, 401, 1, generator=g)
    made = torch.randn(2, 401, 4, generator=g).exp() * torch.tensor([0.2, 0.5, 1.0, 0.3]) + 2 * shared
    return [(made[0], 0.95), (made[1, :, :3], 0.8)]


def _by_sorting(draws: Tensor, level: float) -> Tensor:
    """The same in base 10, by hand: sort, and go in from both ends."""
    elo = 1000 + 400 * math.log10(math.e) * (draws.double().numpy() - draws.double().numpy().mean(1, keepdims=True))
    rows, edge = np.sort(elo, axis=0), (1 - level) / 2 * (len(elo) - 1)
    low, part = int(edge + 1e-9), edge - int(edge + 1e-9)
    at = lambda k: rows[k]  # noqa: E731
    ends = ((1 - part) * at(low) + part * at(low + 1), (1 - part) * at(-1 - low) + part * at(-2 - low))
    return torch.tensor(np.stack(ends, axis=1)).float()


@exercise(
    "arena.interval",
    minutes=10,
    difficulty=2,
    cases=_draws,
    against=_by_sorting,
    hints=(
        "Three things: only differences mean something, so each draw is measured from its own mean; strengths become "
        "points; and what is cut off is cut off at both ends.",
        "400 points are ten to one, and one unit of strength is e to one: a unit is `400 / log(10)` points. At a level "
        "of 0.95, 0.025 are cut off below and above.",
        "`points = 1000 + 400 / math.log(10) * (draws - draws.mean(1, keepdim=True))`, then `torch.quantile(points, "
        "torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0).T`.",
    ),
)
def interval(draws: Tensor, level: float) -> Tensor:
    """From strengths fitted again and again, `draws [R, M]`, the ends of each model's interval in Elo, `[M, 2]`.

    In each draw the mean of the models is 1000. `level` is the share of the draws that the interval holds.
    """
    points = 1000 + 400 / math.log(10) * (draws - draws.mean(1, keepdim=True))  # [R, M]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2])
    return torch.quantile(points, ends, dim=0).T  # [M, 2]


@wrong("arena.interval", "the mean of each draw is not taken away; what all models share says nothing.")
def _no_mean(draws, level):
    points = 1000 + 400 / math.log(10) * draws
    return torch.quantile(points, torch.tensor([(1 - level) / 2, (1 + level) / 2]), dim=0).T


@wrong(
    "arena.interval", "the mean is taken over the draws, so that every model stands at 1000; take it over the models."
)
def _over_draws(draws, level):
    return _no_mean(draws - draws.mean(0), level)


@wrong("arena.interval", "one mean is taken over everything; every draw is measured from the mean of its own models.")
def _one_mean(draws, level):
    return _no_mean(draws - draws.mean(), level)


@wrong("arena.interval", "the strengths are multiplied by 400; they are in powers of e, Elo in powers of 10.")
def _times_400(draws, level):
    return 1000 + math.log(10) * (interval(draws, level) - 1000)


@wrong("arena.interval", "each end cuts off the whole rest, so that the interval holds too little; halve it.")
def _twice_cut(draws, level):
    return interval(draws, 2 * level - 1)


@wrong("arena.interval", "mean and 1.96 deviations suit a bell; these draws are lopsided, so take their quantiles.")
def _bell(draws, level):
    points = 1000 + 400 / math.log(10) * (draws - draws.mean(1, keepdim=True))
    return torch.stack([points.mean(0) - 1.96 * points.std(0), points.mean(0) + 1.96 * points.std(0)], dim=1)


def _uncertain() -> list[tuple]:
    g, cases = torch.Generator().manual_seed(17), []
    for models, p, i, j in ((3, 0.5, 0, 2), (5, 0.9, 3, 1), (4, 0.2, 1, 0)):
        some = torch.randn(models, models, generator=g)
        cases.append((some @ some.T + 0.3 * torch.eye(models), p, i, j))
    return cases


def _by_inverse(covariance: Tensor, p: float, i: int, j: int) -> float:
    """The same without a formula: add the vote to the information, and invert again."""
    c = covariance.double()
    d = torch.zeros(len(c), dtype=torch.float64)
    d[i], d[j] = 1, -1
    after = torch.linalg.inv(torch.linalg.inv(c) + p * (1 - p) * torch.outer(d, d))
    return float(c.trace() - after.trace())


@exercise(
    "arena.gain",
    minutes=15,
    difficulty=3,
    cases=_uncertain,
    against=_by_inverse,
    tolerance=1e-4,  # the answer is in float32, and the reference inverts twice
    hints=(
        "A vote adds `w d d^T` to the information, with w = p (1 - p), and d is 1 at i, -1 at j, 0 elsewhere. What "
        "that does to the inverse is known without inverting anything, by Sherman and Morrison's formula: "
        "(A + u u^T)^-1 = A^-1 - A^-1 u u^T A^-1 / (1 + u^T A^-1 u).",
        "The covariance loses `w (C d)(C d)^T / (1 + w d^T C d)`. Its trace is what is asked for, and the trace of "
        "`u u^T` is `u @ u`.",
        "`moved = covariance[:, i] - covariance[:, j]`, `along = moved[i] - moved[j]`, and then "
        "`w * moved @ moved / (1 + w * along)`.",
    ),
)
def gain(covariance: Tensor, p: float, i: int, j: int) -> Tensor:
    """How much one more vote on i and j takes from the summed variance of the strengths: a number.

    `covariance [M, M]` is that of the strengths around their mean; `p` is the chance that i is preferred. A vote adds
    `p (1 - p)` of information about the one difference `s_i - s_j`.
    """
    w = p * (1 - p)
    moved = covariance[:, i] - covariance[:, j]  # [M]: C d
    along = moved[i] - moved[j]  # d' C d, the variance of the difference
    return w * moved @ moved / (1 + w * along)


def _of_pair(covariance, p, i, j):
    moved = covariance[:, i] - covariance[:, j]
    return p * (1 - p), moved, moved[i] - moved[j]


@wrong("arena.gain", "that is the variance of the one difference; the vote also tells about all who met these two.")
def _only_difference(covariance, p, i, j):
    w, _, along = _of_pair(covariance, p, i, j)
    return w * along**2 / (1 + w * along)


@wrong("arena.gain", "it is not divided by 1 + w d'Cd, so that a vote could take away more variance than there is.")
def _undivided(covariance, p, i, j):
    w, moved, _ = _of_pair(covariance, p, i, j)
    return w * moved @ moved


@wrong(
    "arena.gain",
    "every vote is taken to tell the same; when the winner is known beforehand it tells little: p (1 - p).",
)
def _certain(covariance, p, i, j):
    return gain(covariance, 0.5, i, j)


@wrong("arena.gain", "d is 1 at both; what a vote compares is a difference, so it is 1 and -1.")
def _sum(covariance, p, i, j):
    w, moved = p * (1 - p), covariance[:, i] + covariance[:, j]
    return w * moved @ moved / (1 + w * (moved[i] + moved[j]))
