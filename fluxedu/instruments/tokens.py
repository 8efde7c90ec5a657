"""Which tokens a word of the prompt is: the transformer sees T5's pieces, a reader thinks in words."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence

from fluxedu.errors import InstrumentError, WordNotInPrompt, describe
from fluxedu.sampling.prompts import Tokenizer
from fluxedu.sampling.step_context import StepContext

Word = str | int


def listed(words: Sequence[Word] | Word) -> list[Word]:
    """One or several words, or places of tokens (any whole numbers), as a list."""
    try:
        several = [words] if isinstance(words, str) or not hasattr(words, "__iter__") else list(words)
        found = [word if isinstance(word, str) else operator.index(word) for word in several]
    except TypeError:
        found = []
    if not found:
        raise InstrumentError(f"tokens are words or places, one or several, not {describe(words)}.")
    return found


def contains_words(words: Sequence[Word] | Word) -> bool:
    """Is any of them a word, not a place?"""
    return any(isinstance(word, str) for word in listed(words))


def token_indices_at(
    context: StepContext | None, site: str, words: Sequence[Word] | Word, negative: bool = False
) -> list[int]:
    """Places of ``words`` in what is being read at ``site`` at this context; numbers are places already."""
    if not contains_words(words):
        return listed(words)
    if context is None:
        raise InstrumentError(
            f"at {site!r}, words can only be found in a pipeline's run; give places of tokens instead."
        )
    return token_indices(tokenizer_at(context, site), prompt_at(context, negative), listed(words))


def tokenizer_at(context: StepContext, site: str) -> Tokenizer:
    """The transformer reads T5's pieces; only CLIP itself reads CLIP's."""
    encoder = context.pipe.prompt_encoder
    return encoder.clip_tokenizer if site.startswith("clip.") else encoder.t5_tokenizer


def prompt_at(context: StepContext, negative: bool = False) -> str:
    """The prompt that is being encoded or drawn."""
    if context.text is not None:
        return context.text
    return context.request.negative_prompt if negative else context.request.prompt


def _spans(tokenizer: Tokenizer, prompt: str) -> list[tuple[int, int]]:
    """Where in the prompt each token begins and ends."""
    try:
        return tokenizer.fast.encode(prompt).offsets
    except TypeError:  # no string, or half a character
        raise InstrumentError(f"words are looked for in one prompt, not in {describe(prompt)}.") from None


def token_indices(tokenizer: Tokenizer, prompt: str, words: Sequence[Word]) -> list[int]:
    """Places of the T5 tokens that spell ``words`` in ``prompt``, in the order asked; a number is a place itself.

    A word said twice is found twice. Padding is never part of a word. Raises InstrumentError for a word
    that the prompt does not say.
    """
    spans = _spans(tokenizer, prompt)
    found: list[int] = []
    for word in listed(words):
        found += _places(spans, prompt, word) if isinstance(word, str) else [word]
    return list(dict.fromkeys(found))


def _places(spans: list[tuple[int, int]], prompt: str, word: str) -> list[int]:
    uttered = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)] if word else []
    places = [i for i, (a, b) in enumerate(spans) if any(a < end and b > start for start, end in uttered) and b > a]
    if not places:
        raise WordNotInPrompt(f"the prompt does not say {describe(word)}; it is {describe(prompt)}.")
    return places


def real_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Places of all tokens that carry words: neither the end mark nor padding."""
    return [i for i, (a, b) in enumerate(_spans(tokenizer, prompt)) if b > a]
