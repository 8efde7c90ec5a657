"""The miniature's world: small pictures of coloured shapes, with captions that are exactly true.

A :class:`Scene` says what is where; :func:`render` draws it; :func:`caption` says it in words and
returns, beside the sentence, the :class:`Claim` the sentence makes, which is what a picture drawn
from it is judged by. Everything is a pure function of a ``numpy`` generator, so the world is endless
and reproducible.

Held out: a scene in which any thing's (colour, shape, background) is one of the tenth of all triples
named by :func:`held_out_triple`. Training never sees such a thing; the scenes behind the judge's
prompts all have one. Every colour, shape and background, and every pair of two of them, is seen in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "orange": (250, 135, 20),
    "yellow": (250, 225, 40),
    "green": (30, 155, 60),
    "cyan": (40, 205, 225),
    "blue": (40, 90, 235),
    "purple": (145, 50, 200),
    "pink": (255, 135, 195),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (243, 243, 243),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "navy": (22, 28, 84),
    "brown": (96, 58, 28),
    "beige": (232, 214, 178),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
LETTERS = ("A", "C", "E", "H", "K", "L", "T", "U", "X", "Z")
FORMS = SHAPES + LETTERS
HOLLOW = ("circle", "square", "triangle", "star")  # the shapes wide enough to be drawn as an outline
SIZES = {"small": (14.0, 16.0), "large": (22.0, 26.0)}  # radius in pixels, drawn uniformly
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
#: (height, width) in pixels, all of about the same area, from 1:2 to 2:1
ASPECTS = ((128, 128), (112, 144), (144, 112), (96, 160), (160, 96), (96, 192), (192, 96))
MIN_CONTRAST = 105.0  # Euclidean RGB distance of a thing's colour from its background
GAP = 5.0  # pixels between the bounding circles of two things


@dataclass(frozen=True)
class Thing:
    """One object of a scene: form (shape name or letter), colour, size name, centre and radius in pixels."""

    form: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background and one to three things; ``texture`` seeds the grain so that rendering is pure."""

    background: str
    things: tuple[Thing, ...]
    height: int
    width: int
    texture: int = 0

    @property
    def held_out(self) -> bool:
        return any(held_out_triple(t.color, t.form, self.background) for t in self.things)


@dataclass(frozen=True)
class Claim:
    """What a sentence says: per thing (colour, form, size or None), relations (i, name, j), background or None."""

    things: tuple[tuple[str, str, str | None], ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str | None


def held_out_triple(color: str, form: str, background: str) -> bool:
    """Is this combination kept from training? A tenth of all are, spread over every pair."""
    c, f, b = list(COLORS).index(color), FORMS.index(form), list(BACKGROUNDS).index(background)
    return (7 * c + 3 * f + 5 * b) % 10 == 0


def visible_colors(background: str) -> list[str]:
    """The colours that stand out from ``background``."""
    ground = np.array(BACKGROUNDS[background], float)
    return [name for name, rgb in COLORS.items() if np.linalg.norm(ground - rgb) >= MIN_CONTRAST]


# ---------------------------------------------------------------- making a scene


def _related(a: Thing, relation: str, b: Thing) -> bool:
    """Is ``a`` clearly ``relation`` ``b``: along the right axis, and mostly along that axis?"""
    dx, dy = RELATIONS[relation]
    along = (a.x - b.x) * dx + (a.y - b.y) * dy
    across = abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx)
    return along > 0 and along >= 1.3 * across


def relation_between(a: Thing, b: Thing) -> str | None:
    """The one relation that clearly holds from ``a`` to ``b``, or None when they lie diagonally."""
    return next((r for r in RELATIONS if _related(a, r, b)), None)


def _place(rng: np.random.Generator, looks: list[tuple[str, str]], height: int, width: int) -> tuple[Thing, ...] | None:
    """Put the things somewhere without touching; None when this try did not fit."""
    things: list[Thing] = []
    for form, color in looks:
        size = str(rng.choice(list(SIZES)))
        radius = rng.uniform(*SIZES[size])
        margin = radius + 3
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        thing = Thing(form, color, size, round(x, 1), round(y, 1), round(radius, 1))
        if any(np.hypot(t.x - thing.x, t.y - thing.y) < t.radius + thing.radius + GAP for t in things):
            return None
        if things and relation_between(thing, things[0]) is None:
            return None
        things.append(thing)
    return tuple(things)


def sample_scene(
    rng: np.random.Generator, *, size: tuple[int, int] | None = None, count: int | None = None, held_out: bool = False
) -> Scene:
    """Draw a scene; ``size`` is (height, width), ``held_out`` asks for one training never sees.

    Things in a scene differ in colour and in form; a second and third thing stand clearly left of,
    right of, above or below the first.
    """
    height, width = size or ASPECTS[rng.integers(len(ASPECTS))]
    count = count or int(rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25]))
    while True:
        background = str(rng.choice(list(BACKGROUNDS)))
        colors = rng.permutation(visible_colors(background))[:count]
        # a letter is as likely as two shapes, so that each of the ten is met often enough
        weights = np.array([1.0] * len(SHAPES) + [0.6] * len(LETTERS))
        forms = rng.choice(FORMS, size=count, replace=False, p=weights / weights.sum())
        looks = [(str(f), str(c)) for f, c in zip(forms, colors, strict=True)]
        if any(held_out_triple(c, f, background) for f, c in looks) != held_out:
            continue
        for _ in range(20):
            things = _place(rng, looks, height, width)
            if things:
                return Scene(background, things, height, width, int(rng.integers(2**31)))


def scenes(seed: int, **kwargs) -> Iterator[Scene]:
    """An endless stream of scenes; keywords as for :func:`sample_scene`."""
    rng = np.random.default_rng(seed)
    while True:
        yield sample_scene(rng, **kwargs)


# ---------------------------------------------------------------- drawing


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon, negative inside."""
    distance = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        distance = np.minimum(distance, _segment(x, y, ax, ay, bx, by))
        crosses = (ay > y) != (by > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return np.where(inside, -distance, distance)


def _segment(x: np.ndarray, y: np.ndarray, ax: float, ay: float, bx: float, by: float) -> np.ndarray:
    """Distance to the segment from (ax, ay) to (bx, by)."""
    length2 = (bx - ax) ** 2 + (by - ay) ** 2
    t = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length2, 0, 1)
    return np.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay))


def _star_corners() -> np.ndarray:
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


_TRIANGLE = np.array([(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)])
_STAR = _star_corners()
_ARC = [(0.62 * np.cos(a), 0.82 * np.sin(a)) for a in np.linspace(0.28 * np.pi, 1.72 * np.pi, 12)]
_BOWL = [(0.58 * np.cos(a), 0.2 + 0.6 * np.sin(a)) for a in np.linspace(0, np.pi, 9)]
#: letters as pen strokes (polylines) in a box of about [-0.65, 0.65] x [-0.85, 0.85], y down
STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "A": [[(-0.65, 0.82), (0, -0.82), (0.65, 0.82)], [(-0.4, 0.28), (0.4, 0.28)]],
    "C": [_ARC],
    "E": [[(0.55, -0.82), (-0.5, -0.82), (-0.5, 0.82), (0.55, 0.82)], [(-0.5, 0), (0.4, 0)]],
    "H": [[(-0.58, -0.82), (-0.58, 0.82)], [(0.58, -0.82), (0.58, 0.82)], [(-0.58, 0), (0.58, 0)]],
    "K": [[(-0.52, -0.82), (-0.52, 0.82)], [(0.58, -0.82), (-0.5, 0.08)], [(-0.15, -0.2), (0.6, 0.82)]],
    "L": [[(-0.45, -0.82), (-0.45, 0.82), (0.58, 0.82)]],
    "T": [[(-0.68, -0.82), (0.68, -0.82)], [(0, -0.82), (0, 0.82)]],
    "U": [[(-0.58, -0.82), (-0.58, 0.2)], _BOWL, [(0.58, 0.2), (0.58, -0.82)]],
    "X": [[(-0.62, -0.82), (0.62, 0.82)], [(0.62, -0.82), (-0.62, 0.82)]],
    "Z": [[(-0.6, -0.82), (0.6, -0.82), (-0.6, 0.82), (0.6, 0.82)]],
}
_PEN = 0.17  # half the stroke width, in radii


def signed_distance(form: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of points to the outline of a form of radius 1, negative inside; y points down."""
    match form:
        case "circle":
            return np.hypot(x, y) - 0.95
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.82
        case "triangle":
            return _polygon(x, y, _TRIANGLE)
        case "star":
            return _polygon(x, y, _STAR)
        case "ring":
            return np.abs(np.hypot(x, y) - 0.7) - 0.26
        case "cross":
            ax, ay = np.abs(x), np.abs(y)
            return np.minimum(np.maximum(ax - 0.3, ay - 0.95), np.maximum(ay - 0.3, ax - 0.95))
    pairs = [pair for line in STROKES[form] for pair in zip(line, line[1:], strict=False)]
    return np.min([_segment(x, y, *a, *b) for a, b in pairs], axis=0) - _PEN


def coverage(thing: Thing, height: int, width: int, outline: float | None = None) -> tuple[slice, slice, np.ndarray]:
    """Which share of each pixel the thing covers: the window it lies in, and shares in [0, 1].

    ``outline``: of a hollow thing only so many pixels, from its edge inwards.
    """
    reach = thing.radius + 2
    top, left = max(int(thing.y - reach), 0), max(int(thing.x - reach), 0)
    bottom, right = min(int(thing.y + reach) + 1, height), min(int(thing.x + reach) + 1, width)
    y, x = np.mgrid[top:bottom, left:right] + 0.5
    distance = signed_distance(thing.form, (x - thing.x) / thing.radius, (y - thing.y) / thing.radius)
    share = np.clip(0.5 - distance * thing.radius, 0, 1)
    if outline is not None and thing.form in HOLLOW:
        share = share - np.clip(0.5 - distance * thing.radius - outline, 0, 1)
    return slice(top, bottom), slice(left, right), share


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Slow clouds and a fine grain, in grey levels: enough for the autoencoder to have work."""
    coarse = rng.normal(0, 3.0, (height // 16 + 2, width // 16 + 2))
    rows, cols = np.arange(height) / 16, np.arange(width) / 16
    i, j = rows.astype(int), cols.astype(int)
    fi, fj = (rows - i)[:, None], (cols - j)[None, :]
    top = coarse[i][:, j] * (1 - fj) + coarse[i][:, j + 1] * fj
    bottom = coarse[i + 1][:, j] * (1 - fj) + coarse[i + 1][:, j + 1] * fj
    return top * (1 - fi) + bottom * fi + rng.normal(0, 1.0, (height, width))


def render(scene: Scene, outline: float | None = None) -> np.ndarray:
    """Draw: uint8 ``[height, width, 3]``; with ``outline``, wide shapes as lines of so many pixels."""
    rng = np.random.default_rng(scene.texture)
    h, w = scene.height, scene.width
    image = np.empty((h, w, 3))
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        rows, cols, share = coverage(thing, h, w, outline)
        y, x = np.mgrid[rows, cols]
        light = 10 * ((thing.x - x) + (thing.y - y)) / thing.radius  # lit from the top left
        light = light + 6 * np.sin((x + y) * 0.9 + rng.uniform(0, 6.28))  # faint diagonal stripes
        ink = np.array(COLORS[thing.color]) + light[..., None]
        image[rows, cols] += share[..., None] * (ink - image[rows, cols])
    image += _texture(rng, h, w)[..., None]
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def thing_map(scene: Scene) -> np.ndarray:
    """Which thing each pixel belongs to: int8 ``[height, width]``, -1 for the background."""
    owner = np.full((scene.height, scene.width), -1, np.int8)
    for index, thing in enumerate(scene.things):
        rows, cols, share = coverage(thing, scene.height, scene.width)
        owner[rows, cols][share > 0.5] = index
    return owner


# ---------------------------------------------------------------- saying it


def _noun(color: str, form: str, size: str | None) -> str:
    words = [size, color, f"letter {form}" if form in LETTERS else form]
    return " ".join(w for w in words if w)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def say(claim: Claim, rng: np.random.Generator) -> str:
    """Put a claim into words, in one of several ways (the order of things in ``claim`` is kept)."""
    nouns = [_noun(*thing) for thing in claim.things]
    words = _article(nouns[0])
    for i, relation, j in claim.relations:
        a, b = claim.things[i], claim.things[j]
        if (i, j) == (0, 1):
            words += f" {relation} {_article(nouns[1])}"
        else:  # a thing already named is taken up again with "the"
            words += f" and {_article(nouns[i])} {relation} the {_noun(b[0], b[1], None)}"
        assert a is not b
    if not claim.relations and len(nouns) > 1:
        words = ", ".join(_article(n) for n in nouns[:-1]) + " and " + _article(nouns[-1])
    if claim.background is None:
        return words if rng.random() < 0.7 else f"a picture of {words}"
    ground = f"{_article(claim.background)} background"
    match rng.integers(4):
        case 0 | 1:
            return f"{words} on {ground}"
        case 2:
            return f"on {ground}, {words}"
    return f"a picture of {words} on {ground}"


def claim_of(scene: Scene, rng: np.random.Generator) -> Claim:
    """Choose what to say of a scene: the order of its things, whether sizes and the ground are named.

    Two things are said with the relation between them nine times of ten, from either side; the third
    stands in relation to the scene's first thing.
    """
    order = list(range(len(scene.things)))
    if len(order) > 1 and rng.random() < 0.5:
        order[:2] = [1, 0]  # the same fact from the other side
    things = [scene.things[i] for i in order]
    hub = order.index(0)
    sized = rng.random() < 0.5
    relations: list[tuple[int, str, int]] = []
    if len(things) > 1 and rng.random() < 0.9:
        relations.append((0, relation_between(things[0], things[1]), 1))
        if len(things) > 2:
            relations.append((2, relation_between(things[2], things[hub]), hub))
    return Claim(
        tuple((t.color, t.form, t.size if sized else None) for t in things),
        tuple(relations),
        scene.background if rng.random() < 0.85 else None,
    )


def caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Claim]:
    """A true sentence about the scene, and what it claims."""
    claim = claim_of(scene, rng)
    return say(claim, rng), claim
