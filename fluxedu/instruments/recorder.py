"""Recording: store the values that pass through sites, within a memory budget."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import GradientError, InstrumentError, describe
from fluxedu.instruments.budget import Budget, values_in_run
from fluxedu.instruments.catalogue import axes_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import FolderRecording, Recorded, Recording, StepKey
from fluxedu.instruments.reductions import Reductions, Value, to_named
from fluxedu.instruments.selection import Selection, Times, Tokens
from fluxedu.instruments.watching import Instrument
from fluxedu.probe import Sited
from fluxedu.sampling.step_context import StepContext, Steps, current_context

BUDGET = 2 * 2**30  # bytes
NEGATIVE_PROMPT = -1  # the stage of values of a text encoder while it reads the negative prompt


class record(Instrument, Recorded):  # noqa: N801 - used like a function: ``with fe.record(...) as rec``
    """Record the values of the sites that match ``globs``, inside a ``with`` block::

        with fe.record("double.*.attn.map", tokens=["red"], reduce="head-mean") as rec:
            pipe("a red circle")
        rec["double.2.attn.map"]  # axes (step, query, key)

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
        _check_storage(to, dtype, detach)
        self.dtype, self.detach = dtype, detach
        self.budget = Budget(BUDGET if budget is None else budget, to_folder=to != "memory")
        self.selection = Selection.of(steps, times, passes, streams, tokens, queries, heads)
        self.selection.map_budget = self.budget.limit  # most bytes of an attention map to compute at once
        self.selection.image_queries = True  # at an attention map with tokens= and no queries=, the image's
        if passes is None and self.selection.has_words:  # words belong to the prompt, so they mean its pass
            self.selection.passes = "prompted"
        self.reductions = Reductions(reduce, self.budget)
        self.recording = Recording() if to == "memory" else FolderRecording(to)
        self.in_graph: dict[str, list[Any]] = defaultdict(list)  # site -> complete values, if they are not detached
        self.calls: Counter[str] = Counter()  # calls of each site, if there is no pipeline
        self.selected_sites: set[str] = set()
        self.used = False
        self.txt_len = 0  # number of text tokens in the most recent run

    # ---------------------------------------------------------------- while the model runs

    def see(self, owner: Sited, name: str, site: str, value: Any) -> Any:
        """Called for every value that passes a site of ``globs``: select, reduce, and store a copy.

        The computation continues with what is returned, the value itself.
        """
        context = current_context()  # where the pipeline is: image, step, time; None without a pipeline
        key = self._key(site, context)
        if not self.selection.includes_step(key.step, key.time, None if context is None else context.steps):
            return value
        with torch.set_grad_enabled(not self.detach):
            named = _with_axes(axes_of(owner, name), value, self.detach)
            part = self.selection.part(named, site)  # the selected heads and tokens; None if the value has none of them
            if part is None:
                return value
            reduced = self.reductions(part, site, key)  # None if a reduction waits for the next step
            if reduced is not None and self._fits(site, key, reduced):
                store = self.recording.replace if self.reductions.over_steps else self.recording.add
                store(site, key, self._copy(reduced), context)
                if not self.detach:  # rec.grad(site) reads the gradient of the complete value
                    self.in_graph[site].append(_retain_grad(value, site))
        self.selected_sites.add(site)
        return value

    def _key(self, site: str, context: StepContext | None) -> StepKey:
        """When the value passes; without a pipeline, every call of the site counts as a step."""
        if context is None:
            self.calls[site] += 1
            return StepKey(0, 0, self.calls[site] - 1, 0, None)
        self.txt_len = context.txt_len
        stage = NEGATIVE_PROMPT if context.text is not None and context.negative else max(context.stage, 0)
        return StepKey(context.run, context.picture, context.step, stage, context.time)

    def _fits(self, site: str, key: StepKey, value: Value) -> bool:
        """Whether the budget allows all values that the run will record at this site, if they are as large as this."""
        count = values_in_run(key, self.selection, self.reductions.over_steps, self.recording.holds_one_step)
        nbytes = count * value.shape.numel() * self._stored_dtype(value).itemsize
        run = None if self.recording.holds_one_step else key.run  # in memory, the values of several runs add up
        self.budget.expect(site, run, nbytes, key.step_id)
        return self.budget.exceeded_at is None

    def _stored_dtype(self, value: Value) -> torch.dtype:
        is_exact = value.dtype.is_complex or "what" in value.axes  # the axis "what" holds indices
        return value.dtype if self.dtype is None or is_exact else self.dtype

    def _copy(self, value: Value) -> Named:
        """What is stored: a copy on the CPU; with ``detach=False`` the value itself, which is part of the graph."""
        dtype, named = self._stored_dtype(value), _without_trivial_axes(to_named(value))
        return named.copy_to("cpu", dtype) if self.detach else named.to(dtype)

    # ---------------------------------------------------------------- enter and exit

    def __enter__(self) -> record:
        if self.used:
            raise InstrumentError("this recorder has already recorded; create another one.")
        super().__enter__()  # from here on, every site that matches calls see()
        self.used = True
        return self

    def __exit__(self, kind, *rest) -> None:
        super().__exit__(kind, *rest)
        self.reductions.clear()
        # closing a generator around this `with` is not a failure
        self.recording.close(failed=kind is not None and not issubclass(kind, GeneratorExit))
        if kind is not None:
            return
        self.budget.check()
        for site, error in self.missing_words.items():
            if site not in self.selected_sites:
                raise error
        if self.own_site_passed and not self.selected_sites and not self.missing_words:
            message = f"nothing was recorded at {' and '.join(self.globs)}: {self.selection.missed}."
            warnings.warn(message, stacklevel=2)

    # ---------------------------------------------------------------- what was recorded: rec[site], see Recorded

    def saved(self) -> Recording:
        """The recording; one in a folder is read from its files."""
        return self.recording.saved()

    @property
    def requests(self) -> dict[tuple[int, int], dict]:
        """Prompt, seed and settings of each image: (run, picture) -> names and values."""
        return self.saved().requests

    @property
    def nbytes(self) -> int:
        return self.recording.nbytes

    @property
    def is_partial(self) -> bool:
        """Whether the selection or a reduction leaves out a part of each value."""
        return not self.selection.is_whole or bool(self.reductions.factories)

    def grad(self, name: str) -> Named:
        """The gradients at a site after ``backward()``, with the axes of ``rec[name]``; needs ``detach=False``.

        Raises GradientError if only a part of the value was recorded, or if the loss does not depend on it.
        """
        if self.reductions.factories:
            raise GradientError(f"{name!r} was reduced, and only complete values have a gradient; leave reduce= out.")
        recording = Recording(self.recording.pictures)
        for (key, value), whole in zip(self.recording.in_order(name), self.in_graph[name], strict=False):
            gradient = whole.grad if isinstance(whole, Tensor) and whole.numel() == value.tensor.numel() else None
            if gradient is None:
                raise GradientError(
                    f"{name!r} has no gradient: record complete values with detach=False, and call backward() on a "
                    f"loss that depends on them."
                )
            recording.add(name, key, Named(gradient.reshape(value.shape), value.axes, value.coords))
        return recording[name]

    def __reduce__(self):
        """Pickled, a recorder is the recording that it made."""
        return _identity, (self.saved(),)


def _identity(recording: Recording) -> Recording:
    return recording


def _check_storage(to: str | Path, dtype: torch.dtype | None, detach: bool) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InstrumentError(f"dtype must be a floating point type such as torch.float16, not {describe(dtype)}.")
    if not isinstance(to, (str, Path)):
        raise InstrumentError(f"the argument to must be 'memory' or a new folder, not {describe(to)}.")
    if not isinstance(detach, bool) or (to != "memory" and not detach):
        raise InstrumentError(
            f"detach=False requires to='memory', and detach must be True or False, not {describe(detach)}."
        )


def _with_axes(axes: tuple[str, ...] | None, value: Tensor | AttentionMap, detach: bool) -> Named | AttentionMap:
    """The value with the names of its axes; a lazy map as it is."""
    if isinstance(value, AttentionMap):
        return value
    if axes is None or len(axes) != value.ndim:
        axes = tuple(f"axis{i}" for i in range(value.ndim))
    return Named(value.detach() if detach else value, axes)


def _retain_grad(value: Any, site: str) -> Any:
    """The value, whose gradient is kept; raises GradientError if it is in no graph."""
    if not value.requires_grad:
        raise GradientError(
            f"no gradient flows through {site!r} here: call the pipeline inside `with fe.gradients():`, and select "
            f"this step with its steps=; text encoders and the autoencoder's encoder are not part of its graph."
        )
    if isinstance(value, Tensor):
        value.retain_grad()
    return value


def _without_trivial_axes(value: Named) -> Named:
    """Without axes of length 1 that mean nothing; with classifier-free guidance, the batch is called ``pass``."""
    context, tensor, axes = current_context(), value.tensor, list(value.axes)
    if context is not None and context.request.uses_cfg and value.sizes.get("batch") == 2:
        axes[axes.index("batch")] = "pass"
    for name in ("one", "batch"):
        if name in axes and tensor.shape[axes.index(name)] == 1:
            tensor = tensor.squeeze(axes.index(name))
            axes.remove(name)
    return Named(tensor, tuple(axes), value.coords)
