"""Which words the miniature knows: those of the captions it was trained on, and no others.

Its tokenizers split any other word into letters, and its networks never learnt what such letters mean. The tokenizers
hold a few more words as one token, such as *two*, but no caption contains them, so they are unknown words too.
"""

from __future__ import annotations

import re

from fluxedu.errors import check_text
from fluxedu.nano.scenes import BACKGROUNDS, COLORS, LETTERS, RELATIONS, SHAPES, SIZES

#: the words of the captions by kind; ``colours`` are those of objects, ``backgrounds`` the colours of backgrounds
VOCABULARY: dict[str, tuple[str, ...]] = {
    "colours": tuple(COLORS),
    "shapes": SHAPES,
    "letters": LETTERS,
    "sizes": tuple(SIZES),
    "relations": tuple(RELATIONS),
    "backgrounds": tuple(BACKGROUNDS),
    "other words": ("a", "an", "the", "and", "on", "letter", "background", "picture", "of"),
}
#: the words that only the instructions for nano-kontext contain, such as "move the circle to the top"
INSTRUCTION_WORDS = ("make", "move", "remove", "to", "top", "bottom")

_PUNCTUATION = r"\s.,;:!?()\"“”‘’'\-"
_WORD = re.compile(f"[^{_PUNCTUATION}]+(?:['’][^{_PUNCTUATION}]+)*")
_KNOWN = frozenset(word for words in VOCABULARY.values() for phrase in words for word in phrase.split())


def split_words(prompt: str) -> list[tuple[str, int, int]]:
    """The words of a prompt as ``(word, start, end)``, with ``prompt[start:end] == word``; punctuation is left out."""
    return [(match[0], *match.span()) for match in _WORD.finditer(check_text("the prompt", prompt))]


def unknown_words(prompt: str, instruction: bool = False) -> list[str]:
    """The words of a prompt that the miniature has never seen, each once, in their order.

    >>> unknown_words("a cat left of three red circles")
    ['cat', 'three', 'circles']

    Upper and lower case count, as they do for T5's tokenizer: only letters such as ``A`` are written in upper case.
    With ``instruction``, the prompt is an instruction for nano-kontext, which knows a few words more.
    """
    known = _KNOWN | set(INSTRUCTION_WORDS) if instruction else _KNOWN
    return list(dict.fromkeys(word for word, _, _ in split_words(prompt) if word not in known))
