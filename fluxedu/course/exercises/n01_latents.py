"""Notebook 01: latents."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.course.exercises import random_weights, run_module, subclass
from fluxedu.models.autoencoder import Downsample as LibraryDownsample
from fluxedu.sampling.latents import pack as library_pack
from fluxedu.sampling.latents import unpack as library_unpack


def _latents() -> list[tuple]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, 4, 6, generator=g),), (torch.randn(1, 16, 2, 8, generator=g),)]


@exercise(
    "latents.pack",
    minutes=10,
    difficulty=2,
    cases=_latents,
    against=library_pack,
    tolerance=0,
    hints=(
        "Split the row axis into (token row, row inside the token), and the column axis likewise. A reshape does this "
        "without moving a number. Then put the axes into the right order.",
        "`latent.reshape(b, c, h // 2, 2, w // 2, 2)` has the axes (image, channel, row, inner row, column, inner "
        "column). `permute` moves the two axes that number the tokens to the front.",
        "`.permute(0, 2, 4, 1, 3, 5)` gives (image, row, column, channel, inner row, inner column); reshape it to "
        "`(b, h // 2 * (w // 2), 4 * c)`.",
    ),
)
def pack(latent: Tensor) -> Tensor:
    """Cut a latent `[B, C, h, w]` into tokens `[B, h/2 * w/2, 4 C]`, one for each square of 2 x 2 cells.

    Tokens are numbered row by row. Inside a token, the channel changes slowest, then the row, then the column.
    """
    b, c, h, w = latent.shape
    x = latent.reshape(b, c, h // 2, 2, w // 2, 2)  # [B, C, rows, 2, columns, 2]
    x = x.permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, C, 2, 2]
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


def _packed(latent: Tensor, *order: int) -> Tensor:
    b, c, h, w = latent.shape
    return latent.reshape(b, c, h // 2, 2, w // 2, 2).permute(order).reshape(b, h // 2 * (w // 2), 4 * c)


wrong("latents.pack", "inside a token your channel changes fastest; FLUX's tokens hold all of channel 0 first.")(
    lambda latent: _packed(latent, 0, 2, 4, 3, 5, 1)
)
wrong("latents.pack", "your tokens are numbered column by column; number them row by row, as you read.")(
    lambda latent: _packed(latent, 0, 4, 2, 1, 3, 5)
)
wrong("latents.pack", "you exchanged rows and columns inside each 2 x 2 square.")(
    lambda latent: _packed(latent, 0, 2, 4, 1, 5, 3)
)
wrong("latents.pack", "a reshape alone does not reorder numbers: permute the axes before the last reshape.")(
    lambda latent: latent.reshape(len(latent), -1, 4 * latent.shape[1])
)


def _tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(2, 6, 12, generator=g), 4, 6), (torch.randn(1, 4, 64, generator=g), 8, 2)]


@exercise(
    "latents.unpack",
    minutes=8,
    difficulty=2,
    cases=_tokens,
    against=library_unpack,
    tolerance=0,
    hints=(
        "Undo the steps of `pack` in reverse order: first split every axis, then put the axes into the latent's order.",
        "The numbers of a token are (channel, inner row, inner column): reshape to `(b, height // 2, width // 2, "
        "d // 4, 2, 2)`.",
        "`.permute(0, 3, 1, 4, 2, 5)` gives (image, channel, row, inner row, column, inner column); reshape it to "
        "`(b, d // 4, height, width)`.",
    ),
)
def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: tokens `[B, N, D]` to a latent `[B, D/4, height, width]`, both sides in latent cells."""
    b, _, d = tokens.shape
    x = tokens.reshape(b, height // 2, width // 2, d // 4, 2, 2)  # [B, rows, columns, C, 2, 2]
    x = x.permute(0, 3, 1, 4, 2, 5)  # [B, C, rows, 2, columns, 2]
    return x.reshape(b, d // 4, height, width)


wrong("latents.unpack", "you read a token's numbers as (row, column, channel); they are (channel, row, column).")(
    lambda tokens, height, width: unpack(tokens.unflatten(-1, (4, -1)).mT.flatten(-2), height, width)
)
wrong("latents.unpack", "you read the tokens as numbered column by column; they are numbered row by row.")(
    lambda tokens, height, width: unpack(
        tokens.unflatten(1, (width // 2, -1)).transpose(1, 2).flatten(1, 2), height, width
    )
)
wrong(
    "latents.unpack",
    "before the last reshape the axes must be in the order (row, inner row, column, inner column); yours are "
    "(row, column, inner row, inner column).",
)(lambda tokens, height, width: tokens.unflatten(-1, (-1, 4)).transpose(1, 2).reshape(len(tokens), -1, height, width))


def _moments() -> list[tuple]:
    g = torch.Generator().manual_seed(3)
    return [
        (torch.randn(2, 8, 3, 5, generator=g), 0.3611, 0.1159),
        (torch.randn(1, 6, 2, 3, generator=g) + 1, 0.6, -0.4),
    ]


@exercise(
    "latents.standardise",
    minutes=6,
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
    minutes=8,
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
