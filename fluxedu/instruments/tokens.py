"""Which tokens a word of the prompt is: the transformer reads T5's tokens, a user thinks in words."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence

from fluxedu.errors import InstrumentError, WordNotInPrompt, describe
from fluxedu.sampling.prompts import Tokenizer
from fluxedu.sampling.step_context import StepContext

Word = str | int


def as_list(words: Sequence[Word] | Word) -> list[Word]:
    """One or several words or token indices (whole numbers of any type), as a list."""
    try:
        items = [words] if isinstance(words, str) or not hasattr(words, "__iter__") else list(words)
        found = [item if isinstance(item, str) else operator.index(item) for item in items]
    except TypeError:
        found = []
    if not found:
        raise InstrumentError(f"tokens must be words or token indices, one or several, not {describe(words)}.")
    return found


def contains_words(tokens: Sequence[Word] | Word) -> bool:
    """Whether any of them is a word, not a token index."""
    return any(isinstance(token, str) for token in as_list(tokens))


def token_indices_at(
    context: StepContext | None, site: str, words: Sequence[Word] | Word, negative: bool = False
) -> list[int]:
    """Indices of the tokens of ``words`` in the prompt that is read at ``site`` now; numbers are indices already."""
    if not contains_words(words):
        return as_list(words)
    if context is None:
        raise InstrumentError(f"at {site!r}, words can only be found while a pipeline runs; use token indices instead.")
    return token_indices(tokenizer_at(context, site), prompt_at(context, negative), as_list(words))


def tokenizer_at(context: StepContext, site: str) -> Tokenizer:
    """CLIP's tokenizer at the sites of CLIP, T5's everywhere else."""
    encoder = context.pipe.prompt_encoder
    return encoder.clip_tokenizer if site.startswith("clip.") else encoder.t5_tokenizer


def prompt_at(context: StepContext, negative: bool = False) -> str:
    """The prompt that is being encoded or drawn."""
    if context.text is not None:
        return context.text
    return context.request.negative_prompt if negative else context.request.prompt


def token_indices(tokenizer: Tokenizer, prompt: str, words: Sequence[Word]) -> list[int]:
    """Indices of the tokens that spell ``words`` in ``prompt``, in the order of ``words``; a number stands for itself.

    All occurrences of a word are found. Padding never belongs to a word. Raises WordNotInPrompt.
    """
    spans = _spans(tokenizer, prompt)
    found: list[int] = []
    for word in as_list(words):
        found += _indices_of(word, spans, prompt) if isinstance(word, str) else [word]
    return list(dict.fromkeys(found))


def text_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Indices of all tokens that stand for text: neither the end-of-text token nor padding."""
    return [i for i, (start, end) in enumerate(_spans(tokenizer, prompt)) if end > start]


def _spans(tokenizer: Tokenizer, prompt: str) -> list[tuple[int, int]]:
    """Start and end of each token in the prompt, in characters."""
    try:
        return tokenizer.fast.encode(prompt).offsets
    except TypeError:  # not a string, or half a character
        raise InstrumentError(f"the prompt must be one string, not {describe(prompt)}.") from None


def _indices_of(word: str, spans: list[tuple[int, int]], prompt: str) -> list[int]:
    matches = re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) if word else []
    occurrences = [match.span() for match in matches]
    indices = []
    for i, (start, end) in enumerate(spans):
        if end > start and any(start < last and end > first for first, last in occurrences):
            indices.append(i)
    if not indices:
        raise WordNotInPrompt(f"the prompt does not contain {describe(word)}; it is {describe(prompt)}.")
    return indices
