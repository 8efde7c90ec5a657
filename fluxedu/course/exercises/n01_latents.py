"""Notebook 01: latents."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.models.autoencoder import Downsample as OurDownsample
from fluxedu.sampling.latents import pack as our_pack
from fluxedu.sampling.latents import unpack as our_unpack


def _latents() -> list[tuple]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, 4, 6, generator=g),), (torch.randn(1, 16, 2, 8, generator=g),)]


@exercise(
    "latents.pack",
    minutes=10,
    difficulty=2,
    cases=_latents,
    against=our_pack,
    tolerance=0,
    hints=(
        "Cut rows into (token row, row inside the token) and columns likewise, without moving a number; then say in "
        "which order the axes are to be read.",
        "`latent.reshape(b, c, h // 2, 2, w // 2, 2)` has the axes (picture, channel, row, inner row, column, inner "
        "column). `permute` puts the two that number the tokens in front.",
        "`.permute(0, 2, 4, 1, 3, 5)` gives (picture, row, column, channel, inner row, inner column); reshape it to "
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


@wrong(
    "latents.pack",
    "inside a token your channel changes fastest; FLUX's tokens hold all four numbers of channel 0, then of channel 1.",
)
def _channel_last(latent):
    b, c, h, w = latent.shape
    x = latent.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


@wrong("latents.pack", "the tokens are numbered column by column; they go row by row, as one reads.")
def _columns_first(latent):
    b, c, h, w = latent.shape
    x = latent.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 4, 2, 1, 3, 5)
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


@wrong("latents.pack", "a reshape alone moves nothing: the axes must be permuted before the last reshape.")
def _no_permute(latent):
    b, c, h, w = latent.shape
    return latent.reshape(b, h // 2 * (w // 2), 4 * c)


@wrong("latents.pack", "rows and columns inside each 2 x 2 square have changed places.")
def _inner_swapped(latent):
    b, c, h, w = latent.shape
    x = latent.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 5, 3)
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


def _tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(2, 6, 12, generator=g), 4, 6), (torch.randn(1, 4, 64, generator=g), 8, 2)]


@exercise(
    "latents.unpack",
    minutes=8,
    difficulty=2,
    cases=_tokens,
    against=our_unpack,
    tolerance=0,
    hints=(
        "It is `pack` read backwards: first give every axis its name again, then put them in the latent's order.",
        "A token's numbers are (channel, inner row, inner column): reshape to `(b, height // 2, width // 2, d // 4, 2, "
        "2)`.",
        "`.permute(0, 3, 1, 4, 2, 5)` gives (picture, channel, row, inner row, column, inner column); reshape it to "
        "`(b, d // 4, height, width)`.",
    ),
)
def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The way back: tokens `[B, N, D]` to a latent `[B, D/4, height, width]`, both sides counted in latent cells."""
    b, _, d = tokens.shape
    x = tokens.reshape(b, height // 2, width // 2, d // 4, 2, 2)  # [B, rows, columns, C, 2, 2]
    x = x.permute(0, 3, 1, 4, 2, 5)  # [B, C, rows, 2, columns, 2]
    return x.reshape(b, d // 4, height, width)


@wrong("latents.unpack", "you took a token's numbers as (row, column, channel); they are (channel, row, column).")
def _channel_was_last(tokens, height, width):
    b, _, d = tokens.shape
    x = tokens.reshape(b, height // 2, width // 2, 2, 2, d // 4)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, d // 4, height, width)


@wrong("latents.unpack", "you took the tokens as numbered column by column; they go row by row.")
def _were_columns(tokens, height, width):
    b, _, d = tokens.shape
    x = tokens.reshape(b, width // 2, height // 2, d // 4, 2, 2)
    return x.permute(0, 3, 2, 4, 1, 5).reshape(b, d // 4, height, width)


@wrong(
    "latents.unpack",
    "the last reshape must meet the axes in the order (row, inner row, column, inner column); yours are still "
    "(row, column, inner row, inner column).",
)
def _not_woven(tokens, height, width):
    b, _, d = tokens.shape
    x = tokens.reshape(b, height // 2, width // 2, d // 4, 2, 2)
    return x.permute(0, 3, 1, 2, 4, 5).reshape(b, d // 4, height, width)


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
        "The encoder gives twice as many channels as the latent has: means first, then logarithms of variances.",
        "`moments.chunk(2, dim=1)` gives the two halves. The latent is made from the means alone.",
        "`mean, logvar = moments.chunk(2, dim=1)`, then shift first and scale after: `scale * (mean - shift)`.",
    ),
)
def standardise(moments: Tensor, scale: float, shift: float) -> Tensor:
    """What the encoder gives, `[B, 2 C, h, w]`, to the latent that the flow is trained on, `[B, C, h, w]`.

    The first half of the channels is the mean, the second the logarithm of the variance. The official code takes the
    mean, subtracts `shift` and multiplies by `scale`.
    """
    mean, _ = moments.chunk(2, dim=1)
    return scale * (mean - shift)


@wrong("latents.standardise", "the shift is subtracted before the scaling, not after it.")
def _scaled_first(moments, scale, shift):
    return scale * moments.chunk(2, dim=1)[0] - shift


@wrong("latents.standardise", "it goes the way back, divide and add: that is what stands before the decoder.")
def _decoders(moments, scale, shift):
    return moments.chunk(2, dim=1)[0] / scale + shift


@wrong("latents.standardise", "you took the second half, the variances; the means are the first half.")
def _variances(moments, scale, shift):
    return scale * (moments.chunk(2, dim=1)[1] - shift)


@wrong("latents.standardise", "means and variances do not alternate: the first half of the channels are the means.")
def _alternating(moments, scale, shift):
    return scale * (moments[:, 0::2] - shift)


def _grids() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    cases = []
    for shape in ((2, 3, 6, 10), (1, 2, 8, 4)):
        c = shape[1]
        weight = torch.randn(c, c, 3, 3, generator=g)
        cases.append((torch.randn(shape, generator=g) + 0.5, weight, torch.randn(c, generator=g)))
    return cases


def _tried(answer: type[nn.Module], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    module = answer(x.shape[1])
    module.load_state_dict({"conv.weight": weight, "conv.bias": bias})
    return module(x)


@exercise(
    "latents.Downsample",
    minutes=8,
    difficulty=2,
    cases=_grids,
    call=_tried,
    against=OurDownsample,
    stub='''
    class Downsample(nn.Module):
        """Halve the grid `[B, C, h, w]` with a 3 x 3 convolution that moves by 2.

        It is made with the number of channels, and its convolution must be called `conv`, or the trained weights do
        not fit. One row of zeros is added **below** and one column **right**, none above and none left.
        """

        def __init__(self, channels: int):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h/2, w/2]
            raise NotImplementedError("your turn")
    ''',
    hints=(
        "A convolution's own padding adds the same on both sides. Here the sides differ, so pad before it.",
        "`F.pad(x, (left, right, above, below))`: the last axis comes first.",
        "`return self.conv(F.pad(x, (0, 1, 0, 1)))`.",
    ),
)
class Downsample(nn.Module):
    """Halve the grid `[B, C, h, w]` with a 3 x 3 convolution that moves by 2.

    It is made with the number of channels, and its convolution must be called `conv`, or the trained weights do
    not fit. One row of zeros is added **below** and one column **right**, none above and none left.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h/2, w/2]
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Padded(nn.Module):
    sides = (0, 0, 0, 0)

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, self.sides))


@wrong(
    "latents.Downsample",
    "you pad left and above, as padding=1 does too: every cell then looks one pixel further up and left than it was "
    "trained to.",
)
class _AllSides(_Padded):
    sides = (1, 1, 1, 1)


@wrong("latents.Downsample", "you pad right, but above; the numbers of F.pad are left, right, above, below.")
class _RightAbove(_Padded):
    sides = (0, 1, 1, 0)


@wrong("latents.Downsample", "you pad by repeating the edge; the weights were trained with zeros there.")
class _Repeated(_Padded):
    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1), mode="replicate"))
