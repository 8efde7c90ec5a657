"""The explorer of experiments on one block: it shows the results of the same experiments done by hand."""

import numpy as np
import pytest
import torch

import fluxedu as fe
from fluxedu.instruments.interventions import positions
from fluxedu.nano.judge import Detection, Detections
from fluxedu.widgets.bench import CHANGES, bench, bench_view, describe_objects

PROMPT, OTHER = "a red circle left of a blue square", "a green circle left of a blue square"
OPTIONS = {"seed": 4, "steps": 2, "batch": 1, "progress": False}  # equal to the last bit only one by one


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.fixture(scope="module")
def explorer(pipe):
    return bench(pipe, PROMPT, OTHER, **OPTIONS)


def after(explorer, block, change):
    return explorer.set(block=block, change=change).current_view().panels[1].image


def pixels(out):
    return np.asarray(out.images[0], int)


def test_removals_and_positions_match_the_instruments(pipe, explorer):
    by_hand = {
        "remove the block": lambda b: fe.ablate(b),
        "remove its attention heads": lambda b: fe.ablate(f"{b}.heads"),
        "give all patches the same position": lambda b: fe.intervene(f"{b}.attn.rope", positions(torch.zeros_like)),
    }
    for block in ("double.1", "single.3"):
        for change, instrument in by_hand.items():
            with instrument(block):
                expected = pixels(pipe(PROMPT, **OPTIONS))
            # with a table of positions for each image, a product may round the other way: a level of 255
            limit = 1 if "position" in change else 0
            assert np.abs(after(explorer, block, change).astype(int) - expected).max() <= limit, (block, change)


def test_text_and_image_tokens_together_give_the_other_run_and_alone_do_not(pipe, explorer):
    """All tokens of the other run before a block: the rest of the network has nothing left of the prompt's."""
    with fe.record("single.2.x") as rec:
        pipe(OTHER, **OPTIONS)
    with fe.patch("single.2.x", rec):
        both = pipe(PROMPT, **OPTIONS)
    theirs = pipe(OTHER, **OPTIONS)
    far = float((both.latents - theirs.latents).norm() / theirs.latents.norm())
    assert far < 0.1  # the pooled vector is still the prompt's own
    for change in CHANGES[3:]:
        assert not np.array_equal(after(explorer, "single.2", change), pixels(both))
    assert not np.array_equal(after(explorer, "double.0", 3), pixels(pipe(PROMPT, **OPTIONS)))


def test_replaced_image_tokens_give_the_other_image(pipe, explorer):
    image = after(explorer, "single.5", "use the other prompt's image tokens").astype(float)
    own, theirs = (pixels(pipe(p, **OPTIONS)).astype(float) for p in (PROMPT, OTHER))
    assert np.abs(image - theirs).mean() < np.abs(image - own).mean()


def test_the_text_counts_blocks_and_names_the_change():
    blank = np.zeros((4, 4, 3), np.uint8)
    far = np.array([[0.1, 0.5, 0.2]] * len(CHANGES))
    view = bench_view((blank,) * 3, far, "a thing", ("a", "b", "c"), ("one", "two"), 2, 4)
    assert "c, use the other prompt's image tokens: the latent changes by 20%" in view.text
    assert "1 of the 2 other blocks change it more" in view.text
    assert "a thing" in view.text
    assert view.panels[2].title == "The other prompt: two"
    assert "no other block changes it more" in bench_view((blank,) * 3, far, "", ("a", "b", "c"), ("", ""), 1, 0).text


def test_detected_objects_in_words():
    thing = Detection("circle", "red", "large", 1.0, 2.0, 3.0, 1.0)
    assert describe_objects(Detections("white", (thing, thing), 8, 8)) == "red circle, red circle"
    assert describe_objects(Detections("white", (), 8, 8)) == "nothing"
