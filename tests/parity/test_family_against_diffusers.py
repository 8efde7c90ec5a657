"""Fill, control, kontext and redux, from prompt to latents: the same as diffusers' pipelines with the same weights.

The bound is derived from the run itself: see rounding.py.
"""

import copy

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline, FluxFillPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from oracle import randomise
from PIL import Image
from rounding import Exact, relative_error, worst_error
from test_pipeline_against_diffusers import LONG, PROMPT, run_theirs, their_pipe
from transformers import SiglipVisionConfig, SiglipVisionModel

from fluxedu.models.redux import Redux, ReduxHead

HEIGHT, WIDTH = 48, 32


def random_image(height, width, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask_of(height, width):
    levels = np.zeros((height, width), np.uint8)
    levels[5:29, 3:20] = 255  # its edge does not coincide with those of the latent's cells
    return Image.fromarray(levels)


IMAGE, EDGES, REFERENCE = random_image(HEIGHT, WIDTH, 1), random_image(HEIGHT, WIDTH, 2), random_image(64, 48, 3)
CFG = {"negative_prompt": "a green triangle", "true_cfg_scale": 3.0}
# (input channels of the transformer, diffusers' pipeline, arguments of ours, arguments of theirs)
CASES = {
    "fill": (
        384, FluxFillPipeline, {"image": IMAGE, "mask": mask_of(HEIGHT, WIDTH), "guidance": 30.0},
        {"image": IMAGE, "mask_image": mask_of(HEIGHT, WIDTH), "strength": 1.0, "guidance_scale": 30.0},
    ),
    "control": (
        128, FluxControlPipeline, {"control": EDGES, "guidance": 10.0}, {"control_image": EDGES, "guidance_scale": 10.0}
    ),
    "kontext": (
        64, FluxKontextPipeline, {"reference": REFERENCE, "guidance": 2.5},
        {"image": REFERENCE, "guidance_scale": 2.5, "_auto_resize": False, "max_area": HEIGHT * WIDTH},
    ),
    "kontext, cfg": (
        64, FluxKontextPipeline, {"reference": IMAGE, "guidance": 2.5, **CFG},
        {"image": IMAGE, "guidance_scale": 2.5, "_auto_resize": False, "max_area": HEIGHT * WIDTH, **CFG},
    ),
}  # fmt: skip


def random_pipe(make_pipe, tiny, channels=64):
    clip, t5, flux, ae = tiny
    pipe = make_pipe(sizes=(clip, t5, flux.with_(in_channels=channels), ae))
    for i, network in enumerate(pipe.networks().values()):
        randomise(network, i).eval()
    pipe.size = 256  # no picture here is a photo, which would be scaled down
    return pipe


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_conditioning_on_an_image(case, prompt, make_pipe, tiny, tokenizer_folder, monkeypatch):
    channels, kind, arguments, of_theirs = CASES[case]
    pipe = random_pipe(make_pipe, tiny, channels)
    how = {"seed": 7, "steps": 4, "height": HEIGHT, "width": WIDTH, "progress": False}
    out = pipe(prompt, **how, **arguments)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    theirs, reference = (their_pipe(kind, pipe, tokenizer_folder, dtype) for dtype in (torch.float32, torch.float64))

    def their_latents(theirs):
        return run_theirs(theirs, [7], HEIGHT, WIDTH, 4, prompt=[prompt], **of_theirs)[0]

    exact = Exact(lambda: their_latents(reference), worst_error)
    exact.check(their_latents(theirs), torch.float32)
    exact.check(list(out.trajectory.latents[1:]), torch.float32)

    condition = {"fill": "mask", "control": "control"}.get(case, "reference")
    mirrored = {**arguments, condition: arguments[condition].transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
    assert relative_error(pipe(prompt, **how, **mirrored).latents, out.latents) > 1e-3  # the condition has an effect

    out64 = pipe.to(torch.float64)(prompt, **how, **arguments)
    exact.check(list(out64.trajectory.latents[1:]), torch.float64)


class VisionEncoder(torch.nn.Module):
    def __init__(self, siglip):
        super().__init__()
        self.siglip = siglip

    def forward(self, image):
        return self.siglip(image).last_hidden_state


def test_redux_tokens_follow_the_text(make_pipe, tiny, tokenizer_folder):
    torch.manual_seed(0)
    pipe = random_pipe(make_pipe, tiny)
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    width = pipe.flux.config.context_in_dim
    their_head = randomise(ReduxImageEncoder(24, width), 5).eval()
    head = ReduxHead(24, width)
    head.load_state_dict(their_head.state_dict())  # here the official names are also diffusers'
    pipe.redux = Redux(VisionEncoder(siglip), head, tokens=16)
    image = torch.from_numpy(np.asarray(random_image(32, 32, 4)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    how = {"seed": 7, "steps": 4, "height": HEIGHT, "width": WIDTH, "guidance": 3.5, "progress": False}
    out = pipe(PROMPT, image_prompt=image, **how)
    assert relative_error(pipe(PROMPT, **how).latents, out.latents) > 1e-3  # the image prompt has an effect

    theirs, reference = (
        their_pipe(FluxPipeline, pipe, tokenizer_folder, dtype) for dtype in (torch.float32, torch.float64)
    )

    @torch.no_grad()
    def their_latents(theirs, siglip, head, image):
        txt, pooled, _ = theirs.encode_prompt(PROMPT, None, max_sequence_length=32)
        tokens = head(siglip(image).last_hidden_state).image_embeds
        txt = torch.cat([txt, tokens], dim=1)
        how = {"guidance_scale": 3.5, "prompt_embeds": txt, "pooled_prompt_embeds": pooled}
        return run_theirs(theirs, [7], HEIGHT, WIDTH, 4, **how)[0]

    in_float32 = their_latents(theirs, siglip, their_head, image)
    siglip64, head64, image64 = copy.deepcopy(siglip).double(), copy.deepcopy(their_head).double(), image.double()
    exact = Exact(lambda: their_latents(reference, siglip64, head64, image64), worst_error)
    exact.check(in_float32, torch.float32)
    exact.check(list(out.trajectory.latents[1:]), torch.float32)
