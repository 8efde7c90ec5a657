"""What attention shows: where words are in the image, what each head attends to, and what text and padding receive."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluxedu.errors import InstrumentError
from fluxedu.instruments.lenses.run import LensRun, lens, patch_grid, stack_blocks, unfold_patches
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import Value, head_mean, rows, step_mean
from fluxedu.instruments.tokens import token_indices
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.step_context import Steps, current_context


@lens
def word_maps(pipe: FluxPipeline, prompt: str, words: Sequence[str], *, at_steps: Steps = None) -> LensRun:
    """How much each patch attends to each word: axes ``block, word, row, column``.

    The attention of image queries to the keys of the word, summed over its tokens and averaged over heads and over
    ``at_steps`` (all steps by default). Padding belongs to no word. Cross-attention maps: arXiv 2210.04885 (DAAM),
    here for joint attention.
    """
    word_tokens = tokens_of(pipe, prompt, words)
    tokens = sorted({token for indices in word_tokens for token in indices})
    rec = record("*.attn.map", passes="prompted", tokens=tokens, steps=at_steps, reduce=["head-mean", step_mean])
    out = yield rec
    maps = stack_blocks(rec, pipe, "attn.map")  # [block, query, key]
    per_word = [maps.tensor[..., [tokens.index(token) for token in indices]].sum(-1) for indices in word_tokens]
    coords = {"block": maps.coords["block"], "word": list(words)}
    per_word = Named(torch.stack(per_word, dim=1), ("block", "word", "query"), coords)
    return unfold_patches(per_word, "query", patch_grid(out.latents.shape))


def check_words(words: Sequence[str]) -> None:
    """Raises InstrumentError for an empty list."""
    if not words:
        raise InstrumentError("words must be a list of words, not empty.")


def tokens_of(pipe: FluxPipeline, prompt: str, words: Sequence[str]) -> list[list[int]]:
    """The token indices of each word of the prompt."""
    check_words(words)
    return [token_indices(pipe.prompt_encoder.tokenizer, prompt, [word]) for word in words]


@lens
def head_gallery(pipe: FluxPipeline, prompt: str, query: str | tuple[int, int], *, at_step: int = -1) -> LensRun:
    """How much one query attends to each patch, in every head: axes ``block, head, row, column``.

    query: a word of the prompt (the mean over its tokens), or a patch (row, column). These are rows of the exact
    attention map at ``at_step``. Heads that specialise: arXiv 2411.15034 (HeadRouter).
    """
    if isinstance(query, str):
        query_rows = rows(token_indices(pipe.prompt_encoder.tokenizer, prompt, [query]))
    else:

        def query_rows(value: Value) -> Named:
            context = current_context()
            return rows([context.txt_len + _patch_index(query, patch_grid(context.request.shape))])(value)

    rec = record("*.attn.map", passes="prompted", steps=at_step, reduce=query_rows)
    out = yield rec
    maps = stack_blocks(rec, pipe, "attn.map").at(step=0).mean("query")  # [block, head, key]
    to_image = Named(maps.tensor[..., rec.txt_len :], ("block", "head", "image"), maps.coords)
    return unfold_patches(to_image, "image", patch_grid(out.latents.shape))


def _patch_index(patch: tuple[int, int], grid: tuple[int, int]) -> int:
    """The index of a patch (row, column) among the image tokens."""
    row, column = patch
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise InstrumentError(f"the image has {grid[0]} x {grid[1]} patches, so there is no patch {tuple(patch)}.")
    return row * grid[1] + column


@lens
def attention_balance(pipe: FluxPipeline, prompt: str, *, at_steps: Steps = None) -> LensRun:
    """The share of the image's attention that goes to text tokens, padding included: axes ``block, step``.

    The mean over heads and patches; the rest goes to the image. There are far fewer text tokens than image tokens, and
    the softmax treats both alike: arXiv 2506.07986 (TACA).
    """
    return (yield from _attention_share(pipe, None, at_steps))


@lens
def padding_mass(pipe: FluxPipeline, prompt: str, *, at_steps: Steps = None) -> LensRun:
    """The share of the image's attention that goes to padding tokens: axes ``block, step``.

    FLUX does not mask padding. Padding tokens absorb attention that no other token needs, and can do more:
    arXiv 2501.06751.
    """
    tokenizer = pipe.prompt_encoder.tokenizer
    padding = tokenizer.padding(prompt)
    if not padding:
        raise InstrumentError(f"the prompt fills all {tokenizer.length} text tokens: there is no padding.")
    return (yield from _attention_share(pipe, padding, at_steps))


def _attention_share(pipe: FluxPipeline, keys: range | None, steps: Steps) -> LensRun:
    """The attention of the image's own patches (not those of a reference) to ``keys``; None: to all text tokens."""

    def share(value: Value) -> Named:
        context = current_context()
        height, width = patch_grid(context.request.shape)
        patches = range(context.txt_len, context.txt_len + height * width)
        selected = range(context.txt_len) if keys is None else keys
        weights = head_mean(value.take("query", list(patches)).take("key", list(selected)))  # [B, query, key]
        return Named(weights.tensor.sum(-1).mean(-1), ("batch",))

    rec = record("*.attn.map", passes="prompted", steps=steps, reduce=share)
    yield rec
    return stack_blocks(rec, pipe, "attn.map")
