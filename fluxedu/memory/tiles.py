"""Decoding in tiles: the autoencoder's activations no longer grow with the picture.

Tiles overlap and are blended linearly. It is not exact: the attention at the bottom and the group norms see a
tile and not the picture, so ``decode_tiled`` is only for what would not fit. Beside the whole decode of the
miniature's pictures of 24 x 24 cells, tiles of 16 cells: 47 to 51 dB for seven of eight seeds, 32 dB for one, where a
tile was all background.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxedu.models.autoencoder import AutoEncoder

TILE = 64  # latent cells a side: 512 pixels
OVERLAP = 16


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover ``length`` and share at least ``overlap``."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def ramp(start: int, tile: int, length: int, overlap: int) -> Tensor:
    """A tile's weight along one side: rising and falling over ``overlap``, but not at the picture's own edges."""
    place = torch.arange(tile) + 0.5
    weight = torch.ones(tile)
    if start > 0:
        weight = weight * (place / overlap).clamp(max=1)
    if start + tile < length:
        weight = weight * ((tile - place) / overlap).clamp(max=1)
    return weight


def decode_tiled(ae: AutoEncoder, latent: Tensor, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Like ``ae.decode``: latent ``[B, z, h, w]`` -> image ``[B, 3, 8h, 8w]``, ``tile x tile`` cells at a time."""
    if not 0 < overlap < tile:
        raise ValueError(f"overlap must be between 0 and the tile's {tile} cells, not {overlap}.")
    b, _, rows, columns = latent.shape
    d, (high, wide) = ae.config.downscale, (min(tile, rows), min(tile, columns))
    image = torch.zeros(b, ae.config.out_ch, d * rows, d * columns, dtype=torch.float32, device=latent.device)
    total = torch.zeros(d * rows, d * columns, device=latent.device)
    for top in starts(rows, high, overlap):
        for left in starts(columns, wide, overlap):
            part = AutoEncoder.decode(ae, latent[:, :, top : top + high, left : left + wide])
            weight = torch.outer(  # [d * high, d * wide]
                ramp(d * top, d * high, d * rows, d * overlap), ramp(d * left, d * wide, d * columns, d * overlap)
            ).to(latent.device)
            here = ..., slice(d * top, d * (top + high)), slice(d * left, d * (left + wide))
            image[here] += weight * part.float()
            total[here] += weight
    return (image / total).to(latent.dtype)
