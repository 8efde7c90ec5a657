"""Which words the miniature knows: those of the captions it was trained on, and no others.

Its tokenizers split any other word into letters, and its networks never learnt what such letters mean. The tokenizers
hold a few more words as one token, such as *two*, but no caption contains them, so they are unknown words too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def prompt_problem(prompt: str, instruction: bool = False) -> str | None:
    """Why the miniature cannot draw a prompt as it is meant, in one sentence; None for prompts like its captions.

    Names unknown words first. Otherwise names what no caption says although each of its words occurs in some: an
    object in the colour of a background, a background in the colour of an object, an object without a colour, two
    objects of one colour, more than three objects. ``instruction`` as for :func:`unknown_words`.

    >>> prompt_problem("a red circle on a white background")
    >>> prompt_problem("a Red circle")
    "the miniature knows the word 'red' in lower case only, not 'Red'"
    """
    unknown = unknown_words(prompt, instruction)
    lower = [word.lower() for word in unknown]
    if unknown and not unknown_words(" ".join(lower), instruction):
        return f"the miniature knows {_listed('word', lower)} in lower case only, not {_quoted(unknown)}"
    if unknown:
        return f"the miniature has never seen {_listed('word', unknown)}; {_what_it_knows()}"
    if instruction or not prompt.strip():
        return None
    words = [word for word, _, _ in split_words(prompt)]
    return _unlike_captions(words)


def _unlike_captions(words: list[str]) -> str | None:
    """What these words say that no caption does; each of them is known."""
    objects: dict[tuple[str, str], None] = {}  # (colour, form), in order and without repetitions
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if word == "background" and before in COLORS:
            return f"the miniature knows {_quoted([before])} as the colour of objects only; {_backgrounds()}"
        if word in SHAPES or (word in LETTERS and before == "letter"):
            color = words[i - 2] if word in LETTERS and i > 1 else before
            if color in BACKGROUNDS:
                return f"the miniature knows {_quoted([color])} as the colour of backgrounds only; {_colours()}"
            if color not in COLORS:
                return f"the miniature was trained on objects with a colour, but {word!r} has none here; {_colours()}"
            objects[color, word] = None
    colors = [color for color, _ in objects]
    repeated = next((color for color in colors if colors.count(color) > 1), None)
    if repeated is not None:
        return f"the miniature was trained on objects of different colours; two {repeated} ones are often drawn wrong"
    if len(objects) > 3:
        return f"the miniature was trained on at most three objects, and this prompt has {len(objects)}"
    return None


def _what_it_knows() -> str:
    kinds = {"relations": "positions"}
    lists = [
        f"{kinds.get(kind, kind)} ({', '.join(words)})" for kind, words in VOCABULARY.items() if kind != "other words"
    ]
    return f"it knows {', '.join(lists[:-1])} and {lists[-1]}"


def _colours() -> str:
    return f"objects are {_either(COLORS)}"


def _backgrounds() -> str:
    return f"backgrounds are {_either(BACKGROUNDS)}"


def _either(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"


def _quoted(words: list[str]) -> str:
    *first, last = map(repr, words)
    return f"{', '.join(first)} and {last}" if first else last


def _listed(noun: str, words: list[str]) -> str:
    return f"the {noun}{'s' if len(words) > 1 else ''} {_quoted(words)}"
