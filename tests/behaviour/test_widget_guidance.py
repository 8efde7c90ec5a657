"""The explorer of guidance agrees with the judge on the pipeline's images."""

import numpy as np
import pytest

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.nano.judge import detect, diversity, judge
from fluxedu.nano.scenes import Claim, render, sample_scene
from fluxedu.widgets.guidance import guidance, sweep
from fluxedu.widgets.panels import to_rgb

PROMPT = "a red circle left of a blue square on a white background"
CLAIM = Claim((("red", "circle", None), ("blue", "square", "large")), ((0, "left of", 1),), "white")


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.fixture(scope="module")
def run(pipe):
    return sweep(pipe, PROMPT, CLAIM, scales=[1.0, 6.0], seeds=[3, 1, 2], steps=6, batch=1)


def test_every_cell_is_an_image_and_its_verdict(pipe, run):
    out = pipe(PROMPT, seed=1, steps=6, guidance=6.0, progress=False)
    assert np.array_equal(run.images[1][1], to_rgb(out.images[0]))
    assert run.verdicts[1][1] == judge(out.images[0], CLAIM)
    results = [ok for verdict in run.verdicts[1] for ok in verdict.results]
    assert run.correct[1] == pytest.approx(np.mean(results))
    view = guidance({"built in": run}).set(cell=(1, 1)).current_view()
    correct = sum(run.verdicts[1][1].results)  # of background, 2 colours, 2 forms, size and relation
    assert f"{correct} of 7 claims hold" in view.text
    assert np.array_equal(view.panels[1].image, run.images[1][1])
    assert view.panels[2].mark == 6.0


def test_curves_match_the_judge_and_the_latents(pipe, run):
    out = pipe(PROMPT, seed=[3, 1, 2], steps=6, guidance=1.0, progress=False)
    assert run.diversity[0] == pytest.approx(diversity([detect(image) for image in out.images]))
    assert run.latent_rms[0] == pytest.approx(float(out.latents.pow(2).mean() ** 0.5), rel=1e-5)


def test_only_what_was_claimed_is_checked():
    scene = sample_scene(np.random.default_rng(1))
    unclaimed = Claim(tuple((t.color, t.form, None) for t in scene.objects), (), None)
    results = judge(render(scene), unclaimed).results
    assert len(results) == 2 * len(scene.objects) and all(results)


def test_invalid_arguments_are_refused(pipe, run):
    with pytest.raises(InstrumentError):
        sweep(pipe, PROMPT, CLAIM, scales=[])
    with pytest.raises(InstrumentError):
        guidance({})
    other = sweep(pipe, PROMPT, CLAIM, scales=[2.0], seeds=[0], steps=1)
    with pytest.raises(InstrumentError, match="equally many"):
        guidance({"a": run, "b": other})
