"""Pictures as tensors: PIL images and arrays to the autoencoder's range and back, and their edges for canny."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from fluxedu.errors import RequestError, checked, describe
from fluxedu.files import check_path

Picture = Image.Image | np.ndarray | Tensor
MAX_PIXELS = 1 << 26  # of a picture that is read: 8192 x 8192


def to_tensor(image: Picture) -> Tensor:
    """A picture as ``[1, 3, H, W]`` in [-1, 1]: from PIL, uint8 ``[H, W, 3]``, or a tensor in that form.

    A PIL image may have any mode that Pillow converts to RGB, 16 bits of grey (I;16, or I with numbers up to 65535), or
    floating-point grey from 0 to 1 (F). It is turned as its EXIF orientation says and, where it is transparent, shown
    on white. Raises RequestError for anything else.
    """
    if isinstance(image, Tensor):
        batch = image if image.ndim == 4 else image[None]
        if batch.ndim != 4 or batch.shape[1] != 3:
            raise RequestError(
                f"an image tensor must be [3, H, W] or [B, 3, H, W] in [-1, 1], not {list(image.shape)}."
            )
        if not batch.is_floating_point() or not (batch.abs() <= 1).all():  # bytes, or a NaN
            raise RequestError(
                "an image tensor must have numbers in [-1, 1]; for bytes, x / 127.5 - 1; "
                f"this one is {batch.dtype}, {_range(batch)}."
            )
        return batch
    pixels = _pixels(image, "white") if isinstance(image, Image.Image) else image
    if isinstance(pixels, Tensor):
        return pixels.expand(1, 3, -1, -1) * 2 - 1
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        is_array = isinstance(pixels, np.ndarray)
        found = f"an array {list(pixels.shape)} of {pixels.dtype}" if is_array else describe(pixels)
        raise RequestError(
            f"an image must be a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W] in [-1, 1], not {found}."
        )
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].contiguous().float() / 127.5 - 1


def open_picture(path: str | Path) -> Image.Image:
    """A picture, read completely; raises RequestError if that is not possible, or if it has too many pixels."""
    if not check_path(path, RequestError).is_file():
        raise RequestError(f"there is no picture {path}.")
    try:
        picture = Image.open(path)
        if math.prod(picture.size) > MAX_PIXELS:
            raise ValueError(f"it has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
        picture.load()
    except Exception as error:  # Pillow has no error class of its own
        raise RequestError(f"{path} cannot be read as a picture: {str(error).rstrip('.')}.") from None
    return picture


def to_rgb(image: Picture) -> np.ndarray:
    """A picture that :func:`to_tensor` can read, in 8 bits: uint8 ``[H, W, 3]``."""
    return np.asarray(to_images(to_tensor(image))[0])


def to_mask(mask: Picture) -> Tensor:
    """A mask as ``[B, 1, H, W]``, 1 where to paint: from PIL (white), or an array or tensor ``[H, W]`` (from 0.5).

    Of a PIL image, transparent pixels are not painted, whatever their colour; its modes are those of :func:`to_tensor`.
    In arrays and tensors of uint8 or uint16 with numbers above 1, white is 255 or 65535.
    """
    if isinstance(mask, Image.Image):
        mask = _pixels(mask, "black")
        mask = mask if isinstance(mask, Tensor) else np.asarray(Image.fromarray(mask).convert("L"))
    is_numbers = isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf" and mask.dtype.itemsize <= 8
    values = torch.from_numpy(mask.astype(mask.dtype.newbyteorder("="))) if is_numbers else mask
    is_tensor = isinstance(values, Tensor) and values.numel() > 0
    if not is_tensor or not 2 <= values.ndim <= 4 or (values.ndim == 4 and values.shape[1] != 1):
        raise RequestError("a mask must be a PIL image, or an array or tensor [H, W], white or 1 where to paint.")
    white = {torch.uint8: 255, torch.uint16: 65535}.get(values.dtype, 1)
    levels = values.float() / (white if (values.float() > 1).any() else 1)
    if not ((levels >= 0) & (levels <= 1)).all():  # nor NaN
        raise RequestError(
            f"a mask must have numbers from 0 (keep) to 1 (paint); this one is {values.dtype}, {_range(values)}."
        )
    return (levels >= 0.5).float().reshape(-1, 1, *levels.shape[-2:])


def _pixels(image: Image.Image, background: str) -> np.ndarray | Tensor:
    """A PIL image, upright, on a background: uint8 ``[H, W, 3]``; from I;16, I and F grey ``[H, W]`` from 0 to 1."""
    try:
        mode = image.mode
        image = ImageOps.exif_transpose(image)
        if not mode.startswith(("I", "F")):
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
        grey = torch.from_numpy(np.asarray(image).astype(np.float64))
    except (OSError, ValueError, SyntaxError, TypeError, ArithmeticError, struct.error) as error:  # what Pillow raises
        raise RequestError(f"a picture of the mode {mode} cannot be read: {str(error).rstrip('.')}.") from None
    if "transparency" in image.info and mode != "F":  # one grey value of a PNG
        grey[grey == image.info["transparency"]] = 65535 if background == "white" else 0
    white = 1 if mode == "F" else 65535
    if not ((grey >= 0) & (grey <= white)).all() or (mode == "I" and 1 <= grey.max() <= 255):  # or NaN; 8 bits?
        raise RequestError(
            f"a picture of the mode {mode} must have numbers from 0 (black) to {white} (white)"
            f"{', some above 255' if mode == 'I' else ''}, not {_range(grey)}."
        )
    return (grey / white).float()


def _range(values: Tensor) -> str:
    """For messages: the smallest and the largest number."""
    if not values.numel() or values.is_complex():
        return "complex ones" if values.is_complex() else "none"
    return f"{float(values.double().min()):g} to {float(values.double().max()):g}"


def resized(picture: Tensor, shape: tuple[int, int], downscale: int) -> Tensor:
    """The picture, resampled to the pixel size of a latent ``shape``; averaged over where it becomes smaller."""
    size = [side * downscale for side in shape]
    if list(picture.shape[-2:]) == size:
        return picture
    picture = picture.to(torch.promote_types(picture.dtype, torch.float32))
    shrinks = size[0] < picture.shape[-2] or size[1] < picture.shape[-1]
    return F.interpolate(picture, size, mode="bicubic", antialias=shrinks).clamp(-1, 1)


def usual_size(height: int, width: int, side: int, patch: int) -> tuple[int, int]:
    """Height and width at which a model of images of ``side x side`` pixels reads a picture: those of the picture.

    A picture of more than twice ``side x side`` pixels, such as a photo, is scaled down to about ``side x side``, with
    its aspect ratio, in whole patches. FLUX.1 is for up to 2 megapixels; BFL scales a kontext picture to one of 17
    sizes of about 1 megapixel (black-forest-labs/flux, sampling.py, prepare_kontext).
    """
    if height * width <= 2 * side**2:
        return height, width
    scale = side / math.sqrt(height * width)
    return tuple(patch * max(1, round(pixels * scale / patch)) for pixels in (height, width))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """``[B, 3, H, W]`` in [-1, 1] to PIL, rounded to 8 bits."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]


@checked(RequestError)
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
    picture = open_picture(image) if isinstance(image, str | Path) else image
    pixels = to_rgb(picture) if isinstance(picture, Image.Image) else np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise RequestError(f"image must be uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}.")
    return np.repeat(cv2.Canny(np.ascontiguousarray(pixels), low, high)[..., None], 3, axis=-1)
