"""Interventions: go on with another value than the one that was computed.

    with fe.intervene("single.3.gate", lambda x, ctx: 0 * x, times=(0.5, 1.0)):
        pipe("a red circle")

They compose (the one entered first acts first), recorders see what they leave, and all end with their ``with``. What
changes nothing leaves the picture the same to the last bit.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.catalogue import axes_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import Steps, among, checked_heads, checked_steps, record
from fluxedu.instruments.recording import Recording, When
from fluxedu.instruments.tokens import Word, contains_words, listed, token_indices_at
from fluxedu.instruments.watching import Instrument, takes
from fluxedu.models.attention_map import AttentionMap
from fluxedu.probe import Sited
from fluxedu.sampling.conditions import reference_shape, reference_ids
from fluxedu.sampling.latents import image_ids, text_ids
from fluxedu.sampling.step_context import StepContext, current_context

Times = tuple[float, float]


@dataclass(frozen=True)
class Context:
    """Where a value is being changed: its ``site``, its ``axes``, the run's ``context`` (None without a pipeline)."""

    site: str
    axes: tuple[str, ...] | None
    step_context: StepContext | None

    @property
    def step(self) -> int | None:
        return self.step_context and self.step_context.step

    @property
    def time(self) -> float | None:
        return self.step_context and self.step_context.time

    @property
    def generator(self) -> torch.Generator:
        """Random numbers for this site, step and question, told by the picture's seed; on the CPU."""
        context = self.step_context
        where = (
            (self.site, 0, 0, 0) if context is None else (self.site, context.request.seed, context.step, context.stage)
        )
        told = hashlib.sha256(repr(where).encode()).digest()[:7]
        return torch.Generator().manual_seed(int.from_bytes(told, "big"))

    def tokens(self, words: Sequence[Word] | Word) -> list[int]:
        """Places of the text tokens that spell ``words``; numbers are places already."""
        return token_indices_at(self.step_context, self.site, words)

    def places(self, stream: str) -> slice:
        """Of the joint tokens, those of ``"txt"`` or ``"img"``."""
        if stream not in ("txt", "img"):
            raise InstrumentError(f"a stream is 'txt' or 'img', not {describe(stream)}.")
        words = self._step_context().txt_len
        return slice(0, words) if stream == "txt" else slice(words, None)

    def _step_context(self) -> StepContext:
        if self.step_context is None:
            raise InstrumentError(f"at {self.site!r}, words and streams can be told apart in a pipeline's run only.")
        return self.step_context


class intervene(Instrument):  # noqa: N801 - used like a function
    """``change(value, ctx) -> value`` at every site that ``globs`` name.

    steps: which steps (a number, a list, a slice) · times: from, to, in [0, 1], 1 being noise. The change must keep
    shape and dtype, and may write into the value, a copy of its own; of ``attn.map`` it gets the lazy map and may give
    a tensor ``[B, H, N, N]``. Random numbers come from ``ctx.generator``, the same for the same seed. Raises
    InstrumentError for a site that is not there or a change that does not fit; warns when no step of a run was meant.
    """

    changes = True

    def __init__(
        self,
        *globs_and_change: Any,
        steps: Steps = None,
        times: Times | None = None,
    ):
        *globs, change = globs_and_change or (None,)
        if not callable(change):
            raise InstrumentError(
                f"the last argument must be a function (value, ctx) -> value, not {describe(change)}."
            )
        super().__init__(*globs)
        if not takes(change, None, None):
            raise InstrumentError(f"a change is a function of two, (value, ctx) -> value; {describe(change)} is not.")
        self.change, self.steps, self.times = change, checked_steps(steps), _checked(times)
        self.acted: set[str] = set()  # the sites where it did
        self.early: set[str] = set()  # those that passed outside of a run's steps, though steps= or times= name some
        self.missed = 0  # of how many steps the run is that passed outside of steps= and times=

    def see(self, owner: Sited, name: str, whole: str, value: Any) -> Any:
        context = current_context()
        if not self._now(context, whole):
            return value
        own = value.clone() if isinstance(value, Tensor) else value  # a change may write into it
        changed = self.change(own, Context(whole, axes_of(owner, name), context))
        self.acted.add(whole)
        return _fitting(changed, value, whole)

    def _now(self, context: StepContext | None, site: str) -> bool:
        if context is None or context.step is None:
            always = self.times is None and self.steps is None
            self.early |= set() if always else {site}
            return always
        low, high = self.times or (-1.0, 2.0)
        meant = among(self.steps, context.step, context.steps) and low <= context.time <= high
        self.missed = self.missed if meant else context.steps
        return meant

    def __exit__(self, kind, *rest) -> None:
        super().__exit__(kind, *rest)
        if kind is None and self.absent and not self.acted:
            raise next(iter(self.absent.values()))
        early = sorted(self.early - self.acted) if kind is None else []
        if early:
            says = (
                f"{early[0]} passed outside of the steps of a run only, where steps= and times= never let it be changed"
            )
            if not self.acted:
                raise InstrumentError(f"{says}; leave them out.")
            warnings.warn(f"{says}.", stacklevel=2)
        if kind is None and self.missed and not self.acted:
            warnings.warn(f"nothing was changed at {' and '.join(self.globs)}: {self._never()}.", stacklevel=2)

    def _never(self) -> str:
        if self.times is None:
            return f"the run has {self.missed} steps, and none of them is in steps={describe(self.steps)}"
        steps = "" if self.steps is None else f" in steps={describe(self.steps)}"
        between = "between t = {:g} and {:g}".format(*self.times)
        return f"no step{steps} of the run's {self.missed} begins {between}"


def _checked(times: Times | None) -> Times | None:
    if times is None:
        return None
    try:
        low, high = sorted(float(t) for t in times)
        if not (0 <= low and high <= 1):  # false for nan too
            raise ValueError
    except (TypeError, ValueError):
        raise InstrumentError(f"times is a pair (from, to) in [0, 1], not {describe(times)}.") from None
    return low, high


def _fitting(changed: Any, value: Any, site: str) -> Any:
    """The changed value, if it fits; the old one itself if nothing changed, so that not a bit of the run does."""
    if changed is value:
        return value
    if not isinstance(changed, Tensor):
        raise InstrumentError(f"the change at {site!r} gave {type(changed).__name__}; it must give a tensor.")
    if tuple(changed.shape) != tuple(value.shape):
        raise InstrumentError(
            f"the change at {site!r} gave a tensor {list(changed.shape)}; it must be {list(value.shape)}."
        )
    if isinstance(value, AttentionMap):
        return value if torch.equal(changed, value.weights().to(changed)) else changed
    if changed.dtype != value.dtype or changed.device != value.device:
        raise InstrumentError(
            f"the change at {site!r} gave {changed.dtype} on {changed.device}; "
            f"it must be {value.dtype} on {value.device}."
        )
    return value if torch.equal(changed, value) else changed


# ---------------------------------------------------------------- cutting things out

_BLOCK = re.compile(r"(double|single)\.(\*|\d+)")


def ablate(
    *globs: str,
    heads: Sequence[int] | int | None = None,
    streams: Sequence[str] | str | None = None,
    tokens: Sequence[Word] | Word | None = None,
    steps: Steps = None,
    times: Times | None = None,
    to: str | float = 0.0,
) -> intervene:
    """Cut out what sites say: set it to 0 (or to another number, or ``to="mean"``, the mean over its tokens).

    A whole block is ``"double.1"`` or ``"single.*"``: it then adds nothing to its stream. heads: only these, at
    sites with heads · streams: only the tokens of ``"txt"`` or ``"img"`` · tokens: only these words or places (of text
    tokens; at a site of the image's alone, of patches). At
    ``attn.map``, tokens are not looked at: their columns go and every row is made whole again::

        with fe.ablate("double.1.heads", heads=[2]): ...
        with fe.ablate("*.attn.map", tokens=["red"]): ...
    """
    heads, tokens = checked_heads(heads), None if tokens is None else listed(tokens)
    named = [streams] if isinstance(streams, str) else streams
    if named is not None and (
        not isinstance(named, (list, tuple)) or not named or any(s not in _STREAMS for s in named)
    ):
        raise InstrumentError(f"a stream is 'txt' or 'img', not {describe(streams)}.")
    if to != "mean" if isinstance(to, str) else isinstance(to, bool) or not isinstance(to, (int, float)) or to != to:
        raise InstrumentError(f"to= is a number or 'mean', not {describe(to)}.")
    sites = [site for glob in globs for site in _sites_of(glob, named, tokens)]

    def change(value: Tensor | AttentionMap, ctx: Context) -> Tensor | AttentionMap:
        if (ctx.axes or ())[-1:] == ("key",):
            if named is not None or to != 0:
                raise InstrumentError(
                    f"at {ctx.site!r} columns are cut: say tokens= (and heads=), not streams= or to=."
                )
            return _unseen(value, ctx, heads, tokens)
        mask = _mask(value, ctx, heads, named, tokens)
        return torch.where(mask, _instead(value, ctx, to), value)

    return intervene(*sites, change, steps=steps, times=times)


_STREAMS = ("txt", "img")


def _sites_of(glob: str, streams: Sequence[str] | None, tokens) -> list[str]:
    """A block's name as the sites of what it adds; any other glob as it is."""
    if not isinstance(glob, str) or not _BLOCK.fullmatch(glob):
        return [glob]
    if glob.startswith("single"):
        return [f"{glob}.contribution"]
    return [f"{glob}.{stream}_*_contribution" for stream in streams or (_STREAMS if tokens is None else ("txt",))]


def _instead(value: Tensor, ctx: Context, to: str | float) -> Tensor:
    if to == "mean":
        axes = [i for i, a in enumerate(ctx.axes or ()) if a in ("text", "image", "token")]
        if not axes:
            raise InstrumentError(f"{ctx.site!r} has no tokens to take the mean over (its axes are {ctx.axes}).")
        return value.mean(dim=axes, keepdim=True)
    try:
        return torch.full((), float(to), dtype=value.dtype, device=value.device)
    except (RuntimeError, OverflowError):
        raise InstrumentError(f"to={describe(to)} is more than {value.dtype} at {ctx.site!r} can hold.") from None


def _mask(value: Tensor, ctx: Context, heads, streams, tokens) -> Tensor:
    """Which entries are cut: the named heads and the named tokens, everything along what is not named."""
    mask = torch.ones((), dtype=torch.bool, device=value.device)
    if heads is not None:
        mask = mask & _along(value, ctx, ("head",), heads)
    own = re.search(r"(?:^|\.)(txt|img)(_|$)", ctx.site)  # a site of one stream
    if streams is not None and own:
        mask = mask & (own[1] in streams)
    elif streams is not None:
        mask = mask & _along(value, ctx, ("token",), [ctx.places(s) for s in streams])
    if tokens is not None:
        axes = ("text", "token") if contains_words(tokens) else ("text", "token", "image")
        mask = mask & _along(value, ctx, axes, ctx.tokens(tokens))
        mask = mask & _prompted(value, ctx, tokens)
    return mask


def _prompted(value: Tensor, ctx: Context, tokens: Sequence[Word] | Word) -> Tensor:
    """Words are the prompt's: of the two passes of classifier-free guidance, only the prompted one says them."""
    guided = ctx.step_context is not None and ctx.step_context.request.uses_cfg and ctx.step_context.text is None
    both = guided and contains_words(tokens) and len(value) == 2
    mask = torch.ones(len(value) if both else 1, dtype=torch.bool, device=value.device)
    if both:
        mask[0] = False
    return mask.view(-1, *[1] * (value.ndim - 1))


def _along(value: Tensor, ctx: Context, names: tuple[str, ...], places: Sequence[int | slice]) -> Tensor:
    """True at ``places`` of the first axis of those ``names`` that there is."""
    axis = next((i for i, a in enumerate(ctx.axes or ()) if a in names), None)
    if axis is None:
        raise InstrumentError(
            f"{ctx.site!r} has no {names[0]} axis (its axes are {', '.join(ctx.axes or ('unknown',))})."
        )
    chosen = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
    for place in places:
        if isinstance(place, int) and not -len(chosen) <= place < len(chosen):
            raise InstrumentError(f"{ctx.site!r} has {len(chosen)} places along {names[0]}, so there is no {place}.")
        chosen[place] = True
    return chosen.view([-1 if i == axis else 1 for i in range(value.ndim)])


def _unseen(value: AttentionMap | Tensor, ctx: Context, heads, tokens) -> Tensor:
    """The map without some columns, its rows made to sum to 1 again."""
    if tokens is None:
        raise InstrumentError(f"at {ctx.site!r} say which tokens are not to be looked at: tokens=['red'].")
    weights = value.weights() if isinstance(value, AttentionMap) else value
    keys = Context(ctx.site, ("batch", "head", "query", "token"), ctx.step_context)
    hidden = _along(weights, keys, ("token",), keys.tokens(tokens)) & _prompted(weights, ctx, tokens)
    if heads is not None:
        hidden = hidden & _along(weights, ctx, ("head",), heads)
    if hidden.all(-1).any():
        raise InstrumentError(f"at {ctx.site!r} every token would be hidden, and a row needs something to look at.")
    kept = weights.masked_fill(hidden, 0)
    return torch.where(hidden.any(-1, keepdim=True), kept / kept.sum(-1, keepdim=True), weights)


# ---------------------------------------------------------------- places


def positions(
    edit: Callable[[Tensor], Tensor], text: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor, Context], Tensor]:
    """A change for ``attn.rope`` sites: tell some blocks that the tokens are elsewhere.

    ``edit(ids [N, 3]) -> ids [N, 3]`` of the image tokens, the columns being frame, row and column; ``text``, of the
    same form, of the text tokens, which stay at (0, 0, 0) if it is not said. A reference picture's tokens (kontext)
    are image tokens too: they come last, in frame 1.

        flat = positions(lambda ids: ids * torch.tensor([1, 0, 1]))        # every row is row 0
        with fe.intervene("double.*.attn.rope", flat): ...
    """

    def change(table: Tensor, ctx: Context) -> Tensor:
        context = ctx._step_context()
        ids = image_ids(*context.request.shape)
        if context.request.reference is not None:
            cells = reference_shape(context.request, context.pipe.autoencoder.config.downscale)
            ids = torch.cat([ids, reference_ids(*cells)])
        ids = edit(ids)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[-1] != 3:
            raise InstrumentError(f"edit must give the ids of the image tokens, a tensor [N, 3], not {describe(ids)}.")
        words = text_ids(context.txt_len) if text is None else text(text_ids(context.txt_len))
        new = context.pipe.flux.rope(ids.to(table.device), words.to(table.device))
        return new.view(table.shape) if new.numel() == table.numel() else new

    return change


# ------------------------------------------------------------ instruments/interventions.py
# Activation patching: a run goes on with values that were recorded in another one.


def patch(
    glob: str, source: record | Recording | Named | Tensor, steps: Steps = None, times: Times | None = None
) -> intervene:
    """Go on with values from another run: activation patching (arXiv 2202.05262).

    source: a recording of one run of the same sites, taken unreduced, of which the same step is put in (of a text
    encoder, the same prompt: the first encoded, the second, ...); or one value, a tensor or :class:`Named`, put in
    every time. Raises InstrumentError when the recording has no such site, step, time or shape, or is of several runs.
    """
    if not isinstance(source, (record, Recording, Named, Tensor)):
        raise InstrumentError(f"a patch is a recording, a Named or a tensor, not {type(source).__name__}.")
    if isinstance(source, record) and (source.tokens or source.heads or source.reductions()):
        raise InstrumentError("a patch needs whole values: record them without tokens=, heads= and reduce=.")
    calls: Counter = Counter()  # (run, site) -> how many prompts have been encoded there

    def change(value: Any, ctx: Context) -> Tensor:
        found = _recorded(source, ctx, calls) if isinstance(source, (record, Recording)) else source
        tensor = found.tensor if isinstance(found, Named) else found
        mine, theirs = ([n for n in shape if n != 1] for shape in (value.shape, tensor.shape))
        if mine != theirs:
            raise InstrumentError(f"{ctx.site!r} is {list(value.shape)}, but the patch is {list(tensor.shape)}.")
        like = value.q if isinstance(value, AttentionMap) else value
        if tensor.is_complex() and not like.is_complex():
            raise InstrumentError(f"{ctx.site!r} is of real numbers, but the patch is of complex ones.")
        dtype = tensor.dtype if isinstance(value, AttentionMap) else like.dtype
        return tensor.to(like.device, dtype).reshape(value.shape)

    return intervene(glob, change, steps=steps, times=times)


def _recorded(source: record | Recording, ctx: Context, calls: Counter) -> Named:
    """The recorded value that belongs to this context."""
    context, entries = ctx.step_context, source.entries(ctx.site)
    if len(runs := {when.run for when, _ in entries}) > 1:
        raise InstrumentError(f"the recording of {ctx.site!r} is of {len(runs)} runs; record the one to put in alone.")
    if context is None:
        return entries[0][1]
    if context.text is not None:
        calls[context.run, ctx.site] += 1
        if calls[context.run, ctx.site] > len(entries):
            raise InstrumentError(
                f"the recording of {ctx.site!r} has {len(entries)} encoded prompts, and this run encodes more; "
                f"to put one value in every time, give that value."
            )
        return entries[calls[context.run, ctx.site] - 1][1]
    same = [(when, v) for when, v in entries if (when.step, when.stage) == (context.step, max(context.stage, 0))]
    if not same:
        have = sorted({when.step for when, _ in entries if when.step is not None})
        raise InstrumentError(f"the recording of {ctx.site!r} has no step {context.step}; it has {have}.")
    when, value = same[min(context.picture, len(same) - 1)]
    _same_time(when, ctx)
    return value


def _same_time(when: When, ctx: Context) -> None:
    if when.time is not None and abs(when.time - ctx.time) > 1e-4:
        raise InstrumentError(
            f"step {when.step} of the recording of {ctx.site!r} is at t = {when.time:.3f}, and of this run at "
            f"t = {ctx.time:.3f}; record as many steps as are drawn, or give one value."
        )
