"""Notebook 04: rotary positions."""

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, wrong
from fluxedu.models.attention import rotate as ours
from fluxedu.sampling.latents import image_ids as our_ids


def _angles() -> list[tuple]:
    return [(torch.arange(5.0), 8, 10_000.0), (torch.tensor([0.0, 3.0, 100.0]), 6, 100.0)]


@exercise(
    "rope.angles",
    minutes=8,
    difficulty=1,
    cases=_angles,
    hints=(
        "There is one frequency per pair, so `dim / 2` of them. The first is 1, and each next one is smaller.",
        "`torch.arange(0, dim, 2)` gives 0, 2, 4, ...: twice the pair's number, which is what the exponent needs.",
        "The frequencies are `theta ** (-torch.arange(0, dim, 2) / dim)`; every position times every frequency is an "
        "outer product.",
    ),
)
def angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """By how much is each pair turned at each position? `positions [N]` -> angles `[N, dim / 2]` in radians.

    Pair `i` of `dim` numbers turns by `position * theta ** (-2 i / dim)`.
    """
    frequency = theta ** (-torch.arange(0, dim, 2) / dim)  # [dim / 2]
    return positions[:, None] * frequency[None, :]


@wrong("rope.angles", "the exponent runs over pairs 0, 1, 2, ... divided by dim: pair i needs 2 i / dim.")
def _half_exponent(positions, dim, theta):
    return positions[:, None] * theta ** (-torch.arange(0, dim // 2) / dim)


@wrong("rope.angles", "the frequencies grow from pair to pair; the exponent lacks its minus sign.")
def _growing(positions, dim, theta):
    return positions[:, None] * theta ** (torch.arange(0, dim, 2) / dim)


@wrong("rope.angles", "the slowest pair comes first; the fastest should.")
def _backwards(positions, dim, theta):
    return (positions[:, None] * theta ** (-torch.arange(0, dim, 2) / dim)).flip(-1)


def _turns() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    return [
        (torch.randn(1, 2, 5, 8, generator=g), torch.randn(5, 4, generator=g)),
        (torch.randn(2, 1, 3, 6, generator=g), torch.randn(3, 3, generator=g)),
    ]


def _by_table(x: Tensor, angles: Tensor) -> Tensor:
    return ours(x, torch.polar(torch.ones_like(angles), angles)[None])


@exercise(
    "rope.rotate",
    minutes=12,
    difficulty=2,
    cases=_turns,
    against=_by_table,
    hints=(
        "A pair is two neighbours, (x0, x1), (x2, x3), ...; as points of the plane they turn by their angle.",
        "Turning (a, b) by an angle gives (a cos - b sin, a sin + b cos). `x[..., 0::2]` are all the a, `x[..., 1::2]` "
        "all the b.",
        "To interleave again: `torch.stack([new_a, new_b], dim=-1).flatten(-2)`.",
    ),
)
def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn every pair of neighbours of `x [B, H, N, d]` by its angle, `angles [N, d / 2]`.

    Every head and every picture of the batch is turned alike. Positive angles turn (1, 0) towards (0, 1).
    """
    cos, sin = angles.cos(), angles.sin()  # [N, d/2], the same for every head
    a, b = x[..., 0::2], x[..., 1::2]  # [B, H, N, d/2] each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


@wrong("rope.rotate", "your pairs are halves, (x0, x[d/2]), as in Llama; FLUX turns neighbours, (x0, x1).")
def _halves(x, angles):
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@wrong("rope.rotate", "it turns the other way round: check the sign of the two sines.")
def _other_way(x, angles):
    return rotate(x, -angles)


@wrong(
    "rope.rotate", "the numbers are right, but the order is not: pairs must be interleaved again, not put end to end."
)
def _not_interleaved(x, angles):
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _grids() -> list[tuple]:
    return [(2, 3), (4, 1), (3, 3)]


@exercise(
    "rope.ids",
    minutes=6,
    difficulty=1,
    cases=_grids,
    call=lambda answer, rows, columns: answer(rows, columns).float(),
    against=lambda rows, columns: our_ids(2 * rows, 2 * columns),
    tolerance=0,
    hints=(
        "The patches are numbered row by row, as one reads. The first coordinate is 0 for every one.",
        "Make a grid `[rows, columns, 3]` of zeros, fill the second coordinate with the row and the third with the "
        "column.",
        "`grid[..., 1] = torch.arange(rows)[:, None]`, `grid[..., 2] = torch.arange(columns)[None, :]`, then flatten.",
    ),
)
def ids(rows: int, columns: int) -> Tensor:
    """The positions of the patches of a picture, `[rows * columns, 3]`: (0, row, column) each, counted from 0."""
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)[None, :]
    return grid.reshape(rows * columns, 3)


@wrong("rope.ids", "rows and columns have changed places.")
def _swapped(rows, columns):
    return ids(rows, columns)[:, [0, 2, 1]]


@wrong("rope.ids", "it counts from 1; FLUX counts rows and columns from 0.")
def _from_one(rows, columns):
    return ids(rows, columns) + torch.tensor([0.0, 1.0, 1.0])


@wrong("rope.ids", "the patches come column by column; they are numbered row by row.")
def _by_columns(rows, columns):
    return ids(columns, rows)[:, [0, 2, 1]]
