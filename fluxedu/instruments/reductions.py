"""Reductions: what is kept of a value instead of all of it, computed where the value is.

Each is a function ``Named -> Named``, made anew for every site, so it may remember earlier steps (it then says how much
in ``nbytes``, for the budget); None means that there is nothing to keep yet. An object with a ``site`` is told there
which site the value is of, and serves all sites: it may put together what passes at several. An attention map arrives
as a :class:`MapView` and is never made whole unless asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fluxedu.errors import BudgetError, InstrumentError, describe
from fluxedu.instruments.named import Named
from fluxedu.models.attention_map import AttentionMap, at_least_float32

MAP_AXES = ("batch", "head", "query", "key")


class MapView:
    """A lazy map, and which heads, queries and keys of it are wanted (None: all); at most ``budget`` bytes of it.

    ``labels`` name the chosen keys.
    """

    axes = MAP_AXES

    def __init__(
        self,
        lazy: AttentionMap,
        heads: list[int] | None = None,
        queries: slice | list[int] = slice(None),
        keys: list[int] | None = None,
        labels: list[str] | None = None,
        budget: int | None = None,
    ):
        self.lazy, self.heads, self.queries, self.keys = lazy, heads, queries, keys
        self.labels, self.budget = labels, budget
        for axis, chosen in (("query", queries), ("key", keys)):
            wrong = [] if chosen is None or isinstance(chosen, slice) else [i for i in chosen if not 0 <= i < self._all]
            if wrong:
                raise InstrumentError(f"axis {axis!r} has {self._all} places, so there is no {wrong[0]}.")
        if keys is not None:
            _ = lazy.lse  # of all heads, since the attention itself comes with it
        self.few = lazy if heads is None else lazy.heads(heads)

    @property
    def _all(self) -> int:
        return self.lazy.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        b, h, n, m = self.few.shape
        rows = len(range(n)[self.queries]) if isinstance(self.queries, slice) else len(self.queries)
        return (b, h, rows, m if self.keys is None else len(self.keys))

    def take(self, name: str, index: list[int]) -> MapView:
        """The same view of other queries or keys, by their places in the whole map."""
        if name == "query":
            return MapView(self.lazy, self.heads, index, self.keys, self.labels, self.budget)
        if self.keys is not None:
            raise InstrumentError("tokens= has chosen the keys already, so columns= cannot; leave one of them out.")
        return MapView(self.lazy, self.heads, self.queries, index, None, self.budget)

    def made(self) -> Named:
        """The wanted part as a tensor: by columns when keys are chosen, else by rows."""
        b, h, n, m = self.shape
        if self.budget is not None and 4 * b * h * n * m > self.budget:
            raise BudgetError(
                f"this part of the map takes {4 * b * h * n * m:,} bytes, the budget is {self.budget:,}: "
                f"choose heads=, tokens= or reduce='head-mean', or allow more (budget={4 * b * h * n * m})."
            )
        if self.keys is not None:
            return self._named(self.few.columns(self.keys, self.queries), MAP_AXES)
        return self._named(self.few.rows(self.queries), MAP_AXES)

    def head_mean(self) -> Named:
        """The mean over the wanted heads, one head at a time, so that no map of all heads is ever there."""
        mean = self.few.head_mean(self.queries, self.keys)
        return self._named(mean, tuple(a for a in MAP_AXES if a != "head"))

    def _named(self, tensor: Tensor, axes: tuple[str, ...]) -> Named:
        return Named(tensor, axes, {} if self.labels is None else {"key": self.labels})


Value = Named | MapView
Reduction = Callable[[Value], Named | None]


def made(value: Value) -> Named:
    """The value as a tensor."""
    return value.made() if isinstance(value, MapView) else value


def real(value: Value) -> Named:
    """The value as a tensor of ordinary numbers; raises InstrumentError for complex ones (``attn.rope``)."""
    x = made(value)
    if x.tensor.is_complex():
        raise InstrumentError("these values are complex, so this reduction has no meaning; take them as they are.")
    return x


def head_mean(value: Value) -> Named:
    """The mean over heads."""
    return value.head_mean() if isinstance(value, MapView) else value.mean("head")


def entropy(value: Value) -> Named:
    """How widely each query looks, in nats: of a whole map exactly and without making it."""
    if isinstance(value, MapView) and value.keys is None:
        return Named(value.few.entropy()[:, :, value.queries], MAP_AXES[:3])
    p = real(value)
    if bool((p.tensor < 0).any()):
        raise InstrumentError("only shares have an entropy, and some of these values are below zero.")
    return p.dropped(p.axes[-1], torch.special.entr(p.tensor).sum(-1))


def norm(value: Value) -> Named:
    """The length (L2) of the vectors along the last axis."""
    x = made(value)
    return x.dropped(x.axes[-1], torch.linalg.vector_norm(x.tensor, dim=-1))


def rms(value: Value) -> Named:
    """The root mean square along the last axis."""
    x = made(value)
    return x.dropped(x.axes[-1], x.tensor.abs().square().mean(-1).sqrt())


def summary(value: Value) -> Named:
    """Four numbers, axis ``number``: mean, spread, least and most; of a map, of how much each key is looked at."""
    x = value.head_mean().tensor.sum(-2) if isinstance(value, MapView) else made(value).tensor
    x = (x.angle() if x.is_complex() else x).float()  # a turn is its angle
    numbers = torch.stack([x.mean(), x.std(correction=0), x.min(), x.max()])
    return Named(numbers, ("number",), {"number": ["mean", "spread", "least", "most"]})


def mean(*names: str) -> Reduction:
    """The mean over the named axes, e.g. ``mean("query")``."""

    def reduction(value: Value) -> Named:
        x = made(value)
        for name in names:
            x = x.mean(name)
        return x

    return reduction


def rows(index: Sequence[int]) -> Reduction:
    """What some queries look at, by their places among all tokens, text first."""
    return lambda value: made(value.take("query", list(index)))


def columns(index: Sequence[int]) -> Reduction:
    """What the queries take from some keys, by their places among all tokens, exact by the log-sum-exp."""
    return lambda value: made(value.take("key", list(index)))


def top(count: int) -> Reduction:
    """The ``count`` largest along the last axis, and where: axes ``rank`` and ``what`` (value, place) in its stead."""

    def reduction(value: Value) -> Named:
        x = real(value)
        if count > x.shape[-1]:
            raise InstrumentError(f"axis {x.axes[-1]!r} has {x.shape[-1]} places, so there is no top {count}.")
        largest = at_least_float32(x.tensor).topk(count, dim=-1)  # float32 at least, or the places would be rounded
        pair = torch.stack([largest.values, largest.indices.to(largest.values.dtype)], dim=-1)
        return Named(pair, (*x.axes[:-1], "rank", "what"), {"what": ["value", "place"]})

    return reduction


class cosine:  # noqa: N801 - a function with a memory
    """How alike the vectors along the last axis are to those of the step before; nothing for the first step.

    Of a solver that asks twice a step (midpoint, heun), each question is compared with the same one before.
    """

    question = 0  # which one of the step, told by the recorder

    def __init__(self):
        self.before: dict[int, Named] = {}

    def __call__(self, value: Value) -> Named | None:
        x, before = real(value), self.before.get(self.question)
        self.before[self.question] = x
        if before is None or before.shape != x.shape:
            return None
        return x.dropped(x.axes[-1], torch.cosine_similarity(before.tensor, x.tensor, dim=-1))

    @property
    def nbytes(self) -> int:
        return sum(x.tensor.nbytes for x in self.before.values())


class step_mean:  # noqa: N801 - a function with a memory
    """The running mean over steps: one value a picture is kept, whatever the number of steps."""

    over_steps = True

    def __init__(self):
        self.total, self.count = None, 0

    def __call__(self, value: Value) -> Named:
        x = real(value)
        if self.total is not None and self.total.shape != x.shape:
            raise InstrumentError(
                f"a mean over steps needs values of one shape, not {list(self.total.shape)} and then {list(x.shape)}; "
                f"where guidance comes and goes, say passes='prompted'."
            )
        self.count += 1
        self.total = x.tensor.double() + (0 if self.total is None else self.total)
        return Named((self.total / self.count).to(x.tensor.dtype), x.axes, x.coords)

    @property
    def nbytes(self) -> int:
        return 0 if self.total is None else self.total.nbytes


#: by name; each entry makes a fresh one
NAMES: dict[str, Callable[[], Reduction]] = {
    "head-mean": lambda: head_mean,
    "entropy": lambda: entropy,
    "norm": lambda: norm,
    "rms": lambda: rms,
    "summary": lambda: summary,
    "cosine": cosine,
    "step-mean": step_mean,
}


def maker(reduce) -> Callable[[], list[Reduction]]:
    """What ``reduce=`` was given (a name, a function, a list of both, or nothing) as a maker of fresh reductions."""
    steps = [] if reduce is None else list(reduce) if isinstance(reduce, (list, tuple)) else [reduce]
    makers = [_one(step) for step in steps]
    return lambda: [make() for make in makers]


def _one(step) -> Callable[[], Reduction]:
    if isinstance(step, str):
        if step in NAMES:
            return NAMES[step]
        head, _, number = step.partition("-")
        if head == "top" and number.isdigit() and int(number):
            return lambda: top(int(number))
        raise InstrumentError(f"reduce must be one of {', '.join(NAMES)}, top-8 or a function, not {describe(step)}.")
    if step is cosine or step is step_mean:
        return step
    if callable(step):
        return lambda: step
    raise InstrumentError(f"reduce must be a name, a function or a list of them, not {describe(step)}.")
