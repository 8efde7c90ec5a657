"""Checking an answer: is it right, and if not, what is the likely mistake? The verdict is one sentence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.errors import CourseError, check_choice

NOT_WRITTEN = "not written yet."
CHANGED = "it modifies its input in place; create a new tensor instead"


@dataclass(frozen=True)
class Verdict:
    """The result of a check; it is true if the answer is right. ``message`` is the sentence that was printed."""

    name: str
    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        mark = "✓" if self.passed else "○" if self.message == NOT_WRITTEN else "✗"
        return f"{mark} {self.name}: {self.message}"

    def _ipython_display_(self) -> None:
        """A cell that ends in a check shows nothing more, because the verdict has been printed."""


def check(name: str, answer: Any) -> Verdict:
    """Check ``answer`` to the exercise ``name``, print the verdict and return it.

    The shapes are checked first, then the values. If the values are wrong but equal those of a known wrong answer, the
    verdict explains that mistake. Raises CourseError if there is no such exercise.
    """
    if not isinstance(name, str) or name not in all_exercises():
        raise CourseError(f"there is no exercise {name!r}; there are {', '.join(all_exercises())}.")
    verdict = assess(all_exercises()[name], answer)
    print(verdict)
    (_solved.add if verdict else _solved.discard)(name)
    return verdict


_solved: set[str] = set()  # the exercises whose last check in this session was right


def passed(*names: str) -> bool:
    """Whether the last check of each of these exercises was right; if not, print which ones are to be solved first.

    For a cell that uses what the student has written: ``if fe.passed("rope.angles", "rope.rotate"):``.
    """
    for name in names:
        check_choice("the name of an exercise", name, all_exercises(), error=CourseError)
    missing = [name for name in names if name not in _solved]
    if missing:
        print(f"solve {', '.join(missing)} above first; then run this cell again")
    return not missing


@dataclass(frozen=True)
class Outcome:
    """What an answer did with one case: the tensors that it returned, or a sentence about what prevented that."""

    tensors: Sequence[Tensor] = ()
    problem: str = ""


def assess(task: Exercise, answer: Any) -> Verdict:
    """The verdict on an answer, without printing it."""
    cases = task.cases()
    return judge(task, cases, outcomes(task, answer, cases))


def outcomes(task: Exercise, answer: Any, cases: Sequence[tuple]) -> list[Outcome]:
    """What an answer returns for each case, up to the first in which it returns no tensors or changes its input."""
    done: list[Outcome] = []
    for case in cases:
        outcome = _outcome(task, answer, case)
        done.append(outcome)
        if outcome.problem:
            break
    return done


def _outcome(task: Exercise, answer: Any, case: tuple) -> Outcome:
    if answer is None or answer is Ellipsis:
        return Outcome(problem=NOT_WRITTEN)
    inputs = copy.deepcopy(case)
    try:
        with torch.no_grad():
            result = task.call(answer, *inputs)
    except NotImplementedError:
        return Outcome(problem=NOT_WRITTEN)
    except Exception as error:  # noqa: BLE001 - a student's code may raise anything
        text = " ".join(str(error).split())[:160].rstrip(".")
        return Outcome(problem=f"it raises {type(error).__name__}: {text}")
    if result is None:
        return Outcome(problem="it returns None; is there a `return` statement?")
    try:
        tensors = as_tensors(result)
    except (TypeError, RuntimeError, OverflowError):  # no number, an endless list, a number without limits
        return Outcome(problem=f"it returns a {type(result).__name__} instead of a tensor")
    changed = any(_changed(before, after) for before, after in zip(case, inputs, strict=True))
    return Outcome(tensors, CHANGED if changed else "")


def judge(task: Exercise, cases: Sequence[tuple], given: Sequence[Outcome]) -> Verdict:
    """The verdict on what an answer has returned for ``cases``; the answer itself is not needed."""
    reference = task.against or task.solution
    expected = [as_tensors(task.call(reference, *copy.deepcopy(case))) for case in cases]
    for case, outcome, want in zip(cases, given, expected, strict=False):
        if outcome.problem == NOT_WRITTEN:
            return Verdict(task.name, False, NOT_WRITTEN)
        returned = outcome.tensors if outcome.problem in ("", CHANGED) else None
        problem = (None if returned is None else _wrong_form(returned, want)) or outcome.problem
        if problem:
            return Verdict(task.name, False, f"{problem}{_input_shapes(case)}.")
    if len(given) < len(cases):
        return Verdict(task.name, False, f"it returned a result for {len(given)} of {len(cases)} test inputs.")
    actual = [outcome.tensors for outcome in given]
    errors = [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
    if max(errors) <= task.tolerance:
        return Verdict(task.name, True, f"right in {len(cases)} case{'s' * (len(cases) > 1)}.")
    return Verdict(
        task.name, False, _known_mistake(task, cases, actual) or _wrong_values(actual, errors, task.tolerance)
    )


def as_tensors(value: Any) -> list[Tensor]:
    """A result as a flat list of tensors; numbers, strings, tuples and modules are converted."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(value)]
    if isinstance(value, str):
        return [torch.tensor(list(value.encode()))]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in as_tensors(part)]
    if isinstance(value, nn.Module):
        return as_tensors(list(value.parameters()))
    raise TypeError(f"a {type(value).__name__} cannot be converted to tensors")


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of ``|actual - expected| / |expected|`` over pairs of tensors, with the Euclidean norm.

    Infinite if shapes differ, a value is not finite, or a tensor of zeros is expected and another one is there. Every
    tensor is measured against its own size, however small that is.
    """
    if len(actual) != len(expected) or any(x.shape != y.shape for x, y in zip(actual, expected, strict=True)):
        return float("inf")
    largest = 0.0
    for x, y in zip(actual, expected, strict=True):
        x, y = (v.to(torch.complex128 if v.is_complex() else torch.float64) for v in (x, y))
        if torch.equal(x, y):
            continue
        scale = y.abs().max()  # dividing by it first keeps the squares of tiny values from becoming zero
        error = float(((x - y) / scale).abs().square().sum().sqrt() / (y / scale).abs().square().sum().sqrt())
        largest = max(largest, error if error == error else float("inf"))
    return largest


def _wrong_form(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with the number, the shapes or the dtypes of the results, or None."""
    if len(tensors) != len(expected):
        return f"it returns {len(tensors)} tensor{'s' * (len(tensors) != 1)} instead of {len(expected)}"
    for x, y in zip(tensors, expected, strict=True):
        if x.shape != y.shape:
            return f"the shape is {list(x.shape)} but should be {list(y.shape)}"
        if x.is_complex() != y.is_complex():
            kinds = ("complex", "real") if x.is_complex() else ("real", "complex")
            return "the values are {} but should be {}".format(*kinds)
        if y.dtype in (torch.bfloat16, torch.float16) and x.dtype != y.dtype:
            dtypes = [str(v.dtype).removeprefix("torch.") for v in (x, y)]
            return f"the dtype is {dtypes[0]} but should be {dtypes[1]}, like the input's; use `.type_as(...)`"
    return None


def _changed(before: Any, after: Any) -> bool:
    return isinstance(before, Tensor) and not torch.equal(before, after)


def _known_mistake(task: Exercise, cases: Sequence[tuple], actual: Sequence[Sequence[Tensor]]) -> str | None:
    """The message of the known wrong answer that gives the same values in every case, or None."""
    tolerance = max(task.tolerance, 1e-6)
    for known in task.wrong:
        try:
            with torch.no_grad():
                same = [as_tensors(task.call(known.answer, *copy.deepcopy(case))) for case in cases]
        except Exception:  # noqa: BLE001 - some wrong answers raise in some cases
            continue
        if all(relative_error(a, b) <= tolerance for a, b in zip(actual, same, strict=True)):
            return known.message
    return None


def _wrong_values(actual: Sequence[Sequence[Tensor]], errors: list[float], tolerance: float) -> str:
    wrong = [i for i, error in enumerate(errors) if error > tolerance]
    where = "all cases" if len(wrong) == len(errors) > 1 else f"case {wrong[0] + 1} of {len(errors)}"
    if max(errors) < float("inf"):
        what = f"the relative error is {max(errors):.2g}"
    elif all(tensor.isfinite().all() for tensors in actual for tensor in tensors):
        what = "there are values other than the expected zeros"
    else:
        what = "there are NaN or infinite values"
    return f"the shapes are right but the values are wrong: {what} in {where}."


def _input_shapes(case: tuple) -> str:
    shapes = [f"[{', '.join(map(str, x.shape))}]" for x in case if isinstance(x, Tensor)]
    return f" (input shapes: {', '.join(shapes)})" if shapes else ""
