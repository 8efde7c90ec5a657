"""The judge: which objects an image of the miniature's world shows, found by geometry alone.

>>> import numpy as np
>>> from fluxedu.nano.scenes import caption, render, sample_scene
>>> scene = sample_scene(rng := np.random.default_rng(0))
>>> summary([judge(render(scene), caption(scene, rng)[1])])["everything"]
{'percent': 100.0, 'n': 1}

The judge has no weights, so it shares no mistakes with the networks that it judges. It takes four steps:

1. The background colour is the median along the image's border.
2. Every pixel is explained as a mixture of the background and one palette colour. It belongs to an object if that
   colour's share exceeds one half, which is where an edge lies, however soft it is.
3. Each connected region of such pixels is one object, unless two colours each fill a good part of it.
4. Each object is scaled to a common frame and compared with a template of every form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np
from PIL import Image
from scipy import ndimage

from fluxedu.errors import RequestError
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
from fluxedu.sampling.images import to_rgb

BORDER = 4  # width in pixels of the border from which the background colour is taken
MIN_PIXELS = 25  # a smaller region is ignored
MIN_CORE = 20  # pixels of a second colour that must survive erosion for it to be an object of its own
MAX_OBJECTS = 10  # more are ignored: a noisy image has hundreds of regions
SIZE_EDGE = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius in pixels that separates small from large
CLEAN_SLOPE = 0.42  # slope of a clean anti-aliased outline, in shares per pixel

#: sample positions along each side of the common frame, in units of half a bounding box
_TICKS = np.linspace(-1.26, 1.26, 32)
_EDGE_WIDTH = 0.09  # width of a template's edge, in radii: 1.5 pixels on an object of medium size
_SHIFTS = (-0.07, 0.0, 0.07)  # offsets to try, in half boxes: a box of whole pixels may be off by this much
_SCALES = (0.93, 1.0, 1.07)


@dataclass(frozen=True)
class Detection:
    """One detected object: its form, colour and size name, its centre and radius in pixels.

    ``match`` in [0, 1] is the score of the best template; a clean drawing reaches 0.97 or more.
    """

    form: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    match: float


@dataclass(frozen=True)
class Detections:
    """What :func:`detect` finds in an image of ``height`` x ``width`` pixels, the largest object first."""

    background: str
    objects: tuple[Detection, ...]
    height: int
    width: int


@dataclass(frozen=True)
class Verdict:
    """The result of checking a claim. Tuples are in the claim's order; None marks what the claim leaves open.

    ``matched``: for each claimed object the index of the detected one it was compared with, or None.
    """

    claim: Claim
    detections: Detections
    matched: tuple[int | None, ...]
    background: bool | None
    colors: tuple[bool, ...]
    forms: tuple[bool, ...]
    sizes: tuple[bool | None, ...]
    relations: tuple[bool, ...]

    @property
    def shapes(self) -> tuple[bool, ...]:
        """For each claimed shape, whether it is right."""
        return tuple(ok for ok, (_, form, _) in zip(self.forms, self.claim.objects, strict=True) if form not in LETTERS)

    @property
    def letters(self) -> tuple[bool, ...]:
        """For each claimed letter, whether it is right."""
        return tuple(ok for ok, (_, form, _) in zip(self.forms, self.claim.objects, strict=True) if form in LETTERS)

    @property
    def missing(self) -> int:
        """Number of claimed objects that were not detected."""
        return self.matched.count(None)

    @property
    def extra(self) -> int:
        """Number of detected objects that were not claimed."""
        return len(self.detections.objects) - (len(self.matched) - self.missing)

    @property
    def results(self) -> list[bool]:
        """For each claim that was made, whether it holds."""
        claims = (self.background, *self.colors, *self.forms, *self.sizes, *self.relations)
        return [ok for ok in claims if ok is not None]

    @property
    def everything(self) -> bool:
        """True if every claim holds and there are exactly as many objects as claimed."""
        return not self.extra and not self.missing and all(self.results)


# ---------------------------------------------------------------- detecting objects


def detect(image) -> Detections:
    """The background and the objects of an image: uint8 ``[H, W, 3]`` or a PIL image."""
    pixels = _pixels(image)
    background_rgb = _background_color(pixels)
    background = _nearest(background_rgb, BACKGROUNDS)
    masks = _object_masks(pixels, background_rgb, background)
    objects = [_identify(pixels, background_rgb, background, mask) for mask in masks]
    return Detections(background, tuple(objects), *pixels.shape[:2])


def _pixels(image) -> np.ndarray:
    """The image as float32 ``[H, W, 3]`` from 0 to 255."""
    array = to_rgb(image) if isinstance(image, Image.Image) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise RequestError(f"image must be uint8 [H, W, 3] or a PIL image, not {array.dtype} {list(array.shape)}.")
    return array.astype(np.float32)


def _background_color(pixels: np.ndarray) -> np.ndarray:
    """The background's colour ``[3]``: a median along the border, so that an object that touches it does no harm."""
    b = BORDER
    edges = pixels[:b], pixels[-b:], pixels[b:-b, :b], pixels[b:-b, -b:]
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """The name of the palette's colour that is closest to ``color`` ``[3]``."""
    return min(palette, key=lambda name: float(np.sum((color - palette[name]) ** 2)))


def _unmix(pixels: np.ndarray, background_rgb: np.ndarray, inks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain each of ``pixels`` ``[N, 3]`` as a mixture of ``background_rgb`` and one of ``inks`` ``[C, 3]``.

    Returns the index of the ink and its share, both ``[N]``. Distance to the line between the two colours decides, not
    distance to the ink: the edge of a yellow object on black is brown, nearer to other inks than to yellow.
    """
    difference = pixels - background_rgb
    direction = (inks - background_rgb).astype(np.float32)
    length2 = (direction**2).sum(1)
    along = difference @ direction.T  # [N, C]
    share = np.clip(along / length2, 0, 1)
    # squared distance from the line, without |difference|^2, which is the same for every ink
    distance2 = share * (share * length2 - 2 * along)
    ink = distance2.argmin(1)
    return ink, share[np.arange(len(ink)), ink]


def _object_masks(pixels: np.ndarray, background_rgb: np.ndarray, background: str) -> list[np.ndarray]:
    """A mask, bool ``[H, W]``, for each object, the largest first."""
    inks = np.array([COLORS[name] for name in visible_colors(background)])
    far = ((pixels - background_rgb) ** 2).sum(-1) > 30.0**2  # no other pixel can be half of any visible colour
    ink = np.full(far.shape, -1)
    nearest, share = _unmix(pixels[far], background_rgb, inks)
    ink[far] = np.where(share > 0.5, nearest, -1)
    # dilate by a pixel before connecting, so that a hairline crack does not divide a stroke into two objects
    regions, count = ndimage.label(ndimage.binary_dilation(ink >= 0), np.ones((3, 3)))
    regions[ink < 0] = 0
    area = np.bincount(regions.ravel(), minlength=count + 1)
    area[0] = 0
    largest = [regions == index for index in np.argsort(-area)[:MAX_OBJECTS] if area[index] >= MIN_PIXELS]
    masks = [mask for region in largest for mask in _split(region, ink, pixels, background_rgb, inks)]
    return sorted(masks, key=np.count_nonzero, reverse=True)[:MAX_OBJECTS]


def _split(region: np.ndarray, ink: np.ndarray, pixels: np.ndarray, background_rgb: np.ndarray, inks: np.ndarray):
    """A list of masks: the region, bool ``[H, W]``, divided where objects of different colours touch.

    Erosion removes the rim of wrong colours that blur and compression leave, but keeps a letter's thinnest stroke.
    """
    core = [np.count_nonzero(ndimage.binary_erosion(region & (ink == c))) for c in range(len(inks))]
    present = [c for c, n in enumerate(core) if n >= max(MIN_CORE, 0.1 * sum(core))]
    if len(present) < 2:
        return [region]
    nearest, _ = _unmix(pixels[region], background_rgb, inks[present])
    masks = []
    for c in range(len(present)):
        of_color = np.zeros_like(region)
        of_color[region] = nearest == c
        pieces, count = ndimage.label(ndimage.binary_opening(of_color), np.ones((3, 3)))
        masks += [pieces == i for i in range(1, count + 1) if np.count_nonzero(pieces == i) >= MIN_PIXELS]
    return masks


def _identify(pixels: np.ndarray, background_rgb: np.ndarray, background: str, mask: np.ndarray) -> Detection:
    """The colour, form, size and position of the object whose mask is bool ``[H, W]``."""
    inner = ndimage.binary_erosion(mask)
    ink = np.median(pixels[inner if np.count_nonzero(inner) >= MIN_PIXELS else mask], axis=0)
    color = _nearest(ink, {name: COLORS[name] for name in visible_colors(background)})
    direction = ink - background_rgb
    share = (pixels - background_rgb) @ direction / max(float(direction @ direction), 1.0)
    share = np.clip((share - 0.2) / 0.6, 0, 1)  # removes shading and stripes from the object's inside
    share[~ndimage.binary_dilation(mask, iterations=2)] = 0  # removes neighbouring objects
    form, x, y, radius, match = _match(share)
    return Detection(form, color, "small" if radius < SIZE_EDGE else "large", x, y, radius, match)


# ---------------------------------------------------------------- matching forms


def _match(share: np.ndarray) -> tuple[str, float, float, float, float]:
    """The best form for an object that covers ``share`` ``[H, W]``: form, x, y, radius in pixels, match in [0, 1].

    The match is the Dice coefficient 2 a.t / (a.a + t.t) of the object and the template, 1 where they agree; one
    matrix product gives it for all templates.
    """
    templates, norms, variants = _templates()
    rows, cols = np.flatnonzero((share > 0.5).any(1)), np.flatnonzero((share > 0.5).any(0))
    x, y = (cols[0] + cols[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    half = max(cols[-1] - cols[0], rows[-1] - rows[0]) / 2 + 0.5
    for _ in range(2):  # the second pass starts from the frame that the first one found
        grid = np.meshgrid(y + half * _TICKS - 0.5, x + half * _TICKS - 0.5, indexing="ij")
        sample = ndimage.map_coordinates(share, grid, order=1).ravel().astype(np.float32)
        scores = 2 * (templates @ sample) / (norms + sample @ sample)
        best = int(scores.argmax())
        form, scale, dx, dy = variants[best]
        x, y, half = x + half * dx, y + half * dy, half * scale
    cx, cy, extent = _bounding_box(form)
    radius = half / extent
    return form, float(x - cx * radius), float(y - cy * radius), float(radius), float(scores[best])


@cache
def _bounding_box(form: str) -> tuple[float, float, float]:
    """The bounding box of a form of radius 1: its centre (x, y) and half its longer side."""
    ticks = np.linspace(-1.3, 1.3, 521)
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    inside = signed_distance(form, x, y) < 0
    x0, x1 = ticks[inside.any(0)][[0, -1]]
    y0, y1 = ticks[inside.any(1)][[0, -1]]
    return (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) / 2


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[tuple[str, float, float, float]]]:
    """Every form at every scale and offset.

    Returns float32 ``[T, 32*32]``, the squared norms ``[T]``, and (form, scale, dx, dy) of each template.
    """
    variants = list(product(FORMS, _SCALES, _SHIFTS, _SHIFTS))
    y, x = np.meshgrid(_TICKS, _TICKS, indexing="ij")
    templates = []
    for form, scale, dx, dy in variants:
        cx, cy, extent = _bounding_box(form)
        distance = signed_distance(form, (x - dx) / scale * extent + cx, (y - dy) / scale * extent + cy)
        templates.append(np.clip(0.5 - distance / _EDGE_WIDTH, 0, 1).ravel())
    templates = np.array(templates, np.float32)
    return templates, (templates**2).sum(1), variants


# ---------------------------------------------------------------- judging a claim


def judge(image, claim: Claim) -> Verdict:
    """Check a claim against an image: uint8 ``[H, W, 3]``, a PIL image, or its :class:`Detections`."""
    detections = image if isinstance(image, Detections) else detect(image)
    matched = _assign(detections.objects, claim)
    found = [None if index is None else detections.objects[index] for index in matched]
    colors, forms, sizes = [], [], []
    for detected, (color, form, size) in zip(found, claim.objects, strict=True):
        colors.append(detected is not None and detected.color == color)
        forms.append(detected is not None and detected.form == form)
        sizes.append(None if size is None else detected is not None and detected.size == size)
    background = None if claim.background is None else detections.background == claim.background
    relations = tuple(_holds(found[i], name, found[j]) for i, name, j in claim.relations)
    return Verdict(claim, detections, matched, background, tuple(colors), tuple(forms), tuple(sizes), relations)


def _assign(objects: Sequence[Detection], claim: Claim) -> tuple[int | None, ...]:
    """The index of the detected object for each claimed one: the assignment with the most colours and forms right.

    Colour counts slightly more than form: if the prompt names a blue square and the image shows a blue circle, the
    circle is taken for a wrongly drawn square. Size only breaks ties. An object with neither the colour nor the form
    of the claim is a different object, and the claimed one is missing.
    """

    def agreement(index: int | None, color: str, form: str, size: str | None) -> float:
        if index is None:
            return 0.0
        detected = objects[index]
        hit = 1.1 * (detected.color == color) + (detected.form == form)
        return hit + 0.01 * (detected.size == size) if hit else -1.0

    candidates = [*range(len(objects)), *[None] * len(claim.objects)]
    scores = [{index: agreement(index, *claimed) for index in candidates} for claimed in claim.objects]
    assignments = permutations(candidates, len(claim.objects))
    return max(assignments, key=lambda chosen: sum(row[index] for row, index in zip(scores, chosen, strict=True)))


def _holds(a: Detection | None, relation: str, b: Detection | None) -> bool:
    """True if ``a`` lies on the named side of ``b``, at least as far along that axis as across it."""
    if a is None or b is None:
        return False
    dx, dy = RELATIONS[relation]
    along = (a.x - b.x) * dx + (a.y - b.y) * dy
    across = abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx)
    return along > 0 and along >= across


# ---------------------------------------------------------------- figures for many images


def summary(verdicts: Iterable[Verdict]) -> dict[str, dict[str, float | int | None]]:
    """For each kind of claim, the percentage that is right and the number of claims ``n``.

    ``everything`` corresponds to prompt following in the published comparison of FLUX.1, ``letter`` to typography.
    ``percent`` is None if there were no claims of that kind.
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


def diversity(detections: Sequence[Detections]) -> float:
    """How much images of one prompt differ: the spread of the objects' positions and sizes.

    Objects are matched between images by colour, which a prompt never repeats. For each colour detected at least
    twice: the root of the summed variance of x, y and radius, in units of the image's width, height and the root of
    its area. The result is the mean over colours: 0 for identical images, about 0.3 for independent scenes.
    """
    positions: dict[str, list[tuple[float, float, float]]] = {}
    for d in detections:
        largest = {o.color: o for o in sorted(d.objects, key=lambda o: o.radius)}
        for o in largest.values():
            position = (o.x / d.width, o.y / d.height, o.radius / (d.width * d.height) ** 0.5)
            positions.setdefault(o.color, []).append(position)
    spreads = [np.sqrt(np.var(p, axis=0).sum()) for p in positions.values() if len(p) > 1]
    return float(np.mean(spreads)) if spreads else 0.0


def quality(image, detections: Detections) -> float:
    """How cleanly an image is drawn, whatever the prompt was: the mean of three scores in [0, 1].

    *Forms*: the mean template match of the objects. *Edges*: how steep their outlines are, 1 for a clean drawing and
    0.5 for a blur of about 1.4 pixels. *Background*: 1 if its root mean square deviation is at most 4 grey levels (the
    scenes' own texture has 2 to 3), 0 at 40. Without objects, only the background scores.
    """
    pixels = _pixels(image)
    background_rgb = _background_color(pixels)
    y, x = np.mgrid[: detections.height, : detections.width] + 0.5
    bare = np.ones(pixels.shape[:2], bool)
    forms, edges = [], []
    for o in detections.objects:
        near = np.hypot(x - o.x, y - o.y) <= 1.25 * o.radius + 2
        bare &= ~near
        forms.append(o.match)
        edges.append(_steepness(pixels, background_rgb, o, near))
    deviation = float(np.sqrt(((pixels[bare] - background_rgb) ** 2).mean())) if bare.any() else 40.0
    object_score = (sum(forms) + sum(edges)) / max(len(detections.objects), 1)
    return (object_score + float(np.clip((40 - deviation) / 36, 0, 1))) / 3


def _steepness(pixels: np.ndarray, background_rgb: np.ndarray, detected: Detection, near: np.ndarray) -> float:
    """The slope of an object's outline in [0, 1], measured over the pixels ``near``, bool ``[H, W]``."""
    direction = np.subtract(COLORS[detected.color], background_rgb)
    down, right = np.gradient(np.clip((pixels - background_rgb) @ direction / (direction @ direction), 0, 1))
    slope = np.hypot(down, right)[near]
    # high powers, so that the many faint slopes of shading and stripes do not count
    return float(np.clip((slope**3).sum() / max((slope**2).sum(), 1e-6) / CLEAN_SLOPE, 0, 1))
