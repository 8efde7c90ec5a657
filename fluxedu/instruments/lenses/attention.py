"""Whom the tokens look at: heads one by one, text against image, and the padding."""

from __future__ import annotations

import operator
from collections.abc import Callable

from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.lenses.run import Look, alone, as_picture, by_block, grid
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import Value, head_mean, rows
from fluxedu.instruments.tokens import text_tokens, token_indices
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.step_context import StepContext, current_context


def head_gallery(pipe: FluxPipeline, prompt: str, query: str | tuple[int, int], *, at_step: int = -1, **asked) -> Named:
    """What every head of every block looks at in the picture, for one query: axes ``block, head, row, column``.

    query: a word of the prompt (the mean over its pieces), or a patch (row, column). Rows of the exact map at
    ``at_step``. Heads that specialise: arXiv 2411.15034 (HeadRouter).
    """
    return alone(pipe, prompt, look_at_heads(pipe, prompt, query, at_step), asked)


def look_at_heads(pipe: FluxPipeline, prompt: str, query: str | tuple[int, int], at_step: int = -1) -> Look:
    """:func:`head_gallery` in two halves."""
    if not isinstance(at_step, int):
        raise InstrumentError(f"at_step is one step, a whole number, not {describe(at_step)}.")
    if isinstance(query, str):
        look = rows(token_indices(pipe.prompt_encoder.t5_tokenizer, prompt, [query]))
    else:

        def look(value: Value) -> Named:
            return rows([current_context().txt_len + _patch(current_context(), query)])(value)

    rec = record("*.attn.map", passes="prompted", steps=at_step, reduce=look)
    out = yield rec
    maps = by_block(rec, pipe, "attn.map").at(step=0).mean("query")  # [block, head, key]
    image = Named(maps.tensor[..., rec.txt_len :], ("block", "head", "image"), maps.coords)
    return as_picture(image, "image", *grid(pipe, out))


def _patch(context: StepContext, query: tuple[int, int]) -> int:
    """The place of a patch among the picture's."""
    height, width = (cells // 2 for cells in context.request.shape)
    try:
        row, column = map(operator.index, query)
    except (TypeError, ValueError):
        raise InstrumentError(f"a query is a word or a patch (row, column), not {describe(query)}.") from None
    if not (0 <= row < height and 0 <= column < width):
        raise InstrumentError(f"the picture has {height} x {width} patches, so there is none at {tuple(query)}.")
    return row * width + column


def attention_balance(pipe: FluxPipeline, prompt: str, *, at_steps=None, **asked) -> Named:
    """The share of the image's attention that goes to the text, padding included: axes ``block, step``.

    The mean over heads and patches; the rest goes to the image. Far fewer text tokens than image tokens, and the
    softmax does not care which is which: arXiv 2506.07986 (TACA).
    """
    return alone(pipe, prompt, look_at_balance(pipe, prompt, at_steps), asked)


def look_at_balance(pipe: FluxPipeline, prompt: str, at_steps=None) -> Look:
    """:func:`attention_balance` in two halves."""
    return _mass(pipe, lambda: range(current_context().txt_len), at_steps)


def padding_mass(pipe: FluxPipeline, prompt: str, *, at_steps=None, **asked) -> Named:
    """The share of the image's attention that goes to padding: axes ``block, step``.

    FLUX masks no padding, and pads serve as a place to put attention, or more: arXiv 2501.06751.
    """
    return alone(pipe, prompt, look_at_padding(pipe, prompt, at_steps), asked)


def look_at_padding(pipe: FluxPipeline, prompt: str, at_steps=None) -> Look:
    """:func:`padding_mass` in two halves."""
    tokenizer = pipe.prompt_encoder.t5_tokenizer
    first = max(text_tokens(tokenizer, prompt), default=-1) + 2  # behind the words and the end mark
    if first >= tokenizer.length:
        raise InstrumentError(f"the prompt fills all {tokenizer.length} tokens: there is no padding.")
    return _mass(pipe, lambda: range(first, tokenizer.length), at_steps)


def _mass(pipe: FluxPipeline, keys: Callable[[], range], steps) -> Look:
    """What the picture's own patches (not a reference's) give to ``keys``."""

    def mass(value: Value) -> Named:
        height, width = (cells // 2 for cells in current_context().request.shape)
        patches = range(current_context().txt_len, current_context().txt_len + height * width)
        part = head_mean(value.take("query", list(patches)).take("key", list(keys())))
        return Named(part.tensor.sum(-1).mean(-1), ("batch",))

    rec = record("*.attn.map", passes="prompted", steps=steps, reduce=mass)
    yield rec
    return by_block(rec, pipe, "attn.map")
