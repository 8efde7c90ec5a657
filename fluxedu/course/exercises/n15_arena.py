"""Notebook 15: ratings from votes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes


def _comparisons() -> list[tuple]:
    games = [(1000.0, 1000.0, 1.0), (1200.0, 900.0, 0.0), (1200.0, 900.0, 1.0), (850.0, 1100.0, 0.5)]
    return [*games, (900.0, 950.0, 1.0, 16.0)]


def _by_strengths(a: float, b: float, score: float, k: float = 32.0) -> tuple[float, float]:
    """The reference, with strengths instead of ratings: a is preferred with probability s_a / (s_a + s_b)."""
    s_a, s_b = math.pow(10, a / 400), math.pow(10, b / 400)
    gain = k * (score - s_a / (s_a + s_b))
    return a + gain, b - gain


@exercise(
    "arena.elo",
    minutes=6,
    difficulty=2,
    cases=_comparisons,
    against=_by_strengths,
    tolerance=1e-6,
    hints=(
        "Ratings move in proportion to the surprise: the actual score minus the expected score.",
        "The expected score of a against b is 1 / (1 + 10^((b - a) / 400)): 0.5 for equal ratings, more if a is "
        "ahead. What one side gains, the other loses.",
        "`expected = 1 / (1 + 10 ** ((b - a) / 400))`, `gain = k * (score - expected)`, `return a + gain, b - gain`.",
    ),
)
def elo(a: float, b: float, score: float, k: float = 32.0) -> tuple[float, float]:
    """The new ratings of a and b after one comparison: `score` is 1.0 if a was preferred, 0.0 if b, 0.5 for a tie.

    400 points more mean odds of 10 to 1. At most `k` points move from one side to the other.
    """
    expected = 1 / (1 + 10 ** ((b - a) / 400))
    gain = k * (score - expected)
    return a + gain, b - gain


@mistakes(
    "arena.elo",
    ("expected of b", "your expected score is that of b: if a is ahead, it must be above a half."),
    ("base e", "your expected score uses powers of e; Elo uses powers of 10, so that 400 points mean ten to one."),
    ("same direction", "the rating of b moves in the same direction as that of a; what one gains the other loses."),
    ("fixed k", "k is 32 in your answer, whatever is passed in; use the argument."),
    ("no expectation", "every win counts the same; a surprising result should move the ratings more."),
)
def _elo_with(mistake, a, b, score, k=32.0):
    gap = a - b if mistake == "expected of b" else b - a
    expected = 1 / (1 + (math.e if mistake == "base e" else 10) ** (gap / 400))
    if mistake == "no expectation":
        expected = 0.5
    gain = (32 if mistake == "fixed k" else k) * (score - expected)
    return a + gain, b + gain if mistake == "same direction" else b - gain


def _win_tables() -> list[tuple]:
    g = torch.Generator().manual_seed(15)
    cases = []
    for models in (3, 5):
        wins = torch.randint(0, 9, (models, models), generator=g) / 2 + 0.5  # ties are half wins
        cases.append((torch.randn(models, generator=g), wins * (1 - torch.eye(models))))
    return cases


def _pair_by_pair(strengths: Tensor, wins: Tensor) -> Tensor:
    """The reference: i is preferred to j with probability e^s_i / (e^s_i + e^s_j); add up the logarithms."""
    weight, total = [math.exp(s) for s in strengths.tolist()], 0.0
    for i, row in enumerate(wins.tolist()):
        total += sum(n * math.log(weight[i] / (weight[i] + weight[j])) for j, n in enumerate(row))
    return torch.tensor(total)


@exercise(
    "arena.likelihood",
    minutes=5,
    gradient=False,  # NumPy will do as well
    difficulty=1,
    cases=_win_tables,
    against=_pair_by_pair,
    hints=(
        "Every vote has a probability under these strengths. Votes are independent, so their probabilities multiply "
        "and the logarithms add up.",
        "`strengths[:, None] - strengths[None, :]` is the table of all differences, row minus column, like `wins`.",
        "`gaps = strengths[:, None] - strengths[None, :]`, then `(wins * F.logsigmoid(gaps)).sum()`.",
    ),
)
def likelihood(strengths: Tensor, wins: Tensor) -> Tensor:
    """The log-likelihood of the votes in the Bradley-Terry model: `strengths [M]`, `wins [M, M]` -> one number.

    `wins[i, j]` is how often i was preferred to j; a tie counts as half a win for each. In this model, i is preferred
    to j with probability `sigmoid(strengths[i] - strengths[j])`.
    """
    gaps = strengths[:, None] - strengths[None, :]  # [M, M]: s_i - s_j
    return (wins * F.logsigmoid(gaps)).sum()


@mistakes(
    "arena.likelihood",
    ("transposed", "the difference has the wrong sign: `wins[i, j]` are wins of i, so it is s_i - s_j."),
    ("no log", "you add up probabilities; take their logarithms first."),
    ("once", "each pair counts once in your sum; multiply by the number of its votes."),
    ("mean", "you return the mean over the votes; the log-likelihood is the sum."),
    ("loss", "the sign is wrong: you return a loss; the log-likelihood is the sum itself."),
)
def _likelihood_with(mistake, strengths, wins):
    gaps = strengths[:, None] - strengths[None, :]
    if mistake == "transposed":
        gaps = -gaps
    counts = (wins > 0).float() if mistake == "once" else wins
    total = (counts * (torch.sigmoid(gaps) if mistake == "no log" else F.logsigmoid(gaps))).sum()
    if mistake == "mean":
        total = total / wins.sum()
    return -total if mistake == "loss" else total


def _tables_in_doubles() -> list[tuple]:
    return [(strengths.double(), wins.double()) for strengths, wins in _win_tables()]


def _by_differentiation(strengths: Tensor, wins: Tensor) -> Tensor:
    """The reference: automatic differentiation of the log-likelihood."""
    with torch.enable_grad():
        return torch.autograd.functional.jacobian(lambda s: likelihood(s, wins), strengths)


@exercise(
    "arena.gradient",
    minutes=4,
    gradient=False,  # NumPy will do as well
    difficulty=1,
    cases=_tables_in_doubles,
    against=_by_differentiation,
    hints=(
        "Per model: the number of wins, minus the number that the strengths predict for its games.",
        "`games = wins + wins.T` counts the votes of each pair; model i is expected to win `games[i, j] * p[i, j]` of "
        "them, with `p = sigmoid(s_i - s_j)`.",
        "`p = torch.sigmoid(strengths[:, None] - strengths[None, :])`, then `(wins - (wins + wins.T) * p).sum(1)`.",
    ),
)
def gradient(strengths: Tensor, wins: Tensor) -> Tensor:
    """The gradient of the log-likelihood by the strengths: `strengths [M]`, `wins [M, M]` -> `[M]`.

    For each model this is the number of its wins minus the expected number of wins.
    """
    p = torch.sigmoid(strengths[:, None] - strengths[None, :])  # [M, M]: P(i is preferred to j)
    games = wins + wins.T
    return (wins - games * p).sum(1)


@mistakes(
    "arena.gradient",
    ("sign", "the sign is wrong: it is actual wins minus expected wins."),
    ("won games", "your expected wins come from `wins`, which lacks the lost games: use `wins + wins.T`."),
    ("p of j", "your p is the probability that j is preferred to i; it is sigmoid(s_i - s_j)."),
    ("halves", "you expect half of the games to be won, whatever the strengths are."),
    ("mean", "you take the mean over the opponents; it is the sum."),
)
def _gradient_with(mistake, strengths, wins):
    p = torch.sigmoid(strengths[:, None] - strengths[None, :])
    if mistake == "p of j":
        p = p.T
    if mistake == "halves":
        p = torch.full_like(p, 0.5)
    surprise = wins - (wins if mistake == "won games" else wins + wins.T) * p
    if mistake == "mean":
        return surprise.mean(1)
    return -surprise.sum(1) if mistake == "sign" else surprise.sum(1)


def _by_second_differentiation(strengths: Tensor, wins: Tensor) -> Tensor:
    """The reference: minus the Hessian of the log-likelihood, from automatic differentiation."""
    with torch.enable_grad():
        return -torch.autograd.functional.hessian(lambda s: likelihood(s, wins), strengths)


@exercise(
    "arena.information",
    minutes=7,
    gradient=False,  # NumPy will do as well
    difficulty=2,
    cases=_tables_in_doubles,
    against=_by_second_differentiation,
    hints=(
        "First the matrix of the weights n_ij p_ij (1 - p_ij). Off the diagonal, the information is minus this matrix.",
        "On the diagonal stand the sums of its rows. `x.diag()` makes a diagonal matrix of a vector x.",
        "`weights = (wins + wins.T) * p * (1 - p)`, then `weights.sum(1).diag() - weights`.",
    ),
)
def information(strengths: Tensor, wins: Tensor) -> Tensor:
    """The information matrix, minus the second derivatives of the log-likelihood: -> `[M, M]`.

    `strengths [M]`, `wins [M, M]`. A vote on i and j adds `p (1 - p)` to the entries (i, i) and (j, j), and subtracts
    it from (i, j) and (j, i).
    """
    p = torch.sigmoid(strengths[:, None] - strengths[None, :])  # [M, M]
    weights = (wins + wins.T) * p * (1 - p)  # [M, M], 0 on the diagonal
    return weights.sum(1).diag() - weights


@mistakes(
    "arena.information",
    ("Hessian", "that is the matrix of second derivatives; the information is minus this matrix."),
    ("diagonal", "you return only the diagonal; a vote on i and j is about both strengths at once."),
    ("equal weights", "all games have the same weight; a predictable game has less, p (1 - p)."),
    ("won games", "you count `wins` only; each vote on a pair adds information, whoever won it."),
    ("plus", "the entries off the diagonal have the wrong sign; only the difference of two strengths matters."),
    ("p", "your weights are n p; the derivative of the sigmoid is p (1 - p)."),
)
def _information_with(mistake, strengths, wins):
    p = torch.sigmoid(strengths[:, None] - strengths[None, :])
    weights = (wins if mistake == "won games" else wins + wins.T) * p * (1 if mistake == "p" else 1 - p)
    if mistake == "equal weights":
        weights = (wins + wins.T) / 4
    diagonal = weights.sum(1).diag()
    if mistake == "diagonal":
        return diagonal
    found = diagonal + weights if mistake == "plus" else diagonal - weights
    return -found if mistake == "Hessian" else found


def _newton_inputs() -> list[tuple]:
    cases = []
    for strengths, wins in _tables_in_doubles():
        strengths = torch.cat([0.7 * strengths[:-1], torch.zeros(1, dtype=torch.float64)])
        cases.append((strengths, gradient(strengths, wins), information(strengths, wins)))
    return cases


def _by_inverse(strengths: Tensor, gradient: Tensor, information: Tensor) -> Tensor:
    """The reference: the inverse of the matrix without its last row and column."""
    step = torch.linalg.inv(information[:-1, :-1]) @ gradient[:-1]
    return strengths + torch.cat([step, torch.zeros(1, dtype=step.dtype)])


@exercise(
    "arena.newton",
    minutes=6,
    gradient=False,  # NumPy will do as well
    difficulty=2,
    cases=_newton_inputs,
    against=_by_inverse,
    hints=(
        "All strengths could rise by the same number without any effect, so the whole matrix has no inverse. Leave the "
        "last model out of the matrix and of the gradient.",
        "`torch.linalg.solve(information[:-1, :-1], gradient[:-1])` is the step of all models but the last.",
        "`step = torch.linalg.solve(information[:-1, :-1], gradient[:-1])`, then "
        "`strengths + F.pad(step, (0, 1))`, which adds a 0 for the last model.",
    ),
)
def newton(strengths: Tensor, gradient: Tensor, information: Tensor) -> Tensor:
    """One step of Newton's method: `strengths [M]`, `gradient [M]`, `information [M, M]` -> new strengths `[M]`.

    The strength of the last model is 0 and stays 0. The step of the others is the inverse of their information matrix
    times their gradient.
    """
    step = torch.linalg.solve(information[:-1, :-1], gradient[:-1])  # [M - 1]
    return strengths + F.pad(step, (0, 1))


@mistakes(
    "arena.newton",
    ("gradient", "you step along the gradient; Newton's step solves with the information matrix, `linalg.solve`."),
    ("diagonal", "you use only the diagonal of the information; the strengths depend on each other."),
    ("sign", "the sign is wrong, so the likelihood falls: the information is minus the Hessian."),
    ("all", "the last model moves too; solve for the others only."),
    ("times", "you multiply by the information; multiply by its inverse."),
    ("step only", "you return the step; add it to the strengths."),
)
def _newton_with(mistake, strengths, gradient, information):
    some, g = information[:-1, :-1], gradient[:-1]
    if mistake == "all":
        return strengths + torch.linalg.pinv(information) @ gradient
    step = {"gradient": g, "diagonal": g / some.diag(), "times": some @ g}.get(mistake, torch.linalg.solve(some, g))
    step = F.pad(step, (0, 1))
    if mistake == "step only":
        return step
    return strengths - step if mistake == "sign" else strengths + step
