"""Fill, control, kontext and redux from prompt to latents: the same as diffusers' pipelines over the same weights."""

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline, FluxFillPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from oracle import randomise, relative
from PIL import Image
from test_pipeline_against_diffusers import LATENTS, LONG, PROMPT, run_theirs, their_pipe
from transformers import SiglipVisionConfig, SiglipVisionModel

from fluxedu.models.redux import Redux, ReduxHead

HEIGHT, WIDTH = 48, 32


def picture(height, width, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask_of(height, width):
    levels = np.zeros((height, width), np.uint8)
    levels[5:29, 3:20] = 255  # its edge runs through the cells of the latent
    return Image.fromarray(levels)


PICTURE, EDGES, BEFORE = picture(HEIGHT, WIDTH, 1), picture(HEIGHT, WIDTH, 2), picture(64, 48, 3)
CFG = {"negative_prompt": "a green triangle", "true_cfg_scale": 3.0}
# channels going in, their pipeline, what ours is asked for, what theirs is asked for
CASES = {
    "fill": (
        384, FluxFillPipeline, {"image": PICTURE, "mask": mask_of(HEIGHT, WIDTH), "guidance": 30.0},
        {"image": PICTURE, "mask_image": mask_of(HEIGHT, WIDTH), "strength": 1.0, "guidance_scale": 30.0},
    ),
    "control": (
        128, FluxControlPipeline, {"control": EDGES, "guidance": 10.0}, {"control_image": EDGES, "guidance_scale": 10.0}
    ),
    "kontext": (
        64, FluxKontextPipeline, {"reference": BEFORE, "guidance": 2.5},
        {"image": BEFORE, "guidance_scale": 2.5, "_auto_resize": False, "max_area": HEIGHT * WIDTH},
    ),
    "kontext, cfg": (
        64, FluxKontextPipeline, {"reference": PICTURE, "guidance": 2.5, **CFG},
        {"image": PICTURE, "guidance_scale": 2.5, "_auto_resize": False, "max_area": HEIGHT * WIDTH, **CFG},
    ),
}  # fmt: skip


def random_pipe(make_pipe, tiny, channels=64):
    clip, t5, flux, ae = tiny
    pipe = make_pipe(sizes=(clip, t5, flux.with_(in_channels=channels), ae))
    for i, network in enumerate(pipe.networks().values()):
        randomise(network, i).eval()
    return pipe


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_a_picture_beside_the_words(case, prompt, make_pipe, tiny, tokenizer_folder, monkeypatch):
    channels, kind, asked, asked_of_them = CASES[case]
    pipe = random_pipe(make_pipe, tiny, channels)
    size = {"height": HEIGHT, "width": WIDTH}
    out = pipe(prompt, seed=7, steps=4, progress=False, **size, **asked)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    theirs = their_pipe(pipe, kind, tokenizer_folder)
    latents, _ = run_theirs(theirs, [7], HEIGHT, WIDTH, 4, prompt=[prompt], **asked_of_them)

    worst = max(relative(a, b) for a, b in zip(out.trajectory.latents[1:], latents, strict=True))
    print(f"{case}: {worst:.1e}")
    assert worst <= LATENTS
    others = {"fill": "mask", "control": "control"}.get(case, "reference")
    changed = {**asked, others: asked[others].transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
    again = pipe(prompt, seed=7, steps=4, progress=False, **size, **changed)
    assert relative(again.latents, out.latents) > 1e-3  # what is given is read


class Eye(torch.nn.Module):
    def __init__(self, siglip):
        super().__init__()
        self.siglip = siglip

    def forward(self, image):
        return self.siglip(image).last_hidden_state


def test_redux_stands_behind_the_words(make_pipe, tiny, tokenizer_folder):
    torch.manual_seed(0)
    pipe = random_pipe(make_pipe, tiny)
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
    eye = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    width = pipe.flux.config.context_in_dim
    theirs_head = randomise(ReduxImageEncoder(24, width), 5).eval()
    head = ReduxHead(24, width)
    head.load_state_dict(theirs_head.state_dict())  # the official names are diffusers' here
    pipe.redux = Redux(Eye(eye), head, tokens=16)
    attention_or_map = torch.from_numpy(np.asarray(picture(32, 32, 4)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    asked = {"seed": 7, "steps": 4, "height": HEIGHT, "width": WIDTH, "guidance": 3.5, "progress": False}
    out = pipe(PROMPT, image_prompt=attention_or_map, **asked)

    theirs = their_pipe(pipe, FluxPipeline, tokenizer_folder)
    with torch.no_grad():
        txt, pooled, _ = theirs.encode_prompt(PROMPT, None, max_sequence_length=32)
        seen = theirs_head(eye(attention_or_map).last_hidden_state).image_embeds
    latents, _ = run_theirs(
        theirs, [7], HEIGHT, WIDTH, 4, guidance_scale=3.5,
        prompt_embeds=torch.cat([txt, seen], dim=1), pooled_prompt_embeds=pooled,
    )  # fmt: skip
    assert max(relative(a, b) for a, b in zip(out.trajectory.latents[1:], latents, strict=True)) <= LATENTS
    without = pipe(PROMPT, **asked)
    assert relative(without.latents, out.latents) > 1e-3
