"""The edges of any picture, as canny reads them: OpenCV's, with the numbers of the official code.

    fe.load("nano-canny")("a pink circle", control=edges("photo.png"))

Source: Canny 1986; black-forest-labs/flux, modules/image_embedders.py (CannyImageEncoder).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fluxedu.sampling.request import RequestError


def edges(image: Image.Image | np.ndarray | str | Path, low: float = 50, high: float = 200) -> np.ndarray:
    """White lines on black where the picture changes: uint8 ``[H, W, 3]``, for ``control=``.

    ``image``: a PIL picture, uint8 ``[H, W, 3]``, or a file's path. ``low`` and ``high`` bound the gradient's size
    (of 8-bit grey): a line begins above ``high`` and goes on while above ``low``.

    Raises:
        RequestError: OpenCV is not installed; this is no picture; the bounds are not 0 <= low <= high.
    """
    try:
        import cv2
    except ImportError:
        raise RequestError("edges are found by OpenCV: pip install 'fluxedu[edges]'.") from None
    if not 0 <= low <= high:
        raise RequestError(f"the bounds are 0 <= low <= high, not low={low} and high={high}.")
    try:
        picture = Image.open(image) if isinstance(image, str | Path) else image
        pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    except OSError as error:
        raise RequestError(f"{image} is no picture that can be read: {error}.") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise RequestError(f"edges are found in uint8 [H, W, 3], not in {pixels.dtype} {list(pixels.shape)}.")
    return np.repeat(cv2.Canny(np.ascontiguousarray(pixels), low, high)[..., None], 3, axis=-1)
