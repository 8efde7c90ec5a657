"""The two tasks that the miniature's T5 encoder was pre-trained on; ``training/t5.py`` trains it.

text to text   a small decoder fills in masked spans, or rewrites the caption as a list of facts
tagging        every token of an object predicts that object's colour, form, size and relations
"""

from __future__ import annotations

import numpy as np

from fluxedu.nano.scenes import COLORS, FORMS, INVERSE, LETTERS, Claim

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
