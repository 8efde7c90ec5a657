"""From prompt to picture: the same as diffusers' pipelines over the same weights and the same tokenizers.

Their schedule is asked for in their own terms (a scheduler as in the published configs, sigmas from 1
to 1/N), and their noise is drawn by themselves from a generator with our seed, so that a seed means
the same picture in both. One thing of theirs is changed: image-to-image encodes to the mean of the
posterior, as ours does, where theirs would draw a sample of it.
"""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st
from oracle import diffusers_flux, drawn, randomise, relative
from PIL import Image
from test_autoencoder_against_diffusers import diffusers_autoencoder
from test_text_encoders_against_transformers import transformers_clip, transformers_t5
from transformers import CLIPTokenizer, T5Tokenizer

from fluxedu.sampling.prompts import Tokenizer
from fluxedu.sampling.solvers import from_strength, schedule

LATENTS = 2e-6  # |ours - theirs| / |theirs|
LEVEL = 1  # of 255

PROMPT = "a red circle left of a blue square"
LONG = "a big red circle over a little blue square and one green triangle under it in the middle"  # cut for CLIP
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8))
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


def their_pipe(pipe, kind, folder):
    """diffusers' pipeline with the weights of ours."""
    flux, ae, texts = pipe.flux, pipe.autoencoder, pipe.prompt_encoder
    clip_ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    clip_ids.model_max_length = texts.clip.config.max_position_embeddings
    theirs = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULERS[pipe.defaults.shift]),
        vae=diffusers_autoencoder(ae.config, ae.state_dict()),
        text_encoder=transformers_clip(texts.clip.config, texts.clip.state_dict()),
        tokenizer=clip_ids,
        text_encoder_2=transformers_t5(texts.t5.config, texts.t5.state_dict()),
        tokenizer_2=T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        transformer=diffusers_flux(flux.config, flux.state_dict()),
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def run_theirs(theirs, seeds, height, width, steps, **asked):
    """Their latents after every step ``[N, B, C, h, w]``, and their pictures."""
    kept = []

    def keep(pipe, step, time, values):
        kept.append(pipe._unpack_latents(values["latents"], height, width, pipe.vae_scale_factor))
        return {}

    images = theirs(
        num_inference_steps=steps,
        height=height,
        width=width,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        max_sequence_length=32,
        callback_on_step_end=keep,
        sigmas=np.linspace(1, 1 / steps, steps),
        **asked,
    ).images
    return torch.stack(kept), images


def worst_pixel(ours, theirs):
    assert len(ours) == len(theirs) and all(a.size == b.size for a, b in zip(ours, theirs, strict=True))
    return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(ours, theirs, strict=True))


CFG = {"negative_prompt": "a green triangle", "true_cfg_scale": 4.0}
IMAGE = {"image": PICTURE, "strength": 0.6}
# guidance as an input?, schedule shifted?, prompts, steps, height, width, and what both are asked for besides
CASES = {
    "schnell": (False, False, [PROMPT], 4, 48, 32, {}),
    "schnell, one step": (False, False, [PROMPT], 1, 32, 32, {}),
    "dev": (True, True, [PROMPT, LONG, ""], 5, 32, 80, {"guidance": 3.5}),
    "dev, strong": (True, True, [PROMPT], 3, 32, 32, {"guidance": 30.0}),
    "dev, cut to a size": (True, True, [PROMPT], 3, 59, 41, {"guidance": 3.5}),
    "cfg": (False, True, [PROMPT, ""], 5, 48, 32, CFG),
    "cfg, a negative each": (False, True, [PROMPT, LONG], 3, 32, 32, {**CFG, "negative_prompt": ["", "one"]}),
    "cfg in dev": (True, True, [PROMPT, LONG], 4, 32, 48, {"guidance": 2.0, **CFG}),
    "img2img": (True, True, [PROMPT, ""], 6, 48, 32, {"guidance": 3.5, **IMAGE}),
    "img2img, schnell": (False, False, [PROMPT], 4, 48, 32, {"image": PICTURE, "strength": 0.3}),
    "img2img, cfg": (False, True, [PROMPT, LONG], 5, 48, 32, {**CFG, **IMAGE, "strength": 0.95}),
    "img2img, cut to a size": (True, True, [PROMPT], 3, 59, 41, {"guidance": 3.5, **IMAGE}),
}


@pytest.mark.parametrize("case", CASES)
def test_from_prompt_to_picture(case, make_pipe, tokenizer_folder, monkeypatch):
    embedded, shift, prompts, steps, height, width, extra = CASES[case]
    ours = make_pipe(embedded, shift)
    for i, network in enumerate(ours.networks().values()):
        randomise(network, i).eval()
    seeds = list(range(7, 7 + len(prompts)))
    out = ours(prompts, seed=seeds, steps=steps, height=height, width=width, rounding="down", progress=False, **extra)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    asked = {"guidance_scale" if name == "guidance" else name: value for name, value in extra.items()}
    theirs = their_pipe(ours, FluxImg2ImgPipeline if "image" in asked else FluxPipeline, tokenizer_folder)
    latents, images = run_theirs(theirs, seeds, height, width, steps, prompt=prompts, **asked)

    assert len(latents) == len(out.trajectory.times) - 1
    worst = max(relative(a, b) for a, b in zip(out.trajectory.latents[1:], latents, strict=True))
    final, pixel = relative(out.latents, latents[-1]), worst_pixel(out.images, images)
    print(f"{case}: final {final:.1e}, worst step {worst:.1e}, pixel {pixel}")
    assert final <= LATENTS
    assert worst <= LATENTS
    assert worst_pixel(out.images, images) <= LEVEL
    assert all(np.asarray(image).std() > 10 for image in images)  # a flat picture would agree with anything


@drawn(60)
@given(st.integers(1, 100), st.integers(1, 16384), st.booleans(), st.floats(0.01, 1))
def test_the_schedule_to_the_last_bit(steps, tokens, shift, strength):
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULERS[shift])
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    times = schedule(steps, tokens, shift)
    assert torch.equal(times, scheduler.sigmas)

    kind = FluxImg2ImgPipeline.__new__(FluxImg2ImgPipeline)  # its share of the steps, without its networks
    kind.register_modules(scheduler=scheduler)
    theirs, _ = kind.get_timesteps(steps, strength, "cpu")
    if len(theirs):  # where they would run no step and refuse, ours runs one
        assert torch.equal(1000 * from_strength(times, strength)[:-1], theirs)


ODD = [PROMPT, LONG, "", "RED  Circle!", "zebra-striped (3 of 7)", "\u00e9t\u00e9 \u732b", "</s> <|endoftext|> <pad>"]


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_tokenizers(name, tokenizer_folder, tmp_path):
    """The same ids as through transformers, and from a folder with the vocabulary only."""
    clip = name == "tokenizer"
    theirs = (CLIPTokenizer if clip else T5Tokenizer).from_pretrained(tokenizer_folder / name)
    pad, end = ("<|endoftext|>", "<|endoftext|>") if clip else ("<pad>", "</s>")
    length = 12 if clip else 60
    expected = theirs(ODD, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(Tokenizer(tokenizer_folder / name, pad, end, length, cut=clip)(ODD), expected)

    if clip:  # the older layout
        fast = theirs.backend_tokenizer.model
        fast.save(str(tmp_path))
        (tmp_path / "tokenizer_config.json").write_text((tokenizer_folder / name / "tokenizer_config.json").read_text())
        assert not (tmp_path / "tokenizer.json").exists()
        assert torch.equal(Tokenizer(tmp_path, pad, end, length, cut=True)(ODD), expected)
