"""Prompts with the claims that they make, drawn like the exam's but never the exam's own."""

from __future__ import annotations

import numpy as np

from fluxedu.nano.exam import Question
from fluxedu.nano.judge import Verdict, judge
from fluxedu.nano.scenes import caption, sample_scene

SEED = 2024  # the exam's is 77


def questions(count: int, size: tuple[int, int] = (128, 128)) -> list[Question]:
    """Questions about held-out scenes, all of one size in pixels; the seed of each picture is its number."""
    rng = np.random.default_rng(SEED)
    made = []
    for number in range(count):
        prompt, claim = caption(sample_scene(rng, size=size, held_out=True), rng)
        made.append(Question(prompt, claim, size, number))
    return made


def verdicts(pipe, asked: list[Question], batch: int = 8, **settings) -> list[Verdict]:
    """The judge's verdict on the picture of each question."""
    found = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        images = pipe(
            [q.prompt for q in part], seed=[q.seed for q in part], trajectory=False, progress=False, **settings
        )
        found += [judge(image, question.claim) for image, question in zip(images.images, part, strict=True)]
    return found


def correct(found: list[Verdict]) -> list[float]:
    """For each picture, the share of its claims that hold."""
    return [float(np.mean(verdict.results)) for verdict in found]
