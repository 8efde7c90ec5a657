"""Recording: keep the values that pass through sites, reduced where they are, exact, within a memory budget.

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

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import BudgetError, InstrumentError, describe
from fluxedu.instruments.catalogue import axes_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import FolderRecording, Recording, StepKey, open_recording
from fluxedu.instruments.reductions import MapView, Reduction, Value, reduction_factory, to_named
from fluxedu.instruments.tokens import Word, as_list, contains_words, prompt_at, token_indices_at, tokenizer_at
from fluxedu.instruments.watching import Instrument
from fluxedu.probe import Sited
from fluxedu.sampling.solvers import solver_called
from fluxedu.sampling.step_context import StepContext, current_context

BUDGET = 2 * 2**30  # bytes
PASSES = ("negative", "prompted")  # of classifier-free guidance, in the order of the batch
Steps = int | Sequence[int] | slice | None


class record(Instrument):  # noqa: N801 - used like a function: ``with fe.record(...) as rec``
    """Keep the values of the sites that match ``globs``, inside a ``with`` block.

    steps: which steps, a number, a list or a slice; all by default · tokens: words of the prompt or indices of text
    tokens; at an attention map they select the keys, and the queries are then the image tokens · heads: which heads ·
    reduce: a name, a function ``Named -> Named`` or a list of them, see :mod:`fluxedu.instruments.reductions` · to:
    ``"memory"``, or a new folder to which every completed step is written · budget: the most bytes to hold, 2 GiB by
    default · passes: ``"prompted"`` or ``"negative"``, one of the two passes of classifier-free guidance · dtype: what
    to store the values in, their own by default.

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
        if not isinstance(passes, (str, type(None))) or passes not in (None, *PASSES):
            raise InstrumentError(f"passes must be 'prompted', 'negative' or None for both, not {describe(passes)}.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InstrumentError(f"dtype must be a floating point type such as torch.float16, not {describe(dtype)}.")
        budget = BUDGET if budget is None else budget
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 0:
            raise InstrumentError(f"budget must be a number of bytes, not {describe(budget)}.")
        if not isinstance(to, (str, Path)):
            raise InstrumentError(f"to must be 'memory' or a new folder, not {describe(to)}.")
        self.steps, self.heads = checked_steps(steps), checked_heads(heads)
        self.tokens = None if tokens is None else as_list(tokens)
        self.passes, self.dtype, self.budget = passes, dtype, budget
        self.new_reductions = reduction_factory(reduce)
        self.over_steps = any(getattr(reduction, "over_steps", False) for reduction in self.new_reductions())
        self.recording = Recording() if to == "memory" else FolderRecording(to)
        self.used = False
        self.reductions: dict[str, tuple[tuple, list[Reduction]]] = {}  # site -> (run, picture), its reductions
        self.calls: dict[str, int] = {}  # site -> calls so far, of a network without a pipeline
        self.recorded_sites: set[str] = set()
        self.skipped_steps = 0  # number of steps of a run of which at least one was not selected
        self.txt_len = 0  # number of text tokens in the most recent run
        self.expected_bytes: dict[tuple, int] = {}  # (site, run) -> by the end of that run
        self.total_bytes = 0  # their sum
        self.over_budget_at: tuple[int, int, int] | None = None  # the step in which it passed the budget
        self.refused = False

    # ---------------------------------------------------------------- a value passes

    def see(self, owner: Sited, name: str, site: str, value: Any) -> Any:
        context = current_context()
        in_step = context is not None and context.step is not None
        if in_step and not is_selected(self.steps, context.step, context.steps):
            self.skipped_steps = context.steps
            return value
        if self._is_other_pass(site, context, value):
            return value
        key = self._key(site, context)
        if context is None and not is_selected(self.steps, key.step, None):
            return value
        if self.over_budget_at is not None and self.over_budget_at != key.step_id:
            raise self._budget_error()  # a whole step has passed since, so the needs of a step are known
        with torch.no_grad():
            selected = self._named(owner, name, value)
            selected = self._select_pass(selected, context)
            selected = self._select(selected, site, context)
            reduced = self._reduce(selected, value, site, context, key)
        self.recorded_sites.add(site)
        if reduced is not None:
            stored = self._to_storage(reduced, context)
            self._expect(site, stored.tensor.nbytes, context, key)
            if self.over_budget_at is None:
                self.recording.add(site, key, stored, last_only=self.over_steps)
        return value

    def _is_other_pass(self, site: str, context: StepContext | None, value: Any) -> bool:
        """Whether the value is only of the guidance pass that is not recorded."""
        if self.passes is None or context is None or context.step is None:
            return False
        is_negative = self.passes == "negative"
        if not context.request.uses_cfg:  # the only pass is the prompted one
            return is_negative and not site.startswith("sample.")
        if site in ("sample.negative", "sample.prompted"):
            return not site.endswith(self.passes)
        is_single = not site.startswith("sample.") and value.shape[0] == 1  # guidance is off at this time
        return is_single and is_negative

    def _key(self, site: str, context: StepContext | None) -> StepKey:
        if context is None:
            self.calls[site] = self.calls.get(site, -1) + 1
            return StepKey(0, 0, self.calls[site], 0, None)
        self.recording.pictures, self.recording.completed[context.run] = context.pictures, context.ended
        self.txt_len = context.txt_len
        return StepKey(context.run, context.picture, context.step, max(context.stage, 0), context.time)

    def _named(self, owner: Sited, name: str, value: Any) -> Named | AttentionMap:
        if isinstance(value, AttentionMap):
            return value
        axes = axes_of(owner, name)
        if axes is None or len(axes) != value.ndim:
            axes = tuple(f"axis{i}" for i in range(value.ndim))
        return Named(value.detach(), axes)

    # ---------------------------------------------------------------- selection

    def _kept_pass(self) -> str | None:
        """The pass of guidance that is kept, None for both. Words belong to the prompt, so they mean its pass."""
        return self.passes or ("prompted" if self.tokens and contains_words(self.tokens) else None)

    def _select_pass(self, value: Named | AttentionMap, context: StepContext | None) -> Named | AttentionMap:
        """One of the two passes of guidance, before anything is computed from both."""
        kept = self._kept_pass() if context is not None and context.request.uses_cfg else None
        if kept is None:
            return value
        if isinstance(value, AttentionMap):
            return value.picture(PASSES.index(kept)) if value.shape[0] == 2 else value
        return value.take("batch", [PASSES.index(kept)]) if value.sizes.get("batch") == 2 else value

    def _select(self, value: Named | AttentionMap, site: str, context: StepContext | None) -> Value:
        """The selected tokens and heads of a value."""
        tokens, labels = None, None
        if self.tokens is not None:
            tokens = token_indices_at(context, site, self.tokens, self.passes == "negative")
            if context is not None:
                pieces = tokenizer_at(context, site).pieces(prompt_at(context, self.passes == "negative"))
                labels = [pieces[i] if 0 <= i < len(pieces) else "<pad>" for i in tokens]

        if isinstance(value, AttentionMap):
            self._check_tokens(site, tokens, value.txt_len)
            for head in self.heads or []:
                if not -value.shape[1] <= head < value.shape[1]:
                    raise InstrumentError(f"{site!r} has {value.shape[1]} heads, so there is no head {head}.")
            queries = slice(None) if tokens is None else _image_queries(value.txt_len, value.shape[2])
            return MapView(value, self.heads, queries, tokens, labels, self.budget)

        if tokens is not None and value.axes[-1] == "key":  # a map that an intervention replaced by a tensor
            in_encoder = context is None or context.text is not None
            txt_len = value.shape[-1] if in_encoder else context.txt_len
            self._check_tokens(site, tokens, txt_len)
            queries = range(value.sizes["query"])[_image_queries(txt_len, value.sizes["query"])]
            value = value.take("query", list(queries)).take("key", tokens)
            value = Named(value.tensor, value.axes, {} if labels is None else {"key": labels})
        elif tokens is not None:
            axis = next((a for a in ("text", "token") if a in value.axes), None)
            if axis is None:
                raise InstrumentError(f"{site!r} has no text tokens (its axes are {', '.join(value.axes)}).")
            is_joint = context is not None and axis == "token"
            self._check_tokens(site, tokens, context.txt_len if is_joint else value.sizes[axis])
            value = value.take(axis, tokens)
        return value if self.heads is None else value.take("head", self.heads)

    def _check_tokens(self, site: str, tokens: list[int] | None, txt_len: int) -> None:
        for token in tokens or []:
            if not 0 <= token < txt_len:
                raise InstrumentError(f"{site!r} has {txt_len} text tokens, so there is no token {token}.")

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
            if self.over_budget_at is not None:
                return None  # refused before it is computed
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
        self._expect_bytes((f"{site}, state of the reduction", None), memory, key)
        return None if selected is None else to_named(selected)

    def _to_storage(self, value: Named, context: StepContext | None) -> Named:
        """A copy on the CPU, without axes of length 1 that carry no meaning; of guidance, the axis is called pass."""
        tensor, axes = value.tensor, list(value.axes)
        if context is not None and context.request.uses_cfg and value.sizes.get("batch") == 2:
            axes[axes.index("batch")] = "pass"
            kept = self._kept_pass()
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

    # ---------------------------------------------------------------- budget

    def _expect(self, site: str, nbytes: int, context: StepContext | None, key: StepKey) -> None:
        """Count the bytes that a site will hold by the end of the run, given those of one value."""
        evaluations = 1
        if context is not None and context.stage >= 0:
            evaluations = len(solver_called(context.request.solver).stages)
        run = None if context is None else context.run
        if isinstance(self.recording, FolderRecording) and not self.over_steps:
            values, run = evaluations, None  # one step is held at a time; the others are on disk
        elif context is None:
            values = 1 if self.over_steps else self.calls[site] + 1
        elif context.step is None or self.over_steps:
            values = context.pictures
        else:
            steps = sum(is_selected(self.steps, i, context.steps) for i in range(context.steps))
            values = evaluations * steps * context.pictures
        self._expect_bytes((site, run), nbytes * values, key)

    def _expect_bytes(self, what: tuple[str, int | None], nbytes: int, key: StepKey) -> None:
        self.total_bytes += nbytes - self.expected_bytes.get(what, 0)
        self.expected_bytes[what] = nbytes
        if self.over_budget_at is None and self.total_bytes > self.budget:
            self.over_budget_at = key.step_id

    def _budget_error(self) -> BudgetError:
        self.refused = True
        sites = {name.removesuffix(", state of the reduction") for name, _ in self.expected_bytes}
        folder = "" if isinstance(self.recording, FolderRecording) else "write to a folder (to=...), "
        return BudgetError(
            f"recording {len(sites)} sites or more needs at least {self.total_bytes:,} bytes, "
            f"the budget is {self.budget:,}: name fewer sites, steps or heads, "
            f"reduce (reduce='head-mean', tokens=[...]), {folder}or allow more (budget={self.total_bytes})."
        )

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
        if self.over_budget_at is not None and not self.refused:
            raise self._budget_error()
        for site, error in self.missing_words.items():
            if site not in self.recorded_sites:
                raise error
        if self.own_site_passed and not self.recorded_sites and not self.missing_words:
            reason = f"there was no {self.passes} pass"
            if self.skipped_steps:
                reason = f"the run has {self.skipped_steps} steps, and none of them is in steps={describe(self.steps)}"
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


def _image_queries(txt_len: int, queries: int) -> slice:
    """With tokens=, the queries of a joint map are the image tokens; a text encoder's are all its tokens."""
    return slice(txt_len if txt_len < queries else 0, None)


def _version(value: Any) -> tuple:
    """Changes when the value (of a map: its q, k or v) is written to in place."""
    parts = (value.q, value.k, value.v) if isinstance(value, AttentionMap) else (value,)
    return tuple(x._version for x in parts if isinstance(x, torch.Tensor) and not x.is_inference())


# ---------------------------------------------------------------- arguments that several instruments take


def checked_steps(steps: Steps) -> int | list[int] | slice | None:
    """``steps``, sequences as a list; raises InstrumentError for what cannot select steps."""
    ends = [steps.start, steps.stop, steps.step] if isinstance(steps, slice) else []
    if steps is None or (ends and all(end is None or isinstance(end, int) for end in ends) and steps.step != 0):
        return steps
    try:
        return _integers(steps)
    except TypeError:
        raise InstrumentError(f"steps must be a number, a list of numbers or a slice, not {describe(steps)}.") from None


def checked_heads(heads: Sequence[int] | int | None) -> list[int] | None:
    """Head indices as a list; raises InstrumentError for what selects no head."""
    try:
        found = None if heads is None else _integers(heads)
    except TypeError:
        raise InstrumentError(f"heads must be a number or a list of numbers, not {describe(heads)}.") from None
    if found == []:
        raise InstrumentError("heads must not be empty; leave it out for all of them.")
    return [found] if isinstance(found, int) else found


def _integers(values) -> int | list[int]:
    """A whole number, or a list of them from any iterable of them; raises TypeError."""
    if isinstance(values, (str, bytes, bool)):
        raise TypeError
    try:
        return operator.index(values)
    except TypeError:  # several; an array of length 1 has __index__ too
        return [operator.index(value) for value in values]


def is_selected(steps: Steps, step: int | None, count: int | None) -> bool:
    """Whether ``step`` (of ``count`` steps, if known) is one of ``steps``; negative numbers count from the end."""
    if steps is None or step is None:
        return True
    if isinstance(steps, slice):
        return step in range(*steps.indices(count if count is not None else step + 1))
    selected = [steps] if isinstance(steps, int) else steps
    return step in [s + count if s < 0 and count is not None else s for s in selected]
