"""Which pair to ask about next: the one whose answer is expected to tighten the ratings most.

The strengths' covariance is ``C``, the inverse of the information. One more vote on i and j adds
``w d d'`` to the information, with ``d = e_i - e_j`` and ``w = p (1 - p)``, and so takes

    w |C d|^2 / (1 + w d' C d)

from the summed variance (Sherman and Morrison): large where little is known, small where one surely wins.
"""

from __future__ import annotations

import numpy as np

from fluxedu.arena.rating import chances, fit, information, with_prior

ALIKE = 1e-9  # gains that differ by less than this share are equal, and chance decides


def gains(wins: np.ndarray, pending: np.ndarray | None = None) -> np.ndarray:
    """How much variance one more vote on each pair takes away, ``[M, M]``; from wins ``[M, M]``, row over column.

    ``pending [M, M]``: pairs that are being judged at this moment count as known already, so that many voters at
    once are not all asked the same.
    """
    m = len(wins)
    table = with_prior(wins)
    strengths = fit(table)
    if pending is not None:
        table[:m, :m] += pending
    covariance = np.linalg.inv(information(table, strengths))
    covariance -= covariance.mean(0)  # Elo's mean is fixed: only what differs from the mean has a variance
    p = chances(strengths)[:m, :m]
    moved = covariance[:, :, None] - covariance[:, None, :]  # [M, i, j]: C d
    along = np.einsum("iij->ij", moved) - np.einsum("jij->ij", moved)  # d' C d
    weight = p * (1 - p)
    return weight * (moved**2).sum(0) / (1 + weight * along)


def best_pairs(wins: np.ndarray, rng: np.random.Generator, pending: np.ndarray | None = None) -> list[tuple[int, int]]:
    """All pairs, the most telling first, equal ones in a random order, and each with a random one on the left."""
    table = gains(wins, pending)
    i, j = np.triu_indices(len(wins), 1)
    gain = table[i, j]
    exact = np.round(gain / max(gain.max(), 1e-300) / ALIKE)
    order = np.lexsort((rng.random(len(gain)), -exact))
    sides = rng.random(len(gain)) < 0.5
    return [(int(i[k]), int(j[k])) if sides[k] else (int(j[k]), int(i[k])) for k in order]
