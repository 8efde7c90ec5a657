"""The explorer of guidance strength: what it says is what the judge says of the pipeline's pictures."""

import numpy as np
import pytest

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.nano.judge import diversity, judge, read
from fluxedu.nano.scenes import Claim, render, sample_scene
from fluxedu.widgets.paint import picture
from fluxedu.widgets.strength import claims, strength, sweep

PROMPT = "a red circle left of a blue square on a white background"
CLAIM = Claim((("red", "circle", None), ("blue", "square", "large")), ((0, "left of", 1),), "white")


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.fixture(scope="module")
def run(pipe):
    return sweep(pipe, PROMPT, CLAIM, strengths=[1.0, 6.0], seeds=[3, 1, 2], steps=6)


def test_every_cell_is_a_picture_and_its_verdict(pipe, run):
    out = pipe(PROMPT, seed=1, steps=6, guidance=6.0, progress=False)
    assert np.array_equal(run.pictures[1][1], picture(out.images[0]))
    assert run.verdicts[1][1] == judge(out.images[0], CLAIM)
    held = [ok for verdict in run.verdicts[1] for ok in claims(verdict)]
    assert run.right[1] == pytest.approx(np.mean(held))
    view = strength({"built in": run}).set(cell=(1, 1)).now()
    assert f"{sum(claims(run.verdicts[1][1]))} of 7 claims hold" in view.text  # ground, 2 colours, 2 forms, size, side
    assert np.array_equal(view.panels[1].image, run.pictures[1][1])
    assert view.panels[2].mark == 6.0


def test_the_curves_are_the_judges_and_the_latents(pipe, run):
    out = pipe(PROMPT, seed=[3, 1, 2], steps=6, guidance=1.0, progress=False)
    assert run.differ[0] == pytest.approx(diversity([read(image) for image in out.images]))
    assert run.size[0] == pytest.approx(float(out.latents.pow(2).mean() ** 0.5), rel=1e-5)


def test_claims_leave_out_what_was_not_said():
    scene = sample_scene(np.random.default_rng(1))
    unsaid = Claim(tuple((t.color, t.form, None) for t in scene.things), (), None)
    held = claims(judge(render(scene), unsaid))
    assert len(held) == 2 * len(scene.things) and all(held)


def test_what_cannot_be_drawn_is_refused(pipe, run):
    with pytest.raises(InstrumentError):
        sweep(pipe, PROMPT, CLAIM, strengths=[])
    with pytest.raises(InstrumentError):
        strength({})
    other = sweep(pipe, PROMPT, CLAIM, strengths=[2.0], seeds=[0], steps=1)
    with pytest.raises(InstrumentError, match="equally many"):
        strength({"a": run, "b": other})
