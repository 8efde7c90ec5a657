"""Ablation: set the output of blocks, heads, streams or tokens to zero or to a mean."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.interventions import STREAMS, Context, Times, intervene
from fluxedu.instruments.selection import checked_heads
from fluxedu.instruments.tokens import Word, as_list, contains_words
from fluxedu.sampling.step_context import Steps

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
    """Set values to 0 (or another number; or ``to="mean"``, the mean over their tokens).

    A whole block is ``"double.1"`` or ``"single.*"``: it then adds nothing to the residual stream. heads: only these,
    at sites with heads · streams: only the tokens of ``"txt"`` or ``"img"`` · tokens: only these words or token indices
    (of text tokens; at a site of the image stream, of patches). At ``attn.map``, no query attends to ``tokens``: their
    columns become 0 and every row is normalised again::

        with fe.ablate("double.1.heads", heads=[2]): ...
        with fe.ablate("*.attn.map", tokens=["red"]): ...
    """
    heads, tokens = checked_heads(heads), None if tokens is None else as_list(tokens)
    if streams is not None:
        streams = [streams] if isinstance(streams, str) else streams
        if not isinstance(streams, (list, tuple)) or not streams or any(s not in STREAMS for s in streams):
            raise InstrumentError(f"streams must be 'txt', 'img' or both, not {describe(streams)}.")
    is_number = isinstance(to, (int, float)) and not isinstance(to, bool) and to == to
    if to != "mean" and not is_number:
        raise InstrumentError(f"to must be a number or 'mean', not {describe(to)}.")
    sites = [site for glob in globs for site in _contribution_sites(glob, streams, tokens)]

    def change(value: Tensor | AttentionMap, ctx: Context) -> Tensor | AttentionMap:
        if (ctx.axes or ())[-1:] == ("key",):
            if streams is not None or to != 0:
                raise InstrumentError(
                    f"at {ctx.site!r}, columns are removed: use tokens= (and heads=), not streams= or to=."
                )
            return _without_columns(value, ctx, heads, tokens)
        mask = _ablation_mask(value, ctx, heads, streams, tokens)
        return torch.where(mask, _replacement(value, ctx, to), value)

    return intervene(*sites, change, steps=steps, times=times)


def _contribution_sites(glob: str, streams: Sequence[str] | None, tokens) -> list[str]:
    """The name of a block as the sites of what it adds to the residual stream; any other glob unchanged."""
    if not isinstance(glob, str) or not _BLOCK.fullmatch(glob):
        return [glob]
    if glob.startswith("single"):
        return [f"{glob}.contribution"]
    return [f"{glob}.{stream}_*_contribution" for stream in streams or (STREAMS if tokens is None else ("txt",))]


def _replacement(value: Tensor, ctx: Context, to: str | float) -> Tensor:
    if to == "mean":
        axes = [i for i, axis in enumerate(ctx.axes or ()) if axis in ("text", "image", "token")]
        if not axes:
            raise InstrumentError(f"{ctx.site!r} has no tokens to take the mean over (its axes are {ctx.axes}).")
        return value.mean(dim=axes, keepdim=True)
    try:
        return torch.full((), float(to), dtype=value.dtype, device=value.device)
    except (RuntimeError, OverflowError):
        raise InstrumentError(f"to={describe(to)} is beyond the range of {value.dtype} at {ctx.site!r}.") from None


def _ablation_mask(value: Tensor, ctx: Context, heads, streams, tokens) -> Tensor:
    """True for the entries to replace: the selected heads, streams and tokens, and all along axes without selection."""
    mask = torch.ones((), dtype=torch.bool, device=value.device)
    if heads is not None:
        mask = mask & _mask_along(value, ctx, ("head",), heads)
    own_stream = re.search(r"(?:^|\.)(txt|img)(_|$)", ctx.site)  # at a site of one stream
    if streams is not None and own_stream:
        mask = mask & (own_stream[1] in streams)
    elif streams is not None:
        mask = mask & _mask_along(value, ctx, ("token",), [ctx.stream_slice(stream) for stream in streams])
    if tokens is not None:
        axes = ("text", "token") if contains_words(tokens) else ("text", "token", "image")
        mask = mask & _mask_along(value, ctx, axes, ctx.tokens(tokens))
        mask = mask & _prompted_pass(value, ctx, tokens)
    return mask


def _prompted_pass(value: Tensor, ctx: Context, tokens: Sequence[Word] | Word) -> Tensor:
    """Words belong to the prompt: of the two passes of classifier-free guidance, only the prompted one has them."""
    context = ctx.step_context
    uses_cfg = context is not None and context.request.uses_cfg and context.text is None
    both_passes = uses_cfg and contains_words(tokens) and len(value) == 2
    mask = torch.ones(len(value) if both_passes else 1, dtype=torch.bool, device=value.device)
    if both_passes:
        mask[0] = False
    return mask.view(-1, *[1] * (value.ndim - 1))


def _mask_along(value: Tensor, ctx: Context, names: tuple[str, ...], indices: Sequence[int | slice]) -> Tensor:
    """True at ``indices`` of the first axis in ``names`` that the value has."""
    axis = next((i for i, name in enumerate(ctx.axes or ()) if name in names), None)
    if axis is None:
        axes = ", ".join(ctx.axes or ("unknown",))
        raise InstrumentError(f"{ctx.site!r} has no {names[0]} axis (its axes are {axes}).")
    mask = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
    for index in indices:
        if isinstance(index, int) and not -len(mask) <= index < len(mask):
            raise InstrumentError(f"{ctx.site!r} has length {len(mask)} along {names[0]}, so there is no {index}.")
        mask[index] = True
    return mask.view([-1 if i == axis else 1 for i in range(value.ndim)])


def _without_columns(value: AttentionMap | Tensor, ctx: Context, heads, tokens) -> Tensor:
    """The map with the columns of ``tokens`` set to 0, its rows normalised to sum to 1 again."""
    if tokens is None:
        raise InstrumentError(f"at {ctx.site!r}, say which tokens are not to be attended to: tokens=['red'].")
    weights = value.weights() if isinstance(value, AttentionMap) else value
    key_context = Context(ctx.site, ("batch", "head", "query", "token"), ctx.step_context)
    hidden = _mask_along(weights, key_context, ("token",), ctx.tokens(tokens)) & _prompted_pass(weights, ctx, tokens)
    if heads is not None:
        hidden = hidden & _mask_along(weights, ctx, ("head",), heads)
    if hidden.all(-1).any():
        raise InstrumentError(f"at {ctx.site!r}, every token would be hidden, and a row must attend to something.")
    rest = weights.masked_fill(hidden, 0)
    return torch.where(hidden.any(-1, keepdim=True), rest / rest.sum(-1, keepdim=True), weights)
