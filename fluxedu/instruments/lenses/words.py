"""Where in the picture a word is: what the image looks at, and what it says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.lenses.run import Look, alone, as_picture, by_block, grid
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import Value, step_mean, to_named
from fluxedu.instruments.tokens import token_indices
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.step_context import current_context


def _places(pipe: FluxPipeline, prompt: str, words: Sequence[str]) -> list[list[int]]:
    """The tokens of each word."""
    if not isinstance(words, list | tuple) or not words:
        raise InstrumentError(f"words is a list of words of the prompt, not {describe(words)}.")
    return [token_indices(pipe.prompt_encoder.t5_tokenizer, prompt, [word]) for word in words]


def word_maps(pipe: FluxPipeline, prompt: str, words: Sequence[str], *, at_steps=None, **asked) -> Named:
    """How much each patch looks at each word: axes ``block, word, row, column``, summed over a word's pieces.

    Attention of image queries to the word's keys, the mean over heads and over ``at_steps`` (all if not said). Padding
    is no word and not in it. ``asked`` goes to the pipeline (seed, guidance, height, ...).
    Cross-attention maps: arXiv 2210.04885 (DAAM), here for joint attention.
    """
    return alone(pipe, prompt, attention_to_words(pipe, prompt, words, at_steps), asked)


def attention_to_words(pipe: FluxPipeline, prompt: str, words: Sequence[str], at_steps=None) -> Look:
    """:func:`word_maps` in two halves."""
    places = _places(pipe, prompt, words)
    tokens = sorted({p for word in places for p in word})
    how = {"tokens": tokens, "steps": at_steps, "reduce": ["head-mean", step_mean]}
    rec = record("*.attn.map", passes="prompted", **how)
    out = yield rec
    maps = by_block(rec, pipe, "attn.map")  # [block, image, token]
    per_word = [maps.tensor[..., [tokens.index(p) for p in word]].sum(-1) for word in places]
    named = Named(torch.stack(per_word, dim=1), ("block", "word", "query"), {"block": maps.coords["block"]})
    named.coords["word"] = list(words)
    return as_picture(named, "query", *grid(pipe, out))


def concept_maps(pipe: FluxPipeline, prompt: str, words: Sequence[str], *, at_steps=None, **asked) -> Named:
    """Which of the words each patch speaks of: axes ``block, word, row, column``, in [0, 1], summing to 1 over words.

    The output of the attention, not its weights: the cosine between what a patch was told and what a word was told,
    a softmax over the words. After ConceptAttention (arXiv 2502.04320), which adds concept tokens that the image
    does not see; here the prompt's own words serve, and single-stream blocks are looked at as well.
    """
    return alone(pipe, prompt, similarity_to_concepts(pipe, prompt, words, at_steps), asked)


def similarity_to_concepts(pipe: FluxPipeline, prompt: str, words: Sequence[str], at_steps=None) -> Look:
    """:func:`concept_maps` in two halves."""
    places = _places(pipe, prompt, words)

    def spoken(value: Value) -> Named:
        heads = to_named(value)  # [B, H, T, d]
        told = torch.nn.functional.normalize(heads.tensor.transpose(1, 2).flatten(2).float(), dim=-1)  # [B, T, D]
        word = torch.stack([told[:, p].mean(1) for p in places], dim=1)  # [B, words, D]
        return Named(told[:, current_context().txt_len :] @ word.transpose(1, 2), ("batch", "image", "word"))

    how = {"steps": at_steps, "reduce": [spoken, step_mean]}
    rec = record("double.*.heads", "single.*.heads", passes="prompted", **how)
    out = yield rec
    maps = by_block(rec, pipe, "heads")
    alike = Named((maps.tensor.transpose(1, 2) / 0.1).softmax(1), ("block", "word", "image"), dict(maps.coords))
    alike.coords["word"] = list(words)
    return as_picture(alike, "image", *grid(pipe, out))
