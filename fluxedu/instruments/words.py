"""Which tokens a word of the prompt is: the transformer sees T5's pieces, a reader thinks in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fluxedu.instruments.errors import InstrumentError
from fluxedu.sampling.prompts import Tokenizer

Word = str | int


def token_ids(tokenizer: Tokenizer, prompt: str, words: Sequence[Word]) -> list[int]:
    """Places of the T5 tokens that spell ``words`` in ``prompt``, in the order asked; a number is a place itself.

    A word said twice is found twice. Padding is never part of a word. Raises InstrumentError for a word
    that the prompt does not say.
    """
    if not isinstance(prompt, str):
        raise InstrumentError(f"words are looked for in one prompt, not in {prompt!r}.")
    spans = tokenizer.fast.encode(prompt).offsets
    found: list[int] = []
    for word in [words] if isinstance(words, (str, int)) else words:
        found += [word] if isinstance(word, int) else _places(spans, prompt, word)
    return list(dict.fromkeys(found))


def _places(spans: list[tuple[int, int]], prompt: str, word: str) -> list[int]:
    said = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)] if word else []
    places = [i for i, (a, b) in enumerate(spans) if any(a < end and b > start for start, end in said) and b > a]
    if not places:
        raise InstrumentError(f"the prompt does not say {word!r}; it is {prompt!r}.")
    return places


def real_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Places of all tokens that carry words: neither the end mark nor padding."""
    return [i for i, (a, b) in enumerate(tokenizer.fast.encode(prompt).offsets) if b > a]
