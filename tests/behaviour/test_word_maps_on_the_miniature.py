"""Word maps find the thing that the word names: on held-out pictures, of which the judge knows where each thing is."""

import numpy as np
import pytest

import fluxedu as fe
from fluxedu.instruments import lenses
from fluxedu.nano.exam import questions
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import LETTERS, Scene, SceneObject, object_map

SCENES = 100
LATE = slice(8, None)  # of 20 steps: things are where they will be


def patches_of(found, reading):
    """The share of every patch that a thing covers, ``[rows, columns]``."""
    thing = SceneObject(found.form, found.color, found.size, found.x, found.y, found.radius)
    covered = object_map(Scene("white", (thing,), reading.height, reading.width, 0)) >= 0
    return covered.reshape(reading.height // 16, 16, reading.width // 16, 16).mean((1, 3))


def overlap(weights, share):
    """Intersection over union of the patches of half the map's peak and more, and those the thing covers."""
    bright, covered = weights >= weights.max() / 2, share > 0.15
    return (bright & covered).sum() / (bright | covered).sum()


@pytest.mark.slow
def test_words_point_at_their_things(noted):
    """Of the best block: at least 85 % of the words have their brightest patch on the thing; IoU is above a half."""
    pipe, scores = fe.load(), {}
    for q in questions(SCENES):
        asked = {"seed": q.seed, "height": q.size[0], "width": q.size[1], "progress": False}
        words = [f"{color} {'letter ' if form in LETTERS else ''}{form}" for color, form, _ in q.claim.objects]
        maps = lenses.word_maps(pipe, q.prompt, words, at_steps=LATE, **asked)
        reading = detect(pipe(q.prompt, **asked).images[0])
        for i, (color, form, _) in enumerate(q.claim.objects):
            found = [t for t in reading.objects if (t.color, t.form) == (color, form)]
            if len(found) != 1:
                continue  # not drawn, so there is nothing to point at
            share = patches_of(found[0], reading)
            for block, weights in zip(maps.coords["block"], maps.tensor[:, i].numpy(), strict=True):
                hit = share.flat[weights.argmax()] > 0.1
                scores.setdefault(block, []).append((hit, overlap(weights, share)))
    mean = {block: np.mean(rows, axis=0) for block, rows in scores.items()}
    best = max(mean, key=lambda block: mean[block].sum())
    pointing, iou = mean[best]
    each = {block: {"pointing": 100 * float(hit), "iou": float(over)} for block, (hit, over) in mean.items()}
    noted("word maps", {"scenes": SCENES, "words": len(scores[best]), "best": best, "by_block": each})
    print(f"\n{len(scores[best])} words: {best} points at {100 * pointing:.1f} %, mean IoU {iou:.2f}")
    assert len(scores[best]) > SCENES
    assert pointing >= 0.85
    assert iou >= 0.5
