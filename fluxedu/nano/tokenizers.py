"""The miniature's tokenizers: the official kinds, with a vocabulary of the world's few words.

CLIP's is byte-pair encoding (lower case, ``</w>`` ends a word), T5's a unigram model (``▁`` begins
one). Both are built, not trained: every word of the world is one piece, anything else falls apart
into letters. They are made through the official classes of ``transformers`` and saved in the official
folders; at run time the light ``tokenizers`` library reads them.
"""

from __future__ import annotations

from pathlib import Path

from fluxedu.nano.networks import TEXT_LENGTH
from fluxedu.nano.scenes import BACKGROUNDS, COLORS, LETTERS, RELATIONS, SHAPES, SIZES

#: words of the captions, of the tasks T5 is trained on, and a few a visitor might type
WORDS = sorted(
    {word for phrase in (*COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *RELATIONS) for word in phrase.split()}
    | set("a an and the on of is to in at with letter background picture photo photograph image".split())
    | set("draw rephrase describe where what color shape size side top bottom middle center".split())
    | set("one two three big little under over next beside between make move it no not any".split())
)
LETTER_CHARS = "abcdefghijklmnopqrstuvwxyz"
SENTINELS = 20  # <extra_id_0> ... for span denoising


def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that join every word of :data:`WORDS` from the left."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet)]
    merges: dict[tuple[str, str], int] = {}
    for word in WORDS:
        parts = _joined([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:  # what earlier merges leave in pieces is joined by new, later ones
            merges[parts[0], parts[1]] = len(merges)
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, list(merges)


def _joined(parts: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges, earliest first, until none applies."""
    while True:
        known = [(merges[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in merges]
        if not known:
            return parts
        _, i = min(known)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def clip_tokenizer():
    """CLIP's official tokenizer class over the miniature's vocabulary."""
    from transformers import CLIPTokenizer

    vocab, merges = _bpe()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def t5_tokenizer():
    """T5's official tokenizer class over the miniature's vocabulary."""
    from transformers import T5Tokenizer

    whole = [("▁" + word, -2.0) for word in WORDS]
    whole += [("▁" + letter, -2.5) for letter in LETTERS if letter.lower() != letter]
    chars = [("▁", -6.0)] + [(c, -8.0) for c in LETTER_CHARS + LETTER_CHARS.upper() + "0123456789.,;:!?'-()"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *dict([*whole, *chars]).items()]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=SENTINELS)
    tokenizer.model_max_length = TEXT_LENGTH
    return tokenizer


def save_tokenizers(folder: Path) -> None:
    """Write ``tokenizer/`` (CLIP) and ``tokenizer_2/`` (T5) as in the official repositories."""
    clip_tokenizer().save_pretrained(Path(folder) / "tokenizer")
    t5_tokenizer().save_pretrained(Path(folder) / "tokenizer_2")
