"""Blind comparison of models: choose the better of two unnamed images, and watch the Elo ratings change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from fluxedu.errors import InstrumentError, check_integer
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, Slider, Try, View, explorer
from fluxedu.widgets.panels import RGB, Lines, Pixels, to_rgb

VOTES = ("no vote yet", "left", "right", "tie")
SCORES = {1: 1.0, 2: 0.0, 3: 0.5}  # vote -> score of the left model
Pair = tuple[int, str, str]  # index of the prompt, model on the left, model on the right


def pairs_of(names: Sequence[str], prompts: int, count: int, seed: int) -> list[Pair]:
    """``count`` comparisons in random order and on random sides, every two models about equally often."""
    check_integer("pairs", count, 1, 10_000, error=InstrumentError)
    rng = np.random.default_rng(check_integer("seed", seed, 0, 2**63 - 1, error=InstrumentError))
    models = list(combinations(names, 2))
    every = [(prompt, *models[i]) for prompt in range(prompts) for i in rng.permutation(len(models))]
    if count > len(every):
        raise InstrumentError(f"{len(names)} models and {prompts} prompts give {len(every)} pairs, not {count}.")
    return [(p, a, b) if rng.random() < 0.5 else (p, b, a) for p, a, b in every[:count]]


def ratings(names: Sequence[str], pairs: Sequence[Pair], votes: Sequence[int], k: float = 32.0) -> np.ndarray:
    """Elo rating of each model after each pair, ``[pairs + 1, names]``, starting from 1000.

    A pair without a vote changes nothing.
    """
    elo, table = dict.fromkeys(names, 1000.0), [[1000.0] * len(names)]
    for (_, left, right), vote in zip(pairs, votes, strict=True):
        if vote in SCORES:
            expected = 1 / (1 + 10 ** ((elo[right] - elo[left]) / 400))
            gain = k * (SCORES[vote] - expected)
            elo[left], elo[right] = elo[left] + gain, elo[right] - gain
        table.append([elo[name] for name in names])
    return np.array(table)


def blind_view(
    images: Mapping[str, Sequence[RGB]],
    prompts: Sequence[str],
    pairs: Sequence[Pair],
    votes: Sequence[int],
    shown: int | None,
) -> View:
    """Two unnamed images of one prompt and the ratings so far. ``shown``: index of the pair; None is the next one."""
    names = list(images)
    if shown is None:
        shown = next((i for i, vote in enumerate(votes) if vote == 0), len(pairs) - 1)
    prompt, left, right = pairs[shown]
    table, voted = ratings(names, pairs, votes), sum(vote in SCORES for vote in votes)
    series = {name: (table[:, i] - 1000).tolist() for i, name in enumerate(names)}
    title = f"Ratings after {voted} of {len(pairs)} votes"
    panels = [
        Pixels(f"Pair {shown + 1}, left", images[left][prompt]),
        Pixels(f"Pair {shown + 1}, right", images[right][prompt]),
        Lines(title, range(len(pairs) + 1), series, "number of pairs", "Elo points above 1000", shown),
    ]
    answer = f" Left is {left}, right is {right}." if votes[shown] in SCORES else ""
    order = ", ".join(f"{names[i]} {table[-1, i]:.0f}" for i in np.argsort(-table[-1], kind="stable"))
    result = f" Ratings: {order}." if voted else " The models are named after your vote."
    return View(panels, f"Pair {shown + 1}: “{prompts[prompt]}”.{answer}{result}")


def _example(pipe) -> Explorer:
    images = {steps: pipe(EXAMPLE_PROMPT, steps=steps, progress=False).images for steps in (4, 12)}
    return blind({f"{steps} steps": image for steps, image in images.items()}, [EXAMPLE_PROMPT], pairs=1)


@explorer(example=_example)
def blind(images: Mapping[str, Sequence], prompts: Sequence[str], *, pairs: int = 8, seed: int = 0) -> Explorer:
    """Vote for the better image of each pair; the models are named after your vote.

    images: model -> its images, one per prompt (PIL, or tensors ``[3, H, W]`` in [-1, 1]) · pairs: number of votes.
    Ratings are Elo ratings, updated pair by pair. No image is drawn here.
    """
    if len(images) < 2 or any(len(row) != len(prompts) for row in images.values()):
        raise InstrumentError("images needs two models or more, each with one image per prompt.")
    shown = {name: [to_rgb(image) for image in row] for name, row in images.items()}
    compared = pairs_of(list(images), len(prompts), pairs, seed)

    def draw(show: int, **votes: int) -> View:
        ordered = [votes[f"pair_{i + 1}"] for i in range(len(compared))]
        return blind_view(shown, prompts, compared, ordered, show - 1 if show else None)

    numbers = [str(i + 1) for i in range(len(compared))]
    controls = [Slider("show", "show", ["the next pair to vote on", *(f"pair {n}" for n in numbers)])]
    controls += [Choice(f"pair_{n}", f"vote on pair {n}", VOTES) for n in numbers]
    return Explorer(
        "Which image is better?",
        controls,
        draw,
        widths=[2.8, 2.8, 3.4],
        instruction="Vote on the pair that is shown, with its menu; move “show” back to a pair to see who drew it.",
        tries=[
            Try("Vote for the left image of pair 1: whose is it?", pair_1="left", show=1),
            Try("Call pair 1 a tie: do the ratings move?", pair_1="tie", show=1),
        ],
    )
