"""Recording: store the values that pass through sites, within a memory budget.

Values are reduced on their device, without approximation.

with fe.record("double.*.attn.map", tokens=["red"], reduce="head-mean") as rec:
    pipe("a red circle")
rec["double.2.attn.map"]        # axes (step, query, key)
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.budget import Budget
from fluxedu.instruments.catalogue import axes_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import FolderRecording, Recording, StepKey
from fluxedu.instruments.reductions import Reductions, Value, to_named
from fluxedu.instruments.selection import Selection, Steps
from fluxedu.instruments.tokens import Word
from fluxedu.instruments.watching import Instrument
from fluxedu.probe import Sited
from fluxedu.sampling.solvers import get_solver
from fluxedu.sampling.step_context import StepContext, current_context

BUDGET = 2 * 2**30  # bytes


class record(Instrument):  # noqa: N801 - used like a function: ``with fe.record(...) as rec``
    """Record the values of the sites that match ``globs``, inside a ``with`` block.

    steps: which steps, a number, a list or a slice; all by default · tokens: words of the prompt or indices of text
    tokens; at an attention map they select the keys, and the queries are then the image tokens · heads: which heads ·
    reduce: a name, a function ``Named -> Named`` or a list of them, see :mod:`fluxedu.instruments.reductions` · to:
    ``"memory"``, or a new folder to which every completed step is written · budget: the most bytes to hold, 2 GiB by
    default · passes: ``"prompted"`` or ``"negative"``, one of the two passes of classifier-free guidance · dtype: the
    dtype to store the values in, by default their own.

    Without a pipeline (a network called directly) every call counts as a step. Values are copies on the CPU.
    Raises InstrumentError for sites, words, heads or tokens that do not exist, BudgetError before the budget is
    exceeded.
    """

    def __init__(
        self,
        *globs: str,
        steps: Steps = None,
        tokens: Sequence[Word] | Word | None = None,
        heads: Sequence[int] | int | None = None,
        reduce=None,
        to: str | Path = "memory",
        budget: float | None = None,
        passes: str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(*globs)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InstrumentError(f"dtype must be a floating point type such as torch.float16, not {describe(dtype)}.")
        budget = BUDGET if budget is None else budget
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 0:
            raise InstrumentError(f"budget must be a number of bytes, not {describe(budget)}.")
        if not isinstance(to, (str, Path)):
            raise InstrumentError(f"to must be 'memory' or a new folder, not {describe(to)}.")
        self.selection = Selection.of(steps, tokens, heads, passes)
        self.reductions = Reductions(reduce)
        self.recording = Recording() if to == "memory" else FolderRecording(to)
        self.budget = Budget(budget, to_folder=to != "memory")
        self.dtype = dtype
        self.used = False
        self.calls: Counter[str] = Counter()  # of each site, where a network is called without a pipeline
        self.recorded_sites: set[str] = set()
        self.txt_len = 0  # number of text tokens in the most recent run

    def see(self, owner: Sited, name: str, site: str, value: Any) -> Any:
        """Store the selected part of the value, reduced. The computation continues with the value itself."""
        context = current_context()
        key = self._key(site, context)
        if self.selection.includes(site, value, key, context):
            with torch.no_grad():
                part = self.selection.part(_with_axes(owner, name, value), site, context, self.budget.limit)
                reduced = self.reductions(part, site, key)
                self._store(site, key, reduced, context)
        return value

    def _key(self, site: str, context: StepContext | None) -> StepKey:
        """When the value passes: run, image, step and evaluation. Without a pipeline, every call counts as a step."""
        if context is not None:
            return StepKey(context.run, context.picture, context.step, max(context.stage, 0), context.time)
        self.calls[site] += 1
        return StepKey(0, 0, self.calls[site] - 1, 0, None)

    def _store(self, site: str, key: StepKey, value: Value | None, context: StepContext | None) -> None:
        """Keep a copy on the CPU, if the budget allows what the site will need by the end of the run."""
        self.recorded_sites.add(site)
        self.budget.allows(site, "memory of the reductions", self.reductions.nbytes(site), key.step_id)
        if value is None:  # nothing to keep yet: a reduction waits for the next step
            return
        keeps_dtype = self.dtype is None or value.dtype.is_complex or "what" in value.axes  # "what": indices too
        dtype = value.dtype if keeps_dtype else self.dtype
        nbytes = self._values_held(site, context) * value.shape.numel() * dtype.itemsize
        purpose = None if self.recording.holds_one_step else key.run
        if self.budget.allows(site, purpose, nbytes, key.step_id):
            if context is not None:
                self.recording.pictures, self.recording.completed[context.run] = context.pictures, context.ended
                self.txt_len = context.txt_len
            copy = _without_trivial_axes(to_named(value), context).copy_to("cpu", dtype)
            self.recording.add(site, key, copy, last_only=self.reductions.over_steps)

    def _values_held(self, site: str, context: StepContext | None) -> int:
        """How many values of a site the recording will hold at the end of the run."""
        if self.reductions.over_steps:
            return 1 if context is None else context.pictures
        in_evaluation = context is not None and context.stage >= 0
        per_step = len(get_solver(context.request.solver).stages) if in_evaluation else 1
        if self.recording.holds_one_step:
            return per_step
        if context is None:
            return self.calls[site]
        steps = 1 if context.step is None else self.selection.number_of_steps(context.steps)
        return per_step * steps * context.pictures

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
        is_whole = kind is None or issubclass(kind, GeneratorExit)  # a generator that is closed has not failed
        self.recording.close(failed=not is_whole)
        if kind is not None:
            return
        if self.budget.exceeded_at is not None and not self.budget.raised:
            raise self.budget.error()
        for site, error in self.missing_words.items():
            if site not in self.recorded_sites:
                raise error
        if self.own_site_passed and not self.recorded_sites and not self.missing_words:
            message = f"nothing was recorded at {' and '.join(self.globs)}: {self.selection.missed}."
            warnings.warn(message, stacklevel=2)

    # ---------------------------------------------------------------- what was recorded

    def saved(self) -> Recording:
        """The recording; one in a folder is read from its files."""
        return self.recording.saved()

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

    def to_dataset(self):
        return self.saved().to_dataset()

    @property
    def nbytes(self) -> int:
        return self.recording.nbytes


def _with_axes(owner: Sited, name: str, value: Any) -> Named | AttentionMap:
    """The value with the names of its axes; a lazy map as it is."""
    if isinstance(value, AttentionMap):
        return value
    axes = axes_of(owner, name)
    if axes is None or len(axes) != value.ndim:
        axes = tuple(f"axis{i}" for i in range(value.ndim))
    return Named(value.detach(), axes)


def _without_trivial_axes(value: Named, context: StepContext | None) -> Named:
    """Without axes of length 1 that mean nothing; with classifier-free guidance, the batch is called ``pass``."""
    tensor, axes = value.tensor, list(value.axes)
    if context is not None and context.request.uses_cfg and value.sizes.get("batch") == 2:
        axes[axes.index("batch")] = "pass"
    for name in ("one", "batch"):
        if name in axes and tensor.shape[axes.index(name)] == 1:
            tensor = tensor.squeeze(axes.index(name))
            axes.remove(name)
    return Named(tensor, tuple(axes), value.coords)
