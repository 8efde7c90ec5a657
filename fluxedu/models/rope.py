"""Rotary positions: how a token knows where it is.

Every token has a position of three integers, (frame, row, column). A head's numbers are taken in
pairs; each pair is a point in the plane, and it is turned by an angle proportional to one of the
three coordinates. Positions then enter the score of a query and a key through their *difference* only,
since turning both by the same angle changes nothing.

    head of 128 numbers = 8 pairs turned by the frame, 28 by the row, 28 by the column

Turning a point of the plane is multiplying a complex number, and that is how it is written here.
Source: RoFormer (arXiv 2104.09864); black-forest-labs/flux, math.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float = 10_000) -> Tensor:
    """The turn of every pair of every token: ``ids [..., N, axes] -> complex [..., 1, N, d/2]``.

    Pair ``i`` of an axis with ``d_axis`` numbers turns by ``position * theta ** (-2 i / d_axis)``
    radians: the first pair turns fast, the last almost not at all. Angles are taken in float64, since
    a position times a frequency loses digits in float32. The 1 is for the heads, which share the table.

    Raises ValueError when ``ids`` has not one coordinate per axis.
    """
    if ids.shape[-1] != len(axes_dim):
        raise ValueError(
            f"ids have {ids.shape[-1]} coordinates a token, but axes_dim {axes_dim} needs {len(axes_dim)}."
        )
    ids = ids.cpu() if ids.device.type == "mps" else ids  # which has no float64
    angles = []
    for axis, dim in enumerate(axes_dim):
        pair = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device)
        frequency = theta ** (-pair / dim)  # [d_axis/2]
        angles.append(ids[..., axis, None].double() * frequency)  # [..., N, d_axis/2]
    angle = torch.cat(angles, dim=-1)  # [..., N, d/2]
    return torch.polar(torch.ones_like(angle), angle).unsqueeze(-3)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn every pair of ``x [B, H, N, d]`` by ``table [..., 1, N, d/2]``; keeps shape and dtype.

    Pairs are neighbours, (x0, x1), (x2, x3), ..., not halves as in Llama.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if torch.compiler.is_compiling():  # compilers fuse plain arithmetic, not complex numbers: the same by hand
        cos, sin = torch.view_as_real(table).to(wide.dtype).unbind(-1)
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # [B, H, N, d/2]
    return torch.view_as_real(pairs * table.to(pairs.dtype)).flatten(-2).type_as(x)
