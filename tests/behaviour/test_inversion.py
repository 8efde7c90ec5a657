"""fe.invert: the noise that leads to a picture."""

import warnings

import numpy as np
import pytest
import torch
from runs import relative

import fluxedu as fe
from fluxedu.errors import RequestError
from fluxedu.nano.scenes import Scene, SceneObject, render
from fluxedu.sampling.images import to_tensor
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack
from fluxedu.sampling.solvers import schedule

OBJECTS = SceneObject("circle", "red", "large", 40, 45, 24), SceneObject("square", "blue", "large", 90, 85, 23)
PHOTO = render(Scene("white", OBJECTS, 128, 128, 3))  # uint8 [128, 128, 3]
PROMPT = "a red circle left of a blue square on a white background"


@pytest.fixture(scope="module")
def nano():
    return fe.load()


@pytest.mark.parametrize(
    ("steps", "guidance", "bound"),
    [(8, 1.0, 0.04), (20, 1.0, 0.02), (50, 1.0, 0.007), (20, None, 0.045), (50, None, 0.014)],
)
def test_the_round_trip(steps, guidance, bound, nano):
    """The numbers of the docstring, and a third more, since processors round differently."""
    settings = {"steps": steps, "guidance": guidance, "progress": False}
    noise = fe.invert(nano, PHOTO, PROMPT, **settings)
    out = nano(PROMPT, latents=noise, **settings)
    with torch.no_grad():
        latent = nano.autoencoder.encode(to_tensor(PHOTO))
    assert relative(out.latents, latent) <= bound
    error = np.asarray(out.images[0], float) - PHOTO
    assert 10 * np.log10(255**2 / np.mean(error**2)) >= 32  # dB; the autoencoder alone: 32.9


def test_against_a_loop_by_hand(make_pipe):
    """The fixed-point iteration written out with the network alone; two pictures at once, and with guidance."""
    pipe = make_pipe(embedded=False).to(torch.float64)
    pictures = torch.rand(2, 3, 48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prompts, scale, rounds, steps = ["a red circle", "a blue star"], 2.0, 4, 5
    noise, run = fe.invert(
        pipe, pictures, prompts, rounds=rounds, steps=steps, true_cfg_scale=scale, trajectory=True, progress=False
    )
    texts, empty = pipe.prompt_encoder(prompts), pipe.prompt_encoder([""] * 2)
    times = schedule(steps, 6, pipe.defaults.shift, pipe.defaults.shift_ends).double()

    def velocity(x, t):
        v = [
            pipe.flux(pack(x), image_ids(6, 4), text.txt, text_ids(32), t.expand(2), text.pooled)
            for text in (empty, texts)
        ]
        return unpack(v[0] + scale * (v[1] - v[0]), 6, 4)

    with torch.no_grad():
        x = pipe.autoencoder.encode(pictures)
        assert relative(run.latents[-1], x) <= 1e-12
        for i in reversed(range(steps)):
            after = x
            for _ in range(rounds):
                x = after + (times[i] - times[i + 1]) * velocity(x, times[i].float())
            assert relative(run.latents[i], x) <= 1e-10
    assert torch.equal(noise, run.latents[0]) and len(run.velocities) == steps


def test_it_converges_to_the_noise_of_a_run(make_pipe):
    """A picture that the pipeline has drawn: many rounds find the very noise."""
    pipe = make_pipe().to(torch.float64)
    options = {"steps": 20, "height": 48, "width": 32, "progress": False}
    run = pipe("a red circle", seed=5, **options).trajectory
    backwards = fe.sampling.inversion._Backwards(pipe, rounds=60)
    found = backwards("a red circle", latents=run.latents[-1], decode=False, steps=20, progress=False)
    assert relative(found.latents, run.latents[0]) <= 1e-8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds must be a whole number from 1"),
        ({"solver": "heun"}, "fe.invert has no argument solver"),
        ({"latents": torch.zeros(1, 16, 4, 4)}, "fe.invert has no argument latents"),
        ({"image": PHOTO}, "fe.invert has no argument image"),
        ({"picture": "photo.png"}, "an image must be a PIL image"),
        ({"steps": 0}, "steps must be"),
        ({"num_inference_steps": 5}, "here it is steps="),
    ],
)
def test_what_is_refused(arguments, message, nano):
    with pytest.raises(RequestError, match=message):
        fe.invert(nano, **{"picture": PHOTO, "prompt": PROMPT, "progress": False} | arguments)


def test_an_inversion_that_does_not_converge_warns():
    """Seed 3 of the miniature in 8 steps, whose picture does not come back; in 20 steps it does."""
    pipe, prompt = fe.load(), "a red circle left of a blue square"
    picture = pipe(prompt, seed=3, progress=False).images[0]
    with pytest.warns(RuntimeWarning, match="the inversion did not converge"):
        fe.invert(pipe, picture, prompt, steps=8, guidance=1.0, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.invert(pipe, picture, prompt, steps=20, guidance=1.0, progress=False)
