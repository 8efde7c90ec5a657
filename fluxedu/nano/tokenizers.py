"""The miniature's tokenizers: the official kinds with a small vocabulary.

CLIP's tokenizer is byte-pair encoding in lower case, where ``</w>`` marks the end of a word. T5's is a unigram model,
where ``▁`` marks the beginning. Both are constructed, not trained: every word of the captions is one token, and any
other word is split into letters. The official classes of ``transformers`` build them and save them in the official
folders; at run time the smaller library ``tokenizers`` loads them.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

from fluxedu.nano.scenes import BACKGROUNDS, COLORS, LETTERS, RELATIONS, SHAPES, SIZES
from fluxedu.nano.sizes import TEXT_LENGTH

#: words of the captions and of T5's training tasks, and a few that a user may type
WORDS = sorted(
    {word for phrase in (*COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *RELATIONS) for word in phrase.split()}
    | set("a an and the on of is to in at with letter background picture photo photograph image".split())
    | set("draw rephrase describe where what color shape size side top bottom middle center".split())
    | set("one two three big little under over next beside between make move it no not any".split())
)
SENTINELS = 20  # <extra_id_0>, <extra_id_1>, ... mark the masked spans of T5's training


def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges that join every word of :data:`WORDS` from left to right."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet)]
    merges: dict[tuple[str, str], int] = {}
    for word in WORDS:
        parts = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:  # new merges join what the earlier ones leave
            merges[parts[0], parts[1]] = len(merges)
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, list(merges)


def _apply_merges(parts: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges, earliest first, until none applies."""
    while True:
        applicable = [(merges[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in merges]
        if not applicable:
            return parts
        _, i = min(applicable)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def clip_tokenizer():
    """CLIP's official tokenizer class with the miniature's vocabulary."""
    from transformers import CLIPTokenizer

    vocab, merges = _bpe()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def t5_tokenizer():
    """T5's official tokenizer class with the miniature's vocabulary."""
    from transformers import T5Tokenizer

    # pieces with their log probabilities: whole words are more likely than their letters one by one
    words = [("▁" + word, -2.0) for word in WORDS] + [("▁" + letter, -2.5) for letter in LETTERS]
    characters = [(c, -8.0) for c in ascii_lowercase + ascii_uppercase + "0123456789.,;:!?'-()"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    vocab = [*special, *dict([*words, ("▁", -6.0), *characters]).items()]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=SENTINELS)
    tokenizer.model_max_length = TEXT_LENGTH
    return tokenizer


def save_tokenizers(folder: Path) -> None:
    """Save ``tokenizer/`` (CLIP) and ``tokenizer_2/`` (T5), named as in the official repositories."""
    clip_tokenizer().save_pretrained(Path(folder) / "tokenizer")
    t5_tokenizer().save_pretrained(Path(folder) / "tokenizer_2")
