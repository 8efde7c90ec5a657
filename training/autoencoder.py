"""Stage 1: the autoencoder.

    loss = |y - x| + (y - x)^2 + |grad y - grad x| + 1e-4 * KL(q(z|x) || N(0, 1))

``x`` is the image and ``y`` its reconstruction. The KL term is too weak to make N(0, 1) a prior to sample from. It
keeps the latent space smooth, so that a small error of the flow in latent space stays a small error in the image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.nano import networks
from fluxedu.nano.exam import psnr
from fluxedu.nano.scenes import render, sample_scene, to_tensor
from training.loop import Prefetch, Recipe, Run, load_average, mixed_precision

RECIPE = Recipe(steps=2600, lr=2e-3, batch=12, warmup=200, decay=0.5, ema=0.998, clip=1.0)
CROP = 80  # pixels
SEED = 11


def crop_batch(step: int, batch: int) -> Tensor:
    """The training batch of ``step``: random crops of new scenes, ``[B, 3, CROP, CROP]``."""
    rng = np.random.default_rng([SEED, step])
    crops = []
    for _ in range(batch):
        image = render(sample_scene(rng, size=(96, 128)))
        y, x = rng.integers(96 - CROP + 1), rng.integers(128 - CROP + 1)
        crops.append(image[y : y + CROP, x : x + CROP])
    return to_tensor(np.stack(crops))


def autoencoder_loss(model: AutoEncoder, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """The loss above; ``generator`` draws the noise of the sampled latents."""
    with mixed_precision():
        mean, logvar = model.moments(images)
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
        reconstruction = model.decoder(z)
    mean, logvar, reconstruction = mean.float(), logvar.float(), reconstruction.float()
    error = reconstruction - images
    gradient_error = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = error.square().mean()
    loss = error.abs().mean() + mse + gradient_error + 1e-4 * kl
    return loss, {"psnr": float(10 * torch.log10(4 / mse.detach())), "kl": float(kl.detach())}


def validation_images(count: int = 64) -> Tensor:
    """Held-out scenes, ``[count, 3, 128, 128]``."""
    rng = np.random.default_rng(SEED + 1)
    return to_tensor(np.stack([render(sample_scene(rng, size=(128, 128), held_out=True)) for _ in range(count)]))


@torch.no_grad()
def calibrate(model: AutoEncoder) -> AutoEncoder:
    """A copy whose scale and shift give latents with mean 0 and variance 1, as those of FLUX.1's autoencoder do."""
    rng = np.random.default_rng(SEED + 2)
    images = to_tensor(np.stack([render(sample_scene(rng, size=(128, 128))) for _ in range(128)]))
    z = torch.cat([model.moments(chunk)[0] for chunk in images.split(16)])
    config = model.config.with_(scale_factor=round(float(1 / z.std()), 4), shift_factor=round(float(z.mean()), 4))
    calibrated = AutoEncoder(config)
    calibrated.load_state_dict(model.state_dict())
    return calibrated.eval().requires_grad_(False)


def train(folder: Path, resume: bool = True) -> AutoEncoder:
    """Train the autoencoder, or load it if its run is finished; returns it calibrated."""
    torch.manual_seed(SEED)
    model = AutoEncoder(networks.AUTOENCODER)
    run = Run("autoencoder", model, RECIPE, folder, resume)
    validation = validation_images()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        return autoencoder_loss(model, batches(step), torch.Generator().manual_seed(step))

    def report(run: Run) -> None:
        averaged = load_average(AutoEncoder(networks.AUTOENCODER), run.average)
        with torch.no_grad():
            decoded = torch.cat([averaged.decode(averaged.encode(chunk)) for chunk in validation.split(16)])
        print(f"\nautoencoder step {run.step}: {psnr(validation, decoded):.2f} dB on held-out scenes", flush=True)

    with Prefetch(crop_batch, RECIPE.batch) as batches:
        run.train(loss, report, every=500)
    return calibrate(load_average(AutoEncoder(networks.AUTOENCODER), run.average))
