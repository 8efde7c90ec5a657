"""The smallest case that an answer fails, in one line: its inputs, the answer's value and the right one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from fluxedu.course.exercise import Exercise
from fluxedu.course.relations import relative_error, wide


def contents(value: Any) -> Iterator[Any]:
    """The tensors in an input, those in tuples, lists, dicts and modules included, and its keys, numbers and texts."""
    if isinstance(value, (Tensor, int, float, str)):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from (key, *contents(part))
    elif isinstance(value, nn.Module):
        yield from contents(dict(value.state_dict(keep_vars=True)))
    elif isinstance(value, partial):
        yield from contents((value.args, value.keywords))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from contents(part)


def argument_names(task: Exercise) -> list[str]:
    """The names of the arguments in a case, as far as the solution and its ``call`` tell them."""
    inner = getattr(task.solution, "forward", task.solution)
    own = [name for name in inspect.signature(inner).parameters if name != "self"]
    parameters = list(inspect.signature(task.call).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    return named + [name for name in own if name not in named]


def smallest(
    task: Exercise, cases: Sequence[tuple], names: Sequence[str], actual: Sequence, expected: Sequence, errors: list
) -> str:
    """The smallest case in which the values are wrong, and the first place where they differ."""
    size = lambda i: sum(x.numel() if isinstance(x, Tensor) else 1 for x in contents(cases[i]))  # noqa: E731
    i = min((i for i, error in enumerate(errors) if error > task.tolerance), key=size)
    pairs = list(zip(actual[i], expected[i], strict=True))
    number = next(n for n, (x, y) in enumerate(pairs) if relative_error([x], [y]) > task.tolerance)
    x, y = pairs[number]
    allowed = task.tolerance * wide(y).abs().square().mean().sqrt()  # an error beyond it is somewhere
    wrong = ~((wide(x) - wide(y)).abs() <= allowed)
    index = (wrong.nonzero().tolist() or [[0] * wrong.ndim])[0]
    place = f" at {index}" * bool(index) + f" of result {number + 1}" * (len(pairs) > 1)
    values = [v[tuple(index)].item() for v in (x, y)]
    digits = 5 if _number(values[0], 5) != _number(values[1], 5) else 12
    mine, right = (_number(value, digits) for value in values)
    share = f" ({int(wrong.sum())} of {wrong.numel()} values are wrong)" * (wrong.numel() > 1)
    return f"your value{place} is {mine} but should be {right}{share}{inputs_of(cases[i], names)}"


def _number(value: Any, digits: int = 6) -> str:
    return f"{value:.{digits}g}" if isinstance(value, (float, complex)) else repr(value)


def inputs_of(case: tuple, names: Sequence[str]) -> str:
    """The shapes of the tensors in a case, and its numbers: " (inputs: x [2, 3], scale 0.5)"."""
    shown = []
    for value, name in zip(case, [*names, *[""] * len(case)], strict=False):
        if isinstance(value, Tensor):
            numbers = value.tolist() if value.ndim == 1 and len(value) < 5 else value.shape
        elif isinstance(value, (tuple, list)) and value and all(isinstance(x, Tensor) for x in value):
            name, numbers = f"{name} {len(value)} tensors".strip(), value[0].shape
        elif isinstance(value, (bool, int, float, str)):
            numbers = value
        elif isinstance(value, (tuple, list)) and all(isinstance(x, (bool, int, float)) for x in value):
            numbers = value
        else:
            continue
        text = f"[{', '.join(map(_number, numbers))}]" if isinstance(numbers, (tuple, list)) else _number(numbers)
        shown.append(f"{name} {text}".strip())
    return f" (inputs: {', '.join(shown)})" if shown else ""
