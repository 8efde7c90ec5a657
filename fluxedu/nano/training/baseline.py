"""What the Stable Diffusion baseline learns: the noise in a latent, from a time of a thousand and CLIP's tokens.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise,      loss = |unet(x_t, t, words) - noise|^2

On the scenes the flow learned from, a tenth of the captions empty, as many pictures as the flow saw in its own first
run or as ``--steps`` of them. Source: arXiv 2006.11239 (DDPM), 2112.10752 (in a latent).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.nano.baseline import SCHEDULE, Baseline, unet
from fluxedu.nano.training.flow import DROPOUT, Texts
from fluxedu.nano.training.latents import Latents, make_shards
from fluxedu.nano.training.loop import Recipe, Run, fingerprint, mixed_precision, use_average
from fluxedu.sampling.pipeline import FluxPipeline

RECIPE = Recipe(steps=2500, lr=1e-3, batch=64, warmup=100, decay=0.35, ema=0.995)
SHARDS = 14
SEED = 88


def noise_loss(network: nn.Module, batch: dict[str, Tensor], texts: Texts, kept: Tensor, g: torch.Generator) -> Tensor:
    """The error of the noise foreseen; ``kept``: what is left of the picture at each time, a_t."""
    x0 = batch["latents"]
    t = torch.randint(len(kept), (len(x0),), generator=g)
    noise, a = torch.randn(x0.shape, generator=g), kept[t][:, None, None, None]
    drop = torch.rand(len(x0), 1, generator=g) < DROPOUT
    with mixed_precision():
        with torch.no_grad():
            words = texts.clip(torch.where(drop, texts.empty_clip, batch["clip"]))[0]
        foreseen = network(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, words).sample
    return F.mse_loss(foreseen.float(), noise)


def train(folder: Path, pipe: FluxPipeline, resume: bool = True) -> Baseline:
    """Train (or take the finished) baseline beside ``pipe``, whose autoencoder and CLIP it shares."""
    from diffusers import DDPMScheduler

    torch.manual_seed(SEED)
    texts = Texts(pipe.prompt_encoder.t5, pipe.prompt_encoder.clip)
    kept = DDPMScheduler(**SCHEDULE).alphas_cumprod
    network = unet().train()
    run = Run("sd", network, RECIPE, folder, resume, fingerprint(pipe.prompt_encoder.clip, pipe.autoencoder))
    if run.step < RECIPE.steps:
        make_shards(SHARDS, folder, pipe.autoencoder)
        data = Latents(folder)

        def loss(step: int):
            batch = data.batch(step, RECIPE.batch, SEED)
            return noise_loss(network, batch, texts, kept, torch.Generator().manual_seed(step)), {}

        run.train(loss)
    return Baseline(use_average(unet(), run.average), pipe.prompt_encoder, pipe.autoencoder)
