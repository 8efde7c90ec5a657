"""Reductions: what is kept of a value instead of all of it, computed where the value is.

Each is a function ``Named -> Named``, made anew for every site, so it may remember earlier steps; None means that
there is nothing to keep yet. An attention map arrives as a :class:`MapView` and is never made whole unless asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fluxedu.instruments.errors import InstrumentError
from fluxedu.instruments.named import Named
from fluxedu.models.attention_map import AttentionMap

MAP_AXES = ("batch", "head", "query", "key")


class MapView:
    """A lazy map, and which heads, queries and keys of it are wanted (None: all)."""

    axes = MAP_AXES

    def __init__(self, lazy: AttentionMap, heads: list[int] | None, queries: slice | list[int], keys: list[int] | None):
        self.lazy, self.heads, self.queries, self.keys = lazy, heads, queries, keys
        if heads is not None:
            few = torch.as_tensor(heads, device=lazy.q.device)
            self.few = AttentionMap(lazy.q[:, few], lazy.k[:, few], None if lazy.v is None else lazy.v[:, few])
            self.few._lse = lazy.lse[:, few] if keys is not None else None
        else:
            self.few = lazy

    @property
    def shape(self) -> tuple[int, ...]:
        b, h, n, m = self.few.shape
        rows = len(range(n)[self.queries]) if isinstance(self.queries, slice) else len(self.queries)
        return (b, h, rows, m if self.keys is None else len(self.keys))

    def made(self) -> Named:
        """The wanted part as a tensor: by columns when keys are chosen, else by rows."""
        if self.keys is not None:
            return Named(self.few.columns(self.keys, self.queries), MAP_AXES)
        return Named(self.few.rows(self.queries), MAP_AXES)

    def head_mean(self) -> Named:
        """The mean over the wanted heads, one head at a time, so that no map of all heads is ever there."""
        axes = tuple(a for a in MAP_AXES if a != "head")
        total: Tensor | float = 0.0
        lse = self.few.lse if self.keys is not None else None
        for h in range(self.few.shape[1]):
            one = AttentionMap(self.few.q[:, h : h + 1], self.few.k[:, h : h + 1])
            one._lse = None if lse is None else lse[:, h : h + 1]
            part = one.rows(self.queries) if self.keys is None else one.columns(self.keys, self.queries)
            total = total + part[:, 0]
        return Named(total / self.few.shape[1], axes)


Value = Named | MapView
Reduction = Callable[[Value], Named | None]


def made(value: Value) -> Named:
    """The value as a tensor."""
    return value.made() if isinstance(value, MapView) else value


def head_mean(value: Value) -> Named:
    """The mean over heads."""
    return value.head_mean() if isinstance(value, MapView) else value.mean("head")


def entropy(value: Value) -> Named:
    """How widely each query looks, in nats: of a whole map exactly and without making it."""
    if isinstance(value, MapView) and value.keys is None:
        return Named(value.few.entropy()[:, :, value.queries], MAP_AXES[:3])
    p = made(value)
    return p.dropped(p.axes[-1], torch.special.entr(p.tensor).sum(-1))


def norm(value: Value) -> Named:
    """The length (L2) of the vectors along the last axis."""
    x = made(value)
    return x.dropped(x.axes[-1], torch.linalg.vector_norm(x.tensor, dim=-1))


def rms(value: Value) -> Named:
    """The root mean square along the last axis."""
    x = made(value)
    return x.dropped(x.axes[-1], x.tensor.square().mean(-1).sqrt())


def mean(*names: str) -> Reduction:
    """The mean over the named axes, e.g. ``mean("query")``."""

    def reduction(value: Value) -> Named:
        x = made(value)
        for name in names:
            x = x.mean(name)
        return x

    return reduction


def rows(index: Sequence[int]) -> Reduction:
    """What some queries look at."""

    def reduction(value: Value) -> Named:
        if not isinstance(value, MapView):
            return value.take("query", list(index))
        return MapView(value.lazy, value.heads, list(index), value.keys).made()

    return reduction


def columns(index: Sequence[int]) -> Reduction:
    """What the queries take from some keys, exact by the log-sum-exp."""

    def reduction(value: Value) -> Named:
        if not isinstance(value, MapView):
            return value.take("key", list(index))
        return MapView(value.lazy, value.heads, value.queries, list(index)).made()

    return reduction


def top(count: int) -> Reduction:
    """The ``count`` largest along the last axis, and where: axes ``rank`` and ``what`` (value, place) in its stead."""

    def reduction(value: Value) -> Named:
        x = made(value)
        if count > x.shape[-1]:
            raise InstrumentError(f"axis {x.axes[-1]!r} has {x.shape[-1]} places, so there is no top {count}.")
        largest = x.tensor.topk(count, dim=-1)
        pair = torch.stack([largest.values, largest.indices.to(largest.values.dtype)], dim=-1)
        return Named(pair, (*x.axes[:-1], "rank", "what"), {"what": ["value", "place"]})

    return reduction


class cosine:  # noqa: N801 - a function with a memory
    """How alike the vectors along the last axis are to those of the step before; nothing for the first step."""

    def __init__(self):
        self.before: Named | None = None

    def __call__(self, value: Value) -> Named | None:
        x, before = made(value), self.before
        self.before = x
        if before is None or before.shape != x.shape:
            return None
        return x.dropped(x.axes[-1], torch.cosine_similarity(before.tensor, x.tensor, dim=-1))


class step_mean:  # noqa: N801 - a function with a memory
    """The running mean over steps: one value a picture is kept, whatever the number of steps."""

    over_steps = True

    def __init__(self):
        self.total, self.count = None, 0

    def __call__(self, value: Value) -> Named:
        x = made(value)
        self.count += 1
        wide = x.tensor.double()
        self.total = wide if self.total is None else self.total + wide
        return Named((self.total / self.count).to(x.tensor.dtype), x.axes, x.coords)


#: by name; each entry makes a fresh one
NAMES: dict[str, Callable[[], Reduction]] = {
    "head-mean": lambda: head_mean,
    "entropy": lambda: entropy,
    "norm": lambda: norm,
    "rms": lambda: rms,
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
        raise InstrumentError(f"reduce must be one of {', '.join(NAMES)}, top-8 or a function, not {step!r}.")
    if step in (cosine, step_mean):
        return step
    if callable(step):
        return lambda: step
    raise InstrumentError(f"reduce must be a name, a function or a list of them, not {step!r}.")
