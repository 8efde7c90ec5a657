"""Numbers to colours: arrays become 8-bit RGB, which a browser paints as it comes.

A matplotlib figure takes 100 ms to draw and encode; looking colours up in a table takes less than one.
"""

from __future__ import annotations

from functools import cache

import matplotlib
import numpy as np
from PIL import Image

from fluxedu.plots.canvas import HEAT, TWO_SIDED, array, pixels

Pixels8 = np.ndarray  # uint8 [height, width, 3]


@cache
def table(name: str) -> np.ndarray:
    """A colour map as 256 rows of 8-bit RGB."""
    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def stops(name: str) -> list[str]:
    """Nine colours of a map as CSS writes them, for its key."""
    return ["#" + bytes(row).hex() for row in table(name)[np.linspace(0, 255, 9).round().astype(int)]]


def heat(values, most: float | None = None, name: str = HEAT) -> Pixels8:
    """``[h, w]`` of numbers from 0 to ``most`` (the largest if not said), a pixel a number."""
    x = array(values)
    most = float(x.max()) if most is None else most
    return table(name)[(np.clip(x / max(most, 1e-12), 0, 1) * 255).astype(np.uint8)]


def two_sided(values, most: float | None = None) -> Pixels8:
    """``[h, w]`` of numbers from ``-most`` (blue) over 0 (white) to ``most`` (red)."""
    x = array(values)
    most = float(np.abs(x).max()) if most is None else most
    return heat(x / max(most, 1e-12) + 1, 2.0, TWO_SIDED)


def picture(image) -> Pixels8:
    """A PIL image or a tensor ``[3, H, W]`` in [-1, 1] as 8-bit RGB."""
    return (pixels(image) * 255).round().astype(np.uint8)


def enlarged(image: Pixels8, side: int) -> Pixels8:
    """Every pixel as a square block, so that the longer side is about ``side``: never smoothed, never out of shape."""
    times = max(1, side // max(image.shape[:2]))
    return image.repeat(times, 0).repeat(times, 1)


def stretched(table: Pixels8, height: int, width: int) -> Pixels8:
    """A table, whose shape means nothing, to about ``height x width``; of a larger one every second, third, ... row."""
    table = table[:: -(-table.shape[0] // height), :: -(-table.shape[1] // width)]
    return table.repeat(max(1, height // table.shape[0]), 0).repeat(max(1, width // table.shape[1]), 1)


def reduced(image: Image.Image, most: int) -> Image.Image:
    """A picture whose longer side is above ``most``, smaller by a whole factor; another as it is."""
    return image.reduce(-(-max(image.size) // most)) if max(image.size) > most else image


def _laid(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heat of ``share`` in [0, 1], opaque where it is strong: how much stays of what is below, and what is added."""
    alpha = (share**0.7 * 0.9).astype(np.float32)[..., None]
    return 1 - alpha, heat(share, 1.0) * alpha


def over(image: Pixels8, weights, most: float | None = None) -> Pixels8:
    """Weights ``[rows, columns]`` laid over a picture turned pale."""
    w = array(weights)
    share = np.clip(w / max(float(w.max()) if most is None else most, 1e-12), 0, 1)
    height, width = image.shape[:2]
    rows, columns = np.arange(height) * w.shape[0] // height, np.arange(width) * w.shape[1] // width
    pale = image @ _PALE + np.float32(0.5 * 220)
    stays, added = (x.astype(np.float32)[rows][:, columns] for x in _laid(share))  # of cells, then of pixels
    return (pale * stays + added).astype(np.uint8)


#: of a colour, three tenths, and two tenths of its grey
_PALE = (0.3 * np.eye(3) + 0.2 / 3).astype(np.float32)


def over_stops() -> list[str]:
    """The colours of :func:`over`'s key, as they look on a light ground."""
    stays, added = _laid(np.linspace(0, 1, 9))
    return ["#" + bytes(colour).hex() for colour in (210 * stays + added).astype(np.uint8)]
