"""Blind comparison: balanced pairs, the Elo formula, and models that are named only after a vote."""

from collections import Counter

import numpy as np
import pytest

from fluxedu.errors import InstrumentError
from fluxedu.widgets.blind import VOTES, blind, pairs_of, ratings

NAMES = ("one", "two", "three")


def drawn(prompts=2):
    """Images whose colour identifies the model."""
    flat = lambda shade: np.full((8, 8, 3), shade, np.uint8)  # noqa: E731
    from PIL import Image

    return {name: [Image.fromarray(flat(40 * i + 10 + p)) for p in range(prompts)] for i, name in enumerate(NAMES)}


def test_every_two_models_meet_once_per_prompt_on_random_sides():
    pairs = pairs_of(NAMES, 40, 120, seed=1)
    assert len(set((p, *sorted(two)) for p, *two in pairs)) == 120
    left = Counter(a for _, a, _ in pairs)
    assert all(25 < left[name] < 55 for name in NAMES)
    assert pairs == pairs_of(NAMES, 40, 120, seed=1) != pairs_of(NAMES, 40, 120, seed=2)


def test_too_many_pairs_are_refused():
    with pytest.raises(InstrumentError, match="6 pairs, not 7"):
        pairs_of(NAMES, 2, 7, seed=0)


def test_ratings_by_hand():
    pairs = [(0, "one", "two"), (0, "two", "three"), (1, "one", "two")]
    left, right, same = (VOTES.index(v) for v in ("left", "right", "tie"))
    table = ratings(NAMES, pairs, [left, 0, right])
    assert np.allclose(table[1], [1016, 984, 1000])  # equal ratings: half of k
    assert np.allclose(table[2], table[1])  # no vote
    gain = 32 * (0 - 1 / (1 + 10 ** ((984 - 1016) / 400)))
    assert np.allclose(table[3], [1016 + gain, 984 - gain, 1000])
    assert np.allclose(ratings(NAMES, pairs, [same] * 3), 1000)
    assert np.allclose(table.sum(1), 3000)


def test_models_are_named_after_the_vote_and_the_next_pair_follows():
    explorer = blind(drawn(), ["first prompt", "second prompt"], pairs=4)
    assert "Pair 1" in explorer.current_view().text and "Left is" not in explorer.current_view().text
    explorer.set(pair_1="left")
    assert "Pair 2" in explorer.current_view().text and "Left is" not in explorer.current_view().text
    explorer.set(show="pair 1")
    (_, a, b), *_ = pairs_of(NAMES, 2, 4, seed=0)
    assert f"Left is {a}, right is {b}." in explorer.current_view().text
    assert explorer.current_view().panels[0].image[0, 0, 0] == 40 * NAMES.index(a) + 10
    assert explorer.current_view().panels[2].series[a][-1] == 16


def test_images_must_match_the_prompts():
    with pytest.raises(InstrumentError, match="one image per prompt"):
        blind(drawn(2), ["only one"])
