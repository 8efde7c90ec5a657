"""A Stable Diffusion in miniature, to hold FLUX beside: the same world, autoencoder, CLIP and captions.

    FLUX                                        here
    transformer over patches and words          U-Net over the latent, words by cross-attention
    T5's tokens, CLIP's pooled vector           CLIP's tokens
    velocity of a straight path                 the noise, epsilon, of a curved one (DDPM, 1,000 times)
    Euler steps                                 DDIM steps (arXiv 2010.02502)
    guidance built in, or two passes            classifier-free guidance: two passes a step

The U-Net and the schedule are diffusers' own, the schedule with Stable Diffusion 1's numbers (arXiv 2112.10752); it
needs diffusers to be installed. A baseline to measure, nothing that is explained block by block.
"""

from __future__ import annotations

from functools import cache
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
    "block_out_channels": (64, 128),  # 4.0 million parameters, as the miniature FLUX has 4.4
    "layers_per_block": 1,
    # attention where the miniature FLUX has its tokens, at a cell for every 16 x 16 pixels
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": configs.CLIP.hidden_size,
    "attention_head_dim": 4,  # diffusers' name for how many heads; 32 channels each
    "norm_num_groups": 16,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}


def unet() -> nn.Module:
    """diffusers' UNet2DConditionModel at the miniature's size; raises RequestError where diffusers is missing."""
    UNet2DConditionModel = _diffusers().UNet2DConditionModel
    network = UNet2DConditionModel(**UNET)
    network.set_attn_processor(_diffusers().models.attention_processor.AttnProcessor())  # products, faster so small
    return network


@cache
def schedule():
    """diffusers' DDPMScheduler, as the U-Net was trained with."""
    return _diffusers().DDPMScheduler(**SCHEDULE)


def _diffusers():
    try:
        import diffusers
    except ImportError:
        raise RequestError("the Stable Diffusion baseline is diffusers' own: pip install diffusers.") from None
    return diffusers
