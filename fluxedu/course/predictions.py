"""Predictions: an answer that is given before a measurement, and is scored against it.

    guess = fe.predict("How many numbers does the latent have?", 4096)
    change = fe.predict("Does the image change: 'not', 'a little' or 'much'?", "not")
    ...
    guess.against(out.latents.numel())
    change.against(size_of(difference))
    fe.score()

The words in single quotes are the options of a question. A question without such words asks for a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from fluxedu.errors import CourseError

WITHIN = 0.1  # the relative error up to which a number is right

_predictions: dict[str, Prediction] = {}


class Prediction:
    """An answer given before the measurement: a number, one of the question's options, or a list of these."""

    def __init__(self, question: str, answer: Any):
        self.question, self.points = question, None
        self.options = list(dict.fromkeys(re.findall(r"(?<!\w)'([^']+)'(?!\w)", question)))
        self.answer = answer if answer is ... else read(answer, self.options)

    def __str__(self) -> str:
        """What was stored, or what is to be written, and how it will be scored."""
        if self.options:
            rule = f"{'for each, ' * ('for each' in self.question)}one of {', '.join(self.options)}"
        else:
            rule = f"a number; within {WITHIN:.0%} is right, within a factor of two is half right"
        if self.answer is ...:
            return f"not predicted yet: {rule}"
        return f"predicted: {format_value(self.answer)} ({rule})"

    def against(self, measured: Any) -> None:
        """Compare the prediction with the measured value, print the result and store the points.

        A number scores 1 if its relative error is at most 10 %, and 0.5 if it is right within a factor of two. A
        word is right or wrong. A list scores the share of its elements that are right.
        """
        if self.answer is ...:
            print(f"no prediction was made · measured: {format_value(measured)}")
            return
        self.points = points(self.answer, measured)
        result = "right" if self.points == 1 else "wrong" if self.points == 0 else "partly right"
        print(f"{result} · predicted: {format_value(self.answer)} · measured: {format_value(measured)}")

    def _ipython_display_(self) -> None:
        """A cell that ends in a prediction shows nothing more, because it has been printed."""


def predict(question: str, answer: Any) -> Prediction:
    """Store an ``answer`` before the run and print it; ``...`` means none. A second answer replaces the first.

    - question: its options, if it has any, are the words in single quotes; otherwise it asks for numbers
    - answer: an option in any clear spelling (``"A little"``, ``"lit"``, True for yes), a number (``4096``,
      ``"4,096"``, ``"about 27 %"``), or a list of these, also as one text (``"yes, no, no"``)

    Raises CourseError for an answer that is none of these.
    """
    if not isinstance(question, str) or not question.strip():
        raise CourseError(f"a prediction needs a question as text, not {question!r}.")
    prediction = _predictions[question] = Prediction(question, answer)
    print(prediction)
    return prediction


def score() -> None:
    """Print how many points the predictions of this session have scored."""
    scored = [p.points for p in _predictions.values() if p.points is not None]
    made = sum(p.answer is not ... for p in _predictions.values())
    if made:
        print(f"{sum(scored):g} of {len(_predictions)} points for {made} prediction{'s' * (made != 1)}")
    else:
        print(f"no predictions were made ({len(_predictions)} were asked for)")


# ---------------------------------------------------------------- reading an answer


def read(answer: Any, options: Sequence[str]) -> Any:
    """The answer as one of the options, a number, or a list of these. Raises CourseError."""
    one = _option(answer, options) if options else _number(answer)
    if one is not None:
        return one
    if isinstance(answer, str):  # "yes, no, no"
        between = r"[,;\s]+" if not options else r"[,;/]" if any(" " in option for option in options) else r"[,;/\s]+"
        parts = [part for part in re.split(between, re.sub(r"\band\b", ",", answer)) if part.strip()]
    else:
        parts = list(answer) if isinstance(answer, (list, tuple)) or hasattr(answer, "__array__") else []
    found = [_option(part, options) if options else _number(part) for part in parts]
    if len(found) > 1 and None not in found:
        return found
    wanted = f"one of {', '.join(options)}" if options else "a number, since its question has no 'option' in quotes"
    raise CourseError(f"the prediction must be {wanted}, or a list of such; {answer!r} is not.")


def _option(answer: Any, options: Sequence[str]) -> str | None:
    """The option that is meant: the same words, or the only option that begins with them or contains them."""
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    plain = {option: _plain(option) for option in options}
    text = _plain(str(answer)) if isinstance(answer, (str, int, float)) else ""
    if not text or (re.search("[,;/]", str(answer)) and answer.strip() not in options):  # "yes, no"
        return None
    same = [option for option, words in plain.items() if words == text]
    begins = [option for option, words in plain.items() if words.startswith(text)]
    contains = [option for option, words in plain.items() if f" {text} " in f" {words} "]
    return next((found[0] for found in (same, begins, contains) if len(found) == 1), None)


def _plain(text: str) -> str:
    """Lower case, without punctuation and articles."""
    words = re.sub(r"[^\w.]+", " ", text.casefold()).strip(" .")
    return re.sub(r"^(a|an|the) ", "", words)


def _number(answer: Any) -> int | float | None:
    """A number, or a text that is one: ``"4,096"``, ``"about 27 %"``, ``"1/3"``, ``"2.4x"``."""
    if isinstance(answer, str):
        text = re.sub(r"^(about|around|roughly|ca\.?|~|≈)\s*|\s*(%|percent|times|x|×)$", "", answer.strip().casefold())
        text = re.sub(r"(?<=\d)[,_ ](?=\d{3}(\D|$))", "", text)  # thousands
        top, _, bottom = text.partition("/")
        try:
            value = float(top) / float(bottom) if bottom else float(text)
        except (ValueError, ZeroDivisionError):
            return None
        answer = int(value) if value.is_integer() else value
    elif isinstance(answer, bool) or getattr(answer, "shape", ()) != ():
        return None
    elif hasattr(answer, "item"):  # a number of NumPy's or PyTorch's
        answer = answer.item()
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    return answer if is_number and math.isfinite(answer) else None


# ---------------------------------------------------------------- scoring it


def points(answer: Any, measured: Any) -> float:
    """The score of an answer, from 0 to 1; 0 for an answer of another kind or with another number of parts."""
    if isinstance(measured, (list, tuple)):
        if not isinstance(answer, list) or len(answer) != len(measured):
            return 0.0
        return sum(points(a, b) for a, b in zip(answer, measured, strict=True)) / len(measured)
    if isinstance(measured, bool):
        measured = "yes" if measured else "no"
    if isinstance(measured, str) or isinstance(answer, (str, list)):
        return float(isinstance(answer, str) and _plain(answer) == _plain(str(measured)))
    if math.isclose(answer, measured, rel_tol=WITHIN, abs_tol=1e-12):
        return 1.0
    return 0.5 if answer * measured > 0 and 0.5 <= answer / measured <= 2 else 0.0


def format_value(value: Any) -> str:
    """Numbers with three digits, so that the page is the same on every machine."""
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(format_value(v) for v in value)
