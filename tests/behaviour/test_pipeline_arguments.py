"""Arguments of the pipeline: start, schedule, several images, stopping early, and names known from diffusers."""

import math

import pytest
import torch

import fluxedu as fe
from fluxedu.errors import RequestError
from fluxedu.sampling.latents import draw_noise
from fluxedu.sampling.prompts import Conditioning
from fluxedu.sampling.request import DIFFUSERS_NAMES
from fluxedu.sampling.solvers import schedule, shift_times

PROMPT = "a red circle left of a blue square"
SMALL = {"height": 32, "width": 48, "progress": False}


def draw(pipe, prompt=PROMPT, **options):
    return pipe(prompt, **(SMALL | {"steps": 3} | options))


def test_the_latents_of_a_seed_give_the_image_of_the_seed(pipe):
    expected = draw(pipe, seed=7)
    noise = draw_noise(7, 16, 4, 6)
    assert torch.equal(draw(pipe, latents=noise).latents, expected.latents)
    without_size = pipe(PROMPT, steps=3, progress=False, latents=noise)
    assert torch.equal(without_size.latents, expected.latents) and without_size.images[0].size == (48, 32)
    two = draw(pipe, [PROMPT] * 2, latents=torch.cat([noise, draw_noise(8, 16, 4, 6)]))
    assert torch.equal(two.latents, draw(pipe, seed=[7, 8]).latents)
    assert torch.equal(draw(pipe, seed=[1, 2], latents=noise, batch=1).latents[0], expected.latents[0])  # one start


@pytest.mark.parametrize(
    "latents",
    [3, torch.zeros(16, 4, 6), torch.zeros(1, 8, 4, 6), torch.zeros(3, 16, 4, 6), torch.zeros(1, 16, 3, 6),
     torch.zeros(1, 16, 4, 6, dtype=torch.long)],
)  # fmt: skip
def test_wrong_latents_are_refused(pipe, latents):
    with pytest.raises(RequestError, match=r"latents must (be a tensor of|have the) shape \(1 or 1, 16, rows"):
        draw(pipe, latents=latents)


def test_encoded_prompts_take_the_place_of_the_prompt(pipe):
    with torch.no_grad():
        encoded = pipe.prompt_encoder([PROMPT, "a green star"])
    expected = draw(pipe, [PROMPT, "a green star"], seed=[0, 1], batch=1)
    assert torch.equal(draw(pipe, encoded, seed=[0, 1], batch=1).latents, expected.latents)
    four = draw(pipe, encoded, num_images=2, batch=1).latents
    assert torch.equal(four, draw(pipe, [PROMPT, "a green star"], num_images=2, batch=1).latents)
    mixed = Conditioning(encoded.txt[:1], encoded.pooled[1:])  # T5 reads one prompt, CLIP another
    assert not torch.equal(draw(pipe, mixed).latents, draw(pipe).latents)
    with pytest.raises(RequestError, match=r"an encoded prompt must have txt \[1, 32, \d+\] and pooled"):
        draw(pipe, Conditioning(encoded.txt[:1, :5], encoded.pooled[:1]))


def test_several_images_of_each_prompt(pipe):
    found = draw(pipe, [PROMPT, "a green star"], num_images=2, seed=5)
    prompts = [PROMPT, PROMPT, "a green star", "a green star"]
    assert torch.equal(found.latents, draw(pipe, prompts, seed=[5, 6, 5, 6]).latents) and len(found.images) == 4
    with pytest.raises(RequestError, match="seed must be one number with num_images="):
        draw(pipe, num_images=2, seed=[1, 2])
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises(RequestError, match="num_images must be"):
            draw(pipe, num_images=wrong)


def test_wrong_batches_are_refused(pipe):
    for wrong in (0, -1, 1.5, "2", True, 5000):
        with pytest.raises(RequestError, match="batch must be a whole number from 1 to 4096"):
            draw(pipe, batch=wrong)


def test_a_schedule_of_ones_own(pipe):
    expected = draw(pipe)
    assert torch.equal(draw(pipe, steps=None, times=expected.trajectory.times).latents, expected.latents)
    own = pipe(PROMPT, times=(1.0, 0.7, 0.1, 0.0), **SMALL)
    assert torch.equal(own.trajectory.times, torch.tensor([1.0, 0.7, 0.1, 0.0]))
    half = pipe(PROMPT, times=own.trajectory.times[2:], latents=own.trajectory.latents[2], **SMALL)  # the rest of a run
    assert torch.allclose(half.latents, own.latents, atol=1e-5)
    for wrong in ((1,), (0, 1), (1, 1, 0), (1.2, 0), (1, -0.1), "abc", 3, (1, math.nan, 0)):
        with pytest.raises(RequestError, match="times must fall from at most 1 to at least 0"):
            pipe(PROMPT, times=wrong, **SMALL)
    for also in ({"steps": 3}, {"shift": 2.0}):
        with pytest.raises(RequestError, match="times= sets the whole schedule; leave steps= and shift= out"):
            pipe(PROMPT, times=(1, 0), **SMALL, **also)


def test_shift_is_that_of_diffusers(pipe):
    """``shift * t / (1 + (shift - 1) * t)``, as in FlowMatchEulerDiscreteScheduler; 1 leaves the times alone."""
    t = torch.linspace(1, 0, 6, dtype=torch.float64)
    times = draw(pipe, steps=5, shift=3.0).trajectory.times
    assert torch.allclose(times.double(), 3 * t / (1 + 2 * t), atol=1e-6)
    assert torch.equal(draw(pipe, steps=5, shift=1.0).trajectory.times, shift_times(schedule(5, 6, False), 0.0))
    with pytest.raises(RequestError, match="shift must be"):
        draw(pipe, shift=0)


def test_without_decoding_there_are_latents_only(pipe):
    with fe.record("sample.*") as rec:
        out = draw(pipe, decode=False)
    assert out.images == [] and torch.equal(out.latents, draw(pipe).latents) and "sample.image" not in rec


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("stop", "steps"), [(0, 1), (1, 2), (-1, 3)])
def test_a_run_stops_after_a_step(pipe, stop, steps, solver):
    whole = draw(pipe, solver=solver)
    with fe.record("sample.velocity") as rec:
        part = draw(pipe, stop_after=stop, solver=solver)
    assert torch.equal(part.latents, whole.trajectory.latents[steps]) and part.images == []
    assert len(part.trajectory.velocities) == steps
    assert {key.step for key, _ in rec.entries("sample.velocity")} == set(range(steps))


def test_a_run_stops_after_a_site(pipe):
    with fe.record("double.*.img_out", "single.*", "sample.image") as rec:
        out = draw(pipe, stop_after="double.0.img_out")
    assert rec.keys() == ["double.0.img_out"] and len(rec.entries("double.0.img_out")) == 1
    assert out.images == [] and out.trajectory is None
    assert draw(pipe).images and fe.probe.watch(None) is None  # nothing is left behind


@pytest.mark.parametrize("stop", ["double.99.img_out", "nothing", 3, -4, 1.5, True])
def test_where_a_run_cannot_stop_is_said(pipe, stop):
    with pytest.raises(RequestError, match="stop_after"):
        draw(pipe, stop_after=stop)
    assert fe.probe.watch(None) is None


def test_arguments_known_from_diffusers_are_named(pipe):
    import inspect

    from diffusers import FluxImg2ImgPipeline, FluxPipeline

    ours = set(inspect.signature(pipe.__call__).parameters)
    for pipeline in (FluxPipeline, FluxImg2ImgPipeline):
        for name in set(inspect.signature(pipeline.__call__).parameters) - ours - {"self"}:
            if name not in DIFFUSERS_NAMES:
                assert "ip_adapter" in name or "callback" in name or "negative" in name, name
    for name, meant in DIFFUSERS_NAMES.items():
        with pytest.raises(RequestError) as error:
            pipe(PROMPT, **{name: 1})
        assert str(error.value) == f"the pipeline has no argument {name}; here it is {meant}."
    with pytest.raises(RequestError, match="no argument colour; help"):
        pipe(PROMPT, colour=1)


def test_a_compiled_transformer_is_refused_in_one_sentence(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "flux", torch.compile(pipe.flux))
    with pytest.raises(RequestError, match="load the pipeline with compile=True"):
        draw(pipe)
