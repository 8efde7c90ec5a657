"""Pictures in and out: PIL, arrays and tensors to the autoencoder's range, and back."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fluxedu.sampling.request import RequestError

Picture = Image.Image | np.ndarray | Tensor


def to_tensor(image: Picture) -> Tensor:
    """A picture as ``[1, 3, H, W]`` in [-1, 1]: PIL, uint8 ``[H, W, 3]``, or a tensor already so."""
    if isinstance(image, Tensor):
        batch = image if image.ndim == 4 else image[None]
        if batch.ndim != 4 or batch.shape[1] != 3:
            raise RequestError(
                f"an image tensor must be [3, H, W] or [B, 3, H, W] in [-1, 1], not {list(image.shape)}."
            )
        if not batch.is_floating_point() or not (batch.abs() <= 1).all():  # bytes, or a NaN
            raise RequestError("an image tensor must have numbers in [-1, 1]; for bytes, x / 127.5 - 1.")
        return batch
    pixels = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise RequestError("an image must be a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W] in [-1, 1].")
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].contiguous().float() / 127.5 - 1


def to_mask(mask: Picture) -> Tensor:
    """A mask as ``[B, 1, H, W]``, 1 where to paint: PIL (white), an array or tensor ``[H, W]`` (above half)."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    values = torch.from_numpy(mask.copy()) if isinstance(mask, np.ndarray) else mask
    if not isinstance(values, Tensor) or not 2 <= values.ndim <= 4 or (values.ndim == 4 and values.shape[1] != 1):
        raise RequestError("a mask must be a PIL image, or an array or tensor [H, W], white or 1 where to paint.")
    levels = values.float() / (255 if values.dtype == torch.uint8 and values.max() > 1 else 1)
    if not ((levels >= 0) & (levels <= 1)).all():  # nor NaN
        raise RequestError("a mask must have numbers from 0 (keep) to 1 (paint).")
    return (levels >= 0.5).float().reshape(-1, 1, *levels.shape[-2:])


def fitted(picture: Tensor, shape: tuple[int, int], downscale: int) -> Tensor:
    """The picture resampled to the pixels of a latent ``shape``."""
    size = [side * downscale for side in shape]
    if list(picture.shape[-2:]) == size:
        return picture
    return F.interpolate(picture, size, mode="bicubic").clamp(-1, 1)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """``[B, 3, H, W]`` in [-1, 1] to PIL, rounded to 8 bits."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]
