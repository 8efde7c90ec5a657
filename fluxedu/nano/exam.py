"""The exam: held-out prompts, drawn by a pipeline, read by the judge.

The prompts never change (one seed), every one is written from a scene with a thing whose (colour, form,
background) training never saw (one in seven leaves the background unsaid), and the shapes of picture take turns, so
that aspect ratios can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fluxedu.nano.judge import Verdict, diversity, judge, quality, summary
from fluxedu.nano.scenes import ASPECTS, Claim, caption, render, sample_scene

SEED = 77
DRAW = Callable[[list[str], list[int], tuple[int, int]], list]


@dataclass(frozen=True)
class Question:
    """A prompt, what it claims, the size (height, width) to draw it at, and the seed to draw it with."""

    prompt: str
    claim: Claim
    size: tuple[int, int]
    seed: int


def questions(count: int = 500) -> list[Question]:
    """The first ``count`` held-out prompts."""
    rng = np.random.default_rng(SEED)
    asked = []
    for i in range(count):
        size = ASPECTS[i % len(ASPECTS)]
        prompt, claim = caption(sample_scene(rng, size=size, held_out=True), rng)
        asked.append(Question(prompt, claim, size, i))
    return asked


def sit(draw: DRAW, count: int = 500, batch: int = 16, varied: int = 8, for_shapes: int = 0) -> dict:
    """Let ``draw(prompts, seeds, (height, width)) -> pictures`` sit the exam; the table as a dictionary.

    Rows as :func:`fluxedu.nano.judge.summary` gives them; ``by_size`` the share of pictures with
    everything right for each shape; ``quality`` and ``diversity`` as the judge defines them, the latter
    over eight pictures each of the first ``varied`` prompts (0 leaves it out).

    ``for_shapes``, if more than ``count``: ``more_by_size`` is ``by_size`` over so many prompts, which begin with the
    ``count``. A share of 71 pictures, about as many as each shape has of 500, is known to 4 points; of 300 to 2.
    """
    asked = questions(max(count, for_shapes))
    verdicts, looks = _verdicts(draw, asked[:count], batch)
    figures = {
        "prompts": count,
        "rows": summary(verdicts.values()),
        "by_size": _by_size(asked[:count], verdicts),
        "quality": float(np.mean(looks)),
        "diversity": _diversity(draw, asked[:varied]) if varied else None,
    }
    if for_shapes > count:
        figures["more_by_size"] = _by_size(asked, verdicts | _verdicts(draw, asked[count:], batch)[0])
    return figures


def _verdicts(draw: DRAW, asked: list[Question], batch: int) -> tuple[dict[int, Verdict], list[float]]:
    """The judge's verdict on each question, by its seed, and how good each picture looks."""
    verdicts: dict[int, Verdict] = {}
    looks: list[float] = []
    for size in dict.fromkeys(q.size for q in asked):
        members = [q for q in asked if q.size == size]
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            pictures = draw([q.prompt for q in part], [q.seed for q in part], size)
            for question, picture in zip(part, pictures, strict=True):
                verdict = judge(picture, question.claim)
                verdicts[question.seed] = verdict
                looks.append(quality(picture, verdict.reading))
    return verdicts, looks


def _by_size(asked: list[Question], verdicts: dict[int, Verdict]) -> dict[str, dict]:
    return {f"{h}x{w}": summary(verdicts[q.seed] for q in asked if q.size == (h, w))["everything"] for h, w in ASPECTS}


def _diversity(draw: DRAW, asked: list[Question], pictures: int = 8) -> float:
    """The spread of things among pictures of the same prompt, averaged over prompts."""
    spreads = []
    for q in asked:
        drawn = draw([q.prompt] * pictures, list(range(pictures)), q.size)
        spreads.append(diversity([judge(p, q.claim).reading for p in drawn]))
    return float(np.mean(spreads))


def truth(count: int = 500) -> dict:
    """The ruler measured: true pictures of held-out scenes, read by the judge."""
    rng = np.random.default_rng(SEED + 1)
    verdicts = []
    for _ in range(count):
        scene = sample_scene(rng, held_out=bool(rng.random() < 0.5))
        verdicts.append(judge(render(scene), caption(scene, rng)[1]))
    return summary(verdicts)
