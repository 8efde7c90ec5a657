"""Activation patching: a run goes on with values that were recorded in another one."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from fluxedu.instruments.errors import InstrumentError
from fluxedu.instruments.interventions import Context, Times, intervene
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import Steps, record
from fluxedu.instruments.recording import Recording, When
from fluxedu.models.attention_map import AttentionMap


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
    """The recorded value that belongs to this moment."""
    moment, entries = ctx.moment, source.entries(ctx.site)
    if len(runs := {when.run for when, _ in entries}) > 1:
        raise InstrumentError(f"the recording of {ctx.site!r} is of {len(runs)} runs; record the one to put in alone.")
    if moment is None:
        return entries[0][1]
    if moment.text is not None:
        calls[moment.run, ctx.site] += 1
        if calls[moment.run, ctx.site] > len(entries):
            raise InstrumentError(
                f"the recording of {ctx.site!r} has {len(entries)} encoded prompts, and this run encodes more; "
                f"to put one value in every time, give that value."
            )
        return entries[calls[moment.run, ctx.site] - 1][1]
    same = [(when, v) for when, v in entries if (when.step, when.part) == (moment.step, max(moment.part, 0))]
    if not same:
        have = sorted({when.step for when, _ in entries if when.step is not None})
        raise InstrumentError(f"the recording of {ctx.site!r} has no step {moment.step}; it has {have}.")
    when, value = same[min(moment.picture, len(same) - 1)]
    _same_time(when, ctx)
    return value


def _same_time(when: When, ctx: Context) -> None:
    if when.time is not None and abs(when.time - ctx.time) > 1e-4:
        raise InstrumentError(
            f"step {when.step} of the recording of {ctx.site!r} is at t = {when.time:.3f}, and of this run at "
            f"t = {ctx.time:.3f}; record as many steps as are drawn, or give one value."
        )
