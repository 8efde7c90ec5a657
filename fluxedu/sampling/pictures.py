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
