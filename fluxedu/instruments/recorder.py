"""Recording: store the values that pass through sites, within a memory budget.

Values are reduced on their device, without approximation.

with fe.record("double.*.attn.map", tokens=["red"], reduce="head-mean") as rec:
    pipe("a red circle")
rec["double.2.attn.map"]        # axes (step, query, key)
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import GradientError, InstrumentError
from fluxedu.instruments.budget import Budget
from fluxedu.instruments.catalogue import axes_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import Recording, StepKey
from fluxedu.instruments.reductions import Reductions
from fluxedu.instruments.selection import Selection, Times, Tokens
from fluxedu.instruments.storage import Storage
from fluxedu.instruments.watching import Instrument
from fluxedu.probe import Sited
from fluxedu.sampling.step_context import Steps, current_context

BUDGET = 2 * 2**30  # bytes
NEGATIVE_PROMPT = -1  # the stage of values of a text encoder while it reads the negative prompt


class record(Instrument):  # noqa: N801 - used like a function: ``with fe.record(...) as rec``
    """Record the values of the sites that match ``globs``, inside a ``with`` block.

    steps, times, passes, streams, tokens, queries, heads: what is recorded, by default everything, see
    :mod:`fluxedu.instruments.selection`. With tokens= at a joint attention map, the queries are the image tokens unless
    queries= says otherwise; with words, passes= is ``"prompted"`` · reduce: a name, a function ``Named -> Named`` or a
    list of them, see :mod:`fluxedu.instruments.reductions` · to: ``"memory"``, or a new folder to which every completed
    step is written · budget: the most bytes to hold, 2 GiB by default · dtype: the dtype to store the values in, by
    default their own · detach: False keeps the values in the graph of :func:`fluxedu.gradients`, so that a loss on them
    can be differentiated and :meth:`grad` can be called.

    Without a pipeline (a network called directly) every call counts as a step. Values are copies on the CPU; with
    ``detach=False`` they stay on their device, in their graph. Raises InstrumentError for sites, words, heads or tokens
    that do not exist, BudgetError before the budget is exceeded, GradientError for values that are in no graph.
    """

    def __init__(
        self,
        *globs: str,
        steps: Steps = None,
        times: Times | None = None,
        passes: str | None = None,
        streams: Sequence[str] | str | None = None,
        tokens: Tokens | None = None,
        queries: Tokens | None = None,
        heads: Sequence[int] | int | None = None,
        reduce=None,
        to: str | Path = "memory",
        budget: float | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
    ):
        super().__init__(*globs)
        self.budget = Budget(BUDGET if budget is None else budget, to_folder=to != "memory")
        self.selection = selection = Selection.of(steps, times, passes, streams, tokens, queries, heads)
        selection.map_budget, selection.image_queries = self.budget.limit, True
        if passes is None and selection.has_words:  # words belong to the prompt, so they mean its pass
            selection.passes = "prompted"
        self.reductions = Reductions(reduce, self.budget)
        self.storage = Storage(to, self.budget, dtype, self.selection, self.reductions.over_steps, detach)
        self.detach = detach
        self.in_graph: dict[str, list[Any]] = defaultdict(list)  # site -> complete values, if they are not detached
        self.used = False
        self.calls: Counter[str] = Counter()  # calls of each site, if there is no pipeline
        self.recorded_sites: set[str] = set()
        self.txt_len = 0  # number of text tokens in the most recent run

    def see(self, owner: Sited, name: str, site: str, value: Any) -> Any:
        """Store the selected part of the value, reduced. The computation continues with the value itself."""
        key, context, axes = self._next_key(site), current_context(), axes_of(owner, name)
        if not self.selection.includes_step(key.step, key.time, context and context.steps):
            return value
        with torch.set_grad_enabled(not self.detach):
            part = self.selection.part(_with_axes(axes, value, self.detach), site)
            if part is None:
                return value
            if not self.detach:
                self.in_graph[site].append(_retain_grad(value, site))
            reduced = self.reductions(part, site, key)
            if reduced is not None:  # else a reduction waits for the next step
                self.storage.add(site, key, reduced)
        self.recorded_sites.add(site)
        return value

    def _next_key(self, site: str) -> StepKey:
        """When the value passes; without a pipeline, every call of the site counts as a step."""
        context = current_context()
        if context is None:
            self.calls[site] += 1
            return StepKey(0, 0, self.calls[site] - 1, 0, None)
        self.txt_len = context.txt_len
        stage = NEGATIVE_PROMPT if context.text is not None and context.negative else max(context.stage, 0)
        return StepKey(context.run, context.picture, context.step, stage, context.time)

    @property
    def is_partial(self) -> bool:
        """Whether the selection or a reduction leaves out a part of each value."""
        return not self.selection.is_whole or bool(self.reductions.factories)

    # ---------------------------------------------------------------- enter and exit

    def __enter__(self) -> record:
        if self.used:
            raise InstrumentError("this recorder has already recorded; create another one.")
        super().__enter__()
        self.used = True
        return self

    def __exit__(self, kind, *rest) -> None:
        super().__exit__(kind, *rest)
        self.reductions.clear()
        # closing a generator around this `with` is not a failure
        is_whole = kind is None or issubclass(kind, GeneratorExit)
        self.storage.recording.close(failed=not is_whole)
        if kind is not None:
            return
        self.budget.check()
        for site, error in self.missing_words.items():
            if site not in self.recorded_sites:
                raise error
        if self.own_site_passed and not self.recorded_sites and not self.missing_words:
            message = f"nothing was recorded at {' and '.join(self.globs)}: {self.selection.missed}."
            warnings.warn(message, stacklevel=2)

    # ---------------------------------------------------------------- what was recorded

    def saved(self) -> Recording:
        """The recording; one in a folder is read from its files."""
        return self.storage.recording.saved()

    def __getitem__(self, name: str) -> Named:
        return self.saved()[name]

    def __iter__(self):
        return iter(self.saved())

    def __len__(self) -> int:
        return len(self.saved())

    def __contains__(self, name: str) -> bool:
        return name in self.saved()

    def keys(self) -> list[str]:
        return self.saved().keys()

    def entries(self, name: str) -> list[tuple[StepKey, Named]]:
        return self.saved().entries(name)

    def grad(self, name: str) -> Named:
        """The gradients at a site after ``backward()``, with the axes of ``rec[name]``; needs ``detach=False``.

        Raises GradientError if only a part of the value was recorded, or if the loss does not depend on it.
        """
        if self.reductions.factories:
            raise GradientError(f"{name!r} was reduced, and only complete values have a gradient; leave reduce= out.")
        recording = Recording(self.storage.recording.pictures)
        for (key, value), whole in zip(self.storage.recording.in_order(name), self.in_graph[name], strict=False):
            gradient = whole.grad if isinstance(whole, torch.Tensor) and whole.numel() == value.tensor.numel() else None
            if gradient is None:
                raise GradientError(
                    f"{name!r} has no gradient: record complete values with detach=False, and call backward() on a "
                    f"loss that depends on them."
                )
            recording.add(name, key, Named(gradient.reshape(value.shape), value.axes, value.coords))
        return recording[name]

    def dataset(self, name: str, flatten: str | None = None):
        return self.saved().dataset(name, flatten)

    @property
    def requests(self) -> dict[tuple[int, int], dict]:
        """Prompt, seed and settings of each image: (run, picture) -> names and values."""
        return self.saved().requests

    def __reduce__(self):
        """Pickled, a recorder is the recording that it made."""
        return _identity, (self.saved(),)

    def to_dataset(self):
        return self.saved().to_dataset()

    @property
    def nbytes(self) -> int:
        return self.storage.recording.nbytes


def _identity(recording: Recording) -> Recording:
    return recording


def _retain_grad(value: Any, site: str) -> Any:
    """The value, whose gradient is kept; raises GradientError if it is in no graph."""
    if not value.requires_grad:
        raise GradientError(
            f"no gradient flows through {site!r} here: call the pipeline inside `with fe.gradients():`, and select "
            f"this step with its steps=; text encoders and the autoencoder's encoder are not part of its graph."
        )
    if isinstance(value, torch.Tensor):
        value.retain_grad()
    return value


def _with_axes(axes: tuple[str, ...] | None, value: Any, detach: bool) -> Named | AttentionMap:
    """The value with the names of its axes; a lazy map as it is."""
    if isinstance(value, AttentionMap):
        return value
    if axes is None or len(axes) != value.ndim:
        axes = tuple(f"axis{i}" for i in range(value.ndim))
    return Named(value.detach() if detach else value, axes)
