"""Predicting: say what will come out before it does, and be scored against the measurement.

guess = fe.predict("how many numbers has the latent?", 4096)
...
guess.against(out.latents.numel())
fe.score()
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from fluxedu.errors import CourseError

_asked: dict[str, Prediction] = {}


class Prediction:
    """An answer given before the measurement: a number, a word, or an order (a list)."""

    def __init__(self, question: str, answer: Any):
        self.question, self.answer, self.points = question, answer, None

    def against(self, actual: Any, within: float = 0.1) -> None:
        """Print how the prediction did, and keep its points.

        A number is right within the share ``within`` of the measured one and half right within a factor of two; a word
        is right or not; a list scores the share of places that are right.
        """
        if self.answer is ...:
            print(f"no prediction was made · measured: {shown(actual)}")
            return
        self.points = points(self.answer, actual, within)
        how = "right" if self.points == 1 else "not so" if self.points == 0 else "partly right"
        print(f"{how} · predicted: {shown(self.answer)} · measured: {shown(actual)}")

    def _ipython_display_(self) -> None:
        """A prediction shows nothing before it is scored."""


def points(answer: Any, actual: Any, within: float) -> float:
    """Between 0 and 1. Raises CourseError for two that cannot be compared."""
    if isinstance(actual, str):
        return float(str(answer).strip().casefold() == actual.strip().casefold())
    if isinstance(actual, bool):
        return float(answer is actual)
    if isinstance(actual, Sequence):
        if isinstance(answer, str):  # "yes, no, no" for ["yes", "no", "no"]
            answer = re.split(r"[\s,/]+", answer.strip())
        if not isinstance(answer, Sequence) or len(answer) != len(actual):
            raise CourseError(f"the answer has {len(actual)} parts; {answer!r} has not.")
        return sum(points(a, b, within) for a, b in zip(answer, actual, strict=True)) / len(actual)
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        raise CourseError(f"the answer is a number; {answer!r} is not.")
    if math.isclose(answer, actual, rel_tol=within, abs_tol=1e-12):
        return 1.0
    return 0.5 if answer * actual > 0 and 0.5 <= answer / actual <= 2 else 0.0


def shown(value: Any) -> str:
    """Numbers to three digits, so that a page is the same everywhere."""
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(shown(v) for v in value)


def predict(question: str, answer: Any) -> Prediction:
    """Store an ``answer`` to a ``question`` before the run; ``...`` is none. Asked again, the last answer counts."""
    if not isinstance(question, str) or not question.strip():
        raise CourseError(f"a prediction needs a question in words, not {question!r}.")
    _asked[question] = Prediction(question, answer)
    return _asked[question]


def score() -> None:
    """Print how the predictions of this session did."""
    scored = [p.points for p in _asked.values() if p.points is not None]
    made = sum(p.answer is not ... for p in _asked.values())
    if not made:
        print(f"no predictions were made ({len(_asked)} were asked for)")
    else:
        print(f"{sum(scored):g} of {len(_asked)} points for {made} prediction{'s' * (made != 1)}")
