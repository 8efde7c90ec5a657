"""Single numbers that are out of all proportion."""

from __future__ import annotations

import torch

from fluxedu.instruments.lenses.run import Look, alone, by_block
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import Value, to_named
from fluxedu.sampling.pipeline import FluxPipeline

WHAT = ("largest", "median", "token", "channel")


def massive_activations(pipe: FluxPipeline, prompt: str, *, at_step: int = 0, **asked) -> Named:
    """The largest number in the tokens each block leaves: axes ``block, what``.

    what: its size, the median size beside it, its token and its channel (of a double block, image tokens). Massive
    ones sit in few fixed channels and all tokens of diffusion transformers: arXiv 2510.11538.
    """
    return alone(pipe, prompt, look_at_largest(pipe, at_step), asked)


def look_at_largest(pipe: FluxPipeline, at_step: int = 0) -> Look:
    """:func:`massive_activations` in two halves."""

    def largest(value: Value) -> Named:
        x = to_named(value)
        size = x.tensor.abs().float()  # [B, tokens, D]
        where = size.flatten(1).argmax(1)
        width = size.shape[-1]
        rows = [size.flatten(1).amax(1), size.flatten(1).median(1).values, where // width, where % width]
        return Named(torch.stack([r.float() for r in rows], dim=1), ("batch", "what"), {"what": list(WHAT)})

    rec = record("double.*.img_out", "single.*.out", passes="prompted", steps=at_step, reduce=largest)
    yield rec
    double, single = (by_block(rec, pipe, site).at(step=0) for site in ("img_out", "out"))
    names = double.coords["block"] + single.coords["block"]
    return Named(torch.cat([double.tensor, single.tensor]), ("block", "what"), {"block": names, "what": list(WHAT)})
