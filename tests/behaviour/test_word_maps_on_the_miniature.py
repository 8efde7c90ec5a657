"""Word maps localise the object that the word names, on held-out images in which the judge has found every object."""

import os

import numpy as np
import pytest

import fluxedu as fe
from fluxedu.instruments import lenses
from fluxedu.nano.exam import questions
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import LETTERS, Scene, SceneObject, object_map

SCENES = 100 if "FLUXEDU_FIGURES" in os.environ else 30  # `make bench` notes the figures
LATE_STEPS = slice(8, None)  # of 20: by then, the objects are where they will be


def covered_share(found, detected):
    """The share of every patch that an object covers, ``[rows, columns]``."""
    scene_object = SceneObject(found.form, found.color, found.size, found.x, found.y, found.radius)
    covered = object_map(Scene("white", (scene_object,), detected.height, detected.width, 0)) >= 0
    return covered.reshape(detected.height // 16, 16, detected.width // 16, 16).mean((1, 3))


def intersection_over_union(weights, share):
    """Of the patches with at least half the map's peak, and those that the object covers."""
    bright, covered = weights >= weights.max() / 2, share > 0.15
    return (bright & covered).sum() / (bright | covered).sum()


@pytest.mark.slow
def test_added_concepts_have_their_places():
    """The difference of the maps of an object and of "background", which few prompts name, is larger inside of the
    object: in single.1, for 95 % of the pairs of a patch inside and a patch outside (the area under the ROC curve)."""
    pipe, areas = fe.load(), []
    for q in questions(12):
        options = {"seed": q.seed, "height": q.size[0], "width": q.size[1], "progress": False}
        words = [f"{color} {'letter ' if form in LETTERS else ''}{form}" for color, form, _ in q.claim.objects]
        words.append("background")
        maps = lenses.concept_maps(pipe, q.prompt, words, added=True, at_steps=LATE_STEPS, **options)
        of_block, detected = maps.at(block=maps.coords["block"].index("single.1")).tensor, detect(maps.images[0])
        for i, (color, form, _) in enumerate(q.claim.objects):
            found = [o for o in detected.objects if (o.color, o.form) == (color, form)]
            if len(found) == 1:
                inside = covered_share(found[0], detected) > 0.15
                difference = of_block[i] - of_block[-1]
                areas.append(float((difference[inside][:, None] > difference[~inside]).float().mean()))
    assert len(areas) >= 12
    assert np.mean(areas) >= 0.95, areas


@pytest.mark.slow
def test_words_point_at_their_objects(noted):
    """In the best block, at least 85 % of the words have their brightest patch on the object, and the mean IoU is
    at least 0.5."""
    pipe, scores = fe.load(), {}
    for q in questions(SCENES):
        options = {"seed": q.seed, "height": q.size[0], "width": q.size[1], "progress": False}
        words = [f"{color} {'letter ' if form in LETTERS else ''}{form}" for color, form, _ in q.claim.objects]
        maps = lenses.word_maps(pipe, q.prompt, words, at_steps=LATE_STEPS, **options)
        detected = detect(maps.images[0])
        for i, (color, form, _) in enumerate(q.claim.objects):
            found = [o for o in detected.objects if (o.color, o.form) == (color, form)]
            if len(found) != 1:
                continue  # not drawn, so there is nothing to point at
            share = covered_share(found[0], detected)
            for block, weights in zip(maps.coords["block"], maps.tensor[:, i].numpy(), strict=True):
                hit = share.flat[weights.argmax()] > 0.1
                scores.setdefault(block, []).append((hit, intersection_over_union(weights, share)))
    means = {block: np.mean(pairs, axis=0) for block, pairs in scores.items()}
    best = max(means, key=lambda block: means[block].sum())
    pointing, iou = means[best]
    by_block = {block: {"pointing": 100 * float(hit), "iou": float(mean)} for block, (hit, mean) in means.items()}
    noted("word maps", {"scenes": SCENES, "words": len(scores[best]), "best": best, "by_block": by_block})
    print(f"\n{len(scores[best])} words: {best} points at {100 * pointing:.1f} %, mean IoU {iou:.2f}")
    assert len(scores[best]) > SCENES
    assert pointing >= 0.85
    assert iou >= 0.5
