"""Interventions: replace a computed value by another and continue the run with it.

    with fe.intervene("single.3.gate", lambda x, ctx: 0 * x, times=(0.5, 1.0)):
        pipe("a red circle")

They compose (the one entered first acts first), recorders see their result, and each is removed at the end of its
``with`` block. An intervention that changes nothing leaves the image the same to the last bit; with
``compile=True``, the same as an uncompiled run, which differs from a compiled one by about 6e-5.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import InstrumentError, checked, describe
from fluxedu.instruments.catalogue import axes_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import NEGATIVE_PROMPT, record
from fluxedu.instruments.recording import Recording
from fluxedu.instruments.selection import (
    ONE_PASS_SITES,
    STREAMS,
    Indices,
    Selection,
    Times,
    Tokens,
    mask_of,
    passes_of,
)
from fluxedu.instruments.tokens import Word, token_indices_at
from fluxedu.instruments.watching import Instrument, accepts
from fluxedu.probe import Sited
from fluxedu.sampling.conditions import all_reference_ids
from fluxedu.sampling.latents import image_ids, text_ids
from fluxedu.sampling.step_context import StepContext, Steps, current_context


@dataclass(frozen=True)
class Context:
    """Where a value is changed: its ``site``, its ``axes``, and the ``step_context`` (None without a pipeline).

    ``passes`` names the passes of classifier-free guidance along the batch: ``("negative", "prompted")``,
    ``("prompted",)`` where guidance is off, ``()`` for a value that both passes share.
    """

    site: str
    axes: tuple[str, ...] | None
    step_context: StepContext | None
    passes: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        return self.step_context and self.step_context.step

    @property
    def time(self) -> float | None:
        return self.step_context and self.step_context.time

    @property
    def generator(self) -> torch.Generator:
        """A CPU generator, seeded by the image's seed, the site, the step and the solver's stage."""
        context = self.step_context
        key = (self.site, 0, 0, 0)
        if context is not None:
            key = (self.site, context.request.seed, context.step, context.stage)
        digest = hashlib.sha256(repr(key).encode()).digest()[:7]
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))

    def tokens(self, words: Sequence[Word] | Word) -> list[int]:
        """Indices of the text tokens that spell ``words``; numbers are indices already."""
        return token_indices_at(self.step_context, self.site, words)

    def stream_slice(self, stream: str) -> slice:
        """The tokens of ``"txt"`` or ``"img"`` among all tokens."""
        if stream not in STREAMS:
            raise InstrumentError(f"a stream is 'txt' or 'img', not {describe(stream)}.")
        txt_len = self.pipeline_context().txt_len
        return slice(0, txt_len) if stream == "txt" else slice(txt_len, None)

    def pipeline_context(self) -> StepContext:
        """``step_context``; raises InstrumentError without a pipeline."""
        if self.step_context is None:
            raise InstrumentError(
                f"this change of {self.site!r} works only while a pipeline runs; call the pipeline, not the network."
            )
        return self.step_context


class intervene(Instrument):  # noqa: N801 - used like a function
    """Replace the value at every site that matches ``globs`` by ``change(value, ctx)``.

    steps, times, passes, streams, tokens, queries, heads: the part of the values that is replaced, see
    :mod:`fluxedu.instruments.selection`. ``change`` receives the complete value all the same; of its result, only the
    selected entries are used, and the other entries keep their bits and their gradient::

        with fe.intervene("single.3.x", lambda x, ctx: 0 * x, streams="img", tokens=fe.region(box=(0, 0, 0.5, 1))): ...

    Under classifier-free guidance, by default only the prompted pass is changed, including the encoding of its text;
    ``passes="negative"`` or ``"both"`` select otherwise. A site of one pass, such as ``sample.negative``, is changed
    whatever ``passes`` says.

    The result must have the value's shape and dtype; ``change`` may write to the value, which is a copy. At
    ``attn.map`` it receives the lazy map and returns a map or a tensor ``[B, H, N, N]``. Random numbers from
    ``ctx.generator`` are the same for the same seed. Raises InstrumentError for a site that does not exist, a selection
    that a site does not have, or a result that does not fit; warns if nothing was selected.
    """

    changes = True

    def __init__(
        self,
        *globs_and_change: Any,
        steps: Steps = None,
        times: Times | None = None,
        passes: str | None = None,
        streams: Sequence[str] | str | None = None,
        tokens: Tokens | None = None,
        queries: Tokens | None = None,
        heads: Sequence[int] | int | None = None,
    ):
        *globs, change = globs_and_change or (None,)
        if not callable(change):
            raise InstrumentError(
                f"the last argument must be a function (value, ctx) -> value, not {describe(change)}."
            )
        super().__init__(*globs)
        if not accepts(change, None, None):
            raise InstrumentError(
                f"change must take two arguments, (value, ctx) -> value; {describe(change)} does not."
            )
        self.change = change
        self.selection = Selection.of(
            steps, times, "prompted" if passes is None else passes, streams, tokens, queries, heads
        )
        self.named_passes = set(globs) & set(ONE_PASS_SITES) if passes is None else set()
        self.changed_sites: set[str] = set()
        self.outside_steps: set[str] = set()  # sites reached outside the steps while steps= or times= was set

    def see(self, owner: Sited, name: str, full_name: str, value: Any) -> Any:
        context, axes = current_context(), axes_of(owner, name)
        if not self._is_in_step(context, full_name):
            return value
        if full_name in self.named_passes:
            entries = [{}]
        else:
            entries = self.selection.entries(value, full_name, axes or (), context)
        if not entries:
            return value
        passes = passes_of(full_name, axes, value.shape[0], context)
        result = self.replaced(value, entries, Context(full_name, axes, context, passes))
        self.changed_sites.add(full_name)
        return result

    def replaced(self, value: Any, entries: list[Indices], ctx: Context) -> Any:
        """The value with the selected entries replaced."""
        value_copy = value.clone() if isinstance(value, Tensor) else value  # the change may write to it
        result = checked_result(self.change(value_copy, ctx), value, ctx.site)
        mask = mask_of(entries, ctx.axes or (), value)
        if result is value or mask is None:
            return result
        old, new = (x.weights() if isinstance(x, AttentionMap) else x for x in (value, result))
        return checked_result(torch.where(mask, new, old.to(new.dtype)), value, ctx.site)

    def _is_in_step(self, context: StepContext | None, site: str) -> bool:
        if context is None or context.step is None:
            if self.selection.times is None and self.selection.steps is None:
                return True
            self.outside_steps.add(site)
            return False
        return self.selection.includes_step(context.step, context.time, context.steps)

    def __exit__(self, kind, *rest) -> None:
        super().__exit__(kind, *rest)
        if kind is not None:
            return
        if self.missing_words and not self.changed_sites:
            raise next(iter(self.missing_words.values()))
        never_changed = sorted(self.outside_steps - self.changed_sites)
        if never_changed:
            message = f"{never_changed[0]} is computed outside the steps of a run, so steps= and times= never select it"
            if not self.changed_sites:
                raise InstrumentError(f"{message}; remove them.")
            warnings.warn(f"{message}.", stacklevel=2)
        if self.selection.missed and not self.changed_sites:
            message = f"nothing was changed at {' and '.join(self.globs)}: {self.selection.missed}."
            warnings.warn(message, stacklevel=2)


def checked_result(result: Any, value: Any, site: str) -> Any:
    """The result, if it fits. If it equals the old value, the old value itself is returned, so that not one bit of the
    run changes, unless a gradient may flow through either.
    """
    if result is value:
        return value
    is_map = isinstance(value, AttentionMap)
    if not isinstance(result, Tensor) and not (is_map and isinstance(result, AttentionMap)):
        raise InstrumentError(f"the change at {site!r} returned {type(result).__name__}; it must return a tensor.")
    if tuple(result.shape) != tuple(value.shape):
        raise InstrumentError(
            f"the change at {site!r} returned a tensor {list(result.shape)}; it must be {list(value.shape)}."
        )
    if isinstance(result, AttentionMap):
        return result
    in_graph = torch.is_grad_enabled() and (result.requires_grad or value.requires_grad)
    if is_map:
        is_same = not in_graph and torch.equal(result, value.weights().to(result))
        return value if is_same else result.to(value.q.dtype)
    if result.dtype != value.dtype or result.device != value.device:
        raise InstrumentError(
            f"the change at {site!r} returned {result.dtype} on {result.device}; "
            f"it must be {value.dtype} on {value.device}."
        )
    return value if not in_graph and torch.equal(result, value) else result


# ---------------------------------------------------------------- positions


@checked(InstrumentError)
def positions(
    edit: Callable[[Tensor], Tensor], text: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor, Context], Tensor]:
    """A change for ``attn.rope`` sites: give the tokens other position ids in some blocks.

    ``edit(ids [N, 3]) -> ids [N, 3]`` of the image tokens, with columns frame, row, column; ``text``: the same for the
    text tokens, which stay at (0, 0, 0) by default. The tokens of a reference picture (kontext) are image tokens too;
    they come last, in frame 1. In FLUX.2, ids have a fourth column, which counts the text tokens, and reference
    pictures are in the frames 10, 20, ...

        same_row = positions(lambda ids: ids * torch.tensor([1, 0, 1]))        # every patch in row 0
        with fe.intervene("double.*.attn.rope", same_row): ...
    """

    def change(table: Tensor, ctx: Context) -> Tensor:
        context = ctx.pipeline_context()
        axes = len(context.pipe.flux.config.axes_dim)
        ids = image_ids(*context.request.shape, axes)
        if context.request.references:
            ids = torch.cat([ids, all_reference_ids(context.request, context.pipe.autoencoder.config.downscale, axes)])
        ids = edit(ids)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[-1] != axes:
            raise InstrumentError(f"edit must return the ids, a tensor [N, {axes}], not {describe(ids)}.")
        txt_ids = text_ids(context.txt_len, axes)
        txt_ids = txt_ids if text is None else text(txt_ids)
        new = context.pipe.flux.rope(ids.to(table.device), txt_ids.to(table.device))
        return new.view(table.shape) if new.numel() == table.numel() else new

    return change


# ---------------------------------------------------------------- activation patching


class patch(intervene):  # noqa: N801 - used like a function
    """Activation patching: continue with values from another run (arXiv 2202.05262).

    source: an unreduced recording of one run, or a single value (a tensor or :class:`Named`) for all steps. From a
    recording, each step uses the value recorded at the same step; at a text encoder, the n-th prompt uses the n-th
    recorded value. If it has only one pass of classifier-free guidance, its value is used in every
    selected pass. selection: steps, times, passes,
    streams, tokens, queries and heads, as for :class:`intervene`::

        with fe.patch("single.3.x", rec, streams="img", steps=slice(3, 7)): ...  # only the image tokens

    Raises InstrumentError when the recording lacks the site, step, time or shape, or has several runs.
    """

    def __init__(self, glob: str, source: record | Recording | Named | Tensor, **selection: Any):
        if not isinstance(source, (record, Recording, Named, Tensor)):
            raise InstrumentError(f"source must be a recording, a Named or a tensor, not {type(source).__name__}.")
        if isinstance(source, record) and source.is_partial:
            raise InstrumentError("fe.patch needs complete values: record them without tokens=, heads= and reduce=.")
        super().__init__(glob, self.recorded, **selection)
        self.source = source
        self.prompts_encoded: Counter = Counter()  # (run, site, whether negative) -> number of prompts

    def recorded(self, value: Any, ctx: Context) -> Tensor:
        """The value to continue with, in the shape, on the device and in the dtype of ``value``."""
        is_recording = isinstance(self.source, (record, Recording))
        found = _recorded_value(self.source, ctx, self.prompts_encoded) if is_recording else self.source
        tensor = found.tensor if isinstance(found, Named) else found
        sizes, shape = ([n for n in x.shape if n != 1] for x in (tensor, value))
        if shape != sizes and shape[1:] == sizes and len(ctx.passes) == 2:
            tensor = tensor.reshape(1, *value.shape[1:]).expand(value.shape)
        elif shape != sizes:
            raise InstrumentError(f"{ctx.site!r} is {list(value.shape)}, but the source is {list(tensor.shape)}.")
        like = value.q if isinstance(value, AttentionMap) else value
        if tensor.is_complex() and not like.is_complex():
            raise InstrumentError(f"{ctx.site!r} has real values, but the source has complex ones.")
        dtype = tensor.dtype if isinstance(value, AttentionMap) else like.dtype
        return tensor.to(like.device, dtype).reshape(value.shape)


def _recorded_value(source: record | Recording, ctx: Context, prompts_encoded: Counter) -> Named:
    """The recorded value of the current step."""
    context, entries = ctx.step_context, source.entries(ctx.site)
    runs = {key.run for key, _ in entries}
    if len(runs) > 1:
        raise InstrumentError(f"the recording of {ctx.site!r} holds {len(runs)} runs; record only the one to use.")
    if context is None:
        return entries[0][1]
    if context.text is not None:
        entries = [(key, value) for key, value in entries if (key.stage == NEGATIVE_PROMPT) == context.negative]
        number = prompts_encoded[context.run, ctx.site, context.negative]
        prompts_encoded[context.run, ctx.site, context.negative] += 1
        if number >= len(entries):
            raise InstrumentError(
                f"the recording of {ctx.site!r} has {len(entries)} encoded prompts, and this run encodes more; "
                f"pass a single value to use it every time."
            )
        return entries[number][1]
    stage = max(context.stage, 0)
    same_step = [(key, value) for key, value in entries if (key.step, key.stage) == (context.step, stage)]
    if not same_step:
        recorded = sorted({key.step for key, _ in entries if key.step is not None})
        raise InstrumentError(f"the recording of {ctx.site!r} has no step {context.step}; it has {recorded}.")
    key, value = same_step[min(context.picture, len(same_step) - 1)]
    if key.time is not None and abs(key.time - ctx.time) > 1e-4:
        raise InstrumentError(
            f"step {key.step} is at t = {key.time:.3f} in the recording of {ctx.site!r} but at t = {ctx.time:.3f} in "
            f"this run; record a run with the same steps, or pass a single value."
        )
    return value
