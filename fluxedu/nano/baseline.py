"""A Stable Diffusion in miniature, to hold FLUX beside: the same world, autoencoder, CLIP and captions.

    FLUX                                        here
    transformer over patches and words          U-Net over the latent, words by cross-attention
    T5's tokens, CLIP's pooled vector           CLIP's tokens
    velocity of a straight path                 the noise, epsilon, of a curved one (DDPM, 1,000 times)
    Euler steps, guidance built in              DDIM steps, classifier-free guidance: two passes a step

The U-Net and the schedule are diffusers' own with Stable Diffusion 1's settings (arXiv 2112.10752), and it needs
diffusers to be installed. A baseline to measure, nothing that is explained block by block.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.nano import configs
from fluxedu.sampling.latents import draw_noise
from fluxedu.sampling.load import WEIGHTS, load
from fluxedu.sampling.pictures import to_images
from fluxedu.sampling.pipeline import Output
from fluxedu.sampling.prompts import PromptEncoder
from fluxedu.sampling.request import RequestError

FOLDER = "unet"
STEPS, GUIDANCE = 20, 5.0
UNET = {
    "in_channels": configs.AUTOENCODER.z_channels,
    "out_channels": configs.AUTOENCODER.z_channels,
    "block_out_channels": (64, 128),  # 4.3 million parameters, as the miniature FLUX has 4.4
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": configs.CLIP.hidden_size,
    "attention_head_dim": (2, 4),  # diffusers' name for how many heads; 32 channels each
    "norm_num_groups": 16,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
}


def unet() -> nn.Module:
    """diffusers' UNet2DConditionModel at the miniature's size; raises RequestError where diffusers is missing."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        raise RequestError("the Stable Diffusion baseline is diffusers' own: pip install diffusers.") from None
    return UNet2DConditionModel(**UNET)


class Baseline:
    """``baseline("a red circle", seed=0).images[0]``, as a FluxPipeline is called."""

    def __init__(self, network: nn.Module, prompt_encoder: PromptEncoder, autoencoder: AutoEncoder):
        from diffusers import DDIMScheduler

        self.unet, self.prompt_encoder, self.autoencoder = network.eval(), prompt_encoder, autoencoder
        self.scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        seed: int | list[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        height: int = 128,
        width: int = 128,
        trajectory: bool = False,
        progress: bool = True,
    ) -> Output:
        """Pictures by DDIM with guidance; a negative prompt, the empty one, in the same batch."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if trajectory:
            raise RequestError("the baseline keeps no trajectory.")
        if len(seeds) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}.")
        config = self.autoencoder.config
        cells = height // config.downscale, width // config.downscale
        x = torch.cat([draw_noise(s, config.z_channels, *cells) for s in seeds])
        words = self.words(["", *prompts])
        words = torch.cat([words[:1].expand(len(prompts), -1, -1), words[1:]])
        self.scheduler.set_timesteps(STEPS if steps is None else steps)
        for t in tqdm(self.scheduler.timesteps, disable=not progress, delay=1.0, desc="sampling"):
            empty, prompted = self.unet(x.repeat(2, 1, 1, 1), t, words).sample.chunk(2)
            noise = empty + (GUIDANCE if guidance is None else guidance) * (prompted - empty)
            x = self.scheduler.step(noise, t, x).prev_sample
        return Output(to_images(self.autoencoder.decode(x)), x, None)

    def words(self, prompts: list[str]) -> Tensor:
        """CLIP's last hidden states, ``[B, 32, 96]``: what Stable Diffusion 1 reads."""
        return self.prompt_encoder.clip(self.prompt_encoder.clip_tokenizer(prompts))[0]


def load_baseline(weights: Path = WEIGHTS) -> Baseline:
    """The baseline that was trained; raises RequestError where there is none."""
    path = Path(weights) / FOLDER / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise RequestError(f"the baseline is not in {weights}; `fluxedu train --variant sd --ship-to {weights}`.")
    network, pipe = unet(), load("nano")
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return Baseline(network.requires_grad_(False), pipe.prompt_encoder, pipe.autoencoder)
