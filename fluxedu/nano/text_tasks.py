"""The two tasks that the miniature's T5 encoder was pre-trained on; ``training/t5.py`` trains it.

text to text   a small decoder fills in masked spans, or rewrites the caption as a list of facts
tagging        every token of an object predicts that object's colour, form, size and relations
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxedu.nano.scenes import COLORS, FORMS, INVERSE, LETTERS, SHAPES, Claim, caption, sample_scene

SIDES = ("left of", "right of", "above", "below")
#: number of classes of each tag: colour, form, size (small, large, not mentioned), and one yes/no tag per relation
TAGS = {"color": len(COLORS), "form": len(FORMS), "size": 3, **{side: 2 for side in SIDES}}


def sides_of(claim: Claim) -> list[set[str]]:
    """For each object, the relations in which it stands to another one: ``[{"left of"}, {"right of"}]``."""
    sides: list[set[str]] = [set() for _ in claim.objects]
    for i, relation, j in claim.relations:
        sides[i].add(relation)
        sides[j].add(INVERSE[relation])
    return sides


def facts(claim: Claim) -> str:
    """The claim as a plain list in a fixed order: the objects, sorted by colour, then the background."""
    lines = []
    for (color, form, size), sides in sorted(zip(claim.objects, sides_of(claim), strict=True), key=lambda x: x[0][0]):
        words = [color, "letter " + form if form in LETTERS else form, size or "", *sorted(sides)]
        lines.append(" ".join(w for w in words if w))
    return ", ".join(lines) + f". {claim.background or 'no'} background"


def tag_labels(claim: Claim, tokens: list[str]) -> np.ndarray:
    """The tags of every token, ``[L, len(TAGS)]``; -1 where a token does not belong to an object."""
    labels = np.full((len(tokens), len(TAGS)), -1)
    for (color, form, size), sides in zip(claim.objects, sides_of(claim), strict=True):
        label = [list(COLORS).index(color), FORMS.index(form), ("small", "large", None).index(size)]
        label += [int(side in sides) for side in SIDES]
        for i, token in enumerate(tokens):
            if token == "▁" + color:
                end = i + 2 if form in LETTERS else i + 1  # "red letter A" or "red circle"
                labels[i : end + 1] = label
    return labels


def captions_with_facts(tokenizer: Any, number: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Captions of random scenes for a prompt encoder's T5 tokenizer, with what they say about each shape.

    Returns the ids ``[number, L]``; the mask ``[number, L]`` of tokens that name a shape which the caption gives a
    colour; and the tags ``[N, len(TAGS)]`` of these N tokens, in the mask's order.
    """
    captions = [caption(sample_scene(rng), rng) for _ in range(number)]
    ids = tokenizer([text for text, _ in captions])
    labels = torch.full((*ids.shape, len(TAGS)), -1)
    for row, (text, claim) in zip(labels, captions, strict=True):
        pieces = tokenizer.pieces(text)
        row[: len(pieces)] = torch.from_numpy(tag_labels(claim, pieces))
    shape_ids = torch.tensor([tokenizer.fast.token_to_id("▁" + shape) for shape in SHAPES])
    is_shape = torch.isin(ids, shape_ids) & (labels[..., 0] >= 0)
    return ids, is_shape, labels[is_shape]


def corrupt_spans(ids: list[int], rng: np.random.Generator, sentinels: list[int]) -> tuple[list[int], list[int]]:
    """T5's span corruption: about 15 % of the tokens are replaced, one sentinel per span of one to three tokens.

    Returns the corrupted ids and the target, which lists each sentinel followed by the tokens it replaced. The last
    id, the end-of-text token, is never replaced.
    """
    source, target, i, spans = [], [], 0, 0
    while i < len(ids) - 1:
        if rng.random() < 0.08 and spans < len(sentinels):
            length = min(int(rng.integers(1, 4)), len(ids) - 1 - i)
            source.append(sentinels[spans])
            target += [sentinels[spans], *ids[i : i + length]]
            i, spans = i + length, spans + 1
        else:
            source.append(ids[i])
            i += 1
    return [*source, ids[-1]], [*target, ids[-1]]
