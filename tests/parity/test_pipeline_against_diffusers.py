"""From prompt to image: the same as diffusers' pipelines with the same weights and tokenizers.

diffusers is called in its own terms: a scheduler as in the published configs, sigmas from 1 to 1/N. It draws its noise
itself, from a generator with our seed, so one seed means the same image in both. One thing of theirs is changed:
image-to-image encodes to the mean of the posterior, as ours does, instead of drawing a sample of it.

The bound on the latents is derived from the run itself: see rounding.py.
"""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st
from oracle import diffusers_flux, examples, float64_flux, randomise
from PIL import Image
from rounding import Exact, worst_error
from test_autoencoder_against_diffusers import diffusers_autoencoder
from test_text_encoders_against_transformers import to_float64, transformers_clip, transformers_t5
from transformers import CLIPTokenizer, T5Tokenizer

from fluxedu.sampling.prompts import Tokenizer
from fluxedu.sampling.solvers import from_strength, schedule

LEVEL = 1  # of 255: two values that differ by a rounding error may be rounded to neighbouring levels

PROMPT = "a red circle left of a blue square"
LONG = (
    "a big red circle over a little blue square and one green triangle under it in the middle"  # too long for CLIP here
)
INPUT_IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8))
SCHEDULERS = {  # as in the published scheduler_config.json of schnell and of dev
    False: {"shift": 1.0, "use_dynamic_shifting": False},
    True: {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}


def their_pipe(kind, pipe, folder, dtype=torch.float32):
    """diffusers' pipeline with the weights of ours; in float64, the reference for an exact result."""
    flux, ae, texts = pipe.flux, pipe.autoencoder, pipe.prompt_encoder
    state = lambda network: to_float64(network.state_dict()) if dtype == torch.float64 else network.state_dict()  # noqa: E731
    clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    clip_tokenizer.model_max_length = texts.clip.config.max_position_embeddings
    theirs = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULERS[pipe.defaults.shift]),
        vae=diffusers_autoencoder(ae.config, state(ae)),
        text_encoder=transformers_clip(texts.clip.config, state(texts.clip)),
        tokenizer=clip_tokenizer,
        text_encoder_2=transformers_t5(texts.t5.config, state(texts.t5)),
        tokenizer_2=T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        transformer=(float64_flux if dtype == torch.float64 else diffusers_flux)(flux.config, flux.state_dict()),
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def run_theirs(theirs, seeds, height, width, steps, **arguments):
    """Their latents after every step, each ``[B, C, h, w]``, and their images."""
    latents = []

    def save(pipe, step, time, values):
        latents.append(pipe._unpack_latents(values["latents"], height, width, pipe.vae_scale_factor))
        return {}

    images = theirs(
        num_inference_steps=steps,
        height=height,
        width=width,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        max_sequence_length=32,
        callback_on_step_end=save,
        sigmas=np.linspace(1, 1 / steps, steps),
        **arguments,
    ).images
    return latents, images


def worst_pixel(ours, theirs):
    assert len(ours) == len(theirs) and all(a.size == b.size for a, b in zip(ours, theirs, strict=True))
    return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(ours, theirs, strict=True))


CFG = {"negative_prompt": "a green triangle", "true_cfg_scale": 4.0}
IMAGE = {"image": INPUT_IMAGE, "strength": 0.6}
# (guidance is an input, the schedule is shifted, prompts, steps, height, width, further arguments of both)
CASES = {
    "schnell": (False, False, [PROMPT], 4, 48, 32, {}),
    "schnell, one step": (False, False, [PROMPT], 1, 32, 32, {}),
    "dev": (True, True, [PROMPT, LONG, ""], 5, 32, 80, {"guidance": 3.5}),
    "dev, large guidance": (True, True, [PROMPT], 3, 32, 32, {"guidance": 30.0}),
    "dev, rounded to a size": (True, True, [PROMPT], 3, 59, 41, {"guidance": 3.5}),
    "cfg": (False, True, [PROMPT, ""], 5, 48, 32, CFG),
    "cfg, one negative prompt each": (False, True, [PROMPT, LONG], 3, 32, 32, {**CFG, "negative_prompt": ["", "one"]}),
    "cfg in dev": (True, True, [PROMPT, LONG], 4, 32, 48, {"guidance": 2.0, **CFG}),
    "img2img": (True, True, [PROMPT, ""], 6, 48, 32, {"guidance": 3.5, **IMAGE}),
    "img2img, schnell": (False, False, [PROMPT], 4, 48, 32, {"image": INPUT_IMAGE, "strength": 0.3}),
    "img2img, cfg": (False, True, [PROMPT, LONG], 5, 48, 32, {**CFG, **IMAGE, "strength": 0.95}),
    "img2img, rounded to a size": (True, True, [PROMPT], 3, 59, 41, {"guidance": 3.5, **IMAGE}),
}


@pytest.mark.parametrize("case", CASES)
def test_from_prompt_to_image(case, make_pipe, tokenizer_folder, monkeypatch):
    guidance_embed, shift, prompts, steps, height, width, arguments = CASES[case]
    ours = make_pipe(guidance_embed, shift)
    for i, network in enumerate(ours.networks().values()):
        randomise(network, i).eval()
    seeds = list(range(7, 7 + len(prompts)))
    how = {"seed": seeds, "steps": steps, "height": height, "width": width, "rounding": "down", "progress": False}
    out = ours(prompts, **how, **arguments)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    of_theirs = {"guidance_scale" if name == "guidance" else name: value for name, value in arguments.items()}
    kind = FluxImg2ImgPipeline if "image" in arguments else FluxPipeline
    theirs, reference = (their_pipe(kind, ours, tokenizer_folder, dtype) for dtype in (torch.float32, torch.float64))

    def their_run(pipe):
        return run_theirs(pipe, seeds, height, width, steps, prompt=prompts, **of_theirs)

    latents, images = their_run(theirs)
    exact = Exact(lambda: their_run(reference)[0], worst_error)
    exact.check(latents, torch.float32)
    exact.check(list(out.trajectory.latents[1:]), torch.float32)
    assert torch.equal(out.latents, out.trajectory.latents[-1])
    assert worst_pixel(out.images, images) <= LEVEL
    assert all(np.asarray(image).std() > 10 for image in images)  # any two uniform images would agree

    out64 = ours.to(torch.float64)(prompts, **how, **arguments)
    exact.check(list(out64.trajectory.latents[1:]), torch.float64)


@examples(60)
@given(st.integers(1, 100), st.integers(1, 16384), st.booleans(), st.floats(0.01, 1))
def test_the_schedule_is_theirs_to_the_last_bit(steps, tokens, shift, strength):
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULERS[shift])
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    times = schedule(steps, tokens, shift)
    assert torch.equal(times, scheduler.sigmas)

    theirs = FluxImg2ImgPipeline.__new__(FluxImg2ImgPipeline)  # without its networks
    theirs.register_modules(scheduler=scheduler)
    timesteps, _ = theirs.get_timesteps(steps, strength, "cpu")
    if len(timesteps):  # theirs raises an error where no step is left; ours runs one
        assert torch.equal(1000 * from_strength(times, strength)[:-1], timesteps)


UNUSUAL = [
    PROMPT,
    LONG,
    "",
    "RED  Circle!",
    "zebra-striped (3 of 7)",
    "\u00e9t\u00e9 \u732b",
    "</s> <|endoftext|> <pad>",
]


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_tokenizers(name, tokenizer_folder, tmp_path):
    """The same ids as from transformers, also from a folder with the vocabulary only."""
    clip = name == "tokenizer"
    theirs = (CLIPTokenizer if clip else T5Tokenizer).from_pretrained(tokenizer_folder / name)
    pad, end = ("<|endoftext|>", "<|endoftext|>") if clip else ("<pad>", "</s>")
    length = 12 if clip else 60
    expected = theirs(UNUSUAL, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(Tokenizer(tokenizer_folder / name, pad, end, length, truncate=clip)(UNUSUAL), expected)

    if clip:  # the older layout of the files
        fast = theirs.backend_tokenizer.model
        fast.save(str(tmp_path))
        (tmp_path / "tokenizer_config.json").write_text((tokenizer_folder / name / "tokenizer_config.json").read_text())
        assert not (tmp_path / "tokenizer.json").exists()
        assert torch.equal(Tokenizer(tmp_path, pad, end, length, truncate=True)(UNUSUAL), expected)
