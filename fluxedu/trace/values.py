"""A recorded value at a glance: the tensor itself as a small picture, however large it is.

Tokens (or rows of cells) run down, channels (or heads with their channels, or keys) run across; of what is longer than
the picture, neighbours are averaged. Red is above zero and blue below; what has no sign is dark for nothing.
"""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fluxedu.instruments.named import Named
from fluxedu.instruments.reductions import MapView, Value, made
from fluxedu.plots.canvas import HEAT, TWO_SIDED

ROWS, COLUMNS = 16, 48
SHADES = 15  # odd, so that one of them is for nothing; and few, so that thousands of pictures are small


def glance(value: Value) -> Named:
    """A reduction: the value as a matrix of at most 16 x 48 numbers; maps as the mean over heads."""
    x = value.head_mean().tensor if isinstance(value, MapView) else _flat(made(value))
    x = (x.angle() if x.is_complex() else x).float()[-1]  # of two passes of guidance, the prompted one
    size = [min(n, most) for n, most in zip(x.shape, (ROWS, COLUMNS), strict=True)]
    return Named(F.adaptive_avg_pool2d(x[None], size)[0], ("row", "column"))


def _flat(x: Named) -> Tensor:
    """``[batch, rows, columns]``: heads side by side, pictures of channels as their mean, a vector as one row."""
    axes, tensor = list(x.axes), x.tensor
    if "row" in axes:  # [B, C, h, w]
        return tensor.mean(axes.index("channel"))
    if axes[1:2] == ["head"] and axes[-1] == "key":
        return tensor.mean(1)
    if axes[1:2] == ["head"]:  # [B, H, N, d]
        return tensor.transpose(1, 2).flatten(2)
    return tensor.flatten(1, -2) if tensor.ndim > 2 else tensor.flatten(1)[:, None]


def as_png(matrix: Tensor) -> str:
    """The matrix as a ``data:`` address of a PNG, a pixel a number."""
    numbers = matrix.double().numpy()
    signed = bool((numbers < 0).any())
    most = max(float(np.abs(numbers).max()), 1e-30)
    shares = (numbers / most + 1) / 2 if signed else numbers / most
    image = Image.fromarray(np.round((SHADES - 1) * np.nan_to_num(shares)).astype(np.uint8), "P")
    colours = matplotlib.colormaps[TWO_SIDED if signed else HEAT](np.linspace(0, 1, SHADES))[:, :3]
    image.putpalette(np.round(255 * colours).astype(np.uint8).tobytes())
    data = io.BytesIO()
    image.save(data, format="png", optimize=True, bits=4)
    return address(data)


def address(png: io.BytesIO) -> str:
    """A PNG as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
