"""Notebook 04: rotary positions."""

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.models.attention import rotate as library_rotate
from fluxedu.sampling.latents import image_ids


def _positions() -> list[tuple]:
    return [(torch.arange(5.0), 8, 10_000.0), (torch.tensor([0.0, 3.0, 100.0]), 6, 100.0)]


@exercise(
    "rope.angles",
    minutes=7,
    difficulty=1,
    cases=_positions,
    hints=(
        "There is one frequency per pair, so there are `dim / 2`. The first is 1, and each next one is smaller.",
        "`torch.arange(0, dim, 2)` gives 0, 2, 4, ...: twice the index of the pair, which is what the exponent needs.",
        "The frequencies are `theta ** (-torch.arange(0, dim, 2) / dim)`; multiply every position by every frequency "
        "(an outer product).",
    ),
)
def angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """The rotation angle of each pair at each position: `positions [N]` -> angles `[N, dim / 2]` in radians.

    Pair `i` of `dim` numbers rotates by `position * theta ** (-2 i / dim)`.
    """
    frequency = theta ** (-torch.arange(0, dim, 2) / dim)  # [dim / 2]
    return positions[:, None] * frequency[None, :]


wrong("rope.angles", "your exponent is -i / dim for pair i; it should be -2 i / dim.")(
    lambda positions, dim, theta: positions[:, None] * theta ** (-torch.arange(0, dim // 2) / dim)
)
wrong("rope.angles", "the frequencies grow from pair to pair; the exponent lacks its minus sign.")(
    lambda positions, dim, theta: positions[:, None] * theta ** (torch.arange(0, dim, 2) / dim)
)
wrong("rope.angles", "the slowest pair comes first in your answer; the fastest should.")(
    lambda positions, dim, theta: angles(positions, dim, theta).flip(-1)
)


def _pairs() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    return [
        (torch.randn(1, 2, 5, 8, generator=g), torch.randn(5, 4, generator=g)),
        (torch.randn(2, 1, 3, 6, generator=g), torch.randn(3, 3, generator=g)),
    ]


@exercise(
    "rope.rotate",
    minutes=12,
    difficulty=2,
    cases=_pairs,
    against=lambda x, angles: library_rotate(x, torch.polar(torch.ones_like(angles), angles)[None]),
    hints=(
        "A pair is two neighbours, (x0, x1), (x2, x3), ... Take each pair as a point in the plane and rotate it by its "
        "angle.",
        "Rotating (a, b) by an angle gives (a cos - b sin, a sin + b cos). `x[..., 0::2]` are all the a, "
        "`x[..., 1::2]` all the b.",
        "To interleave the results again: `torch.stack([new_a, new_b], dim=-1).flatten(-2)`.",
    ),
)
def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate every pair of neighbouring numbers of `x [B, H, N, d]` by its angle, `angles [N, d / 2]`.

    All heads and all images of the batch use the same angles. Positive angles rotate (1, 0) towards (0, 1).
    """
    cos, sin = angles.cos(), angles.sin()  # [N, d/2]
    a, b = x[..., 0::2], x[..., 1::2]  # [B, H, N, d/2] each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


@wrong("rope.rotate", "your pairs are halves, (x0, x[d/2]), as in Llama; FLUX pairs neighbours, (x0, x1).")
def _halves(x, angles):
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


wrong("rope.rotate", "you rotate in the opposite direction: check the sign of the two sines.")(
    lambda x, angles: rotate(x, -angles)
)
wrong("rope.rotate", "the numbers are right, but not their order: interleave the pairs instead of concatenating them.")(
    lambda x, angles: rotate(x, angles).unflatten(-1, (-1, 2)).mT.flatten(-2)
)


def _grids() -> list[tuple]:
    return [(2, 3), (4, 1), (3, 3)]


@exercise(
    "rope.ids",
    minutes=5,
    difficulty=1,
    cases=_grids,
    call=lambda answer, rows, columns: answer(rows, columns).float(),
    against=lambda rows, columns: image_ids(2 * rows, 2 * columns),
    tolerance=0,
    hints=(
        "The patches are numbered row by row, as you read. The first coordinate is 0 for all of them.",
        "Make a grid `[rows, columns, 3]` of zeros, fill the second coordinate with the row and the third with the "
        "column.",
        "`grid[..., 1] = torch.arange(rows)[:, None]`, `grid[..., 2] = torch.arange(columns)[None, :]`, then reshape.",
    ),
)
def ids(rows: int, columns: int) -> Tensor:
    """The position ids of an image's patches, `[rows * columns, 3]`: (0, row, column) each, counted from 0."""
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)[None, :]
    return grid.reshape(rows * columns, 3)


wrong("rope.ids", "rows and columns are exchanged.")(lambda rows, columns: ids(rows, columns)[:, [0, 2, 1]])
wrong("rope.ids", "you count from 1; FLUX counts rows and columns from 0.")(
    lambda rows, columns: ids(rows, columns) + torch.tensor([0.0, 1.0, 1.0])
)
wrong("rope.ids", "your patches are numbered column by column; number them row by row.")(
    lambda rows, columns: ids(columns, rows)[:, [0, 2, 1]]
)


def _image_positions() -> list[tuple]:
    return [(image_ids(4, 8), 1), (image_ids(16, 16), 3), (image_ids(6, 10).flip(0), 4)]


@exercise(
    "rope.roll",
    minutes=3,
    difficulty=1,
    cases=_image_positions,
    call=lambda answer, *case: answer(*case).float(),
    against=lambda ids, columns: torch.stack([*ids[:, :2].T, (ids[:, 2] + columns) % len(ids[:, 2].unique())], dim=1),
    tolerance=0,
    after="rope.rotate",
    hints=(
        "Only the third coordinate changes. A number that would become as large as the number of columns starts again "
        "at 0, which is what the remainder `%` does.",
        "The number of columns is the largest column id plus 1: `ids[:, 2].max() + 1`.",
        "`new = ids.clone()`, `new[:, 2] = (ids[:, 2] + columns) % (ids[:, 2].max() + 1)`, `return new`.",
    ),
)
def roll(ids: Tensor, columns: int) -> Tensor:
    """Position ids `[N, 3]` with every patch moved `columns` columns to the right, around the image's edge.

    `ids` are those of all patches of an image, in any order, so the columns run from 0 to C - 1. A patch that would
    leave the image on the right comes back at column 0. Frames and rows stay.
    """
    rolled = ids.clone()
    rolled[:, 2] = (ids[:, 2] + columns) % (ids[:, 2].max() + 1)
    return rolled


@mistakes(
    "rope.roll",
    ("rows", "you move the rows; the column is the last of the three coordinates."),
    ("left", "you move the patches to the left; add to the columns."),
    ("no edge", "patches leave the image on the right; let them start again from column 0."),
    ("off by one", "you take the remainder by the largest column, C - 1; there are C columns."),
    ("order", "you move the rows of the table, so the tokens change places; change the numbers of their columns."),
    ("clamp", "patches pile up in the last column; let them start again from column 0."),
)
def _roll_with(mistake, ids, columns):
    axis, largest = (1 if mistake == "rows" else 2), ids[:, 2].max()
    if mistake == "order":
        return ids.roll(columns, dims=0)
    rolled = ids.clone()
    moved = ids[:, axis] + (-columns if mistake == "left" else columns)
    count = ids[:, axis].max() + (0 if mistake == "off by one" else 1)
    rolled[:, axis] = (
        moved if mistake == "no edge" else moved.clamp(max=largest) if mistake == "clamp" else moved % count
    )
    return rolled
