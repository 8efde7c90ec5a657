"""Comparing models blind: which of two pictures is better? Elo ratings build up from the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from fluxedu.errors import InstrumentError
from fluxedu.widgets.controls import Choice, Slider
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import Pixels8, picture
from fluxedu.widgets.panels import Lines, Pixels

VOTES = ("not yet", "left", "right", "the same")
SCORES = {1: 1.0, 2: 0.0, 3: 0.5}  # of the left one
Pair = tuple[int, str, str]  # which prompt, whose picture is left, whose is right


def pairs_of(names: Sequence[str], prompts: int, count: int, seed: int) -> list[Pair]:
    """``count`` comparisons in a shuffled order, every two models equally often, nearly, and sides at random."""
    rng = np.random.default_rng(seed)
    two = list(combinations(names, 2))
    every = [(prompt, *two[i]) for prompt in range(prompts) for i in rng.permutation(len(two))]
    if count > len(every):
        raise InstrumentError(f"{len(names)} models and {prompts} prompts make {len(every)} pairs, not {count}.")
    return [(p, a, b) if rng.random() < 0.5 else (p, b, a) for p, a, b in every[:count]]


def ratings(names: Sequence[str], pairs: Sequence[Pair], votes: Sequence[int], k: float = 32.0) -> np.ndarray:
    """Elo after each pair, ``[pairs + 1, names]``, from 1000 each; a pair that was not judged changes nothing."""
    now, table = dict.fromkeys(names, 1000.0), [[1000.0] * len(names)]
    for (_, left, right), vote in zip(pairs, votes, strict=True):
        if vote in SCORES:
            expected = 1 / (1 + 10 ** ((now[right] - now[left]) / 400))
            gain = k * (SCORES[vote] - expected)
            now[left], now[right] = now[left] + gain, now[right] - gain
        table.append([now[name] for name in names])
    return np.array(table)


def blind_view(
    drawn: Mapping[str, Sequence[Pixels8]], prompts: Sequence[str], pairs: Sequence[Pair], votes: Sequence[int],
    shown: int | None,
) -> View:  # fmt: skip
    """Two pictures of one prompt, unnamed, and the ratings so far. ``shown``: which pair; None is the next to judge."""
    names = list(drawn)
    if shown is None:
        shown = next((i for i, vote in enumerate(votes) if vote == 0), len(pairs) - 1)
    prompt, left, right = pairs[shown]
    table, judged = ratings(names, pairs, votes), sum(vote in SCORES for vote in votes)
    series = {name: (table[:, i] - 1000).tolist() for i, name in enumerate(names)}
    panels = [
        Pixels(f"pair {shown + 1}, left", drawn[left][prompt]),
        Pixels(f"pair {shown + 1}, right", drawn[right][prompt]),
        Lines(
            f"ratings, {judged} of {len(pairs)} pairs judged",
            range(len(pairs) + 1),
            series,
            "pairs",
            "Elo above 1000",
            shown,
        ),
    ]
    who = f" Left was {left}, right was {right}." if votes[shown] in SCORES else ""
    order = ", ".join(f"{names[i]} {table[-1, i]:.0f}" for i in np.argsort(-table[-1], kind="stable"))
    result = f" Ratings: {order}." if judged else " Nobody is told who drew what before you have judged."
    return View(panels, f"Pair {shown + 1}: “{prompts[prompt]}”.{who}{result}")


def blind(drawn: Mapping[str, Sequence], prompts: Sequence[str], *, pairs: int = 8, seed: int = 0) -> Explorer:
    """Say of each pair of pictures which is better; who drew them is said when you have.

    drawn: model -> its pictures, one a prompt (PIL, or tensors ``[3, H, W]`` in [-1, 1]) · pairs: how many are
    asked for. Ratings are Elo's, pair by pair.
    """
    if len(drawn) < 2 or any(len(row) != len(prompts) for row in drawn.values()):
        raise InstrumentError("drawn needs two models or more, each with one picture a prompt.")
    shown = {name: [picture(image) for image in row] for name, row in drawn.items()}
    asked = pairs_of(list(drawn), len(prompts), pairs, seed)

    def draw(show: int, **votes: int) -> View:
        given = [votes[f"pair_{i + 1}"] for i in range(len(asked))]
        return blind_view(shown, prompts, asked, given, show - 1 if show else None)

    numbers = [str(i + 1) for i in range(len(asked))]
    controls = [Slider("show", "show", ["the next to judge", *(f"pair {n}" for n in numbers)])]
    controls += [Choice(f"pair_{n}", n, VOTES) for n in numbers]
    return Explorer("Compare blind", controls, draw, widths=[2.8, 2.8, 3.4])
