"""Pairing: the variance reduction matches its definition, and simulated votes reach an interval with fewer votes."""

import numpy as np

from fluxedu.arena.rating import add_prior, fisher_information, fit, rank_pairs, variance_reduction, win_probabilities

TRUE = np.array([-3.0, -2.7, -0.2, 0.1, 2.8, 3.0])  # three pairs of nearly equal models, far from each other


def spread(table, strengths):
    """Summed variance of the strengths around their mean."""
    covariance = np.linalg.inv(fisher_information(table, strengths))
    middle = np.eye(len(strengths)) - 1 / len(strengths)
    return np.trace(middle @ covariance @ middle)


def test_the_variance_reduction_is_that_of_one_more_vote():
    wins = np.random.default_rng(0).integers(0, 6, (5, 5)) * (1 - np.eye(5))
    table, found = add_prior(wins), variance_reduction(wins)
    strengths = fit(table)
    for i, j in [(0, 1), (1, 4), (3, 2)]:
        more = table.copy()
        more[i, j] += 1
        assert abs(spread(table, strengths) - spread(more, strengths) - found[i, j]) < 1e-9
    assert np.allclose(found, found.T)
    assert np.allclose(win_probabilities(strengths)[:5, :5] + win_probabilities(strengths)[:5, :5].T, 1)


def votes_needed(width, choose, seed):
    """How many votes it takes until the strengths' mean 95 % interval is ``width`` wide; ``choose(wins, rng)``."""
    rng, wins = np.random.default_rng(seed), np.zeros((len(TRUE),) * 2)
    for count in range(1, 2000):
        i, j = choose(wins, rng)
        won = rng.random() < 1 / (1 + np.exp(TRUE[j] - TRUE[i]))
        wins[(i, j) if won else (j, i)] += 1
        if count % 5 == 0:
            table = add_prior(wins)
            if 2 * 1.96 * np.sqrt(spread(table, fit(table)) / len(TRUE)) < width:
                return count
    return 2000


def test_fewer_votes_are_needed_than_with_pairs_drawn_evenly():
    evenly = lambda wins, rng: tuple(rng.choice(len(wins), 2, replace=False))  # noqa: E731
    closest = lambda wins, rng: rank_pairs(wins, rng)[0]  # noqa: E731
    counts = {f: [votes_needed(1.9, f, seed) for seed in range(8)] for f in (evenly, closest)}
    print({"evenly": np.median(counts[evenly]), "chosen": np.median(counts[closest])})
    assert np.median(counts[closest]) < 0.8 * np.median(counts[evenly])


def test_simultaneous_voters_get_different_pairs():
    rng, pending = np.random.default_rng(0), np.zeros((4, 4))
    for _ in range(60):
        i, j = rank_pairs(np.zeros((4, 4)), rng, pending)[0]
        pending[i, j] += 1
    both = (pending + pending.T)[np.triu_indices(4, 1)]
    assert both.min() == both.max() == 10
    assert 15 < np.triu(pending).sum() < 45  # the sides are random


def test_the_same_seed_chooses_the_same_pairs():
    first, again = (rank_pairs(np.zeros((5, 5)), np.random.default_rng(3)) for _ in range(2))
    assert first == again and len(first) == 10
    assert first != rank_pairs(np.zeros((5, 5)), np.random.default_rng(4))
