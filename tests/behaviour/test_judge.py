"""The judge is the ruler for every figure in the model card, so it is held to the scenes' own truth."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fluxedu.nano.judge import detect, diversity, judge, quality, summary
from fluxedu.nano.scenes import (
    ASPECTS,
    BACKGROUNDS,
    COLORS,
    FORMS,
    Claim,
    Scene,
    SceneObject,
    caption,
    render,
    sample_scene,
)


def softened(picture, rng):
    """Blurred and grainy, as a small autoencoder leaves it."""
    blurred = ndimage.gaussian_filter(picture.astype(float), (0.7, 0.7, 0))
    return np.clip(np.round(blurred + rng.normal(0, 4, picture.shape)), 0, 255).astype(np.uint8)


def as_jpeg(picture, rng):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=75)
    return Image.open(file)


@pytest.fixture(scope="module")
def world():
    """600 scenes, every aspect ratio, half of them held out: (scene, claim, picture)."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(600):
        scene = sample_scene(rng, size=ASPECTS[i % len(ASPECTS)], held_out=i % 2 == 1)
        made.append((scene, caption(scene, rng)[1], render(scene)))
    return made


@pytest.mark.parametrize(
    ("spoil", "floor"), [(lambda p, rng: p, 99.5), (softened, 97.0), (as_jpeg, 97.0)], ids=["clean", "soft", "jpeg"]
)
def test_true_claims_hold(world, spoil, floor):
    rng = np.random.default_rng(1)
    table = summary(judge(spoil(picture, rng), claim) for _, claim, picture in world)
    assert all(row["percent"] >= floor and row["n"] > 100 for row in table.values()), table


def test_places_and_sizes_are_measured(world):
    for scene, _, picture in world[:100]:
        seen = {t.color: t for t in detect(picture).objects}
        for thing in scene.objects:
            found = seen[thing.color]
            assert abs(found.x - thing.x) < 1.5 and abs(found.y - thing.y) < 1.5
            assert abs(found.radius - thing.radius) < 2


def another(name, names, taken=()):
    """The next name in ``names`` that is neither ``name`` nor taken."""
    names = list(names)
    start = names.index(name)
    return next(n for n in names[start + 1 :] + names[:start] if n not in taken)


def lies(claim):
    """Claims that differ from a true one in a single word or thing: (what the lie is about, claim)."""
    (color, form, size), *rest = claim.objects
    colors, forms = [t[0] for t in claim.objects], [t[1] for t in claim.objects]
    yield "colors", replace(claim, objects=((another(color, COLORS, colors), form, size), *rest))
    yield "forms", replace(claim, objects=((color, another(form, FORMS, forms), size), *rest))
    if size:
        yield "sizes", replace(claim, objects=((color, form, another(size, ["small", "large"])), *rest))
    if claim.background:
        yield "background", replace(claim, background=another(claim.background, BACKGROUNDS))
    for k, (i, name, j) in enumerate(claim.relations):
        for wrong in {"left of", "right of", "above", "below"} - {name}:
            changed = (*claim.relations[:k], (i, wrong, j), *claim.relations[k + 1 :])
            yield "relations", replace(claim, relations=changed)
    if len(rest) == 1:  # the two things swap their colours: every word is in the picture, bound wrongly
        (other, other_form, other_size) = rest[0]
        yield "forms", replace(claim, objects=((other, form, size), (color, other_form, other_size)))
    new = another(color, COLORS, colors), another(form, FORMS, forms), None
    yield "missing", replace(claim, objects=(*claim.objects, new))
    if rest and not claim.relations:
        yield "extra", replace(claim, objects=claim.objects[:-1])


def test_false_claims_are_rejected(world):
    counts = {}
    for scene, claim, picture in world[:400]:
        reading = detect(picture)
        for about, lie in lies(claim):
            verdict = judge(reading, lie)
            counts[about] = counts.get(about, 0) + 1
            assert not verdict.everything, (scene, lie)
            wrong = getattr(verdict, about)
            # the error is found in the part that is false, not merely somewhere
            assert wrong if about in ("missing", "extra") else wrong is False or False in wrong, (about, scene, lie)
    assert set(counts) == {"colors", "forms", "sizes", "background", "relations", "missing", "extra"}


def two(second="blue"):
    things = (SceneObject("circle", "red", "large", 35, 64, 24), SceneObject("square", second, "large", 77, 64, 24))
    return Scene("white", things, 128, 128)


def test_touching_things_are_told_apart_by_colour():
    # the circle ends at 57.8 and the square begins at 57.3
    reading = detect(render(two()))
    assert [(t.color, t.form) for t in sorted(reading.objects, key=lambda t: t.x)] == [
        ("red", "circle"),
        ("blue", "square"),
    ]


def test_a_missing_thing_fails_its_colour_form_and_relation():
    claim = Claim((("red", "circle", None), ("green", "star", None)), ((0, "left of", 1),), "white")
    verdict = judge(render(replace(two(), objects=two().objects[:1])), claim)
    assert verdict.colors == (True, False) and verdict.forms == (True, False)
    assert verdict.relations == (False,) and verdict.background is True
    assert (verdict.missing, verdict.extra, verdict.everything) == (1, 0, False)


def test_what_was_not_claimed_is_not_judged():
    verdict = judge(render(two()), Claim((("red", "circle", None), ("blue", "square", None)), (), None))
    assert verdict.everything and verdict.background is None and verdict.sizes == (None, None)
    table = summary([verdict])
    assert table["background"] == {"percent": None, "n": 0}
    assert table["shapes"] == {"percent": 100.0, "n": 2}


def test_specks_are_dirt_and_blank_or_noisy_pictures_are_read_without_error():
    picture = render(two())
    picture[4:8, 100:105] = (30, 155, 60)
    assert len(detect(picture).objects) == 2
    blank = np.full((96, 192, 3), 18, np.uint8)
    assert detect(blank).background == "black" and not detect(blank).objects
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert not judge(noise, Claim((("red", "circle", None),), (), None)).everything


def test_a_picture_of_the_wrong_kind_is_refused():
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\].*float64 \[8, 8, 3\]"):
        detect(np.zeros((8, 8, 3)))


def test_diversity_is_zero_for_copies_and_grows_with_spread(world):
    same = [detect(render(two()))] * 4
    rng = np.random.default_rng(0)
    spread = [detect(picture) for _, _, picture in world[:100]]
    near = [
        detect(render(replace(two(), objects=(replace(two().objects[0], x=40 + rng.uniform(-6, 6)),))))
        for _ in range(8)
    ]
    assert diversity(same) == 0.0 == diversity([])
    assert 0 < diversity(near) < 0.1
    assert 0.2 < diversity(spread) < 0.5


def test_quality_falls_with_lost_form_and_dirt():
    clean = render(Scene("white", (SceneObject("star", "red", "large", 64, 64, 24),), 128, 128))
    melted = np.round(ndimage.gaussian_filter(clean.astype(float), (5, 5, 0))).astype(np.uint8)
    dirty = clean.copy()
    dirty[100:, ::4] = 60
    scores = [quality(p, detect(p)) for p in (clean, melted, dirty)]
    assert scores[0] > 0.97 and scores[1] < scores[0] - 0.1 and scores[2] < scores[0] - 0.1
    assert all(0 <= s <= 1 for s in scores)
