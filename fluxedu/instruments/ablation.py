"""Ablation: set the output of blocks, heads, streams or tokens to zero or to a mean, and hide tokens from attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.interventions import Context, checked_result, intervene
from fluxedu.instruments.selection import STREAMS, Indices, checked_streams, mask_along, mask_of
from fluxedu.instruments.tokens import Region, as_list

_BLOCK = re.compile(r"(double|single)\.(\*|\d+)")


class ablate(intervene):  # noqa: N801 - used like a function
    """Replace the selected entries by ``to``: 0, another number, or ``"mean"``, the mean over all tokens of the value.

    A whole block is ``"double.1"`` or ``"single.*"``: it then adds nothing to the residual stream. selection: steps,
    times, passes, streams, tokens, queries and heads, as for :class:`intervene`. At ``attn.map``, the selected keys are
    hidden from the selected queries, by default from all: their scores become minus infinity inside the fused kernel
    (not at ``attn.scores``, which comes before), so that every row still sums to 1::

        with fe.ablate("double.1.heads", heads=[2]): ...
        with fe.ablate("*.attn.map", tokens=["red"], queries="img"): ...        # hide a word from the image tokens
        with fe.ablate("double.1.attn.map", streams="txt", queries="img"): ...  # no attention from image to text
    """

    def __init__(self, *globs: str, to: str | float = 0.0, **selection: Any):
        is_number = isinstance(to, (int, float)) and not isinstance(to, bool) and to == to
        if not is_number and not (isinstance(to, str) and to == "mean"):
            raise InstrumentError(f"to must be a number or 'mean', not {describe(to)}.")
        streams, tokens = checked_streams(selection.get("streams")), selection.get("tokens")
        sites = [site for glob in globs for site in _contribution_sites(glob, streams, tokens)]
        super().__init__(*sites, self._replacement, **selection)
        self.to = to

    def replaced(self, value: Tensor | AttentionMap, entries: list[Indices], ctx: Context) -> Tensor | AttentionMap:
        if (ctx.axes or ())[-1:] == ("key",) and ctx.site.endswith("map"):
            return self._hidden(value, entries, ctx)
        mask = mask_of(entries, ctx.axes or (), value)
        mask = torch.ones((), dtype=torch.bool, device=value.device) if mask is None else mask
        return checked_result(torch.where(mask, self._replacement(value, ctx), value), value, ctx.site)

    def _replacement(self, value: Tensor, ctx: Context) -> Tensor:
        """What replaces the value's entries, broadcastable to it."""
        if self.to == "mean":
            axes = [i for i, axis in enumerate(ctx.axes or ()) if axis in ("text", "image", "token")]
            if not axes:
                raise InstrumentError(f"{ctx.site!r} has no tokens to take the mean over (its axes are {ctx.axes}).")
            return value.mean(dim=axes, keepdim=True)
        try:
            return torch.full((), float(self.to), dtype=value.dtype, device=value.device)
        except (RuntimeError, OverflowError):
            raise InstrumentError(
                f"to={describe(self.to)} is beyond the range of {value.dtype} at {ctx.site!r}."
            ) from None

    def _hidden(self, value: AttentionMap | Tensor, entries: list[Indices], ctx: Context) -> AttentionMap | Tensor:
        """The map in which the selected queries do not attend to the selected keys."""
        if self.to != 0 or any("key" not in indices for indices in entries):
            raise InstrumentError(
                f"at {ctx.site!r}, say which tokens are hidden, by tokens=['red'] or streams='txt', without to=."
            )
        if isinstance(value, Tensor):  # an intervention returned a tensor
            hidden = mask_of(entries, ctx.axes, value)
            is_empty = bool(hidden.expand(value.shape).all(-1).any())
            rest = value.masked_fill(hidden, 0)
            value = torch.where(hidden.any(-1, keepdim=True), rest / rest.sum(-1, keepdim=True), value)
        else:
            shape, device = value.shape, value.q.device
            for indices in entries:
                by_pass, by_head, queries, keys = (
                    mask_along(i, indices.get(axis), shape, device) for i, axis in enumerate(ctx.axes)
                )
                value = value.hide(by_pass & by_head, queries, keys)
            is_empty = value.has_empty_rows()
        if is_empty:
            raise InstrumentError(f"at {ctx.site!r}, every token would be hidden, and a row must attend to something.")
        return value


def _contribution_sites(glob: str, streams: Sequence[str] | None, tokens) -> list[str]:
    """The name of a block as the sites of what it adds to the residual stream; any other glob unchanged."""
    if not isinstance(glob, str) or not _BLOCK.fullmatch(glob):
        return [glob]
    if glob.startswith("single"):
        return [f"{glob}.contribution"]
    if streams is None and tokens is not None:  # words and numbers are text tokens, regions are image tokens
        kinds = {isinstance(token, Region) for token in as_list(tokens)}
        streams = [stream for stream, is_region in (("txt", False), ("img", True)) if is_region in kinds]
    return [f"{glob}.{stream}_{part}_contribution" for stream in streams or STREAMS for part in ("attn", "mlp")]
