"""Notebook 01: latents: the autoencoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.course.exercises import random_weights, randomise, run_module, subclass
from fluxedu.models.autoencoder import Downsample as LibraryDownsample


def _moments() -> list[tuple]:
    g = torch.Generator().manual_seed(3)
    return [
        (torch.randn(2, 8, 3, 5, generator=g), 0.3611, 0.1159),
        (torch.randn(1, 6, 2, 3, generator=g) + 1, 0.6, -0.4),
    ]


@exercise(
    "latents.standardise",
    minutes=5,
    difficulty=1,
    cases=_moments,
    hints=(
        "The encoder's output has twice as many channels as the latent: first the means, then the logarithms of the "
        "variances.",
        "`moments.chunk(2, dim=1)` gives the two halves. The latent is computed from the means alone.",
        "`mean, logvar = moments.chunk(2, dim=1)`, then subtract the shift first and scale after: "
        "`scale * (mean - shift)`.",
    ),
)
def standardise(moments: Tensor, scale: float, shift: float) -> Tensor:
    """Turn the encoder's output `[B, 2 C, h, w]` into the latent on which the flow is trained, `[B, C, h, w]`.

    The first half of the channels are the means, the second half the logarithms of the variances. The official code
    takes the mean, subtracts `shift` and multiplies by `scale`.
    """
    mean, _ = moments.chunk(2, dim=1)
    return scale * (mean - shift)


wrong("latents.standardise", "you subtract the shift after the scaling; subtract it before.")(
    lambda moments, scale, shift: scale * moments.chunk(2, dim=1)[0] - shift
)
wrong("latents.standardise", "that is the inverse, divide and add, which is used before the decoder.")(
    lambda moments, scale, shift: moments.chunk(2, dim=1)[0] / scale + shift
)
wrong("latents.standardise", "you took the second half, the log variances; the means are the first half.")(
    lambda moments, scale, shift: scale * (moments.chunk(2, dim=1)[1] - shift)
)
wrong("latents.standardise", "means and variances do not alternate: the means are the first half of the channels.")(
    lambda moments, scale, shift: scale * (moments[:, 0::2] - shift)
)


def _grids() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    inputs = [torch.randn(shape, generator=g) + 0.5 for shape in ((2, 3, 6, 10), (1, 2, 8, 4))]
    return [((x.shape[1],), random_weights(LibraryDownsample(x.shape[1]), 4), x) for x in inputs]


@exercise(
    "latents.Downsample",
    minutes=5,
    difficulty=2,
    cases=_grids,
    call=run_module,
    against=LibraryDownsample,
    hints=(
        "The padding argument of a convolution adds the same on both sides. Here the sides differ, so pad before it.",
        "`F.pad(x, (left, right, above, below))`: the last axis comes first.",
        "`return self.conv(F.pad(x, (0, 1, 0, 1)))`.",
    ),
)
class Downsample(nn.Module):
    """Halve the grid `[B, C, h, w]` with a 3 x 3 convolution of stride 2.

    The constructor gets the number of channels. The convolution must be named `conv`, so that the trained weights
    fit. One row of zeros is added **below** and one column **on the right**, none above and none on the left.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h/2, w/2]
        # your turn
        return self.conv(F.pad(x, (0, 1, 0, 1)))


wrong(
    "latents.Downsample",
    "you pad on the left and above, as padding=1 does too: every cell then reads pixels one further up and left than "
    "in training.",
)(subclass(Downsample, forward=lambda self, x: self.conv(F.pad(x, (1, 1, 1, 1)))))
wrong("latents.Downsample", "you pad above instead of below; the numbers of F.pad are left, right, above, below.")(
    subclass(Downsample, forward=lambda self, x: self.conv(F.pad(x, (0, 1, 1, 0))))
)
wrong("latents.Downsample", "you pad by repeating the edge; the weights were trained with zeros there.")(
    subclass(Downsample, forward=lambda self, x: self.conv(F.pad(x, (0, 1, 0, 1), mode="replicate")))
)


# ---------------------------------------------------------------- the loss of a variational autoencoder


def _gaussians() -> list[tuple]:
    g = torch.Generator().manual_seed(5)
    shapes = ((3, 2), (2, 16, 16, 16), (1, 4))
    return [(torch.randn(shape, generator=g), 2 * torch.randn(shape, generator=g) - 1) for shape in shapes]


def _torch_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    normal = torch.distributions.Normal
    return torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).mean()


@exercise(
    "latents.kl",
    minutes=4,
    difficulty=1,
    cases=_gaussians,
    against=_torch_kl,
    hints=(
        "Compute the formula for every number first, then take one mean over all of them.",
        "The variance is the exponential of its logarithm: `logvar.exp()`.",
        "`0.5 * (mean**2 + logvar.exp() - 1 - logvar)`, then `.mean()`.",
    ),
)
def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of N(mean, variance) from N(0, 1), averaged over all numbers: one number.

    `mean` and `logvar`, the logarithm of the variance, have the same shape. For one number it is half of
    `mean**2 + variance - 1 - log(variance)`.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


@mistakes(
    "latents.kl",
    ("sum", "you add the divergences of all numbers; take their mean, or beta would depend on the image's size."),
    ("standard deviation", "exp(logvar / 2) is the standard deviation; the formula needs the variance, exp(logvar)."),
    ("half", "the factor 1/2 is missing."),
    ("sign", "the sign of the logarithm is wrong: a small variance must cost much, so subtract logvar."),
    ("one", "the -1 is missing: N(0, 1) itself must have the divergence 0."),
    ("logvar", "you put the logarithm of the variance where the variance should be."),
)
def _kl(mistake: str, mean: Tensor, logvar: Tensor) -> Tensor:
    variance = {"standard deviation": (logvar / 2).exp(), "logvar": logvar}.get(mistake, logvar.exp())
    log = -logvar if mistake == "sign" else logvar
    each = mean.square() + variance - int(mistake != "one") - log
    each = each if mistake == "half" else 0.5 * each
    return each.sum() if mistake == "sum" else each.mean()


def _networks() -> list[tuple]:
    g = torch.Generator().manual_seed(6)
    cases = []
    for batch, pixels, size, beta in ((4, 12, 3, 0.5), (32, 768, 2, 0.003), (5, 8, 1, 0.0)):
        encoder = nn.Sequential(nn.Linear(pixels, 8), nn.SiLU(), nn.Linear(8, 2 * size))
        decoder = nn.Sequential(nn.Linear(size, 8), nn.SiLU(), nn.Linear(8, pixels))
        images, noise = torch.randn(batch, pixels, generator=g), torch.randn(batch, size, generator=g)
        cases.append((randomise(encoder, g), randomise(decoder, g), images, noise, beta))
    return cases


def _with_gradient(answer, encoder, decoder, images, noise, beta):
    """The loss, and its gradient with respect to the first layer: a loss without one cannot be trained."""
    encoder.requires_grad_(True)
    with torch.enable_grad():
        loss = answer(encoder, decoder, images, noise, beta)
    if not isinstance(loss, Tensor) or loss.ndim:
        return loss
    if not loss.requires_grad:
        raise ValueError("no gradient flows from the loss to the encoder; leave out .detach(), .item() and no_grad")
    return loss, torch.autograd.grad(loss, encoder[0].weight)[0]


@exercise(
    "latents.vae_loss",
    minutes=8,
    difficulty=2,
    cases=_networks,
    call=_with_gradient,
    hints=(
        "Four steps: encode, add the noise, decode, compare. The first half of the encoder's numbers are the means.",
        "`mean, logvar = encoder(images).chunk(2, dim=1)`, and the latent is `mean + (logvar / 2).exp() * noise`.",
        "`((decoder(z) - images) ** 2).mean() + beta * KL`, with the formula of `kl` for KL, or a call of your `kl`.",
    ),
)
def vae_loss(encoder: nn.Module, decoder: nn.Module, images: Tensor, noise: Tensor, beta: float) -> Tensor:
    """The loss with which a variational autoencoder is trained: mean squared error + beta * KL.

    `encoder(images)`, `[B, 2 C]`, are the means and then the logarithms of the variances of the latents. Sample the
    latents with `noise`, `[B, C]`, decode them, and compare the result with `images`, `[B, D]`.
    """
    mean, logvar = encoder(images).chunk(2, dim=1)
    z = mean + (logvar / 2).exp() * noise
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (decoder(z) - images).square().mean() + beta * divergence


@mistakes(
    "latents.vae_loss",
    ("mean only", "you decode the means without noise; then nothing keeps the variances from becoming 0."),
    ("variance", "the noise is multiplied by the standard deviation exp(logvar / 2), not by the variance."),
    ("logvar", "the noise is multiplied by exp(logvar / 2), the standard deviation, not by a multiple of logvar."),
    ("no beta", "the KL term is not multiplied by beta."),
    ("halves", "the encoder's first half are the means, the second half the log variances; you exchanged them."),
    ("absolute", "you take the absolute error; this loss has the squared error."),
)
def _vae_loss(mistake: str, encoder, decoder, images: Tensor, noise: Tensor, beta: float) -> Tensor:
    mean, logvar = encoder(images).chunk(2, dim=1)
    if mistake == "halves":
        mean, logvar = logvar, mean
    deviation = {"mean only": 0, "variance": logvar.exp(), "logvar": logvar / 2}.get(mistake, (logvar / 2).exp())
    error = decoder(mean + deviation * noise) - images
    error = error.abs() if mistake == "absolute" else error.square()
    return error.mean() + (1 if mistake == "no beta" else beta) * kl(mean, logvar)
