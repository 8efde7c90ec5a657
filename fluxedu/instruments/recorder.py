"""Recording: store the values that pass through sites, within a memory budget.

Values are reduced on their device, without approximation.

with fe.record("double.*.attn.map", tokens=["red"], reduce="head-mean") as rec:
    pipe("a red circle")
rec["double.2.attn.map"]        # axes (step, query, key)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import BudgetError, InstrumentError, describe
from fluxedu.instruments.catalogue import axes_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import FolderRecording, Recording, StepKey, open_recording
from fluxedu.instruments.reductions import MapView, Reduction, Value, reduction_factory, to_named
from fluxedu.instruments.selection import PASSES, Selection, Steps, is_selected
from fluxedu.instruments.tokens import Word
from fluxedu.instruments.watching import Instrument
from fluxedu.probe import Sited
from fluxedu.sampling.solvers import get_solver
from fluxedu.sampling.step_context import StepContext, current_context

BUDGET = 2 * 2**30  # bytes


class Budget:
    """The bytes that a recording will hold by the end of the run, known as soon as one value per site has passed."""

    def __init__(self, limit: float, to_folder: bool):
        self.limit, self.to_folder = limit, to_folder
        self.expected: dict[tuple, int] = {}  # (site, run or purpose) -> bytes
        self.total = 0
        self.exceeded_at: tuple[int, int, int] | None = None  # the step in which the total passed the limit
        self.raised = False

    def expect(self, site: str, purpose: Any, nbytes: int, step_id: tuple[int, int, int]) -> None:
        """``nbytes`` will be held for ``site``; replaces what was expected before for the same purpose."""
        self.total += nbytes - self.expected.get((site, purpose), 0)
        self.expected[site, purpose] = nbytes
        if self.exceeded_at is None and self.total > self.limit:
            self.exceeded_at = step_id

    def error(self) -> BudgetError:
        self.raised = True
        folder = "" if self.to_folder else "write to a folder (to=...), "
        return BudgetError(
            f"recording at least {len({site for site, _ in self.expected})} sites needs at least {self.total:,} bytes, "
            f"but the budget is {self.limit:,}; record fewer sites, steps or heads, "
            f"reduce (reduce='head-mean', tokens=[...]), {folder}or allow more (budget={self.total})."
        )


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
        self.budget = Budget(budget, to_folder=to != "memory")
        self.dtype = dtype
        self.new_reductions = reduction_factory(reduce)
        self.over_steps = any(getattr(reduction, "over_steps", False) for reduction in self.new_reductions())
        self.recording = Recording() if to == "memory" else FolderRecording(to)
        self.used = False
        self.reductions: dict[str, tuple[tuple, list[Reduction]]] = {}  # site -> (run, picture), its reductions
        self.calls: dict[str, int] = {}  # site -> calls so far, of a network without a pipeline
        self.recorded_sites: set[str] = set()
        self.steps_in_run = 0  # number of steps of a run in which at least one step was not selected
        self.txt_len = 0  # number of text tokens in the most recent run

    # ---------------------------------------------------------------- a value passes

    def see(self, owner: Sited, name: str, site: str, value: Any) -> Any:
        context = current_context()
        in_step = context is not None and context.step is not None
        if in_step and not is_selected(self.selection.steps, context.step, context.steps):
            self.steps_in_run = context.steps
            return value
        if self.selection.is_other_pass(site, context, value):
            return value
        if context is not None:
            self._note_run(context)
        key = self._next_key(site, context)
        if context is None and not is_selected(self.selection.steps, key.step, None):
            return value
        if self.budget.exceeded_at not in (None, key.step_id):
            raise self.budget.error()  # one full step is complete, so its size is known
        with torch.no_grad():
            selected = self.selection.apply(_with_axes(owner, name, value), site, context, self.budget.limit)
            reduced = self._reduce(selected, value, site, context, key)
        self.recorded_sites.add(site)
        if reduced is not None:
            stored = self._to_storage(reduced, context)
            self._expect(site, stored.tensor.nbytes, context, key)
            if self.budget.exceeded_at is None:
                self.recording.add(site, key, stored, last_only=self.over_steps)
        return value

    def _note_run(self, context: StepContext) -> None:
        self.recording.pictures, self.recording.completed[context.run] = context.pictures, context.ended
        self.txt_len = context.txt_len

    def _next_key(self, site: str, context: StepContext | None) -> StepKey:
        """The key of the value; without a pipeline, the site's calls are counted in place of steps."""
        if context is None:
            self.calls[site] = self.calls.get(site, -1) + 1
            return StepKey(0, 0, self.calls[site], 0, None)
        return StepKey(context.run, context.picture, context.step, max(context.stage, 0), context.time)

    # ---------------------------------------------------------------- reduction and storage

    def _reduce(
        self, selected: Value, value: Any, site: str, context: StepContext | None, key: StepKey
    ) -> Named | None:
        picture = key.step_id[:2]
        if site not in self.reductions or self.reductions[site][0] != picture:
            self.reductions[site] = picture, self.new_reductions()
        reductions = self.reductions[site][1]
        if isinstance(selected, MapView) and not reductions:
            b, h, n, m = selected.shape
            self._expect(site, (self.dtype or torch.float32).itemsize * b * h * n * m, context, key)
            if self.budget.exceeded_at is not None:
                return None  # over budget: do not compute the map
        version = _version(value)
        for reduction in reductions:
            if hasattr(reduction, "stage"):
                reduction.stage = key.stage
            if hasattr(reduction, "site"):
                reduction.site = site
            selected = reduction(selected)
            if selected is None:
                break
            if not isinstance(selected, (Named, MapView)):
                raise InstrumentError(f"a reduction must return a Named or None, not {type(selected).__name__}.")
        if _version(value) != version:
            raise InstrumentError(f"the reduction changed the value of {site!r} in place; begin it with .clone().")
        memory = sum(getattr(reduction, "nbytes", 0) for reduction in reductions)
        self.budget.expect(site, "state of the reduction", memory, key.step_id)
        return None if selected is None else to_named(selected)

    def _to_storage(self, value: Named, context: StepContext | None) -> Named:
        """A copy on the CPU, without axes of length 1 that carry no meaning.

        With classifier-free guidance the batch axis is called ``pass``.
        """
        tensor, axes = value.tensor, list(value.axes)
        if context is not None and context.request.uses_cfg and value.sizes.get("batch") == 2:
            axes[axes.index("batch")] = "pass"
            kept = self.selection.kept_pass()
            if kept is not None:
                tensor = tensor.select(axes.index("pass"), PASSES.index(kept))
                axes.remove("pass")
        for name in ("one", "batch"):
            if name in axes and tensor.shape[axes.index(name)] == 1:
                tensor = tensor.squeeze(axes.index(name))
                axes.remove(name)
        keeps_dtype = self.dtype is None or tensor.is_complex() or "what" in axes  # "what": indices beside values
        dtype = tensor.dtype if keeps_dtype else self.dtype
        tensor = tensor.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        return Named(tensor, tuple(axes), value.coords)

    def _expect(self, site: str, nbytes: int, context: StepContext | None, key: StepKey) -> None:
        """Tell the budget how many bytes a site will hold by the end of the run, given those of one value."""
        evaluations = 1
        if context is not None and context.stage >= 0:
            evaluations = len(get_solver(context.request.solver).stages)
        run = None if context is None else context.run
        if isinstance(self.recording, FolderRecording) and not self.over_steps:
            values, run = evaluations, None  # one step is held at a time; the others are on disk
        elif context is None:
            values = 1 if self.over_steps else self.calls[site] + 1
        elif context.step is None or self.over_steps:
            values = context.pictures
        else:
            steps = sum(is_selected(self.selection.steps, i, context.steps) for i in range(context.steps))
            values = evaluations * steps * context.pictures
        self.budget.expect(site, run, nbytes * values, key.step_id)

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
        if isinstance(self.recording, FolderRecording):
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
            reason = f"there was no {self.selection.passes} pass"
            if self.steps_in_run:
                steps = describe(self.selection.steps)
                reason = f"the run has {self.steps_in_run} steps, and none of them is in steps={steps}"
            warnings.warn(f"nothing was recorded at {' and '.join(self.globs)}: {reason}.", stacklevel=2)

    # ---------------------------------------------------------------- what was recorded

    def saved(self) -> Recording:
        """The recording; one in a folder is read from its files."""
        if not isinstance(self.recording, FolderRecording):
            return self.recording
        return open_recording(self.recording.folder) if self.recording.files_written else Recording()

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


def _version(value: Any) -> tuple:
    """Changes when the value (of a map: its q, k or v) is written to in place."""
    parts = (value.q, value.k, value.v) if isinstance(value, AttentionMap) else (value,)
    return tuple(x._version for x in parts if isinstance(x, torch.Tensor) and not x.is_inference())
