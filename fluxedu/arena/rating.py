"""Strengths from votes: Bradley and Terry's model by maximum likelihood, on the Elo scale, with intervals.

    rated(["nano", "nano@4"], [("nano", "nano@4", 1.0), ("nano@4", "nano", 0.5)]).table()

The model: ``P(i is preferred to j) = sigmoid(s_i - s_j)``; a tie is half a win for each. One more player, the last
of the table, stands at 0 and belongs to the prior: everyone has won a game against it and lost one, so that whoever
never lost stays finite.

The interval is the Bayesian bootstrap's (Rubin, 1981): every vote, and every game of the prior, is weighed anew by
an exponential number instead of being drawn 0, 1, 2, ... times. No vote ever vanishes, so a model that never lost
has an honest, wide interval, where the plain bootstrap would give one of no width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fluxedu.errors import ArenaError

ELO = 400 / np.log(10)  # Elo points in one unit of strength
PRIOR = 1.0  # games won, and as many lost, against the player at 0; less, and few votes give too narrow intervals
LONGEST = 2.0  # units of strength in one step: Newton's own may overshoot where one side hardly ever wins

Vote = tuple[str, str, float]  # two models, and the share of the win that the first had: 1, 0.5 or 0


# ---------------------------------------------------------------- the fit


def with_prior(wins: np.ndarray, prior: float | np.ndarray = PRIOR) -> np.ndarray:
    """Wins ``[..., M, M]`` (row over column) with the player at 0 as the last row and column.

    ``prior``: games that each of ``M`` won against it and lost to it; ``[..., M, 2]`` if these differ.
    """
    m = wins.shape[-1]
    table = np.zeros((*wins.shape[:-2], m + 1, m + 1))
    table[..., :m, :m] = wins
    table[..., :m, m], table[..., m, :m] = (prior, prior) if np.isscalar(prior) else (prior[..., 0], prior[..., 1])
    return table


def information(table: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Fisher information ``[..., M, M]`` about the strengths ``[..., M]``, of a table with the player at 0.

    A vote on i and j tells ``p (1 - p)`` about ``s_i - s_j``: most when they are equal, little when one surely wins.
    """
    p = chances(strengths)
    weights = (table + table.swapaxes(-1, -2)) * p * (1 - p)  # [..., M+1, M+1]
    m = strengths.shape[-1]
    return (np.eye(m + 1) * weights.sum(-1)[..., None] - weights)[..., :m, :m]


def chances(strengths: np.ndarray) -> np.ndarray:
    """``P(i is preferred to j)`` as ``[..., M+1, M+1]`` from strengths ``[..., M]``, the player at 0 being the last."""
    s = np.concatenate([strengths, np.zeros((*strengths.shape[:-1], 1))], -1)
    return 0.5 + 0.5 * np.tanh((s[..., :, None] - s[..., None, :]) / 2)  # sigmoid, and no overflow


def newton_step(table: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """One step ``[..., M]`` up the log likelihood ``sum_ij table_ij log sigmoid(s_i - s_j)``, which has one top."""
    games = table + table.swapaxes(-1, -2)
    slope = (table - games * chances(strengths)).sum(-1)[..., :-1]  # wins, less the wins to be expected
    step = np.linalg.solve(information(table, strengths), slope[..., None])[..., 0]
    return np.clip(step, -LONGEST, LONGEST)


def fit(table: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """The likeliest strengths ``[..., M]`` for a table ``[..., M+1, M+1]`` of :func:`with_prior`."""
    strengths = np.zeros((*table.shape[:-2], table.shape[-1] - 1)) if start is None else start.copy()
    for _ in range(100):
        step = newton_step(table, strengths)
        strengths += step
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    return strengths


def resampled(cells: np.ndarray, m: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """Tables ``[rounds, M+1, M+1]`` in which every vote counts as often as an exponential number says.

    ``cells [C, 4]``: the rows (i, j, share of i, votes). ``n`` votes alike weigh a gamma number of shape ``n``.
    """
    i, j = cells[:, 0].astype(int), cells[:, 1].astype(int)
    weights = rng.gamma(cells[:, 3], size=(rounds, len(cells)))
    wins = np.zeros((rounds, m, m))
    np.add.at(wins, (slice(None), i, j), weights * cells[:, 2])
    np.add.at(wins, (slice(None), j, i), weights * (1 - cells[:, 2]))
    return with_prior(wins, np.maximum(rng.gamma(PRIOR, size=(rounds, m, 2)), 1e-6))


# ---------------------------------------------------------------- the result


@dataclass(frozen=True)
class Ratings:
    """Elo of each model (``[M]``, mean 1000), the ends of its interval, the votes that it took part in.

    ``total``: votes in all, each of them about two models.
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
        """Places of the models, the strongest first."""
        return [int(i) for i in np.argsort(-self.elo, kind="stable")]

    def rows(self) -> dict[str, dict[str, float]]:
        """name -> elo, low, high, votes; the strongest first."""
        keys = ("elo", "low", "high")
        told = {self.names[i]: {key: round(float(getattr(self, key)[i]), 1) for key in keys} for i in self.order}
        return {name: row | {"votes": int(self.votes[self.names.index(name)])} for name, row in told.items()}

    def table(self) -> str:
        """The figures as text."""
        wide = max(map(len, (*self.names, "model")))
        lines = [f"{'model':<{wide}}   Elo   {self.level:.0%} interval   votes"]
        for name, row in self.rows().items():
            ends = f"{row['low']:.0f} to {row['high']:.0f}"
            lines.append(f"{name:<{wide}}  {row['elo']:4.0f}   {ends:>12}   {row['votes']:>5}")
        return "\n".join([*lines, f"{self.total} votes; 100 Elo more is preferred in 64 of 100 pairs."])


def cells_of(names: Sequence[str], votes: Iterable[Vote | tuple[str, str, float, int]]) -> np.ndarray:
    """Votes as rows (i, j, share of i, votes alike), ``[C, 4]``; a vote may say itself how many are like it."""
    place, counts = {name: i for i, name in enumerate(names)}, {}
    for a, b, share, *count in votes:
        if a not in place or b not in place or a == b or share not in (0, 0.5, 1):
            raise ArenaError(f"a vote is on two of {', '.join(names)} and 1, 0.5 or 0, not ({a!r}, {b!r}, {share!r}).")
        key = (place[a], place[b], share)
        counts[key] = counts.get(key, 0) + (count[0] if count else 1)
    return np.array([(*key, n) for key, n in counts.items()], float).reshape(-1, 4)


def wins_of(cells: np.ndarray, m: int) -> np.ndarray:
    """Wins ``[M, M]``, row over column, from rows (i, j, share of i, votes)."""
    wins = np.zeros((m, m))
    for i, j, share, n in cells:
        wins[int(i), int(j)] += share * n
        wins[int(j), int(i)] += (1 - share) * n
    return wins


def rated(
    names: Sequence[str], votes: Iterable[Vote], *, level: float = 0.95, rounds: int = 1000, seed: int = 0
) -> Ratings:
    """Elo with intervals from ``votes`` (model, model, share of the first); ``rounds`` of the bootstrap."""
    if len(set(names)) < max(len(names), 2):
        raise ArenaError(f"ratings need two models or more with different names, not {', '.join(names) or 'none'}.")
    cells, m = cells_of(names, votes), len(names)
    wins = wins_of(cells, m)
    best = fit(with_prior(wins))
    spread = fit(resampled(cells, m, rounds, np.random.default_rng(seed)), np.tile(best, (rounds, 1)))
    spread -= spread.mean(-1, keepdims=True)
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2], axis=0)
    elo, low, high = (1000 + ELO * s for s in (best - best.mean(), low, high))
    taken = (wins + wins.T).sum(-1).round().astype(int)
    return Ratings(tuple(names), elo, low, high, taken, int(cells[:, 3].sum()), level)
