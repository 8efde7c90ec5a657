"""Recording: keep what passes through sites, reduced where it is, exact, within a budget.

with fe.record("double.*.attn.map", tokens=["red"], reduce="head-mean") as rec:
    pipe("a red circle")
rec["double.2.attn.map"]        # axes (step, query, key)
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fluxedu.errors import BudgetError, InstrumentError, describe
from fluxedu.instruments.catalogue import axes_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import FolderRecording, Recording, When, open_recording
from fluxedu.instruments.reductions import MapView, Reduction, Value, maker
from fluxedu.instruments.tokens import Word, contains_words, listed, prompt_at, token_indices_at, tokenizer_at
from fluxedu.instruments.watching import Instrument
from fluxedu.models.attention_map import AttentionMap
from fluxedu.probe import Sited
from fluxedu.sampling.solvers import solver_called
from fluxedu.sampling.step_context import StepContext, current_context

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
        budget: float | None = None,
        passes: str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(*globs)
        if not isinstance(passes, (str, type(None))) or passes not in (None, "prompted", "negative"):
            raise InstrumentError(f"passes is 'prompted', 'negative' or None for both, not {describe(passes)}.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InstrumentError(f"dtype is one for real numbers, such as torch.float16, not {describe(dtype)}.")
        budget = BUDGET if budget is None else budget
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 0:
            raise InstrumentError(f"budget is a number of bytes, not {describe(budget)}.")
        self.steps, self.passes, self.dtype = checked_steps(steps), passes, dtype
        self.tokens = None if tokens is None else listed(tokens)
        self.heads = checked_heads(heads)
        self.reductions = maker(reduce)
        self.over_steps = any(getattr(reduction, "over_steps", False) for reduction in self.reductions())
        self.budget = budget
        if not isinstance(to, (str, Path)):
            raise InstrumentError(f"to is 'memory' or a new folder, not {describe(to)}.")
        self.recording = Recording() if to == "memory" else FolderRecording(to)
        self.used = False
        self.made: dict[str, tuple[tuple, list[Reduction]]] = {}  # they may remember: a site's, of the picture at hand
        self.calls: dict[str, int] = {}
        self.expected: dict[tuple, int] = {}  # (site, run) -> bytes by the end of that run
        self.seen: set[str] = set()
        self.missed = 0  # of how many steps the run is of which one was not among the wanted
        self.txt_len = 0  # how many tokens of the run last seen are text
        self.total = 0  # of them all
        self.over: tuple[int, int, int] | None = None  # the step in which that passed the budget
        self.refused = False

    # -- what comes in

    def see(self, owner: Sited, name: str, site: str, value: Any) -> Any:
        context = current_context()
        if context is not None and context.step is not None and not among(self.steps, context.step, context.steps):
            self.missed = context.steps
            return value
        if self._other_pass(site, context, value):
            return value
        when = self._when(site, context)
        if context is None and not among(self.steps, when.step, None):
            return value
        if self.over is not None and self.over != when.place:  # a step has gone by, so what it needs is known
            raise self._refusal()
        with torch.no_grad():
            kept = self._reduced(owner, name, site, value, context, when)
        self.seen.add(site)
        if kept is not None:
            self._keep(site, when, kept, context)
        return value

    def _other_pass(self, site: str, context: StepContext | None, value: Any) -> bool:
        """Does only the pass that is not wanted go by here?"""
        if self.passes is None or context is None or context.step is None:
            return False
        if not context.request.uses_cfg:  # one pass only, and it is prompted
            return self.passes == "negative" and not site.startswith("sample.")
        if site in ("sample.negative", "sample.prompted"):
            return not site.endswith(self.passes)
        alone = not site.startswith("sample.") and value.shape[0] == 1  # guidance is off at this time
        return alone and self.passes == "negative"

    def _when(self, site: str, context: StepContext | None) -> When:
        if context is not None:
            self.recording.pictures, self.recording.ended[context.run] = context.pictures, context.ended
            self.txt_len = context.txt_len
            return When(context.run, context.picture, context.step, max(context.stage, 0), context.time)
        self.calls[site] = self.calls.get(site, -1) + 1
        return When(0, 0, self.calls[site], 0, None)

    def _reduced(
        self, owner: Sited, name: str, site: str, value, context: StepContext | None, when: When
    ) -> Named | None:
        chosen = self._chosen(self._of_pass(self._named(owner, name, site, value), context), site, context)
        picture = when.place[:2]
        if site not in self.made or self.made[site][0] != picture:
            self.made[site] = picture, self.reductions()
        _, reductions = self.made[site]
        if isinstance(chosen, MapView) and not reductions:
            b, h, n, m = chosen.shape
            self._expect(site, (self.dtype or torch.float32).itemsize * b * h * n * m, context, when)
            if self.over is not None:
                return None  # before it is made
        before = _version(value)
        for reduction in reductions:
            for told, what in (("question", when.stage), ("site", site)):
                if hasattr(reduction, told):
                    setattr(reduction, told, what)
            chosen = reduction(chosen)
            if chosen is None:
                break
            if not isinstance(chosen, (Named, MapView)):
                raise InstrumentError(f"a reduction gives a Named or None, not {type(chosen).__name__}.")
        if _version(value) != before:
            raise InstrumentError(f"the reduction wrote into the value of {site!r}; let it begin with .clone().")
        self._claim((f"{site}, remembered", None), sum(getattr(r, "nbytes", 0) for r in reductions), when)
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

    def _of_pass(self, value: Named | AttentionMap, context: StepContext | None) -> Named | AttentionMap:
        """Of the two passes of guidance, the one that is wanted, before anything is made of both."""
        which = self._one_pass() if context is not None and context.request.uses_cfg else None
        if which is None or "batch" not in getattr(value, "axes", ("batch",)):
            return value
        size = value.shape[0] if isinstance(value, AttentionMap) else value.sizes["batch"]
        if size != 2:
            return value
        at = ("negative", "prompted").index(which)
        return value.picture(at) if isinstance(value, AttentionMap) else value.take("batch", [at])

    # -- which part of it

    def _chosen(self, value: Named | AttentionMap, site: str, context: StepContext | None) -> Value:
        places = (
            None if self.tokens is None else token_indices_at(context, site, self.tokens, self.passes == "negative")
        )
        labels = None if places is None or context is None else self._labels(places, site, context)
        if isinstance(value, AttentionMap):
            self._check(site, places, value.txt_len, value.shape[1])
            queries = slice(None) if places is None else self._readers(value.txt_len, value.shape[2])
            return MapView(value, self.heads, queries, places, labels, self.budget)
        if places is not None and value.axes[-1] == "key":  # a map that was changed
            words = value.shape[-1] if context is None or context.text is not None else context.txt_len
            self._check(site, places, words, value.shape[1])
            readers = range(value.sizes["query"])[self._readers(words, value.sizes["query"])]
            value = value.take("query", list(readers)).take("key", places)
            value = Named(value.tensor, value.axes, {} if labels is None else {"key": labels})
        elif places is not None:
            axis = next((a for a in ("text", "token") if a in value.axes), None)
            if axis is None:
                raise InstrumentError(f"{site!r} has no text tokens (its axes are {', '.join(value.axes)}).")
            words = context.txt_len if context is not None and axis == "token" else value.sizes[axis]
            self._check(site, places, words, None)
            value = value.take(axis, places)
        return value if self.heads is None else value.take("head", self.heads)

    @staticmethod
    def _readers(words: int, queries: int) -> slice:
        """Which queries are asked how much they take from words: the image's; of a text encoder, all there are."""
        return slice(words if words < queries else 0, None)

    def _check(self, site: str, places: list[int] | None, words: int, heads: int | None) -> None:
        wrong = [i for i in places or [] if not 0 <= i < words]
        if wrong:
            raise InstrumentError(f"{site!r} has {words} text tokens, so there is no token {wrong[0]}.")
        wrong = [i for i in self.heads or [] if heads is not None and not -heads <= i < heads]
        if wrong:
            raise InstrumentError(f"{site!r} has {heads} heads, so there is no head {wrong[0]}.")

    def _labels(self, places: list[int], site: str, context: StepContext) -> list[str]:
        pieces = tokenizer_at(context, site).pieces(prompt_at(context, self.passes == "negative"))
        return [pieces[i] if 0 <= i < len(pieces) else "<pad>" for i in places]

    def _one_pass(self) -> str | None:
        """The one pass of two that is kept, if not both: words are the prompt's, so they mean the prompted one."""
        return self.passes or ("prompted" if self.tokens and contains_words(self.tokens) else None)

    # -- what is kept

    def _keep(self, site: str, when: When, value: Named, context: StepContext | None) -> None:
        value = self._plain(value, context)
        self._expect(site, value.tensor.nbytes, context, when)
        if self.over is None:
            self.recording.add(site, when, value, last_only=self.over_steps)

    def _plain(self, value: Named, context: StepContext | None) -> Named:
        """A copy on the CPU without axes of one place that mean nothing, its batch axis said as what it is."""
        tensor, axes = value.tensor, list(value.axes)
        guided = context is not None and context.request.uses_cfg and "batch" in axes
        if guided and tensor.shape[axes.index("batch")] == 2:
            axes[axes.index("batch")] = "pass"
            which = self._one_pass()
            if which is not None:
                tensor = tensor.select(axes.index("pass"), ("negative", "prompted").index(which))
                axes.remove("pass")
        for name in ("one", "batch"):
            if name in axes and tensor.shape[axes.index(name)] == 1:
                tensor = tensor.squeeze(axes.index(name))
                axes.remove(name)
        dtype = tensor.dtype if self.dtype is None or tensor.is_complex() or "what" in axes else self.dtype
        tensor = tensor.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        return Named(tensor, tuple(axes), value.coords)

    def _expect(self, site: str, nbytes: int, context: StepContext | None, when: When) -> None:
        """Claim what a site will hold by the end of the run, as soon as that can be known."""
        run, folder = None if context is None else context.run, isinstance(self.recording, FolderRecording)
        if folder and not self.over_steps:
            steps, pictures, run = self._questions(context), 1, None  # a step at a time is held; the rest is written
        elif context is None:
            steps, pictures = 1 if self.over_steps else self.calls[site] + 1, 1
        else:
            inside = context.step is not None and not self.over_steps
            asked = sum(among(self.steps, i, context.steps) for i in range(context.steps))
            steps = self._questions(context) * asked if inside else 1
            pictures = context.pictures
        self._claim((site, run), nbytes * steps * pictures, when)

    def _claim(self, what: tuple[str, int | None], nbytes: int, when: When) -> None:
        """So many bytes will be held for ``what``; past the budget nothing more is kept, and it is refused soon."""
        self.total += nbytes - self.expected.get(what, 0)
        self.expected[what] = nbytes
        if self.total > self.budget and self.over is None:
            self.over = when.place

    def _refusal(self) -> BudgetError:
        self.refused = True
        return BudgetError(
            f"recording {len({s.removesuffix(', remembered') for s, _ in self.expected})} sites"
            f" or more needs {self.total:,} bytes or more, the budget is {self.budget:,}: "
            f"name fewer sites, steps or heads, reduce (reduce='head-mean', tokens=[...]), "
            f"{'' if isinstance(self.recording, FolderRecording) else 'stream to a folder (to=...), '}"
            f"or allow more (budget={self.total})."
        )

    @staticmethod
    def _questions(context: StepContext | None) -> int:
        """How often a step asks the network."""
        return 1 if context is None or context.stage < 0 else len(solver_called(context.request.solver).stages)

    # -- coming and going

    def __enter__(self) -> record:
        if self.used:
            raise InstrumentError("this recorder has recorded already; make another one.")
        super().__enter__()
        self.used = True
        return self

    def __exit__(self, kind, *rest) -> None:
        super().__exit__(kind, *rest)
        self.made.clear()
        if isinstance(self.recording, FolderRecording):
            over = kind is None or issubclass(kind, GeneratorExit)  # a generator that is closed has not failed
            try:
                self.recording.close() if over else self.recording.settle(failed=True)
            finally:
                self.recording.let_go()
        if kind is None and self.over is not None and not self.refused:
            raise self._refusal()
        if kind is None and self.passed and not self.seen and not self.absent:
            why = f"the run has {self.missed} steps, and none of them is in steps={describe(self.steps)}"
            why = why if self.missed else f"there was no {self.passes} pass"
            warnings.warn(f"nothing was recorded at {' and '.join(self.globs)}: {why}.", stacklevel=2)
        never = [error for site, error in self.absent.items() if site not in self.seen]
        if kind is None and never:
            raise never[0]

    # -- what was recorded: the recording's own face

    def _read(self) -> Recording:
        if isinstance(self.recording, FolderRecording):
            written = self.recording.written > 0
            return open_recording(self.recording.folder) if written else Recording()
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


def _version(value: Any) -> tuple:
    """Changes when the value (of a map: what it is made of) is written into."""
    parts = (value.q, value.k, value.v) if isinstance(value, AttentionMap) else (value,)
    return tuple(x._version for x in parts if isinstance(x, torch.Tensor) and not x.is_inference())


def checked_steps(steps: Steps) -> int | list[int] | slice | None:
    """``steps`` as it is, another sequence than a list as one; raises InstrumentError for what cannot name steps."""
    ends = [steps.start, steps.stop, steps.step] if isinstance(steps, slice) else []
    if steps is None or (ends and all(end is None or isinstance(end, int) for end in ends) and steps.step != 0):
        return steps
    try:
        return whole(steps)
    except TypeError:
        raise InstrumentError(f"steps is a number, a list of numbers or a slice, not {describe(steps)}.") from None


def checked_heads(heads: Sequence[int] | int | None) -> list[int] | None:
    """Heads by number as a list; raises InstrumentError for what names none."""
    try:
        found = None if heads is None else whole(heads)
    except TypeError:
        raise InstrumentError(f"heads is a number or a list of numbers, not {describe(heads)}.") from None
    if found == []:
        raise InstrumentError("heads names no head; leave it out for all of them.")
    return [found] if isinstance(found, int) else found


def whole(given) -> int | list[int]:
    """A whole number, or a list of them from whatever holds them; raises TypeError."""
    if isinstance(given, (str, bytes, bool)):
        raise TypeError
    try:
        return operator.index(given)
    except TypeError:  # several; an array of them has __index__ too
        return [operator.index(one) for one in given]


def among(steps: Steps, step: int | None, count: int | None) -> bool:
    """Is ``step`` (of ``count``, if that is known) one of ``steps``?"""
    if steps is None or step is None:
        return True
    if isinstance(steps, slice):
        return step in range(*steps.indices(count if count is not None else step + 1))
    wanted = [steps] if isinstance(steps, int) else steps
    return step in [s + count if s < 0 and count is not None else s for s in wanted]
