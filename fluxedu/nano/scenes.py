"""The miniature's world: small images of coloured shapes and letters, with captions that are exactly true.

A :class:`Scene` lists the objects and their positions, and :func:`render` draws it. :func:`caption` describes it in a
sentence and returns the :class:`Claim` that the sentence makes; an image generated from the sentence is judged by that
claim. Everything is a pure function of a ``numpy`` generator, so there are endless scenes and all are reproducible.

:func:`held_out_triple` names a tenth of all combinations (colour, form, background). Training never sees an object of
these, while every scene of the exam has one. Each colour, form and background, and each pair of them, does occur in
training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

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
HOLLOW = ("circle", "square", "triangle", "star")  # shapes wide enough to be drawn as an outline
SIZES = {"small": (14.0, 16.0), "large": (22.0, 26.0)}  # radius in pixels, drawn uniformly
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
#: image sizes (height, width) in pixels, all of about the same area, from 1:2 to 2:1
ASPECTS = ((128, 128), (112, 144), (144, 112), (96, 160), (160, 96), (96, 192), (192, 96))
MIN_CONTRAST = 105.0  # least Euclidean RGB distance of an object's colour from its background
GAP = 5.0  # least distance in pixels between the bounding circles of two objects


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: form (shape name or letter), colour, size name, centre and radius in pixels."""

    form: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background and one to three objects; ``texture`` is the seed of the background's texture."""

    background: str
    objects: tuple[SceneObject, ...]
    height: int
    width: int
    texture: int = 0

    @property
    def held_out(self) -> bool:
        """True if an object has a combination that training never sees."""
        return any(held_out_triple(o.color, o.form, self.background) for o in self.objects)


@dataclass(frozen=True)
class Claim:
    """What a sentence states: each object as (colour, form, size or None), relations (i, name, j), the background."""

    objects: tuple[tuple[str, str, str | None], ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str | None


def held_out_triple(color: str, form: str, background: str) -> bool:
    """True for the tenth of all combinations that training never sees; they are spread over every pair."""
    c, f, b = list(COLORS).index(color), FORMS.index(form), list(BACKGROUNDS).index(background)
    return (7 * c + 3 * f + 5 * b) % 10 == 0


def visible_colors(background: str) -> list[str]:
    """The colours with enough contrast to ``background``."""
    ground = np.array(BACKGROUNDS[background], float)
    return [name for name, rgb in COLORS.items() if np.linalg.norm(ground - rgb) >= MIN_CONTRAST]


# ---------------------------------------------------------------- sampling scenes


def relation_between(a: SceneObject, b: SceneObject) -> str | None:
    """The relation that clearly holds from ``a`` to ``b``, or None if they lie diagonally."""
    for name, (dx, dy) in RELATIONS.items():
        along = (a.x - b.x) * dx + (a.y - b.y) * dy
        across = abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx)
        if along > 0 and along >= 1.3 * across:
            return name
    return None


def _place(rng: np.random.Generator, looks: list[tuple[str, str]], height: int, width: int) -> list[SceneObject]:
    """Objects of these (form, colour) at random positions; an empty list if this attempt does not fit."""
    objects: list[SceneObject] = []
    for form, color in looks:
        size = str(rng.choice(list(SIZES)))
        radius = rng.uniform(*SIZES[size])
        margin = radius + 3
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        new = SceneObject(form, color, size, round(x, 1), round(y, 1), round(radius, 1))
        if any(np.hypot(o.x - new.x, o.y - new.y) < o.radius + new.radius + GAP for o in objects):
            return []
        if objects and relation_between(new, objects[0]) is None:
            return []
        objects.append(new)
    return objects


def sample_scene(
    rng: np.random.Generator, *, size: tuple[int, int] | None = None, count: int | None = None, held_out: bool = False
) -> Scene:
    """A random scene of ``size`` (height, width); with ``held_out``, one that training never sees.

    The objects of a scene differ in colour and in form. The second and third are clearly left of, right of, above or
    below the first.
    """
    height, width = size or ASPECTS[rng.integers(len(ASPECTS))]
    count = count or int(rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25]))
    while True:
        background = str(rng.choice(list(BACKGROUNDS)))
        colors = rng.permutation(visible_colors(background))[:count]
        # a letter has 0.6 of a shape's probability: 10 letters and 6 shapes are then equally frequent
        weights = np.array([1.0] * len(SHAPES) + [0.6] * len(LETTERS))
        forms = rng.choice(FORMS, size=count, replace=False, p=weights / weights.sum())
        looks = [(str(f), str(c)) for f, c in zip(forms, colors, strict=True)]
        if any(held_out_triple(c, f, background) for f, c in looks) != held_out:
            continue
        for _ in range(20):
            objects = _place(rng, looks, height, width)
            if objects:
                return Scene(background, tuple(objects), height, width, int(rng.integers(2**31)))


def scenes(seed: int, **kwargs) -> Iterator[Scene]:
    """An endless stream of scenes; keyword arguments as for :func:`sample_scene`."""
    rng = np.random.default_rng(seed)
    while True:
        yield sample_scene(rng, **kwargs)


# ---------------------------------------------------------------- drawing


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon with ``corners`` ``[N, 2]``, negative inside."""
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


_TRIANGLE = np.array([(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)])
_STAR_ANGLES = -np.pi / 2 + np.arange(10) * np.pi / 5
_STAR_RADII = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
_STAR = np.stack([_STAR_RADII * np.cos(_STAR_ANGLES), _STAR_RADII * np.sin(_STAR_ANGLES)], 1)
_ARC = [(0.62 * np.cos(a), 0.82 * np.sin(a)) for a in np.linspace(0.28 * np.pi, 1.72 * np.pi, 12)]
_BOWL = [(0.58 * np.cos(a), 0.2 + 0.6 * np.sin(a)) for a in np.linspace(0, np.pi, 9)]
#: letters as strokes (polylines) in a box of about [-0.65, 0.65] x [-0.85, 0.85], with y pointing down
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
_PEN = 0.17  # half the width of a stroke, in radii


def signed_distance(form: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of points to the outline of a form of radius 1, negative inside, with y pointing down."""
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


def coverage(
    obj: SceneObject, height: int, width: int, outline: float | None = None
) -> tuple[slice, slice, np.ndarray]:
    """The share of each pixel that an object covers: (rows, columns) of the window around it, shares in [0, 1].

    With ``outline``, a shape in :data:`HOLLOW` is only a line of this many pixels, measured inwards from its edge.
    """
    reach = obj.radius + 2
    top, left = max(int(obj.y - reach), 0), max(int(obj.x - reach), 0)
    bottom, right = min(int(obj.y + reach) + 1, height), min(int(obj.x + reach) + 1, width)
    y, x = np.mgrid[top:bottom, left:right] + 0.5
    distance = signed_distance(obj.form, (x - obj.x) / obj.radius, (y - obj.y) / obj.radius)
    share = np.clip(0.5 - distance * obj.radius, 0, 1)
    if outline is not None and obj.form in HOLLOW:
        share = share - np.clip(0.5 - distance * obj.radius - outline, 0, 1)
    return slice(top, bottom), slice(left, right), share


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth clouds and a fine grain, in grey levels, so that the autoencoder has detail to encode."""
    coarse = rng.normal(0, 3.0, (height // 16 + 2, width // 16 + 2))
    clouds = ndimage.map_coordinates(coarse, np.mgrid[:height, :width] / 16, order=1)  # bilinear
    return clouds + rng.normal(0, 1.0, (height, width))


def render(scene: Scene, outline: float | None = None) -> np.ndarray:
    """The scene as uint8 ``[height, width, 3]``; ``outline`` as for :func:`coverage`."""
    rng = np.random.default_rng(scene.texture)
    h, w = scene.height, scene.width
    image = np.empty((h, w, 3))
    image[:] = BACKGROUNDS[scene.background]
    for obj in scene.objects:
        rows, cols, share = coverage(obj, h, w, outline)
        y, x = np.mgrid[rows, cols]
        light = 10 * ((obj.x - x) + (obj.y - y)) / obj.radius  # lit from the top left
        light = light + 6 * np.sin((x + y) * 0.9 + rng.uniform(0, 6.28))  # faint diagonal stripes
        ink = np.array(COLORS[obj.color]) + light[..., None]
        image[rows, cols] += share[..., None] * (ink - image[rows, cols])
    image += _texture(rng, h, w)[..., None]
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def object_map(scene: Scene) -> np.ndarray:
    """The index of the object that each pixel belongs to: int8 ``[height, width]``, -1 for the background."""
    owner = np.full((scene.height, scene.width), -1, np.int8)
    for index, obj in enumerate(scene.objects):
        rows, cols, share = coverage(obj, scene.height, scene.width)
        owner[rows, cols][share > 0.5] = index
    return owner


def edge_map(scene: Scene) -> np.ndarray:
    """White outlines of the objects on black, uint8 ``[H, W, 3]``: the control image of canny."""
    owner = object_map(scene)
    edge = np.zeros(owner.shape, bool)
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge[1:] |= owner[1:] != owner[:-1]
    return np.repeat((255 * edge).astype(np.uint8)[..., None], 3, axis=-1)


def depth_map(scene: Scene) -> np.ndarray:
    """Objects as plain grey shapes on black, uint8 ``[H, W, 3]``: the control image of depth.

    Larger objects count as nearer, so they are brighter.
    """
    smallest, largest = SIZES["small"][0], SIZES["large"][1]
    grey = np.zeros((scene.height, scene.width))
    for obj in scene.objects:
        rows, cols, share = coverage(obj, scene.height, scene.width)
        level = 110 + 145 * (obj.radius - smallest) / (largest - smallest)
        grey[rows, cols] = np.maximum(grey[rows, cols], level * share)
    return np.repeat(np.round(grey).astype(np.uint8)[..., None], 3, axis=-1)


def to_tensor(images: np.ndarray) -> Tensor:
    """A batch of images, uint8 ``[B, H, W, 3]``, as float32 ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


# ---------------------------------------------------------------- captions


def _noun(color: str, form: str, size: str | None) -> str:
    noun = f"{color} letter {form}" if form in LETTERS else f"{color} {form}"
    return f"{size} {noun}" if size else noun


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def describe_claim(claim: Claim, rng: np.random.Generator) -> str:
    """A sentence that states ``claim``, in one of several wordings; the order of the objects is kept."""
    nouns = [_noun(*looks) for looks in claim.objects]
    sentence = _with_article(nouns[0])
    for i, relation, j in claim.relations:
        if (i, j) == (0, 1):
            sentence += f" {relation} {_with_article(nouns[1])}"
        else:  # the second relation refers to an object that was named before, hence "the"
            color, form, _ = claim.objects[j]
            sentence += f" and {_with_article(nouns[i])} {relation} the {_noun(color, form, None)}"
    if not claim.relations and len(nouns) > 1:
        sentence = ", ".join(_with_article(noun) for noun in nouns[:-1]) + " and " + _with_article(nouns[-1])
    if claim.background is None:
        return sentence if rng.random() < 0.7 else f"a picture of {sentence}"
    background = f"{_with_article(claim.background)} background"
    match rng.integers(4):
        case 0 | 1:
            return f"{sentence} on {background}"
        case 2:
            return f"on {background}, {sentence}"
    return f"a picture of {sentence} on {background}"


def sample_claim(scene: Scene, rng: np.random.Generator) -> Claim:
    """A random true claim about a scene: the order of the objects, and whether sizes and background are mentioned.

    Relations are stated for nine in ten scenes with several objects, the first of them from either side.
    """
    order = list(range(len(scene.objects)))
    if len(order) > 1 and rng.random() < 0.5:
        order[:2] = [1, 0]  # states the first relation from the other side
    objects = [scene.objects[i] for i in order]
    first = order.index(0)  # the object to which the others have clear relations
    with_sizes = rng.random() < 0.5
    relations: list[tuple[int, str, int]] = []
    if len(objects) > 1 and rng.random() < 0.9:
        relations.append((0, relation_between(objects[0], objects[1]), 1))
        if len(objects) > 2:
            relations.append((2, relation_between(objects[2], objects[first]), first))
    return Claim(
        tuple((o.color, o.form, o.size if with_sizes else None) for o in objects),
        tuple(relations),
        scene.background if rng.random() < 0.85 else None,
    )


def caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Claim]:
    """A true sentence about the scene, and the claim that it makes."""
    claim = sample_claim(scene, rng)
    return describe_claim(claim, rng), claim
