"""Reductions: functions that reduce a value before it is stored, on its own device.

A reduction is a function ``Named -> Named``. One that needs to know the site or the step, or that remembers earlier
steps, is a :class:`StepReduction`. An attention map arrives as a :class:`MapView`; the whole map is computed only on
request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fluxedu.attention_map import AttentionMap, at_least_float32
from fluxedu.errors import BudgetError, InstrumentError, describe
from fluxedu.instruments.budget import Budget
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import StepKey
from fluxedu.sampling.step_context import current_context

MAP_AXES = ("batch", "head", "query", "key")


class MapView:
    """A part of a lazy map: its heads, queries and keys (None: all); at most ``budget`` bytes may be computed.

    ``labels`` are names of the selected keys.
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
            for i in [] if chosen is None or isinstance(chosen, slice) else chosen:
                if not 0 <= i < lazy.shape[-1]:
                    raise InstrumentError(f"axis {axis!r} has length {lazy.shape[-1]}, so there is no index {i}.")
        if keys is not None:
            _ = lazy.lse  # compute it for all heads: the same call gives the attention output
        self.selected = lazy if heads is None else lazy.heads(heads)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.lazy.q.dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> torch.Size:
        b, h, n, m = self.selected.shape
        rows = len(range(n)[self.queries]) if isinstance(self.queries, slice) else len(self.queries)
        return torch.Size((b, h, rows, m if self.keys is None else len(self.keys)))

    def take(self, name: str, index: list[int]) -> MapView:
        """The same view with other queries or keys, as indices into the whole map."""
        if name == "query":
            return MapView(self.lazy, self.heads, index, self.keys, self.labels, self.budget)
        if self.keys is not None:
            raise InstrumentError("tokens= selects the keys already; use either tokens= or columns(...).")
        return MapView(self.lazy, self.heads, self.queries, index, None, self.budget)

    def to_named(self) -> Named:
        """Compute the selected part: by columns if keys are selected, else by rows."""
        b, h, n, m = self.shape
        if self.budget is not None and 4 * b * h * n * m > self.budget:
            raise BudgetError(
                f"this part of the map needs {4 * b * h * n * m:,} bytes, the budget is {self.budget:,}: "
                f"select heads=, tokens= or reduce='head-mean', or allow more (budget={4 * b * h * n * m})."
            )
        if self.keys is not None:
            return self._named(self.selected.columns(self.keys, self.queries), MAP_AXES)
        return self._named(self.selected.rows(self.queries), MAP_AXES)

    def head_mean(self) -> Named:
        """The mean over the selected heads, computed one head at a time, so that no map of all heads is in memory."""
        mean = self.selected.head_mean(self.queries, self.keys)
        return self._named(mean, tuple(a for a in MAP_AXES if a != "head"))

    def _named(self, tensor: Tensor, axes: tuple[str, ...]) -> Named:
        return Named(tensor, axes, {} if self.labels is None else {"key": self.labels})


Value = Named | MapView
Reduction = Callable[[Value], Named | None]


def to_named(value: Value) -> Named:
    """The value as a tensor with named axes; a lazy map is computed."""
    return value.to_named() if isinstance(value, MapView) else value


def to_real(value: Value) -> Named:
    """:func:`to_named`; raises InstrumentError for complex values (``attn.rope``)."""
    x = to_named(value)
    if x.tensor.is_complex():
        raise InstrumentError("this reduction is not defined for complex values; record them without it.")
    return x


def head_mean(value: Value) -> Named:
    """The mean over heads."""
    return value.head_mean() if isinstance(value, MapView) else value.mean("head")


def entropy(value: Value) -> Named:
    """Entropy of each query's attention in nats; of a whole map exactly, without computing the map."""
    if isinstance(value, MapView) and value.keys is None:
        return Named(value.selected.entropy()[:, :, value.queries], MAP_AXES[:3])
    p = to_real(value)
    if bool((p.tensor < 0).any()):
        raise InstrumentError("entropy needs non-negative values, and some of these are below zero.")
    return p.dropped(p.axes[-1], torch.special.entr(p.tensor).sum(-1))


def norm(value: Value) -> Named:
    """The L2 norm of the vectors along the last axis."""
    x = to_named(value)
    return x.dropped(x.axes[-1], torch.linalg.vector_norm(x.tensor, dim=-1))


def rms(value: Value) -> Named:
    """The root mean square along the last axis."""
    x = to_named(value)
    return x.dropped(x.axes[-1], x.tensor.abs().square().mean(-1).sqrt())


def summary(value: Value) -> Named:
    """Mean, standard deviation, minimum and maximum along the axis ``number``.

    Of an attention map, they are those of the attention that each key receives, averaged over heads, summed over
    queries.
    """
    x = value.head_mean().tensor.sum(-2) if isinstance(value, MapView) else to_named(value).tensor
    x = (x.angle() if x.is_complex() else x).float()  # of a rotation, its angle
    numbers = torch.stack([x.mean(), x.std(correction=0), x.min(), x.max()])
    return Named(numbers, ("number",), {"number": ["mean", "std", "min", "max"]})


def mean(*names: str) -> Reduction:
    """The mean over the named axes, e.g. ``mean("query")``."""

    def reduction(value: Value) -> Named:
        x = to_named(value)
        for name in names:
            x = x.mean(name)
        return x

    return reduction


def rows(index: Sequence[int]) -> Reduction:
    """What some queries attend to; indices count all tokens, text first."""
    return lambda value: to_named(value.take("query", list(index)))


def columns(index: Sequence[int]) -> Reduction:
    """How much the queries attend to some keys; indices count all tokens, text first. Exact, by the log-sum-exp."""
    return lambda value: to_named(value.take("key", list(index)))


def top(count: int) -> Reduction:
    """The ``count`` largest values along the last axis, replaced by axes ``rank`` and ``what`` (value, index)."""

    def reduction(value: Value) -> Named:
        x = to_real(value)
        if count > x.shape[-1]:
            raise InstrumentError(f"axis {x.axes[-1]!r} has length {x.shape[-1]}, so there is no top {count}.")
        largest = at_least_float32(x.tensor).topk(count, dim=-1)  # float16 would round the indices
        pair = torch.stack([largest.values, largest.indices.to(largest.values.dtype)], dim=-1)
        return Named(pair, (*x.axes[:-1], "rank", "what"), {"what": ["value", "index"]})

    return reduction


class StepReduction:
    """A reduction that is also called with the site and the step; each site and image has an instance of its own.

    nbytes: the memory that it holds, for the budget · over_steps: whether each value replaces the earlier ones.
    """

    nbytes = 0
    over_steps = False

    def __call__(self, value: Value, site: str, key: StepKey) -> Named | None:
        """The reduced value, or None when there is nothing to keep yet."""
        raise NotImplementedError


class cosine(StepReduction):  # noqa: N801 - a function with state
    """Cosine similarity of the vectors along the last axis with those of the previous step; none for the first step.

    With a solver of several stages (midpoint, heun), each stage is compared with the same stage of the previous step.
    """

    def __init__(self):
        self.previous: dict[int, Named] = {}  # stage -> value

    def __call__(self, value: Value, site: str, key: StepKey) -> Named | None:
        x, previous = to_real(value), self.previous.get(key.stage)
        self.previous[key.stage] = x
        if previous is None or previous.shape != x.shape:
            return None
        return x.dropped(x.axes[-1], torch.cosine_similarity(previous.tensor, x.tensor, dim=-1))

    @property
    def nbytes(self) -> int:
        return sum(x.tensor.nbytes for x in self.previous.values())


class step_mean(StepReduction):  # noqa: N801 - a function with state
    """The running mean over all model evaluations: one value per image, whatever the number of steps."""

    over_steps = True

    def __init__(self):
        self.total, self.count = None, 0

    def __call__(self, value: Value, site: str, key: StepKey) -> Named:
        x = to_real(value)
        if self.total is not None and self.total.shape != x.shape:
            raise InstrumentError(
                f"a mean over steps needs values of one shape, not {list(self.total.shape)} and then {list(x.shape)}; "
                f"where guidance is on for a part of the run, set passes='prompted'."
            )
        self.count += 1
        self.total = x.tensor.double() + (0 if self.total is None else self.total)
        return Named((self.total / self.count).to(x.tensor.dtype), x.axes, x.coords)

    @property
    def nbytes(self) -> int:
        return 0 if self.total is None else self.total.nbytes


#: name -> factory of the reduction
NAMES: dict[str, Callable[[], Reduction]] = {
    "head-mean": lambda: head_mean,
    "entropy": lambda: entropy,
    "norm": lambda: norm,
    "rms": lambda: rms,
    "summary": lambda: summary,
    "cosine": cosine,
    "step-mean": step_mean,
}


class Reductions:
    """The reductions of ``reduce=``, applied in sequence: a name, a function, a list of both, or None.

    Each site and image has instances of its own, since some remember earlier steps.
    """

    def __init__(self, reduce, budget: Budget):
        self.budget = budget
        several = isinstance(reduce, (list, tuple))
        specs = [] if reduce is None else list(reduce) if several else [reduce]
        self.factories = [_factory(spec) for spec in specs]
        self.over_steps = any(getattr(reduction, "over_steps", False) for reduction in self.create())
        self.clear()

    def create(self) -> list[Reduction]:
        return [factory() for factory in self.factories]

    def clear(self) -> None:
        """Forget all earlier steps."""
        self.batch: tuple[int, int] | None = None  # run, and first of the images that are computed at once
        self.active: dict[str, dict[int, list[Reduction]]] = defaultdict(lambda: defaultdict(self.create))

    def __call__(self, value: Value, site: str, key: StepKey) -> Value | None:
        """The reduced value, or None when there is nothing to keep yet. Raises InstrumentError for a wrong result."""
        self._forget_other_images(key)
        tensors = (value.lazy.q, value.lazy.k, value.lazy.v) if isinstance(value, MapView) else (value.tensor,)
        versions = _versions(tensors)
        for reduction in self.active[site][key.picture]:
            value = reduction(value, site, key) if isinstance(reduction, StepReduction) else reduction(value)
            if not isinstance(value, (Named, MapView, type(None))):
                raise InstrumentError(f"a reduction must return a Named or None, not {type(value).__name__}.")
            if value is None:
                break
        if _versions(tensors) != versions:
            raise InstrumentError(f"the reduction changed the value of {site!r} in place; begin it with .clone().")
        remembered = sum(getattr(one, "nbytes", 0) for each in self.active[site].values() for one in each)
        self.budget.expect(site, "reductions", remembered, key.step_id)
        return value

    def _forget_other_images(self, key: StepKey) -> None:
        """Keep only the reductions of the images that are computed at once."""
        context = current_context()
        batch = key.run, key.picture - (context.row or 0 if context else 0)
        if batch != self.batch:
            self.clear()
            self.batch = batch


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """How often each was written to in place."""
    return [x._version for x in tensors if isinstance(x, Tensor) and not x.is_inference()]


def _factory(spec) -> Callable[[], Reduction]:
    if isinstance(spec, str):
        if spec in NAMES:
            return NAMES[spec]
        head, _, number = spec.partition("-")
        if head == "top" and number.isdigit() and int(number):
            return lambda: top(int(number))
        raise InstrumentError(f"reduce must be one of {', '.join(NAMES)}, top-8 or a function, not {describe(spec)}.")
    if isinstance(spec, type) and issubclass(spec, StepReduction):
        return spec
    if callable(spec):
        return lambda: spec
    raise InstrumentError(f"reduce must be a name, a function, or a list of them, not {describe(spec)}.")
