"""Prompts about two shapes, all of one form: "a red circle left of a blue square"."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from fluxedu.nano.judge import Verdict, judge
from fluxedu.nano.scenes import COLORS, RELATIONS, SHAPES, Claim


@dataclass(frozen=True)
class TwoShapes:
    """Two shapes and where the first is seen from the second."""

    colors: tuple[str, str]
    forms: tuple[str, str]
    relation: str

    @property
    def prompt(self) -> str:
        (c, d), (f, g) = self.colors, self.forms
        return f"a{'n' * (c[0] in 'aeiou')} {c} {f} {self.relation} a{'n' * (d[0] in 'aeiou')} {d} {g}"

    @property
    def claim(self) -> Claim:
        (c, d), (f, g) = self.colors, self.forms
        return Claim(((c, f, None), (d, g, None)), ((0, self.relation, 1),), None)

    def judged(self, image: Image.Image) -> Verdict:
        return judge(image, self.claim)

    def recoloured(self, color: str) -> TwoShapes:
        """The same with the first shape in another colour."""
        return replace(self, colors=(color, self.colors[1]))


def two_shapes(count: int, seed: int = 2024) -> list[TwoShapes]:
    """``count`` different scenes; the two colours and the two forms of each differ."""
    made = list(dict.fromkeys(_draw(np.random.default_rng(seed), 3 * count)))
    return made[:count]


def _draw(rng: np.random.Generator, count: int) -> Iterator[TwoShapes]:
    for _ in range(count):
        colors, forms = rng.permutation(list(COLORS))[:2], rng.permutation(SHAPES)[:2]
        yield TwoShapes(tuple(map(str, colors)), tuple(map(str, forms)), str(rng.choice(list(RELATIONS))))


def roles(tokenizer, scene: TwoShapes) -> dict[str, list[int]]:
    """The T5 tokens of each part of a scene's prompt, padding included."""
    pieces = [piece.strip("▁") for piece in tokenizer.pieces(scene.prompt)]
    words, found, start = scene.prompt.split(), {}, 0
    places = []  # the tokens of each word, in order; a word may be several tokens
    for word in words:
        end = start + 1
        while "".join(pieces[start:end]) != word:
            end += 1
        places.append(list(range(start, end)))
        start = end
    found["first colour"], found["first noun"] = places[1], places[2]
    found["relation"] = [token for place in places[3:-3] for token in place]
    found["second colour"], found["second noun"] = places[-2], places[-1]
    found["articles"] = places[0] + places[-3]
    found["end token"] = [start]
    found["padding"] = list(range(start + 1, tokenizer.length))
    return found
