"""Stage 1: the autoencoder. Pixels, edges, and a light pull of the latents towards a unit Gaussian.

    loss = |x - y| + (x - y)^2 + |grad x - grad y| + 1e-4 * KL(q(z|x) || N(0, 1))

The KL term is not there to generate from: it keeps the latents smooth, so that a small error of the
flow in latent space stays a small error in the picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.nano import networks
from fluxedu.nano.scenes import render, sample_scene
from fluxedu.nano.training.loop import Prefetch, Recipe, Run, mixed_precision, use_average

RECIPE = Recipe(steps=2600, lr=2e-3, batch=12, warmup=200, decay=0.5, ema=0.998, clip=1.0)
CROP = 80
SEED = 11


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 ``[B, H, W, 3]`` -> float ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def crops(step: int, batch: int) -> Tensor:
    """The batch of ``step``: random windows of fresh scenes."""
    rng = np.random.default_rng([SEED, step])
    out = []
    for _ in range(batch):
        image = render(sample_scene(rng, size=(96, 128)))
        y, x = rng.integers(96 - CROP + 1), rng.integers(128 - CROP + 1)
        out.append(image[y : y + CROP, x : x + CROP])
    return to_tensor(np.stack(out))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], each rounded to 8 bits."""
    a, b = (((v.clamp(-1, 1) + 1) * 127.5).round() for v in (a, b))
    mse = (a - b).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(255**2 / mse)).mean())


def loss_of(model: AutoEncoder, image: Tensor, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    with mixed_precision():
        mean, logvar = model.moments(image)
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=noise)
        seen = model.decoder(z)
    mean, logvar, seen = mean.float(), logvar.float(), seen.float()
    difference = seen - image
    edges = sum(difference.diff(dim=d).abs().mean() for d in (2, 3))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = difference.square().mean()
    value = difference.abs().mean() + mse + edges + 1e-4 * kl
    return value, {"psnr": float(10 * torch.log10(4 / mse.detach())), "kl": float(kl.detach())}


def validation(count: int = 64) -> Tensor:
    """Held-out scenes, 128 x 128."""
    rng = np.random.default_rng(SEED + 1)
    return to_tensor(np.stack([render(sample_scene(rng, size=(128, 128), held_out=True)) for _ in range(count)]))


@torch.no_grad()
def calibrate(model: AutoEncoder) -> AutoEncoder:
    """Set scale and shift so that latents have mean 0 and variance 1, as the official numbers do."""
    rng = np.random.default_rng(SEED + 2)
    images = to_tensor(np.stack([render(sample_scene(rng, size=(128, 128))) for _ in range(128)]))
    z = torch.cat([model.moments(part)[0] for part in images.split(16)])
    config = model.config.with_(scale_factor=round(float(1 / z.std()), 4), shift_factor=round(float(z.mean()), 4))
    calibrated = AutoEncoder(config)
    calibrated.load_state_dict(model.state_dict())
    return calibrated.eval().requires_grad_(False)


def train(folder: Path, resume: bool = True) -> AutoEncoder:
    """Train (or take the finished) autoencoder; returns it calibrated."""
    torch.manual_seed(SEED)
    model = AutoEncoder(networks.AUTOENCODER)
    run = Run("autoencoder", model, RECIPE, folder, resume)
    held = validation()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        noise = torch.Generator().manual_seed(step)
        return loss_of(model, batches(step), noise)

    def report(run: Run) -> None:
        judged = use_average(AutoEncoder(networks.AUTOENCODER), run.average)
        with torch.no_grad():
            seen = torch.cat([judged.decode(judged.encode(part)) for part in held.split(16)])
        print(f"\nautoencoder step {run.step}: {psnr(held, seen):.2f} dB on held-out scenes", flush=True)

    with Prefetch(crops, RECIPE.batch) as batches:
        run.train(loss, report, every=500)
    return calibrate(use_average(AutoEncoder(networks.AUTOENCODER), run.average))
