"""How a wrong answer is related to the right one: simple errors, each a sentence and a transformation.

:func:`relation` returns the sentence of the first error that gives the answer's values in every case. Some errors
change the right values (`of_values`: another sign, a factor, exchanged dims), others the inputs that the right answer
was called with (`of_inputs`: two arguments exchanged, one not used); `up_to` says what is right about the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor

MOST_INPUTS = 24  # if a case has more tensors and numbers, they are not altered one by one
TOLERANCE = 1e-5  # of the comparison, in float32, where the exercise's own is smaller
AXES = (-1, -2, 0, 1)


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of ``|actual - expected| / |expected|`` over pairs of tensors, with the Euclidean norm.

    Infinite if shapes differ, a value is not finite, or a tensor of zeros is expected and another one is there. Every
    tensor is measured against its own size, however small that is.
    """
    if len(actual) != len(expected) or any(x.shape != y.shape for x, y in zip(actual, expected, strict=True)):
        return float("inf")
    largest = 0.0
    for x, y in zip(actual, expected, strict=True):
        x, y = wide(x), wide(y)
        if torch.equal(x, y):
            continue
        scale = y.abs().max()  # dividing by it first keeps the squares of tiny values from becoming zero
        error = float(((x - y) / scale).abs().square().sum().sqrt() / (y / scale).abs().square().sum().sqrt())
        largest = max(largest, error if error == error else float("inf"))
    return largest


def wide(x: Tensor) -> Tensor:
    """The tensor in float64, or complex128."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def relation(
    got: Sequence[Sequence[Tensor]],
    want: Sequence[Sequence[Tensor]],
    cases: Sequence[tuple],
    names: Sequence[str],
    tolerance: float,
    call: Callable[[tuple], Sequence[Tensor]],
) -> str | None:
    """The sentence of the first error that explains the answer's tensors ``got`` in every case, or None.

    ``names`` are those of the arguments in a case, and ``call`` computes the right tensors for a case.
    """
    count, tolerance = len(want[0]), max(tolerance, TOLERANCE)
    if any(len(x) != count for x in (*got, *want)) or not all(x.isfinite().all() for xs in got for x in xs):
        return None

    def explains(error: Callable, trials: Sequence[tuple]) -> bool:
        try:
            return all(relative_error(*map(list, zip(*error(*trial), strict=True))) <= tolerance for trial in trials)
        except Exception:  # noqa: BLE001 - an error that does not apply to these shapes
            return False

    for order in list(permutations(range(count)))[1:] if count < 7 else ():
        if explains(
            lambda xs, ys, o=order: [(x, ys[i]) for x, i in zip(xs, o, strict=True)], list(zip(got, want, strict=True))
        ):
            return (
                f"the results are right but in another order: yours are number {', '.join(str(i + 1) for i in order)}"
            )
    wrong: dict[int, list[tuple]] = {}  # by the number of the result: the answer's tensor, the right one, the case
    for xs, ys, case in zip(got, want, cases, strict=True):
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if relative_error([x], [y]) > tolerance:
                wrong.setdefault(i, []).append((wide(x), wide(y), case))
    trials = [trial for tensor in wrong.values() for trial in tensor]
    if not trials or any(not y.any() for _, y, _ in trials):  # nothing can be told from zeros
        return None
    place = f"in result {min(wrong) + 1} of {count}, " if len(wrong) == 1 < count else ""
    for sentence, missing, change in of_values(cases[0], names):
        if explains(lambda x, y, case, f=change: [(x, f(y, case))], trials):
            return place + sentence
        if missing and explains(lambda x, y, case, f=change: [(f(x, case), y)], trials):
            return place + missing
    for sentence, change in of_inputs(cases[0], names):
        if explains(lambda xs, case, f=change: zip(xs, call(f(case)), strict=True), list(zip(got, cases, strict=True))):
            return sentence
    for sentence, same in up_to():
        if explains(lambda x, y, _, f=same: [(x, f(x, y))], trials):
            return place + sentence
    return None


def of_values(case: tuple, names: Sequence[str]) -> Iterator[tuple[str, str, Callable[[Tensor, tuple], Tensor]]]:
    """Errors that change the right values: the sentence, that of the opposite error, and the transformation."""

    def simple(sentence: str, change: Callable[[Tensor], Tensor], missing: str = ""):
        return sentence, missing, lambda x, _: change(x)

    def function(name: str, change: Callable[[Tensor], Tensor]):
        return simple(f"{name} is applied to the right values", change, f"{name} is missing")

    yield simple("all values are 0", torch.zeros_like)
    yield simple("the values have the wrong sign", torch.neg)
    yield simple("the values are 1 minus the right ones", lambda x: 1 - x)
    yield simple("the values are 1 too large", lambda x: x + 1, "the values are 1 too small")
    for factor in (2, 3, 4, 10, 1000, torch.pi, 2 * torch.pi, 2**0.5):
        much, little = f"the values are {factor:.4g} times the right ones", "the values are the right ones divided by "
        yield simple(much, lambda x, f=factor: f * x, f"{little}{factor:.4g}")
    for power, root in ((0.5, "the square root of "), (1, "")):
        for name, size in {
            **{f"the size of the first tensor's dim {a}": lambda x, c, a=a: _tensors(c)[0].shape[a] for a in AXES},
            "the number of values": lambda x, c: x.numel(),
            "the number of values in the first tensor": lambda x, c: _tensors(c)[0].numel(),
        }.items():
            much, little = (f"the values are the right ones {how} {root}{name}" for how in ("times", "divided by"))
            yield much, little, lambda x, c, p=power, size=size: x * size(x, c) ** p
    for keys, name in places(case, names):
        yield f"the result is `{name}` itself", "", lambda x, c, k=keys: _read(c, k) + 0 * x
        much, little = f"`{name}` is added once too often", f"`{name}` must still be added, or is subtracted too often"
        yield much, little, lambda x, c, k=keys: x + _read(c, k)
        much, little = (
            f"the result is multiplied by `{name}` once too often",
            f"the result must be multiplied by `{name}`",
        )
        yield much, little, lambda x, c, k=keys: x * _read(c, k)
    for name, change in {
        "a square": torch.square, "an exponential": torch.exp, "a reciprocal, 1 / x,": torch.reciprocal,
        "a sigmoid": torch.sigmoid, "a tanh": torch.tanh, "a clamp at 0": torch.relu, "an absolute value": torch.abs,
        "a clamp to the range from 0 to 1": lambda x: x.clamp(0, 1), "a rounding to integers": torch.round,
        "a rounding down to integers": torch.floor,
    }.items():  # fmt: skip
        yield function(name, change)
    for axis in AXES:
        yield function(f"a softmax over dim {axis}", lambda x, a=axis: x.softmax(a))
        yield function(f"a subtraction of the mean over dim {axis}", lambda x, a=axis: x - x.mean(a, keepdim=True))
        yield function(f"a scaling to length 1 over dim {axis}", lambda x, a=axis: x / x.norm(dim=a, keepdim=True))
        yield function(f"a mean over dim {axis}", lambda x, a=axis: x.mean(a))
        yield function(f"a sum over dim {axis}", lambda x, a=axis: x.sum(a))
        yield function(f"an `unsqueeze({axis})`", lambda x, a=axis: x.unsqueeze(a))
        yield simple(f"the order is reversed along dim {axis}", lambda x, a=axis: x.flip(a))
        shifted = f"the values are shifted by one place along dim {axis}"
        yield simple(shifted, lambda x, a=axis: x.roll(1, a), shifted)
        for count, name in ((2, "halves"), (3, "thirds"), (4, "quarters"), (6, "sixths")):
            for order in (
                list(permutations(range(count)))[1:] if count < 5 else [(1, 0, 2, 4, 3, 5), (3, 4, 5, 0, 1, 2)]
            ):
                change = lambda x, n=count, a=axis, o=order: torch.cat([x.chunk(n, a)[i] for i in o], a)  # noqa: E731
                yield simple(f"the {name} along dim {axis} are in another order", change)
        for count in (2, 3, 4, 5, 6, 8):
            mixed = f"along dim {axis} the values are interleaved differently, in groups of {count}"
            mixed = f"halves and neighbours are confused along dim {axis}" if count == 2 else mixed
            yield simple(mixed, lambda x, n=count, a=axis: _interleaved(x, n, a % x.ndim), mixed)
    for order in (order for ndim in (2, 3, 4) for order in list(permutations(range(ndim)))[1:]):
        dims = "rows and columns are" if len(order) == 2 else f"dims are in another order, {order},"
        yield simple(
            f"the {dims} exchanged" if len(order) == 2 else f"the {dims} than they should be",
            lambda x, o=order: x.permute(o),
        )
        yield simple(
            "the order of the dims is wrong before the last reshape", lambda x, o=order: x.permute(o).reshape(x.shape)
        )


def up_to() -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """What is right about wrong values: they agree with the right ones up to factors, terms, signs or their order."""
    yield "the values are proportional to the right ones: a constant factor is wrong", _scaled
    yield "the values differ from the right ones by a constant that is added or subtracted", _moved
    for axis in AXES[:3]:
        advice = "look at what is multiplied, divided or normalised there"
        yield (
            f"the values are right up to a factor for each index of dim {axis}: {advice}",
            lambda x, y, a=axis: _scaled(x, y, a),
        )
        advice = "look at what is added or subtracted there, such as a bias, a shift or a mean"
        yield (
            f"the values are right up to a term for each index of dim {axis}: {advice}",
            lambda x, y, a=axis: _moved(x, y, a),
        )
        yield f"the values along dim {axis} are right but in another order", lambda x, y, a=axis: _reordered(x, y, a)
    yield "the numbers are right but in another order", lambda x, y: _reordered(x.flatten(), y.flatten(), 0).view_as(x)
    yield "the sizes are right, but some values have the wrong sign", lambda x, y: y.abs() * x.sign()


def _shared(x: Tensor, y: Tensor, axis: int | None) -> list[int]:
    """The dims other than ``axis``. Raises ValueError if too few values share a factor or a term to mean anything."""
    if x.shape != y.shape or y.numel() < 3 * (1 if axis is None else y.shape[axis]):
        raise ValueError
    return [i for i in range(y.ndim) if axis is None or i != axis % y.ndim]


def _scaled(x: Tensor, y: Tensor, axis: int | None = None) -> Tensor:
    """``y`` times the factor that brings it nearest to ``x``: one for all, or one for each index of ``axis``."""
    dims = _shared(x, y, axis)
    return y * (x * y).sum(dims, keepdim=True) / y.square().sum(dims, keepdim=True)


def _moved(x: Tensor, y: Tensor, axis: int | None = None) -> Tensor:
    return y + (x - y).mean(_shared(x, y, axis), keepdim=True)


def _reordered(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """``x``, if sorting makes it equal to ``y``."""
    if y.unique().numel() < 4 or relative_error([x.sort(axis)[0]], [y.sort(axis)[0]]) > TOLERANCE:
        raise ValueError
    return x


def _interleaved(x: Tensor, count: int, axis: int) -> Tensor:
    return x.unflatten(axis, (count, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)


# ---------------------------------------------------------------- errors in the use of the inputs


def places(case: Any, names: Sequence[str], keys: tuple = (), name: str = "") -> Iterator[tuple[tuple, str]]:
    """Where a case holds tensors and numbers: the keys that lead there, and what it is called."""
    if isinstance(case, (Tensor, int, float)) and not isinstance(case, bool):
        yield keys, name
    elif isinstance(case, dict):
        for key in case:
            yield from places(case[key], names, (*keys, key), str(key))
    elif isinstance(case, (tuple, list)) and name != "arguments":
        for i, part in enumerate(case):
            label = f"{name}[{i}]" if name else names[i] if i < len(names) else f"input {i + 1}"
            yield from places(part, names, (*keys, i), label)


def _tensors(case: tuple) -> list[Tensor]:
    return [x for keys, _ in places(case, ()) if isinstance(x := _read(case, keys), Tensor)]


def _read(case: Any, keys: tuple) -> Any:
    return _read(case[keys[0]], keys[1:]) if keys else case


def _with(case: Any, keys: tuple, value: Any) -> Any:
    """A copy of a case with another value in one place. Raises ValueError if the value is not finite."""
    if not keys:
        if not torch.as_tensor(value).isfinite().all():
            raise ValueError
        return value
    key, *rest = keys
    if isinstance(case, dict):
        return case | {key: _with(case[key], rest, value)}
    return type(case)(_with(part, rest, value) if i == key else part for i, part in enumerate(case))


def of_inputs(case: tuple, names: Sequence[str]) -> Iterator[tuple[str, Callable[[tuple], tuple]]]:
    """Errors that change the inputs of the right answer: two of them are exchanged, one is not used, and so on."""
    known = list(places(case, names))
    if len(known) > MOST_INPUTS:
        return
    for (p, name), (q, other) in combinations(known, 2):
        a, b = _read(case, p), _read(case, q)
        if type(a) is type(b) and (not isinstance(a, Tensor) or a.shape == b.shape):
            exchanged = lambda c, p=p, q=q: _with(_with(c, p, _read(c, q)), q, _read(c, p))  # noqa: E731
            yield f"`{name}` and `{other}` are exchanged", exchanged
            yield f"`{other}` is used in place of `{name}`", lambda c, p=p, q=q: _with(c, p, _read(c, q))
            yield f"`{name}` is used in place of `{other}`", lambda c, p=p, q=q: _with(c, q, _read(c, p))
    changes = {
        "is not used": lambda x: x * 0, "is used as if it were 1": lambda x: x * 0 + 1,
        "has the wrong sign": lambda x: -x, "is used where 1 minus it is needed": lambda x: 1 - x,
        "needs an added 1": lambda x: x - 1, "has a 1 added that does not belong there": lambda x: x + 1,
        "is squared, or used twice": lambda x: x * x, "is used where its square is needed": lambda x: x**0.5,
        "counts double": lambda x: 2 * x, "counts half": lambda x: x / 2, "is inverted": lambda x: 1 / x,
        "is 1000 times too large": lambda x: 1000 * x, "is 1000 times too small": lambda x: x / 1000,
        "is transposed": lambda x: x.mT,
    }  # fmt: skip
    for axis in AXES:
        changes[f"is reversed along dim {axis}"] = lambda x, a=axis: x.flip(a)
        changes[f"is shifted by one place along dim {axis}"] = lambda x, a=axis: x.roll(1, a)
        changes[f"is shifted back by one place along dim {axis}"] = lambda x, a=axis: x.roll(-1, a)
        changes[f"has its halves along dim {axis} exchanged"] = lambda x, a=axis: torch.cat(x.chunk(2, a)[::-1], a)
    for (p, name), (sentence, change) in ((place, item) for place in known for item in changes.items()):
        yield f"`{name}` {sentence}", lambda c, p=p, f=change: _with(c, p, f(_read(c, p)))
