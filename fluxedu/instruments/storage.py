"""Where a recorder keeps values: in memory or in a folder, within a memory budget."""

from __future__ import annotations

from pathlib import Path

import torch

from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.budget import Budget
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import FolderRecording, Recording, StepKey
from fluxedu.instruments.reductions import Value, to_named
from fluxedu.instruments.selection import Selection
from fluxedu.sampling.solvers import get_solver
from fluxedu.sampling.step_context import StepContext, current_context


class Storage:
    """The values of a recorder.

    to: ``"memory"`` or a new folder · dtype: the dtype to store in, or None · detach: False keeps their graph.

    selection and over_steps (whether each value replaces the earlier ones) determine how many values a run will store.
    """

    def __init__(
        self,
        to: str | Path,
        budget: Budget,
        dtype: torch.dtype | None,
        selection: Selection,
        over_steps: bool,
        detach: bool,
    ):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InstrumentError(f"dtype must be a floating point type such as torch.float16, not {describe(dtype)}.")
        if not isinstance(to, (str, Path)):
            raise InstrumentError(f"the argument to must be 'memory' or a new folder, not {describe(to)}.")
        if not isinstance(detach, bool) or (to != "memory" and not detach):
            raise InstrumentError(
                f"detach=False requires to='memory', and detach must be True or False, not {describe(detach)}."
            )
        self.recording = Recording() if to == "memory" else FolderRecording(to)
        self.budget, self.dtype = budget, dtype
        self.selection, self.over_steps, self.detach = selection, over_steps, detach

    def add(self, site: str, key: StepKey, value: Value) -> None:
        """Keep the value, by default a copy on the CPU, if the budget allows what the site needs in the whole run."""
        # the axis "what" holds indices, which stay exact
        keeps_dtype = self.dtype is None or value.dtype.is_complex or "what" in value.axes
        dtype = value.dtype if keeps_dtype else self.dtype
        nbytes = self.values_held(key) * value.shape.numel() * dtype.itemsize
        purpose = None if self.recording.holds_one_step else key.run
        if self.budget.allows(site, purpose, nbytes, key.step_id):
            context = current_context()
            if context is not None:
                self.recording.note_run(context)
            stored = _without_trivial_axes(to_named(value), context)
            stored = stored.copy_to("cpu", dtype) if self.detach else stored.to(dtype)
            self.recording.add(site, key, stored, last_only=self.over_steps)

    def values_held(self, key: StepKey) -> int:
        """How many values of a site the recording will hold at the end of the run."""
        context = current_context()
        if self.over_steps:
            return 1 if context is None else context.pictures
        in_evaluation = context is not None and context.stage >= 0
        per_step = len(get_solver(context.request.solver).stages) if in_evaluation else 1
        if self.recording.holds_one_step:  # of the images that are computed at once
            return per_step * max(1, 0 if context is None else len(context.batch))
        if context is None:
            return key.step + 1
        steps = 1 if context.step is None else self.selection.number_of_steps(context.steps)
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
