"""Checking: is a student's answer right, and if not, what is the likely mistake? One sentence either way."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.errors import CourseError


@dataclass(frozen=True)
class Verdict:
    """True when the answer is right; ``says`` is the sentence, which has been printed."""

    name: str
    passed: bool
    says: str
    written: bool = True

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return f"{'✓' if self.passed else '✗' if self.written else '○'} {self.name}: {self.says}"

    def _ipython_display_(self) -> None:
        """Nothing more: it has been said."""


def check(name: str, yours: Any) -> Verdict:
    """Try ``yours`` on the exercise's cases, print the verdict and give it back, usable as a truth value.

    The shape is looked at first, then the values, then which known mistake gives the same. Raises CourseError for an
    exercise that there is not.
    """
    if name not in all_exercises():
        raise CourseError(f"there is no exercise {name!r}; there are {', '.join(all_exercises())}.")
    verdict = judged(all_exercises()[name], yours)
    print(verdict)
    if "FLUXEDU_VERDICTS" in os.environ:  # for who marks a notebook
        with open(os.environ["FLUXEDU_VERDICTS"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "passed": verdict.passed, "says": verdict.says}) + "\n")
    return verdict


def judged(task: Exercise, yours: Any) -> Verdict:
    """The verdict, without a word."""
    if yours is None or yours is Ellipsis:
        return Verdict(task.name, False, "not written yet.", written=False)
    cases = task.cases()
    right = task.against or task.solution
    wanted = [listed(task.call(right, *copy.deepcopy(case))) for case in cases]
    given = []
    for case, want in zip(cases, wanted, strict=True):
        tried = copy.deepcopy(case)
        try:
            with torch.no_grad():
                got = task.call(yours, *tried)
        except NotImplementedError:
            return Verdict(task.name, False, "not written yet.", written=False)
        except Exception as error:  # noqa: BLE001 - whatever a student's code may raise
            return Verdict(task.name, False, f"it raises {type(error).__name__}: {_one_line(error)}{_on(case)}.")
        said = _form(got, want) or _form_of_input(case, tried)
        if said:
            return Verdict(task.name, False, said + _on(case) + ".")
        given.append(listed(got))
    if furthest(given, wanted) <= task.tolerance:
        return Verdict(task.name, True, f"right in {len(cases)} case{'s' * (len(cases) > 1)}.")
    return Verdict(task.name, False, _mistake(task, cases, given) or _values(given, wanted, task.tolerance))


def listed(value: Any) -> list[Tensor]:
    """A result as a flat list of tensors: numbers, texts and tuples too."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(value)]
    if isinstance(value, str):
        return [torch.tensor(list(value.encode()))]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in listed(part)]
    if isinstance(value, nn.Module):
        return listed(list(value.parameters()))
    raise TypeError(f"{type(value).__name__} is no tensor")


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest relative error among pairs of tensors; infinite where shapes differ or a number is not finite."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    errors = [0.0]
    for x, y in zip(a, b, strict=True):
        x, y = (v.to(torch.complex128 if v.is_complex() else torch.float64) for v in (x, y))
        error = float((x - y).abs().square().sum().sqrt() / y.abs().square().sum().sqrt().clamp(min=1e-12))
        errors.append(error if error == error else float("inf"))
    return max(errors)


def furthest(given: Sequence[list[Tensor]], wanted: Sequence[list[Tensor]]) -> float:
    """The largest :func:`distance` over the cases."""
    return max(distance(a, b) for a, b in zip(given, wanted, strict=True))


def _form(got: Any, want: list[Tensor]) -> str | None:
    """What is wrong with the kind, the number or the shape of what came back."""
    if got is None:
        return "it returns nothing; is there a return?"
    try:
        have = listed(got)
    except TypeError:
        return f"it returns a {type(got).__name__}, and a tensor is wanted"
    if len(have) != len(want):
        wanted = "1 is" if len(want) == 1 else f"{len(want)} are"
        return f"it returns {len(have)} tensor{'s' * (len(have) != 1)}, and {wanted} wanted"
    for x, y in zip(have, want, strict=True):
        if x.shape != y.shape:
            return f"the shape is {list(x.shape)}, and should be {list(y.shape)}"
        if x.is_complex() != y.is_complex():
            return f"the numbers are {'complex' if x.is_complex() else 'real'}, and should not be"
        if y.dtype in (torch.bfloat16, torch.float16) and x.dtype != y.dtype:
            kinds = [str(v.dtype).removeprefix("torch.") for v in (x, y)]
            return f"the numbers are {kinds[0]}, and should be {kinds[1]} as what came in: `.type_as(...)`"
    return None


def _form_of_input(case: tuple, tried: tuple) -> str | None:
    """Was an argument changed?"""
    for before, after in zip(case, tried, strict=True):
        if isinstance(before, Tensor) and not torch.equal(before, after):
            return "it changes its argument in place; make a new tensor instead"
    return None


def _mistake(task: Exercise, cases: Sequence[tuple], given: list[list[Tensor]]) -> str | None:
    """The sentence of the known wrong answer that gives the same in every case."""
    for known in task.wrong:
        try:
            with torch.no_grad():
                same = [listed(task.call(known.answer, *copy.deepcopy(case))) for case in cases]
        except Exception:  # noqa: BLE001 - some wrong answers fail on some cases
            continue
        tolerance = max(task.tolerance, 1e-6)
        if furthest(given, same) <= tolerance:
            return known.says
    return None


def _values(given: list[list[Tensor]], wanted: list[list[Tensor]], tolerance: float) -> str:
    wrong = [i for i, (a, b) in enumerate(zip(given, wanted, strict=True)) if distance(a, b) > tolerance]
    far = furthest(given, wanted)
    which = "all cases" if len(wrong) == len(given) > 1 else f"case {wrong[0] + 1} of {len(given)}"
    size = "values that are no numbers" if far == float("inf") else f"values off by {far:.2g} of their size"
    return f"the shapes are right, the values are not: {size} in {which}."


def _on(case: tuple) -> str:
    shapes = [f"[{', '.join(map(str, x.shape))}]" for x in case if isinstance(x, Tensor)]
    return f" (tried on {', '.join(shapes)})" if shapes else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160].rstrip(".")
