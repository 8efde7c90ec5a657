"""Ratings from votes: the Bradley-Terry model by maximum likelihood, on the Elo scale, with intervals.

    rate(["nano", "nano@4"], [("nano", "nano@4", 1.0), ("nano@4", "nano", 0.5)]).table()

The model: ``P(i is preferred to j) = sigmoid(s_i - s_j)`` with one strength ``s`` per model. A tie is half a win each.
The prior is an imaginary model with strength 0, the last row and column of the win table, against which every model has
won one vote and lost one. It keeps a model that never lost finite.

The intervals come from the Bayesian bootstrap (Rubin, 1981): every vote, also those of the prior, is weighted by an
exponential random number instead of being drawn 0, 1, 2, ... times. No vote ever vanishes, so the interval of a model
that never lost is as wide as it should be, where the ordinary bootstrap would give a width of 0.

The next pair to vote on is the one whose vote is expected to reduce the variance of the strengths most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fluxedu.errors import ArenaError, check_integer, check_number, checked, printable

ELO = 400 / np.log(10)  # Elo points per unit of strength
PRIOR = 1.0  # votes won and lost against the model at 0; with fewer, intervals from few votes are too narrow
MAX_STEP = 2.0  # units of strength; a full Newton step may overshoot if one side hardly ever wins
TIE_TOLERANCE = 1e-9  # variance reductions that differ by less than this share of the largest count as equal

Vote = tuple[str, str, float] | tuple[str, str, float, int]  # two models, the first's share, the number of votes


# ---------------------------------------------------------------- counting votes


def tally(names: Sequence[str], votes: Iterable[Vote]) -> np.ndarray:
    """Votes as rows (i, j, share of i, number of such votes), ``[C, 4]``."""
    index, counts = {name: i for i, name in enumerate(names)}, {}
    for a, b, share, *number in votes:
        if a not in index or b not in index or a == b or share not in (0, 0.5, 1) or any(n < 1 for n in number):
            raise ArenaError(
                f"a vote needs two different models of {', '.join(names)} and a share of 1, 0.5 or 0, "
                f"not ({a!r}, {b!r}, {share!r})."
            )
        key = (index[a], index[b], share)
        counts[key] = counts.get(key, 0) + (number[0] if number else 1)
    return np.array([(*key, n) for key, n in counts.items()], float).reshape(-1, 4)


def win_matrix(rows: np.ndarray, m: int) -> np.ndarray:
    """Wins ``[M, M]``, of the row's model over the column's, from the rows of :func:`tally`."""
    wins = np.zeros((m, m))
    for i, j, share, n in rows:
        wins[int(i), int(j)] += share * n
        wins[int(j), int(i)] += (1 - share) * n
    return wins


def add_prior(wins: np.ndarray, prior: float | np.ndarray = PRIOR) -> np.ndarray:
    """Wins ``[..., M, M]`` with the prior's model at 0 as the last row and column, ``[..., M+1, M+1]``.

    ``prior``: the votes that each model won and lost against it; ``[..., M, 2]`` if these differ.
    """
    m = wins.shape[-1]
    table = np.zeros((*wins.shape[:-2], m + 1, m + 1))
    table[..., :m, :m] = wins
    table[..., :m, m], table[..., m, :m] = (prior, prior) if np.isscalar(prior) else (prior[..., 0], prior[..., 1])
    return table


# ---------------------------------------------------------------- the fit


def win_probabilities(strengths: np.ndarray) -> np.ndarray:
    """``P(i is preferred to j)``, ``[..., M+1, M+1]``, from strengths ``[..., M]``; the last model is the prior's."""
    s = np.concatenate([strengths, np.zeros((*strengths.shape[:-1], 1))], -1)
    return 0.5 + 0.5 * np.tanh((s[..., :, None] - s[..., None, :]) / 2)  # the sigmoid, without overflow


def fisher_information(table: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """The Fisher information ``[..., M, M]`` about the strengths, from a table of :func:`add_prior`.

    A vote on i and j contributes ``p (1 - p)`` about ``s_i - s_j``: most for equal models, little if one surely wins.
    """
    p = win_probabilities(strengths)
    weights = (table + table.swapaxes(-1, -2)) * p * (1 - p)  # [..., M+1, M+1]
    m = strengths.shape[-1]
    return (np.eye(m + 1) * weights.sum(-1)[..., None] - weights)[..., :m, :m]


def newton_step(table: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """A Newton step ``[..., M]`` on the log likelihood ``sum_ij table_ij log sigmoid(s_i - s_j)``, which is concave."""
    games = table + table.swapaxes(-1, -2)
    gradient = (table - games * win_probabilities(strengths)).sum(-1)[..., :-1]  # wins minus expected wins
    step = np.linalg.solve(fisher_information(table, strengths), gradient[..., None])[..., 0]
    return np.clip(step, -MAX_STEP, MAX_STEP)


def fit(table: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """The most likely strengths ``[..., M]`` for a table ``[..., M+1, M+1]`` of :func:`add_prior`."""
    strengths = np.zeros((*table.shape[:-2], table.shape[-1] - 1)) if start is None else start.copy()
    for _ in range(100):
        step = newton_step(table, strengths)
        strengths += step
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    return strengths


def bootstrap_tables(rows: np.ndarray, m: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """Tables ``[rounds, M+1, M+1]`` with random weights, from the rows of :func:`tally`.

    Every vote has an exponential weight, so ``n`` equal votes together have a gamma weight of shape ``n``.
    """
    i, j = rows[:, 0].astype(int), rows[:, 1].astype(int)
    weights = rng.gamma(rows[:, 3], size=(rounds, len(rows)))
    wins = np.zeros((rounds, m, m))
    np.add.at(wins, (slice(None), i, j), weights * rows[:, 2])
    np.add.at(wins, (slice(None), j, i), weights * (1 - rows[:, 2]))
    return add_prior(wins, np.maximum(rng.gamma(PRIOR, size=(rounds, m, 2)), 1e-6))


# ---------------------------------------------------------------- ratings


@dataclass(frozen=True)
class Ratings:
    """Elo of each model (``[M]``, mean 1000), the ends of its interval, and the number of its votes.

    ``total``: the number of all votes, each on two models.
    """

    names: tuple[str, ...]
    elo: np.ndarray
    low: np.ndarray
    high: np.ndarray
    votes: np.ndarray
    total: int
    level: float = 0.95

    @property
    def order(self) -> list[int]:
        """The indices of the models, the strongest first."""
        return [int(i) for i in np.argsort(-self.elo, kind="stable")]

    def rows(self) -> dict[str, dict[str, float]]:
        """Elo, low, high and votes of each model by name, the strongest first."""
        rows = {}
        for i in self.order:
            elo, low, high = (round(float(values[i]), 1) for values in (self.elo, self.low, self.high))
            rows[self.names[i]] = {"elo": elo, "low": low, "high": high, "votes": int(self.votes[i])}
        return rows

    def table(self) -> str:
        """The ratings as text."""
        width = max(len(printable(name)) for name in (*self.names, "model"))
        lines = [f"{'model':<{width}}   Elo   {self.level:.0%} interval   votes"]
        for name, row in self.rows().items():
            interval = f"{row['low']:.0f} to {row['high']:.0f}"
            lines.append(f"{printable(name):<{width}}  {row['elo']:4.0f}   {interval:>12}   {row['votes']:>5}")
        lines.append(f"{self.total} votes. A model with 100 Elo more is preferred in 64 of 100 pairs.")
        return "\n".join(lines)


@checked(ArenaError)
def rate(
    names: str | Sequence[str], votes: Sequence[Vote], *, level: float = 0.95, rounds: int = 1000, seed: int = 0
) -> Ratings:
    """Elo with intervals from ``votes`` (model, model, share of the first), by ``rounds`` rounds of the bootstrap."""
    if len(set(names)) < max(len(names), 2):
        raise ArenaError(f"ratings need at least two models with different names, not {', '.join(names) or 'none'}.")
    check_number("level", level, 0, 1, error=ArenaError)
    check_integer("rounds", rounds, 1, 100_000, error=ArenaError)
    check_integer("seed", seed, 0, 2**63 - 1, error=ArenaError)
    rows, m = tally(names, votes), len(names)
    wins = win_matrix(rows, m)
    best = fit(add_prior(wins))
    samples = fit(bootstrap_tables(rows, m, rounds, np.random.default_rng(seed)), np.tile(best, (rounds, 1)))
    samples -= samples.mean(-1, keepdims=True)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    elo, low, high = (1000 + ELO * s for s in (best - best.mean(), low, high))
    games = (wins + wins.T).sum(-1).round().astype(int)
    return Ratings(tuple(names), elo, low, high, games, int(rows[:, 3].sum()), level)


# ---------------------------------------------------------------- which pair to ask about next


def variance_reduction(wins: np.ndarray, pending: np.ndarray | None = None) -> np.ndarray:
    """How much one more vote on each pair reduces the summed variance of the strengths, ``[M, M]``.

    With the covariance ``C``, ``d = e_i - e_j`` and ``w = p (1 - p)``, a vote adds ``w d d'`` to the information and so
    reduces the variance by ``w |C d|^2 / (1 + w d' C d)`` (Sherman-Morrison).

    Votes in ``pending [M, M]``, which are being given now, count as if they were known, so that many voters at the same
    time do not all get the same pair.
    """
    m = len(wins)
    table = add_prior(wins)
    strengths = fit(table)
    if pending is not None:
        table[:m, :m] += pending
    covariance = np.linalg.inv(fisher_information(table, strengths))
    covariance -= covariance.mean(0)  # the mean of Elo is fixed, so only differences from the mean have a variance
    p = win_probabilities(strengths)[:m, :m]
    change = covariance[:, :, None] - covariance[:, None, :]  # [M, i, j]: C d
    projection = np.einsum("iij->ij", change) - np.einsum("jij->ij", change)  # d' C d
    weight = p * (1 - p)
    return weight * (change**2).sum(0) / (1 + weight * projection)


def rank_pairs(wins: np.ndarray, rng: np.random.Generator, pending: np.ndarray | None = None) -> list[tuple[int, int]]:
    """All pairs, the most informative first; equal ones are in random order, and so are the sides of each pair."""
    i, j = np.triu_indices(len(wins), 1)
    reduction = variance_reduction(wins, pending)[i, j]
    rounded = np.round(reduction / max(reduction.max(), 1e-300) / TIE_TOLERANCE)
    order = np.lexsort((rng.random(len(reduction)), -rounded))
    swapped = rng.random(len(reduction)) >= 0.5
    return [(int(j[k]), int(i[k])) if swapped[k] else (int(i[k]), int(j[k])) for k in order]
