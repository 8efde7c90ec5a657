"""The memory budget of a recording: a run that would exceed it ends after its first step, not at the end of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxedu.errors import BudgetError, InstrumentError, describe
from fluxedu.sampling.solvers import get_solver
from fluxedu.sampling.step_context import current_context

if TYPE_CHECKING:
    from fluxedu.instruments.recording import StepKey
    from fluxedu.instruments.selection import Selection


class Budget:
    """The bytes that a recording will hold by the end of the run, known as soon as one value per site has passed."""

    def __init__(self, limit: float, to_folder: bool):
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 0:
            raise InstrumentError(f"budget must be a number of bytes, not {describe(limit)}.")
        self.limit, self.to_folder = limit, to_folder
        self.expected: dict[tuple, int] = {}  # (site, purpose) -> bytes
        self.total = 0
        self.exceeded_at: tuple[int, int] | None = None  # run and step in which the total passed the limit
        self.raised = False

    def expect(self, site: str, purpose: int | str | None, nbytes: int, step_id: tuple[int, int, int]) -> None:
        """Count the bytes that will be held for a purpose at a site, in place of those that were counted before.

        If the sum passes the limit, the rest of the step is still counted, so that the error can name the size of the
        whole recording. Raises this BudgetError in the next step.
        """
        run, _, step = step_id  # of any image, since several may be computed at once
        if self.exceeded_at not in (None, (run, step)):
            raise self.error()
        self.total += nbytes - self.expected.get((site, purpose), 0)
        self.expected[site, purpose] = nbytes
        if self.exceeded_at is None and self.total > self.limit:
            self.exceeded_at = run, step

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


def values_in_run(key: StepKey, selection: Selection, over_steps: bool, holds_one_step: bool) -> int:
    """How many values of a site will be in memory at the end of the run.

    over_steps: each value replaces the earlier ones · holds_one_step: a completed step leaves memory for a folder.
    """
    context = current_context()
    if over_steps:
        return 1 if context is None else context.pictures
    in_evaluation = context is not None and context.stage >= 0
    per_step = len(get_solver(context.request.solver).stages) if in_evaluation else 1
    if holds_one_step:  # of the images that are computed at once
        return per_step * max(1, 0 if context is None else len(context.batch))
    if context is None:
        return key.step + 1
    steps = 1 if context.step is None else selection.number_of_steps(context.steps)
    return per_step * steps * context.pictures
