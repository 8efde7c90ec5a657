"""Where a recorder keeps values: in memory or in a folder, copied to the CPU, within a memory budget."""

from __future__ import annotations

from pathlib import Path

import torch

from fluxedu.errors import BudgetError, InstrumentError, describe
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import FolderRecording, Recording, StepKey
from fluxedu.instruments.reductions import Reductions, Value, to_named
from fluxedu.instruments.selection import Selection
from fluxedu.sampling.solvers import get_solver
from fluxedu.sampling.step_context import StepContext


class Budget:
    """The bytes that a recording will hold by the end of the run, known as soon as one value per site has passed."""

    def __init__(self, limit: float, to_folder: bool):
        self.limit, self.to_folder = limit, to_folder
        self.expected: dict[tuple, int] = {}  # (site, purpose) -> bytes
        self.total = 0
        self.exceeded_at: tuple[int, int, int] | None = None  # the step in which the total passed the limit
        self.raised = False

    def allows(self, site: str, purpose: int | str | None, nbytes: int, step_id: tuple[int, int, int]) -> bool:
        """Whether ``nbytes`` may be held for ``site``; they replace what was expected for the same purpose.

        The step that exceeds the limit is completed, so that the error can name the size of the whole recording; the
        next one raises it.
        """
        if self.exceeded_at not in (None, step_id):
            raise self.error()
        self.total += nbytes - self.expected.get((site, purpose), 0)
        self.expected[site, purpose] = nbytes
        if self.exceeded_at is None and self.total > self.limit:
            self.exceeded_at = step_id
        return self.exceeded_at is None

    def check(self) -> None:
        """Raises the BudgetError that was not raised yet, because the run ended within the first step."""
        if self.exceeded_at is not None and not self.raised:
            raise self.error()

    def error(self) -> BudgetError:
        self.raised = True
        folder = "" if self.to_folder else "write to a folder (to=...), "
        return BudgetError(
            f"recording at least {len({site for site, _ in self.expected})} sites needs at least {self.total:,} bytes, "
            f"but the budget is {self.limit:,}; record fewer sites, steps or heads, "
            f"reduce (reduce='head-mean', tokens=[...]), {folder}or allow more (budget={self.total})."
        )


class Storage:
    """The values of a recorder. to: ``"memory"`` or a new folder · budget: bytes · dtype: to store in, or None."""

    def __init__(self, to: str | Path, budget: float, dtype: torch.dtype | None):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InstrumentError(f"dtype must be a floating point type such as torch.float16, not {describe(dtype)}.")
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 0:
            raise InstrumentError(f"budget must be a number of bytes, not {describe(budget)}.")
        if not isinstance(to, (str, Path)):
            raise InstrumentError(f"to must be 'memory' or a new folder, not {describe(to)}.")
        self.recording = Recording() if to == "memory" else FolderRecording(to)
        self.budget = Budget(budget, to_folder=to != "memory")
        self.dtype = dtype

    def add(
        self,
        site: str,
        key: StepKey,
        value: Value | None,
        context: StepContext | None,
        selection: Selection,
        reductions: Reductions,
    ) -> None:
        """Keep a copy on the CPU, if the budget allows what the site will need by the end of the run."""
        self.budget.allows(site, "memory of the reductions", reductions.nbytes(site), key.step_id)
        if value is None:
            return
        keeps_dtype = self.dtype is None or value.dtype.is_complex or "what" in value.axes  # "what": indices too
        dtype = value.dtype if keeps_dtype else self.dtype
        count = self._values_held(key, context, selection, reductions.over_steps)
        purpose = None if self.recording.holds_one_step else key.run
        if self.budget.allows(site, purpose, count * value.shape.numel() * dtype.itemsize, key.step_id):
            if context is not None:
                self.recording.pictures, self.recording.completed[context.run] = context.pictures, context.ended
            copy = _without_trivial_axes(to_named(value), context).copy_to("cpu", dtype)
            self.recording.add(site, key, copy, last_only=reductions.over_steps)

    def _values_held(self, key: StepKey, context: StepContext | None, selection: Selection, over_steps: bool) -> int:
        """How many values of a site the recording will hold at the end of the run."""
        if over_steps:
            return 1 if context is None else context.pictures
        in_evaluation = context is not None and context.stage >= 0
        per_step = len(get_solver(context.request.solver).stages) if in_evaluation else 1
        if self.recording.holds_one_step:
            return per_step
        if context is None:
            return key.step + 1
        steps = 1 if context.step is None else selection.number_of_steps(context.steps)
        return per_step * steps * context.pictures


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
