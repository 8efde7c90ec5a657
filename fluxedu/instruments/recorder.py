"""Recording: keep what passes through sites, reduced where it is, exact, within a budget.

with fe.record("double.*.attn.map", tokens=["red"], reduce="head-mean") as rec:
    pipe("a red circle")
rec["double.2.attn.map"]        # axes (step, query, key)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fluxedu.instruments.catalogue import axes_of
from fluxedu.instruments.errors import BudgetError, InstrumentError
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import FolderRecording, Recording, When
from fluxedu.instruments.reductions import MapView, Reduction, Value, maker
from fluxedu.instruments.watching import Instrument
from fluxedu.instruments.words import Word, token_ids
from fluxedu.models.attention_map import AttentionMap
from fluxedu.probe import Sited
from fluxedu.sampling.moment import Moment, now
from fluxedu.sampling.solvers import times_asked

BUDGET = 2 * 2**30
Steps = int | Sequence[int] | slice | None


class record(Instrument):  # noqa: N801 - used like a function: ``with fe.record(...) as rec``
    """Keep what passes through the sites that ``globs`` name, for as long as the ``with`` lasts.

    steps: which steps, a number, a list or a slice; all if not said · tokens: words of the prompt or places of
    text tokens; of a map, the keys, and the queries are then the image's · heads: which heads · reduce: a name, a
    function ``Named -> Named`` or a list of them, see :mod:`fluxedu.instruments.reductions` · to: ``"memory"``
    or a new folder, into which every whole step is written · budget: the most bytes to hold, 2 GiB if not
    said · passes: ``"prompted"`` or ``"negative"``, one of the two of classifier-free guidance · dtype: what to keep
    the values in, their own if not said.

    Without a pipeline (a network called by hand) every call counts as a step. Values are copies on the CPU.
    Raises InstrumentError for sites, words, heads or tokens that are not there, BudgetError before the budget is
    passed.
    """

    def __init__(
        self,
        *globs: str,
        steps: Steps = None,
        tokens: Sequence[Word] | Word | None = None,
        heads: Sequence[int] | int | None = None,
        reduce=None,
        to: str | Path = "memory",
        budget: int = BUDGET,
        passes: str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(*globs)
        if passes not in (None, "prompted", "negative"):
            raise InstrumentError(f"passes is 'prompted', 'negative' or None for both, not {passes!r}.")
        self.steps, self.tokens, self.passes, self.dtype = steps, tokens, passes, dtype
        self.heads = [heads] if isinstance(heads, int) else None if heads is None else list(heads)
        self.reductions = maker(reduce)
        self.budget = budget
        self.recording = Recording() if to == "memory" else FolderRecording(to)
        self.made: dict[tuple[str, int], list[Reduction]] = {}  # they may remember, so each site has its own
        self.calls: dict[str, int] = {}
        self.expected: dict[str, int] = {}  # bytes by the end of the run, a site

    # -- what comes in

    def see(self, owner: Sited, name: str, site: str, value: Any) -> Any:
        moment = now()
        if moment is not None and moment.step is not None and not among(self.steps, moment.step, moment.steps):
            return value
        when = self._when(site, moment)
        if moment is None and not among(self.steps, when.step, None):
            return value
        with torch.no_grad():
            kept = self._reduced(owner, name, site, value, moment, when)
        if kept is not None:
            self._keep(site, when, kept, moment)
        return value

    def _when(self, site: str, moment: Moment | None) -> When:
        if moment is not None:
            self.recording.pictures = moment.pictures
            return When(moment.picture, moment.step, max(moment.part, 0), moment.time)
        self.calls[site] = self.calls.get(site, -1) + 1
        return When(0, self.calls[site], 0, None)

    def _reduced(self, owner: Sited, name: str, site: str, value, moment: Moment | None, when: When) -> Named | None:
        chosen = self._chosen(self._named(owner, name, site, value), site, moment)
        reductions = self.made.setdefault((site, when.picture), self.reductions())
        if isinstance(chosen, MapView) and not reductions:
            shape = chosen.shape
            self._expect(site, 4 * shape[0] * shape[1] * shape[2] * shape[3], moment)  # before it is made
        for reduction in reductions:
            chosen = reduction(chosen)
            if chosen is None:
                return None
        return chosen.made() if isinstance(chosen, MapView) else chosen

    def _named(self, owner: Sited, name: str, site: str, value) -> Named | AttentionMap:
        if isinstance(value, AttentionMap):
            return value
        axes = axes_of(owner, name)
        if axes is None or len(axes) != value.ndim:
            axes = tuple(f"axis{i}" for i in range(value.ndim))
        return Named(value.detach(), axes)

    # -- which part of it

    def _chosen(self, value: Named | AttentionMap, site: str, moment: Moment | None) -> Value:
        places = None if self.tokens is None else self._places(moment)
        if isinstance(value, AttentionMap):
            queries = slice(value.words, None) if places is not None else slice(None)
            wrong = [i for i in self.heads or [] if not -value.shape[1] <= i < value.shape[1]]
            if wrong:
                raise InstrumentError(f"{site!r} has {value.shape[1]} heads, so there is no head {wrong[0]}.")
            return MapView(value, self.heads, queries, places)
        if places is not None:
            axis = next((a for a in ("text", "token") if a in value.axes), None)
            if axis is None:
                raise InstrumentError(f"{site!r} has no text tokens (its axes are {', '.join(value.axes)}).")
            value = value.take(axis, places)
        return value if self.heads is None else value.take("head", self.heads)

    def _places(self, moment: Moment | None) -> list[int]:
        words = [self.tokens] if isinstance(self.tokens, (str, int)) else list(self.tokens)
        if all(isinstance(w, int) for w in words):
            return words
        if moment is None:
            raise InstrumentError("words can only be found in the prompt of a pipeline; give places of tokens instead.")
        return token_ids(moment.pipe.prompt_encoder.t5_tokenizer, moment.asked.prompt, words)

    # -- what is kept

    def _keep(self, site: str, when: When, value: Named, moment: Moment | None) -> None:
        value = self._plain(value, moment)
        self._expect(site, value.tensor.nbytes, moment)
        over_steps = any(getattr(r, "over_steps", False) for r in self.made[site, when.picture])
        self.recording.add(site, when, value, last_only=over_steps)

    def _plain(self, value: Named, moment: Moment | None) -> Named:
        """A copy on the CPU without axes of one place that mean nothing, its batch axis said as what it is."""
        tensor, axes = value.tensor, list(value.axes)
        guided = moment is not None and moment.asked.guided and "batch" in axes
        if guided and tensor.shape[axes.index("batch")] == 2:
            axes[axes.index("batch")] = "pass"
            if self.passes is not None:
                tensor = tensor.select(axes.index("pass"), ("negative", "prompted").index(self.passes))
                axes.remove("pass")
        for name in ("one", "batch"):
            if name in axes and tensor.shape[axes.index(name)] == 1:
                tensor = tensor.squeeze(axes.index(name))
                axes.remove(name)
        tensor = tensor.to("cpu", self.dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)
        return Named(tensor, tuple(axes), self._coords(value, moment))

    def _coords(self, value: Named, moment: Moment | None) -> dict[str, list]:
        if self.tokens is None or moment is None or value.axes[-1] != "key":
            return value.coords
        pieces = moment.pipe.prompt_encoder.t5_tokenizer.pieces(moment.asked.prompt)
        return value.coords | {"key": [pieces[i] if i < len(pieces) else "<pad>" for i in self._places(moment)]}

    def _expect(self, site: str, nbytes: int, moment: Moment | None) -> None:
        """Refuse what would pass the budget by the end of the run, as soon as that can be known."""
        if isinstance(self.recording, FolderRecording):
            steps = pictures = 1  # only a step at a time is held
        elif moment is None:
            steps, pictures = self.calls[site] + 1, 1
        else:
            over = any(getattr(r, "over_steps", False) for r in self.reductions())
            inside = moment.step is not None and not over
            questions = len(times_asked(moment.asked.solver, [1.0, 0.0])) if moment.part >= 0 else 1
            steps = questions * sum(among(self.steps, i, moment.steps) for i in range(moment.steps)) if inside else 1
            pictures = moment.pictures
        self.expected[site] = nbytes * steps * pictures
        total = sum(self.expected.values())
        if total > self.budget:
            raise BudgetError(
                f"recording {len(self.expected)} sites or more needs {total:,} bytes, the budget is {self.budget:,}: "
                f"name fewer sites, steps or heads, reduce (reduce='head-mean', tokens=[...]), stream to a folder "
                f"(to=...), or allow more (budget={total})."
            )

    # -- coming and going

    def __enter__(self) -> record:
        if self.calls or len(self.recording):
            raise InstrumentError("this recorder has recorded already; make another one.")
        return super().__enter__()

    def __exit__(self, kind, *rest) -> None:
        super().__exit__(kind, *rest)
        self.made.clear()
        if isinstance(self.recording, FolderRecording):
            self.recording.close() if kind is None else self.recording.forget()

    # -- what was recorded: the recording's own face

    def _read(self) -> Recording:
        if isinstance(self.recording, FolderRecording):
            from fluxedu.instruments.recording import open_recording

            return open_recording(self.recording.folder)
        return self.recording

    def __getitem__(self, name: str) -> Named:
        return self._read()[name]

    def __iter__(self):
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __contains__(self, name: str) -> bool:
        return name in self._read()

    def keys(self) -> list[str]:
        return self._read().keys()

    def entries(self, name: str) -> list[tuple[When, Named]]:
        return self._read().entries(name)

    def to_dataset(self):
        return self._read().to_dataset()

    @property
    def nbytes(self) -> int:
        return self.recording.nbytes


def among(steps: Steps, step: int | None, count: int | None) -> bool:
    """Is ``step`` (of ``count``, if that is known) one of ``steps``?"""
    if steps is None or step is None:
        return True
    if isinstance(steps, slice):
        return step in range(*steps.indices(count if count is not None else step + 1))
    wanted = [steps] if isinstance(steps, int) else steps
    return step in [s + count if s < 0 and count is not None else s for s in wanted]
