"""Latents as tokens: noise, packing, position ids, sizes.

    latent [B, 16, h, w]  <->  tokens [B, h/2 * w/2, 64]     (2 x 2 cells of 16 channels are one token)

Source: black-forest-labs/flux, sampling.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluxedu.errors import RequestError, check_device, check_integer, check_tensor, checked, describe

PATCH = 2  # latent cells along one side of a token
MAX_CELLS = 4096  # along one side of a latent


@checked(RequestError)
def pack(latent: Tensor) -> Tensor:
    """``[B, C, h, w] -> [B, h/2 * w/2, 4 C]``; inside a token the order is (channel, row, column)."""
    b, c, h, w = check_tensor("latent", latent, "[B, C, h, w]").shape
    if h % PATCH or w % PATCH:
        raise RequestError(f"a latent must have an even number of rows and columns to be packed, not {h} x {w}.")
    x = latent.reshape(b, c, h // 2, 2, w // 2, 2)  # [B, C, rows, 2, cols, 2]
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


@checked(RequestError)
def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`: ``[B, h/2 * w/2, 4 C] -> [B, C, h, w]``; ``height``, ``width`` in cells."""
    b, n, d = check_tensor("tokens", tokens, "[B, N, 4 C]").shape
    rows, cols = (check_integer("the side of a latent", side, 2, MAX_CELLS) // 2 for side in (height, width))
    if n != rows * cols or d % 4:
        raise RequestError(
            f"{n} tokens of {d} numbers do not fill a latent of {height} x {width} cells, which has {rows * cols} "
            "tokens of 4 numbers per channel."
        )
    x = tokens.reshape(b, rows, cols, d // 4, 2, 2)  # [B, rows, cols, C, 2, 2]
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, height, width)


@checked(RequestError)
def image_ids(height: int, width: int, axes: int = 3) -> Tensor:
    """Position ids of image tokens, ``[h/2 * w/2, 3]`` = (0, row, column), for a latent of h x w cells.

    axes: 4 for FLUX.2, whose ids are (0, row, column, 0). Float32, which is exact here; in bfloat16 rows from 257 on
    would be wrong.
    """
    rows, cols = (check_integer("the side of a latent", side, 2, MAX_CELLS) // 2 for side in (height, width))
    ids = torch.zeros(rows, cols, check_integer("axes", axes, 3, 4), dtype=torch.float32, device="cpu")
    ids[..., 1] = torch.arange(rows, device="cpu")[:, None]
    ids[..., 2] = torch.arange(cols, device="cpu")[None, :]
    return ids.reshape(-1, axes)


@checked(RequestError)
def text_ids(length: int, axes: int = 3) -> Tensor:
    """Position ids of text tokens, ``[L, 3]``: all zero. The order of words is encoded by T5 alone.

    axes: 4 for FLUX.2, whose ids are (0, 0, 0, index): there the transformer reads the order too.
    """
    check_integer("axes", axes, 3, 4)
    ids = torch.zeros(check_integer("length", length, 0, 1 << 20), axes, dtype=torch.float32, device="cpu")
    if axes == 4:
        ids[:, 3] = torch.arange(length, device="cpu")
    return ids


def latent_size(height: int, width: int, downscale: int = 8, rounding: str = "up") -> tuple[int, int]:
    """Latent rows and columns for an image of ``height x width`` pixels; always even.

    ``rounding="up"`` is BFL's, ``2 * ceil(pixels / 16)`` (1000 px -> 126 cells);
    ``rounding="down"`` is diffusers', ``2 * floor(pixels / 16)`` (1000 px -> 124 cells).
    """
    if not isinstance(rounding, str) or rounding not in ("up", "down"):
        raise RequestError(f"rounding must be 'up' (as BFL) or 'down' (as diffusers), not {describe(rounding)}.")
    round_to_int = math.ceil if rounding == "up" else math.floor
    return tuple(2 * round_to_int(pixels / (PATCH * downscale)) for pixels in (height, width))


@checked(RequestError)
def draw_noise(
    seed: int,
    channels: int,
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Standard normal noise ``[1, C, h, w]`` for one image, in ``dtype`` and on ``device``.

    It is always drawn in float32 on the CPU and then converted. So it depends only on the image's own seed: it is the
    same alone, in a batch, on any device, and whatever PyTorch's default dtype and device are.
    """
    generator = torch.Generator("cpu").manual_seed(check_integer("seed", seed, -(2**63), 2**64 - 1))
    for name, size in (("channels", channels), ("height", height), ("width", width)):
        check_integer(name, size, 1, MAX_CELLS)
    noise = torch.randn(1, channels, height, width, generator=generator, dtype=torch.float32, device="cpu")
    return noise.to(device if str(device) == "meta" else check_device(device), dtype)
