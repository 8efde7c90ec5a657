"""From prompt to image with FLUX.2: the same as diffusers' pipelines with the same weights, tokenizer and noise."""

from inspect import signature

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2 import pipeline_flux2
from flux2_sizes import TEXT_LENGTH, make_flux2_pipe
from hypothesis import given
from hypothesis import strategies as st
from oracle import examples
from PIL import Image
from rounding import relative_error
from test_flux2_against_diffusers import diffusers_autoencoder, diffusers_flux2, packed, unpacked

from fluxedu.sampling.flux2 import HIDDEN_STATES, SYSTEM_MESSAGE, ChatTokenizer, empirical_mu
from fluxedu.sampling.latents import draw_noise
from fluxedu.sampling.solvers import schedule

LARGEST_ERROR = 2e-6
LEVEL = 1  # of 255: two values that differ by a rounding error may be rounded to neighbouring levels
PROMPT = "a red circle left of a blue square"
RANDOM = np.random.default_rng(0)
REFERENCE, ANOTHER = (
    Image.fromarray(RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((64, 72), (80, 64))
)
# (language model, guidance is an input, prompts, steps, height, width, arguments of ours, of theirs)
CASES = {
    "klein": ("qwen3", False, [PROMPT, ""], 4, 32, 48, {}, {"guidance_scale": 1.0}),
    "klein, cfg": ("qwen3", False, [PROMPT, "one"], 3, 32, 32, {"guidance": 4.0}, {"guidance_scale": 4.0}),
    "klein, a reference": ("qwen3", False, [PROMPT], 3, 40, 32, {"reference": REFERENCE}, {"guidance_scale": 1.0}),
    "klein, three references": (
        "qwen3", False, [PROMPT, "one"], 2, 32, 48, {"reference": [REFERENCE, ANOTHER, REFERENCE]},
        {"guidance_scale": 1.0},
    ),
    "dev": ("mistral", True, [PROMPT, "a green triangle"], 5, 48, 32, {"guidance": 4.0}, {"guidance_scale": 4.0}),
    "dev, a reference": (
        "mistral", True, [PROMPT], 3, 32, 32, {"guidance": 2.5, "reference": REFERENCE}, {"guidance_scale": 2.5}
    ),
    "dev, two references": (
        "mistral", True, [PROMPT], 2, 32, 32, {"guidance": 2.5, "reference": [ANOTHER, REFERENCE]},
        {"guidance_scale": 2.5},
    ),
}  # fmt: skip


def their_pipe(ours, kind):
    """diffusers' pipeline with the weights of ours."""
    pipeline = Flux2KleinPipeline if kind == "qwen3" else Flux2Pipeline
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    theirs = pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=diffusers_autoencoder(ours.autoencoder.config, ours.autoencoder.state_dict()),
        text_encoder=ours.whole_language_model,
        tokenizer=ours.prompt_encoder.tokenizer.fast,
        transformer=diffusers_flux2(ours.flux.config, ours.flux.state_dict()),
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_from_prompt_to_image(case):
    kind, guidance_embed, prompts, steps, height, width, of_ours, of_theirs = CASES[case]
    ours = make_flux2_pipe(kind, guidance_embed)
    theirs = their_pipe(ours, kind)
    seeds = list(range(7, 7 + len(prompts)))
    out = ours(prompts, seed=seeds, steps=steps, height=height, width=width, progress=False, batch=2, **of_ours)
    rows, columns = out.latents.shape[-2:]
    latents = []

    def save(pipe, step, time, values):
        tokens = values["latents"]
        latents.append(unpacked(tokens.transpose(1, 2).reshape(len(tokens), -1, rows // 2, columns // 2)))
        return {}

    noise = torch.cat([draw_noise(seed, 4, rows, columns) for seed in seeds])
    images = theirs(
        prompt=prompts,
        image=of_ours.get("reference"),
        num_inference_steps=steps,
        height=height,
        width=width,
        latents=packed(noise),
        max_sequence_length=TEXT_LENGTH,
        text_encoder_out_layers=(1, 2, 3),
        callback_on_step_end=save,
        **of_theirs,
    ).images
    assert len(latents) == steps
    for mine, expected in zip(out.trajectory.latents[1:], latents, strict=True):
        assert relative_error(mine, expected) <= LARGEST_ERROR
    difference = [
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(out.images, images, strict=True)
    ]
    assert max(difference) <= LEVEL
    assert all(np.asarray(image).std() > 10 for image in images)  # any two uniform images would agree


@pytest.mark.parametrize("kind", HIDDEN_STATES)
@torch.no_grad()
def test_the_embeddings_are_theirs(kind):
    """Also of a prompt that is cut, alone and with others; and the defaults are theirs too."""
    ours = make_flux2_pipe(kind, kind == "mistral")
    theirs = their_pipe(ours, kind)
    prompts = [PROMPT, "", "a blue square " * 40]
    expected, ids = theirs.encode_prompt(prompts, max_sequence_length=TEXT_LENGTH, text_encoder_out_layers=(1, 2, 3))
    found = ours.prompt_encoder(prompts, batch=3)
    assert relative_error(found.txt, expected) <= 1e-6
    assert found.pooled.shape == (3, 0)
    assert relative_error(ours.prompt_encoder(prompts).txt, expected) <= 1e-5
    assert ids[0, :, 3].tolist() == list(range(TEXT_LENGTH))
    defaults = signature(type(theirs).encode_prompt).parameters
    assert defaults["text_encoder_out_layers"].default == HIDDEN_STATES[kind]
    assert defaults["max_sequence_length"].default == signature(ChatTokenizer.__init__).parameters["length"].default
    assert SYSTEM_MESSAGE == pipeline_flux2.SYSTEM_MESSAGE


@examples(50)
@given(st.integers(1, 16384), st.integers(1, 200))
def test_the_schedule_is_theirs(tokens, steps):
    assert empirical_mu(tokens, steps) == pipeline_flux2.compute_empirical_mu(tokens, steps)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = empirical_mu(tokens, steps)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    assert torch.equal(schedule(steps, tokens, True, (mu, mu)), scheduler.sigmas)
