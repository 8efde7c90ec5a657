"""How rough and how smooth: the power of a latent or a picture over spatial frequency."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from fluxedu.errors import InstrumentError
from fluxedu.plots.canvas import array, figure


def radial_power(value) -> tuple[np.ndarray, np.ndarray]:
    """(frequencies in cycles a cell, mean power) of ``[..., h, w]``, averaged over rings and leading axes."""
    x = array(value)
    x = x.reshape(-1, *x.shape[-2:])
    power = (np.abs(np.fft.fft2(x, norm="ortho")) ** 2).mean(0)
    fy, fx = np.fft.fftfreq(x.shape[-2])[:, None], np.fft.fftfreq(x.shape[-1])[None, :]
    radius = np.hypot(fy, fx)
    rings = np.minimum((radius * 2 * 8).astype(int), 7)  # eight rings up to half a cycle a cell, corners in the last
    centres = (np.arange(8) + 0.5) / 16
    counts = np.bincount(rings.ravel(), minlength=8)
    sums = np.bincount(rings.ravel(), power.ravel(), minlength=8)
    there = counts > 0
    return centres[there], sums[there] / counts[there]


def spectrum(values: Mapping[str, object]) -> Figure:
    """The power of each named latent ``[..., h, w]`` over frequency: noise is flat, pictures fall."""
    if not isinstance(values, Mapping) or any(array(value).ndim < 2 for value in values.values()):
        raise InstrumentError("spectrum is of a dictionary name -> latent [..., h, w].")
    fig, ((ax,),) = figure(1, 1, (4.6, 3.0))
    for i, (name, value) in enumerate(values.items()):
        ax.semilogy(*radial_power(value), label=name, marker="o", markersize=3, color=f"C{i}")
    ax.set_xlabel("spatial frequency (cycles a cell)", fontsize=8)
    ax.set_ylabel("power", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return fig
