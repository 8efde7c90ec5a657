"""Ratings: against another optimiser, and against voters whose strengths are known."""

import numpy as np
import pytest
from scipy.optimize import minimize

from fluxedu.arena import rate
from fluxedu.arena.rating import ELO, PRIOR, add_prior, fit
from fluxedu.errors import ArenaError

TRUE = np.array([-1.0, -0.3, 0.2, 1.1])
NAMES = "abcd"


def voted(strengths, count, rng):
    """Simulated votes that follow the model, on uniformly drawn pairs."""
    m = len(strengths)
    i = rng.integers(m, size=count)
    j = (i + rng.integers(1, m, size=count)) % m
    won = rng.random(count) < 1 / (1 + np.exp(strengths[j] - strengths[i]))
    return [(NAMES[a], NAMES[b], float(w)) for a, b, w in zip(i, j, won, strict=True)]


def test_the_fit_is_the_one_that_another_optimiser_finds():
    wins = np.random.default_rng(0).integers(0, 9, (4, 4)) * (1 - np.eye(4))

    def cost(s):  # negative log likelihood, with two games of each model against the player at 0
        lost = sum(wins[i, j] * np.log1p(np.exp(s[j] - s[i])) for i in range(4) for j in range(4))
        return lost + PRIOR * (np.log1p(np.exp(-s)) + np.log1p(np.exp(s))).sum()

    found = minimize(cost, np.zeros(4), tol=1e-12).x
    assert np.abs(fit(add_prior(wins)) - found).max() < 1e-5


def test_a_hundred_elo_is_64_wins_in_100():
    votes = [("a", "b", 1.0, 64_000), ("b", "a", 1.0, 36_000)]
    result = rate("ab", votes)
    assert abs(result.elo[0] - result.elo[1] - 100) < 1
    assert abs(result.elo.mean() - 1000) < 1e-9
    assert result.total == 100_000 and list(result.votes) == [100_000] * 2


def test_a_tie_is_half_a_win_for_each():
    ties = rate("abc", [("a", "b", 0.5, 4), ("b", "c", 1.0, 3)])
    halves = rate("abc", [("a", "b", 1.0, 2), ("b", "a", 1.0, 2), ("c", "b", 0.0, 3)])
    assert np.allclose(ties.elo, halves.elo, atol=1e-6)


def test_the_order_of_known_strengths_is_found():
    result = rate(NAMES, voted(TRUE, 2000, np.random.default_rng(0)))
    assert result.order == [3, 2, 1, 0]
    assert np.abs(result.elo - 1000 - ELO * TRUE).max() < 60  # four standard errors


@pytest.mark.parametrize("count", [60, 400])
def test_95_percent_intervals_cover_the_truth_95_times_in_100(count):
    truth, rng, covered = 1000 + ELO * (TRUE - TRUE.mean()), np.random.default_rng(1), []
    for seed in range(300):
        result = rate(NAMES, voted(TRUE, count, rng), rounds=300, seed=seed)
        covered.append((result.low <= truth) & (truth <= result.high))
    assert 0.91 < np.mean(covered) < 0.98, np.mean(covered)  # 1200 intervals: three standard errors are 0.02 or so


def test_who_never_lost_is_finite_and_uncertain_upwards():
    result = rate("ab", [("a", "b", 1.0, 10)])
    assert np.isfinite([result.elo, result.low, result.high]).all() and result.elo[0] < 1800
    assert result.high[0] - result.elo[0] > 50


def test_who_was_never_shown_has_the_widest_interval():
    result = rate("abc", [("a", "b", 1.0, 30), ("b", "a", 1.0, 30)])
    wide = result.high - result.low
    assert (
        result.votes[2] == 0 and wide[2] > 1.8 * wide[:2].max()
    )  # its uncertainty moves the mean, and so widens the others too


def test_the_table_says_what_was_counted():
    result = rate(["nano", "nano@4"], [("nano", "nano@4", 1.0, 3), ("nano", "nano@4", 0.0, 1)])
    lines = result.table().splitlines()
    assert "95% interval" in lines[0] and lines[1].split()[0] == "nano" and lines[1].split()[-1] == "4"
    assert lines[-1].startswith("4 votes")
    assert rate(["a", "b"], [("a", "b", 1.0)], seed=3).rows() == rate(["a", "b"], [("a", "b", 1.0)], seed=3).rows()


@pytest.mark.parametrize(
    ("names", "votes", "says"),
    [
        (["a"], [], "at least two models"),
        (["a", "a"], [], "different names"),
        (["a", "b"], [("a", "c", 1.0)], "not \\('a', 'c', 1.0\\)"),
        (["a", "b"], [("a", "a", 1.0)], "two different models of a, b"),
        (["a", "b"], [("a", "b", 0.7)], "1, 0.5 or 0"),
    ],
)
def test_errors_are_one_sentence(names, votes, says):
    with pytest.raises(ArenaError, match=says):
        rate(names, votes)
