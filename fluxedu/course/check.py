"""Checking an answer: is it right, and if not, what is the likely mistake? The verdict is one sentence."""

from __future__ import annotations

import copy
import sysconfig
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.course.failing import argument_names, contents, inputs_of, smallest
from fluxedu.course.relations import relation, relative_error, wide
from fluxedu.errors import CourseError, check_choice

NOT_WRITTEN = "not written yet."
NO_RETURN = "it returns None; is there a `return` statement?"
CHANGED = "it modifies its input in place; create a new tensor instead"
HALF = (torch.bfloat16, torch.float16)
#: the folders of code that no student has written
NOT_STUDENTS = tuple({str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))})


@dataclass(frozen=True)
class Verdict:
    """The result of a check; it is true if the answer is right.

    ``message`` is the sentence that was printed, ``detail`` the line below it, with the smallest input that fails.
    """

    name: str
    passed: bool
    message: str
    detail: str = ""

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        mark = "✓" if self.passed else "○" if self.message == NOT_WRITTEN else "✗"
        return f"{mark} {self.name}: {self.message}" + f"\n  {self.detail}" * bool(self.detail)

    def _ipython_display_(self) -> None:
        """A cell that ends in a check shows nothing more, because the verdict has been printed."""


def check(name: str, answer: Any) -> Verdict:
    """Check ``answer`` to the exercise ``name``, print the verdict and return it.

    The shapes are checked first, then the values, then whether a gradient flows. If the values are wrong, the verdict
    says which known mistake or simple error explains them in every case, and shows the smallest input that fails.
    Raises CourseError if there is no such exercise.
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
    """What an answer did with one case: the tensors that it returned, or a sentence about what prevented that.

    ``gradients`` names the inputs and parameters to which a gradient flows; it is filled in for the first case only.
    """

    tensors: Sequence[Tensor] = ()
    problem: str = ""
    gradients: Sequence[str] = ()


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
            return done
    if done:
        done[0] = Outcome(done[0].tensors, gradients=gradients(task, answer, cases[0]))
    return done


def _outcome(task: Exercise, answer: Any, case: tuple) -> Outcome:
    if answer is None or answer is Ellipsis:
        return Outcome(problem=NOT_WRITTEN)
    inputs = copy.deepcopy(case)
    try:
        result = task.call(answer, *inputs)
    except NotImplementedError:
        return Outcome(problem=NOT_WRITTEN)
    except Exception as error:  # noqa: BLE001 - a student's code may raise anything
        return Outcome(problem=_raised(error))
    if result is None:
        return Outcome(problem=NO_RETURN)
    try:
        tensors = as_tensors(result)
    except (TypeError, RuntimeError, OverflowError):  # no number, an endless list, a number without limits
        what = f"a {type(result).__name__}"
        if isinstance(result, (tuple, list)) and any(part is None for part in result):
            what += " with None in it"
        return Outcome(problem=f"it returns {what} instead of a tensor")
    before, after = list(contents(case)), list(contents(inputs))
    same = len(before) == len(after) and all(map(_equal, before, after))
    return Outcome(tensors, "" if same else CHANGED)


def _raised(error: Exception) -> str:
    """The sentence about an error: its type and text, and the last line of the student's code on the way to it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [i for i, frame in enumerate(frames) if not frame.filename.startswith((*NOT_STUDENTS, "<frozen"))]
    text = " ".join(str(error).split())[:160].rstrip(".")
    if not own:
        is_none = isinstance(error, (TypeError, AttributeError)) and "NoneType" in text
        return NO_RETURN if is_none else f"it raises {type(error).__name__}: {text}"
    line = frames[own[-1]]
    code = f": `{line.line.strip()[:80]}`" if line.line else ""
    return f"it raises {type(error).__name__}: {text}, in line {line.lineno}{code}"


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 0, 0, equal_nan=True)


def gradients(task: Exercise, answer: Any, case: tuple) -> tuple[str, ...]:
    """The inputs and parameters to which a gradient flows from the result, by name: "an input of shape [2, 3]"."""
    inputs = copy.deepcopy(case)
    leaves = {id(x): x for x in contents(inputs) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())}
    for x in leaves.values():
        x.requires_grad_()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about numbers taken out of tensors
            waiting = [x.grad_fn for x in _attached(task.call(answer, *inputs)) if x.grad_fn is not None]
    except Exception:  # noqa: BLE001 - such as the conversion to numpy of a tensor that has a gradient
        return ()
    found, seen = [], set(waiting)
    while waiting:
        node = waiting.pop()
        if (x := getattr(node, "variable", None)) is not None:  # the node of a leaf
            found.append(f"{'an input' if id(x) in leaves else 'a parameter'} of shape {list(x.shape)}")
        new = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= new
        waiting += new
    return tuple(sorted(found))


def judge(task: Exercise, cases: Sequence[tuple], given: Sequence[Outcome]) -> Verdict:
    """The verdict on what an answer has returned for ``cases``; the answer itself is not needed."""
    names = argument_names(task)
    expected = [right_values(task, case) for case in cases]
    context = (cases, names, task.tolerance, partial(right_values, task))
    for case, outcome, want in zip(cases, given, expected, strict=False):
        if outcome.problem == NOT_WRITTEN:
            return Verdict(task.name, False, NOT_WRITTEN)
        returned = outcome.tensors if outcome.problem in ("", CHANGED) else None
        form = None if returned is None else _wrong_form(_regrouped(returned, want), want)
        problem = form or outcome.problem
        if form and len(given) == len(cases) and (related := relation([o.tensors for o in given], expected, *context)):
            problem += f": {related}"
        if problem:
            return Verdict(task.name, False, f"{problem}{inputs_of(case, names)}.")
    if len(given) < len(cases):
        return Verdict(task.name, False, f"it returned a result for {len(given)} of {len(cases)} test inputs.")
    actual = [_regrouped(outcome.tensors, want) for outcome, want in zip(given, expected, strict=True)]
    errors = [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
    if max(errors) <= task.tolerance:
        problem = _unusable(task, cases, given)
        return Verdict(task.name, not problem, problem or f"right in {len(cases)} case{'s' * (len(cases) > 1)}.")
    message = _known_mistake(task, cases, actual)
    if not message:
        related = relation(actual, expected, *context)
        message = f"{related}." if related else _wrong_values(actual, errors, task.tolerance)
    return Verdict(task.name, False, message, smallest(task, cases, names, actual, expected, errors))


def right_values(task: Exercise, case: tuple) -> list[Tensor]:
    """The tensors that the answer to a case should return."""
    return _values(task, task.against or task.solution, case)


def _values(task: Exercise, answer: Any, case: tuple) -> list[Tensor]:
    """What fluxedu's own answer, a right or a wrong one, returns, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return as_tensors(task.call(answer, *copy.deepcopy(case)))


def as_tensors(value: Any) -> list[Tensor]:
    """A result as a flat list of tensors; numbers, strings, tuples and modules are converted."""
    return [x.detach() for x in _attached(value)]


def _attached(value: Any) -> list[Tensor]:
    """As :func:`as_tensors`, with gradients."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _attached(value.tolist())
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(value)]
    if isinstance(value, str):
        return [torch.tensor(list(value.encode()))]
    if isinstance(value, (list, tuple, range)):
        return [tensor for part in value for tensor in _attached(part)]
    if isinstance(value, nn.Module):
        return _attached(list(value.parameters()))
    raise TypeError(f"a {type(value).__name__} cannot be converted to tensors")


def _regrouped(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> Sequence[Tensor]:
    """Numbers where one tensor with one dim is expected, as that tensor; and the other way round."""
    if len(expected) == 1 < len(tensors) and expected[0].ndim == 1 and all(x.ndim == 0 for x in tensors):
        return [torch.stack([x.to(tensors[0]) for x in map(wide, tensors)])]
    if len(tensors) == 1 < len(expected) and tensors[0].ndim == 1 and all(y.ndim == 0 for y in expected):
        return list(tensors[0])
    return tensors


def _wrong_form(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with the number, the shapes or the dtypes of the results, or None."""
    if len(tensors) != len(expected):
        if len(expected) == 1 and tensors and all(x.ndim == 0 for x in tensors):
            return f"it returns {len(tensors)} numbers instead of a tensor of shape {list(expected[0].shape)}"
        return f"it returns {len(tensors)} tensor{'s' * (len(tensors) != 1)} instead of {len(expected)}"
    for x, y in zip(tensors, expected, strict=True):
        if x.shape != y.shape:
            return f"the shape is {list(x.shape)} but should be {list(y.shape)}"
        if x.is_complex() != y.is_complex():
            kinds = ("complex", "real") if x.is_complex() else ("real", "complex")
            return "the values are {} but should be {}".format(*kinds)
        if y.dtype in HALF and x.dtype != y.dtype:
            return f"the dtype is {_dtype(x)} but should be {_dtype(y)}, like the input's; use `.type_as(...)`"
    return None


def _unusable(task: Exercise, cases: Sequence[tuple], given: Sequence[Outcome]) -> str:
    """Why right values cannot be used in the cells that follow, or an empty text."""
    for case, outcome in zip(cases, given, strict=True):
        wanted = _values(task, task.solution, case)
        takes_tensors = any(isinstance(x, Tensor) and x.is_floating_point() for x in contents(case))
        if len(wanted) != len(outcome.tensors) and takes_tensors and wanted[0].ndim:
            return "the values are right, but a list of numbers is not a tensor; return `torch.tensor(...)`."
        for x, y in zip(outcome.tensors, wanted, strict=False):
            kinds_differ = x.is_floating_point() != y.is_floating_point()
            too_wide = takes_tensors and x.dtype == torch.float64 != y.dtype and y.ndim > 1
            if y.ndim and x.ndim and (kinds_differ or too_wide):
                return f"the values are right, but their dtype is {_dtype(x)}; it should be {_dtype(y)}."
    missing = Counter(gradients(task, task.solution, cases[0])) - Counter(given[0].gradients) if cases else Counter()
    missing = [name for name in missing if isinstance(task.solution, type) or name.startswith("an input")]
    if task.gradient and missing:
        return (
            f"the values are right, but no gradient flows back to {missing[0]}; compute with tensors throughout, "
            "without `detach`, `.data`, `.item()`, numpy or `no_grad`."
        )
    return ""


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _known_mistake(task: Exercise, cases: Sequence[tuple], actual: Sequence[Sequence[Tensor]]) -> str | None:
    """The message of the known wrong answer that gives the same values in every case, or None."""
    tolerance = max(task.tolerance, 1e-6)
    for known in task.wrong:
        try:
            same = [_values(task, known.answer, case) for case in cases]
        except Exception:  # noqa: BLE001 - some wrong answers raise in some cases
            continue
        if all(_same_values(a, b, tolerance) for a, b in zip(actual, same, strict=True)):
            return known.message
    return None


def _same_values(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float) -> bool:
    """Whether two results have NaN in the same places and are equal elsewhere."""
    nans = [[x.isnan() for x in tensors] for tensors in (a, b)]
    if len(a) != len(b) or not all(map(torch.equal, *nans)):
        return False
    without = [[x.masked_fill(nan, 0) for x, nan in zip(*pair, strict=True)] for pair in zip((a, b), nans, strict=True)]
    return relative_error(*without) <= tolerance


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
