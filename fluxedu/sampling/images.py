"""Pictures as tensors: PIL images and arrays to the autoencoder's range and back, and their edges for canny."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fluxedu.errors import RequestError

Picture = Image.Image | np.ndarray | Tensor


def to_tensor(image: Picture) -> Tensor:
    """A picture as ``[1, 3, H, W]`` in [-1, 1]: from PIL, uint8 ``[H, W, 3]``, or a tensor in that form."""
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
    """A mask as ``[B, 1, H, W]``, 1 where to paint: from PIL (white), or an array or tensor ``[H, W]`` (from 0.5)."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    values = torch.from_numpy(mask.copy()) if isinstance(mask, np.ndarray) else mask
    if not isinstance(values, Tensor) or not 2 <= values.ndim <= 4 or (values.ndim == 4 and values.shape[1] != 1):
        raise RequestError("a mask must be a PIL image, or an array or tensor [H, W], white or 1 where to paint.")
    levels = values.float() / (255 if values.dtype == torch.uint8 and values.max() > 1 else 1)
    if not ((levels >= 0) & (levels <= 1)).all():  # nor NaN
        raise RequestError("a mask must have numbers from 0 (keep) to 1 (paint).")
    return (levels >= 0.5).float().reshape(-1, 1, *levels.shape[-2:])


def resized(picture: Tensor, shape: tuple[int, int], downscale: int) -> Tensor:
    """The picture, resampled to the pixel size of a latent ``shape``."""
    size = [side * downscale for side in shape]
    if list(picture.shape[-2:]) == size:
        return picture
    return F.interpolate(picture, size, mode="bicubic").clamp(-1, 1)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """``[B, 3, H, W]`` in [-1, 1] to PIL, rounded to 8 bits."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]


def edges(image: Image.Image | np.ndarray | str | Path, low: float = 50, high: float = 200) -> np.ndarray:
    """The edges of a picture, white on black, uint8 ``[H, W, 3]``: what canny models read as ``control=``.

    image: a PIL image, uint8 ``[H, W, 3]``, or the path of a file · low, high: thresholds of the gradient of the 8-bit
    grey values; an edge starts above ``high`` and continues while above ``low``. Source: Canny 1986 by OpenCV, with
    the thresholds of black-forest-labs/flux, modules/image_embedders.py. Raises RequestError when OpenCV is not
    installed, for what is no picture, and for thresholds that are not 0 <= low <= high.

        fe.load("nano-canny")("a pink circle", control=edges("photo.png"))
    """
    try:
        import cv2
    except ImportError:
        raise RequestError("edges needs OpenCV: pip install 'fluxedu[edges]'.") from None
    if not 0 <= low <= high:
        raise RequestError(f"low and high must be 0 <= low <= high, not {low} and {high}.")
    try:
        picture = Image.open(image) if isinstance(image, str | Path) else image
        pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    except OSError as error:
        raise RequestError(f"image must be a picture, and {image} cannot be read as one: {error}.") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise RequestError(f"image must be uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}.")
    return np.repeat(cv2.Canny(np.ascontiguousarray(pixels), low, high)[..., None], 3, axis=-1)
