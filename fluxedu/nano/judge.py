"""The judge: what is in a picture of the miniature's world, by geometry alone.

>>> import numpy as np
>>> from fluxedu.nano.scenes import caption, render, sample_scene
>>> scene = sample_scene(rng := np.random.default_rng(0))
>>> summary([judge(render(scene), caption(scene, rng)[1])])["everything"]
{'percent': 100.0, 'n': 1}

No weights are involved, so no network is judged by its own mistakes. Four steps:

1. the ground's colour is the median of the border;
2. every pixel is a mixture of the ground and one palette colour, and part of a thing when that colour
   has more than half of it: half is where an edge lies however soft a model paints it;
3. connected pixels are one thing, unless two colours each fill a good part of it;
4. each thing is scaled to a common frame and compared with every form as the scenes draw it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np

from fluxedu.nano.scenes import (
    BACKGROUNDS,
    COLORS,
    FORMS,
    LETTERS,
    RELATIONS,
    SIZES,
    Claim,
    signed_distance,
    visible_colors,
)

BORDER = 4  # pixels along the edge that show the ground
SPECK = 25  # pixels; a smaller patch is dirt, not a thing
CORE = 20  # pixels a second colour must keep, its outline removed, to be a thing of its own
MOST = 10  # things read at most; a picture of noise has hundreds of patches
SIZE_EDGE = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius between small and large, in pixels
CLEAN_SLOPE = 0.42  # share per pixel across an anti-aliased outline

#: samples along each side of the frame in which forms are compared, in half bounding boxes
_TICKS = np.linspace(-1.26, 1.26, 32)
_SOFT = 0.09  # width of a template's edge, in radii: a pixel and a half on a middling thing
_SHIFTS = (-0.07, 0.0, 0.07)  # tried offsets in half boxes: a box of whole pixels is off by this much
_SCALES = (0.93, 1.0, 1.07)


@dataclass(frozen=True)
class Found:
    """One thing seen: its nearest form, colour and size, centre and radius in pixels.

    ``match`` in [0, 1] says how well the form's template covers it; a clean drawing has 0.97 or more.
    """

    form: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    match: float


@dataclass(frozen=True)
class Reading:
    """What :func:`read` saw in a picture of ``height`` x ``width`` pixels, the largest patch first."""

    background: str
    things: tuple[Found, ...]
    height: int
    width: int


@dataclass(frozen=True)
class Verdict:
    """A claim against a picture. Tuples run as in the claim; None stands for what was not claimed.

    ``matched`` names, per claimed thing, the index of the found thing it was compared with, or None.
    """

    claim: Claim
    reading: Reading
    matched: tuple[int | None, ...]
    background: bool | None
    colors: tuple[bool, ...]
    forms: tuple[bool, ...]
    sizes: tuple[bool | None, ...]
    relations: tuple[bool, ...]

    @property
    def shapes(self) -> tuple[bool, ...]:
        """Which of the claimed shapes are right."""
        return tuple(ok for ok, thing in zip(self.forms, self.claim.things, strict=True) if thing[1] not in LETTERS)

    @property
    def letters(self) -> tuple[bool, ...]:
        """Which of the claimed letters are right."""
        return tuple(ok for ok, thing in zip(self.forms, self.claim.things, strict=True) if thing[1] in LETTERS)

    @property
    def missing(self) -> int:
        """Claimed things for which nothing was found."""
        return self.matched.count(None)

    @property
    def extra(self) -> int:
        """Found things that nobody claimed."""
        return len(self.reading.things) - (len(self.matched) - self.missing)

    @property
    def everything(self) -> bool:
        """Every claim holds, and there are as many things as were claimed."""
        claims = (self.background, *self.colors, *self.forms, *self.sizes, *self.relations)
        return not self.extra and not self.missing and False not in claims


# ---------------------------------------------------------------- reading a picture


def read(image) -> Reading:
    """Say what is in a picture: uint8 ``[H, W, 3]`` or a PIL image."""
    pixels = _pixels(image)
    ground = _ground(pixels)
    background = _nearest(ground, BACKGROUNDS)
    found = [_identify(pixels, ground, background, part) for part in _parts(pixels, ground, background)]
    return Reading(background, tuple(found), *pixels.shape[:2])


def _pixels(image) -> np.ndarray:
    """float32 ``[H, W, 3]`` in grey levels."""
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3] or a PIL image, got {array.dtype} {list(array.shape)}")
    return array.astype(np.float32)


def _ground(pixels: np.ndarray) -> np.ndarray:
    """The ground's colour ``[3]``: a median, so that a thing running off the picture does no harm."""
    b = BORDER
    edges = pixels[:b], pixels[-b:], pixels[b:-b, :b], pixels[b:-b, -b:]
    return np.median(np.concatenate([e.reshape(-1, 3) for e in edges]), axis=0)


def _nearest(color: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    """The name whose colour is closest to ``color`` ``[3]``."""
    return min(names, key=lambda name: float(np.sum((color - names[name]) ** 2)))


def _unmix(pixels: np.ndarray, ground: np.ndarray, inks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain pixels ``[N, 3]`` as ground plus a share of one of ``inks`` ``[C, 3]``: ink ``[N]``, share ``[N]``.

    An edge pixel of a yellow thing on black is brown; taken by itself it is nearest to another colour,
    but it lies on the line from black to yellow.
    """
    away = pixels - ground
    direction = (inks - ground).astype(np.float32)
    length2 = (direction**2).sum(1)
    along = away @ direction.T  # [N, C]
    share = np.clip(along / length2, 0, 1)
    off = share * (share * length2 - 2 * along)  # squared distance from the line, less |away|^2 for all alike
    ink = off.argmin(1)
    return ink, share[np.arange(len(ink)), ink]


def _parts(pixels: np.ndarray, ground: np.ndarray, background: str) -> list[np.ndarray]:
    """The masks bool ``[H, W]`` of the things, largest first."""
    from scipy import ndimage

    inks = np.array([COLORS[name] for name in visible_colors(background)])
    far = ((pixels - ground) ** 2).sum(-1) > 30.0**2  # only these can be half of any visible colour
    ink = np.full(far.shape, -1)
    labels, share = _unmix(pixels[far], ground, inks)
    ink[far] = np.where(share > 0.5, labels, -1)
    # grown by a pixel before connecting: a hairline crack in a stroke does not make two things
    patches, count = ndimage.label(ndimage.binary_dilation(ink >= 0), np.ones((3, 3)))
    patches[ink < 0] = 0
    area = np.bincount(patches.ravel(), minlength=count + 1)
    area[0] = 0
    whole = [patches == index for index in np.argsort(-area)[:MOST] if area[index] >= SPECK]
    parts = [part for patch in whole for part in _split(patch, ink, pixels, ground, inks)]
    return sorted(parts, key=np.count_nonzero, reverse=True)[:MOST]


def _split(patch: np.ndarray, ink: np.ndarray, pixels: np.ndarray, ground: np.ndarray, inks: np.ndarray) -> list:
    """Cut a patch bool ``[H, W]`` where two things of different colours touch; usually it stays whole.

    A rim of the wrong colour is one or two pixels wide (blur, lossy compression): eroding removes it,
    while the thinnest stroke of a letter survives.
    """
    from scipy import ndimage

    core = [np.count_nonzero(ndimage.binary_erosion(patch & (ink == c))) for c in range(len(inks))]
    kept = [c for c, n in enumerate(core) if n >= max(CORE, 0.1 * sum(core))]
    if len(kept) < 2:
        return [patch]
    nearest, _ = _unmix(pixels[patch], ground, inks[kept])
    parts = []
    for c in range(len(kept)):
        mask = np.zeros_like(patch)
        mask[patch] = nearest == c
        pieces, count = ndimage.label(ndimage.binary_opening(mask), np.ones((3, 3)))
        parts += [pieces == i for i in range(1, count + 1) if np.count_nonzero(pieces == i) >= SPECK]
    return parts


def _identify(pixels: np.ndarray, ground: np.ndarray, background: str, part: np.ndarray) -> Found:
    """Name the thing whose mask is ``part`` bool ``[H, W]``."""
    from scipy import ndimage

    inner = ndimage.binary_erosion(part)
    ink = np.median(pixels[inner if np.count_nonzero(inner) >= SPECK else part], axis=0)
    color = _nearest(ink, {name: COLORS[name] for name in visible_colors(background)})
    away = ink - ground
    share = (pixels - ground) @ away / max(float(away @ away), 1.0)
    share = np.clip((share - 0.2) / 0.6, 0, 1)  # flat inside, in spite of light and stripes
    share[~ndimage.binary_dilation(part, iterations=2)] = 0  # the neighbours are not this thing
    form, x, y, radius, match = _match(share)
    return Found(form, color, "small" if radius < SIZE_EDGE else "large", x, y, radius, match)


# ---------------------------------------------------------------- forms


def _match(share: np.ndarray) -> tuple[str, float, float, float, float]:
    """The best form for a thing covering ``share`` ``[H, W]``: form, x, y, radius in pixels, match in [0, 1].

    The score is Dice's, 2 a.t / (a.a + t.t): 1 where they agree, and one product for all templates.
    """
    from scipy import ndimage

    bank, norms, variants = _templates()
    rows, cols = np.flatnonzero((share > 0.5).any(1)), np.flatnonzero((share > 0.5).any(0))
    x, y = (cols[0] + cols[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    half = max(cols[-1] - cols[0], rows[-1] - rows[0]) / 2 + 0.5
    for _ in range(2):  # the second look is from the frame the first one found
        where = np.meshgrid(y + half * _TICKS - 0.5, x + half * _TICKS - 0.5, indexing="ij")
        seen = ndimage.map_coordinates(share, where, order=1).ravel().astype(np.float32)
        scores = 2 * (bank @ seen) / (norms + seen @ seen)
        best = int(scores.argmax())
        form, scale, dx, dy = variants[best]
        x, y, half = x + half * dx, y + half * dy, half * scale
    cx, cy, extent = _box(form)
    radius = half / extent
    return form, float(x - cx * radius), float(y - cy * radius), float(radius), float(scores[best])


@cache
def _box(form: str) -> tuple[float, float, float]:
    """The bounding box of a form of radius 1: its centre (x, y), and half its longer side."""
    ticks = np.linspace(-1.3, 1.3, 521)
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    inside = signed_distance(form, x, y) < 0
    x0, x1 = ticks[inside.any(0)][[0, -1]]
    y0, y1 = ticks[inside.any(1)][[0, -1]]
    return (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) / 2


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[tuple[str, float, float, float]]]:
    """Every form at every small scale and offset: float32 ``[T, 32*32]``, squared norms ``[T]``, (form, s, dx, dy)."""
    variants = list(product(FORMS, _SCALES, _SHIFTS, _SHIFTS))
    y, x = np.meshgrid(_TICKS, _TICKS, indexing="ij")
    bank = []
    for form, scale, dx, dy in variants:
        cx, cy, extent = _box(form)
        distance = signed_distance(form, (x - dx) / scale * extent + cx, (y - dy) / scale * extent + cy)
        bank.append(np.clip(0.5 - distance / _SOFT, 0, 1).ravel())
    bank = np.array(bank, np.float32)
    return bank, (bank**2).sum(1), variants


# ---------------------------------------------------------------- judging a claim


def judge(image, claim: Claim) -> Verdict:
    """Hold a picture (uint8 ``[H, W, 3]``, a PIL image, or its :class:`Reading`) against a claim."""
    reading = image if isinstance(image, Reading) else read(image)
    matched = _assign(reading.things, claim)
    seen = [None if index is None else reading.things[index] for index in matched]
    pairs = list(zip(seen, claim.things, strict=True))
    sizes = [size and (thing is not None and thing.size == size) for thing, (_, _, size) in pairs]
    return Verdict(
        claim,
        reading,
        matched,
        background=None if claim.background is None else reading.background == claim.background,
        colors=tuple(thing is not None and thing.color == color for thing, (color, _, _) in pairs),
        forms=tuple(thing is not None and thing.form == form for thing, (_, form, _) in pairs),
        sizes=tuple(sizes),
        relations=tuple(_holds(seen[i], name, seen[j]) for i, name, j in claim.relations),
    )


def _assign(things: Sequence[Found], claim: Claim) -> tuple[int | None, ...]:
    """Which found thing each claimed one is: the choice with the most colours and forms right.

    Colour counts a little more (a blue circle asked for as "blue square" is the square drawn wrong);
    size only breaks ties. A thing with neither the colour nor the form of the claim is not a bad drawing of
    it but something else, so what was claimed is missing.
    """

    def agreement(index: int | None, look: tuple[str, str, str | None]) -> float:
        if index is None:
            return 0.0
        color, form, size = look
        thing = things[index]
        hit = 1.1 * (thing.color == color) + (thing.form == form)
        return hit + 0.01 * (thing.size == size) if hit else -1.0

    candidates = [*range(len(things)), *[None] * len(claim.things)]
    table = [{index: agreement(index, look) for index in candidates} for look in claim.things]
    choices = permutations(candidates, len(claim.things))
    return max(choices, key=lambda choice: sum(row[index] for row, index in zip(table, choice, strict=True)))


def _holds(a: Found | None, relation: str, b: Found | None) -> bool:
    """Is ``a`` on the named side of ``b``, at least as far along the axis as across it?"""
    if a is None or b is None:
        return False
    dx, dy = RELATIONS[relation]
    along = (a.x - b.x) * dx + (a.y - b.y) * dy
    across = abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx)
    return along > 0 and along >= across


# ---------------------------------------------------------------- figures for a set


def summary(verdicts: Iterable[Verdict]) -> dict[str, dict[str, float | int | None]]:
    """The table's rows: per row the percentage right and the number of claims ``n`` behind it.

    ``everything`` is the published comparison's prompt following, ``letter`` its typography. A row
    about which nothing was claimed has ``percent`` None.
    """
    verdicts = list(verdicts)
    rows: dict[str, list[bool | None]] = {
        "background": [v.background for v in verdicts],
        "colours": [ok for v in verdicts for ok in v.colors],
        "shapes": [ok for v in verdicts for ok in v.shapes],
        "letter": [ok for v in verdicts for ok in v.letters],
        "sizes": [ok for v in verdicts for ok in v.sizes],
        "relations": [ok for v in verdicts for ok in v.relations],
        "everything": [v.everything for v in verdicts],
    }
    claimed = {name: [ok for ok in row if ok is not None] for name, row in rows.items()}
    return {name: {"percent": 100 * float(np.mean(r)) if r else None, "n": len(r)} for name, r in claimed.items()}


def diversity(readings: Sequence[Reading]) -> float:
    """How much pictures of one prompt differ: the spread of where things are and how large.

    Things are followed from picture to picture by colour, which a prompt never repeats. Of each colour
    seen twice or more: the standard deviation of (x, y, radius), as shares of the picture's width,
    height and the root of its area; then the mean over colours. 0 when the pictures are the same;
    about 0.3 for the scenes themselves.
    """
    places: dict[str, list[tuple[float, float, float]]] = {}
    for r in readings:
        largest = {t.color: t for t in sorted(r.things, key=lambda t: t.radius)}
        for t in largest.values():
            place = (t.x / r.width, t.y / r.height, t.radius / (r.width * r.height) ** 0.5)
            places.setdefault(t.color, []).append(place)
    spreads = [np.sqrt(np.var(p, axis=0).sum()) for p in places.values() if len(p) > 1]
    return float(np.mean(spreads)) if spreads else 0.0


def quality(image, reading: Reading) -> float:
    """How cleanly a picture is drawn, in [0, 1]: the mean of three shares, whatever the prompt was.

    *Forms*: the mean template match of the things. *Edges*: how steep their outlines are, 1 for a clean
    drawing, half for a blur of about 1.4 pixels. *Ground*: 1 while the ground strays by no more
    than 4 grey levels (root mean square; clouds and grain make 2 to 3), 0 at 40. Without things, ground only.
    """
    pixels = _pixels(image)
    ground = _ground(pixels)
    y, x = np.mgrid[: reading.height, : reading.width] + 0.5
    bare = np.ones(pixels.shape[:2], bool)
    forms, edges = [], []
    for t in reading.things:
        near = np.hypot(x - t.x, y - t.y) <= 1.25 * t.radius + 2
        bare &= ~near
        forms.append(t.match)
        edges.append(_steepness(pixels, ground, t, near))
    stray = float(np.sqrt(((pixels[bare] - ground) ** 2).mean())) if bare.any() else 40.0
    drawn = (sum(forms) + sum(edges)) / max(len(reading.things), 1)
    return (drawn + float(np.clip((40 - stray) / 36, 0, 1))) / 3


def _steepness(pixels: np.ndarray, ground: np.ndarray, thing: Found, near: np.ndarray) -> float:
    """The slope of a thing's outline in [0, 1], over the pixels ``near`` bool ``[H, W]``."""
    away = np.subtract(COLORS[thing.color], ground)
    down, right = np.gradient(np.clip((pixels - ground) @ away / (away @ away), 0, 1))
    slope = np.hypot(down, right)[near]
    # high powers, so that the many faint slopes of light and stripes do not count
    return float(np.clip((slope**3).sum() / max((slope**2).sum(), 1e-6) / CLEAN_SLOPE, 0, 1))
