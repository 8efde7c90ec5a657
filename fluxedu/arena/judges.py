"""The scene world's judge as a voter: each axis a score of one side, read from its pictures by geometry alone.

The scores are those of :mod:`fluxedu.nano.judge`, by which ``fluxedu judge`` reports a model. What differs by less than
a hundredth is the same, and the vote a tie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from fluxedu.arena.axes import AXES, checked_axis
from fluxedu.arena.match import Arena
from fluxedu.arena.votes import JUDGE
from fluxedu.errors import ArenaError
from fluxedu.nano.judge import Verdict, diversity, judge, quality
from fluxedu.nano.scenes import Claim

DIGITS = 2  # of a score that are compared


def following(verdict: Verdict) -> float:
    """The share of what the prompt says that is there; 1 means everything, and that nothing else is there."""
    said = (verdict.background, *verdict.colors, *verdict.forms, *verdict.sizes, *verdict.relations)
    held = [ok for ok in said if ok is not None] + [not verdict.extra]
    return sum(held) / len(held)


def score(axis: str, pictures: Sequence, claim: Claim) -> tuple[float, ...]:
    """How good one side is on an axis; of two sides, compare tuples.

    Overall, what follows the prompt better wins, and among equals what is drawn more cleanly. Diversity is of places
    and sizes, as :func:`fluxedu.nano.judge.diversity` has it: it does not ask whether the prompt is followed.
    """
    verdicts = [judge(picture, claim) for picture in pictures]
    first = verdicts[0]
    match checked_axis(axis):
        case "overall":
            scores = (following(first), quality(pictures[0], first.reading))
        case "prompt" | "size":
            scores = (float(np.mean([following(v) for v in verdicts])),)
        case "typography":
            scores = (sum(first.letters) / len(first.letters),) if first.letters else (0.0,)
        case "diversity":
            scores = (diversity([v.reading for v in verdicts]),)
        case "quality":
            scores = (quality(pictures[0], first.reading),)
    return tuple(round(s, DIGITS) for s in scores)


def choice(axis: str, left: Sequence, right: Sequence, claim: Claim) -> str:
    """The judge's vote on two sides: left, right or tie."""
    a, b = score(axis, left, claim), score(axis, right, claim)
    return "tie" if a == b else "left" if a > b else "right"


def judged(arena: Arena, votes: int, axes: Sequence[str] = tuple(AXES)) -> int:
    """Let the judge give so many votes, the axes in turn; how many it could give before all pairs were judged."""
    claims = {axis: {(q.prompt, q.seed): q.claim for q in arena.questions(axis)} for axis in axes}
    given, left_over = 0, list(axes)
    with tqdm(total=votes, desc="judge", delay=1) as bar:
        while left_over and given < votes:
            axis = left_over[given % len(left_over)]
            try:
                ballot = arena.ballot(JUDGE, axis)
            except ArenaError:  # all seen: the other axes go on
                left_over.remove(axis)
                continue
            said = choice(axis, *arena.sides(ballot), claims[axis][ballot.prompt, ballot.seed])
            given += arena.vote(ballot.id, said, JUDGE)
            bar.update()
    return given
