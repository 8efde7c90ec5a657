"""Notebook 01b: packing into tokens."""

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes, wrong
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


@exercise(
    "latents.token_at",
    minutes=4,
    difficulty=1,
    cases=lambda: (
        [(y, x, width) for y, x, width in ((40, 20, 128), (0, 0, 96), (15, 16, 160), (100, 1000, 1024))]
        + [(1023, 1023, 1024), (47, 31, 96), (16, 15, 128)]
    ),
    tolerance=0,
    hints=(
        "Divide both coordinates by the side of a token in pixels, and drop the remainder.",
        "A row of tokens has `width // 16` of them, and the tokens of all rows above come first.",
        "`y // 16 * (width // 16) + x // 16`.",
    ),
)
def token_at(y: int, x: int, width: int) -> int:
    """The index of the image token that covers the pixel in row `y` and column `x` of an image `width` pixels wide.

    A token covers 16 x 16 pixels, and tokens are numbered row by row. All coordinates begin with 0.
    """
    return y // 16 * (width // 16) + x // 16


@mistakes(
    "latents.token_at",
    ("exchanged", "you exchanged the row and the column: y counts rows, each of which has width / 16 tokens."),
    ("cells", "you count cells of 8 x 8 pixels; a token has 2 x 2 of them, so it covers 16 x 16 pixels."),
    ("pixels", "the tokens of one row are width // 16; you count width of them."),
    ("one", "you count from 1; the first token has the index 0."),
    ("round", "you round to the nearest token; a pixel belongs to the token in which it lies, so round down."),
)
def _token_at(mistake: str, y: int, x: int, width: int) -> int:
    if mistake == "exchanged":
        return x // 16 * (width // 16) + y // 16
    if mistake == "cells":
        return y // 8 * (width // 8) + x // 8
    if mistake == "round":
        return round(y / 16) * (width // 16) + round(x / 16)
    return y // 16 * (width if mistake == "pixels" else width // 16) + x // 16 + (mistake == "one")


def _changes() -> list[tuple]:
    g = torch.Generator().manual_seed(7)
    sizes = ((2, 32, 48, 1, 2, 0), (16, 128, 128, 8, 8, 8), (1, 40, 32, 3, 1, 4))
    return [
        (torch.rand(count, 3, h, w, generator=g), torch.rand(count, 3, h, w, generator=g), row, column, margin)
        for count, h, w, row, column, margin in sizes
    ]


@exercise(
    "latents.share_near",
    minutes=7,
    difficulty=2,
    cases=_changes,
    hints=(
        "Square the difference of the images and sum it over the colours, which leaves `[B, H, W]`.",
        "The cell's own pixels are the rows from `8 * row` to `8 * row + 8`, without the last one, and the columns "
        "likewise.",
        "`change[:, 8 * row - margin : 8 * row + 8 + margin, 8 * column - margin : 8 * column + 8 + margin]`, summed "
        "over rows and columns, divided by the sum of all of `change`.",
    ),
)
def share_near(before: Tensor, after: Tensor, row: int, column: int, margin: int) -> Tensor:
    """Which share of the squared change between two images `[B, 3, H, W]` lies near a latent cell: `[B]`.

    "Near" means the 8 x 8 pixels of the cell in this row and column, and `margin` more pixels on each side. The
    box lies inside the image. Square the changes first, then add up the colours.
    """
    change = (after - before).square().sum(1)  # [B, H, W]
    top, left = 8 * row - margin, 8 * column - margin
    near = change[:, top : top + 8 + 2 * margin, left : left + 8 + 2 * margin]
    return near.sum((1, 2)) / change.sum((1, 2))


@mistakes(
    "latents.share_near",
    ("absolute", "you add absolute differences; square them."),
    ("exchanged", "you exchanged rows and columns: the image's axes are image, colour, row, column."),
    ("batch", "you divide by the change of all images together; each image has its own share."),
    ("one side", "your margin is missing on the right and below: the box has 8 + 2 * margin pixels along each side."),
    ("mean", "you divide the mean change near the cell by the mean over the image; divide the sums."),
)
def _share_near(mistake: str, before: Tensor, after: Tensor, row: int, column: int, margin: int) -> Tensor:
    if mistake == "exchanged":
        row, column = column, row
    change = (after - before).abs() if mistake == "absolute" else (after - before).square()
    change, side = change.sum(1), 8 + (1 if mistake == "one side" else 2) * margin
    near = change[:, 8 * row - margin :, 8 * column - margin :][:, :side, :side]
    if mistake == "mean":
        return near.mean((1, 2)) / change.mean((1, 2))
    return near.sum((1, 2)) / (change.sum() if mistake == "batch" else change.sum((1, 2)))
