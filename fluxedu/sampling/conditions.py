"""What the members of the family read besides text, as tokens.

    fill      channels after the noise: [64 noise | 64 masked picture | 256 mask]
    control   channels after the noise: [64 noise | 64 control picture]           (canny, depth)
    kontext   tokens after the picture's own, at ids (1, row, column)
    redux     tokens after T5's, made from a picture by the Redux head

Source: black-forest-labs/flux, sampling.py (prepare_fill, prepare_control, prepare_kontext, prepare_redux).
"""

from __future__ import annotations

from torch import Tensor

from fluxedu.sampling.latents import image_ids, pack


def fold_mask(mask: Tensor, downscale: int = 8) -> Tensor:
    """A mask of pixels, ``[B, 1, H, W]``, 1 where to paint, as tokens ``[B, N, 4 * downscale**2]``.

    The ``downscale x downscale`` pixels of a latent cell become that cell's channels, so nothing of the
    mask's edge is lost; then 2 x 2 cells are one token, as for any latent.
    """
    b, _, h, w = mask.shape
    d = downscale
    cells = mask.reshape(b, h // d, d, w // d, d).permute(0, 2, 4, 1, 3)  # [B, d, d, H/d, W/d]
    return pack(cells.reshape(b, d * d, h // d, w // d))


def hidden(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture ``[B, 3, H, W]`` in [-1, 1] with grey, 0, where the mask is 1."""
    return picture * (1 - mask)


def reference_ids(height: int, width: int) -> Tensor:
    """Positions of a reference picture's tokens, (1, row, column): the same places, another frame."""
    ids = image_ids(height, width)
    ids[:, 0] = 1
    return ids
