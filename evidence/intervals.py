"""Values with 95 % intervals, as plain dictionaries for JSON."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap, norm

Z = float(norm.ppf(0.975))


def share(hits: Sequence[bool]) -> dict:
    """The share of true values with its Wilson score interval (Wilson 1927): ``{"value", "low", "high", "n", "hits"}``,
    the last of them one digit per sample, so that a test can compute some of them again.
    """
    n, p = len(hits), float(np.mean(hits))
    centre, half = (p + Z * Z / (2 * n)), Z * np.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    low, high = float(centre - half) / scale, float(centre + half) / scale
    interval = {"low": min(low, p), "high": max(high, p)}  # for 0 and for all, rounding must not exclude the value
    return {"value": p, **interval, "n": n, "hits": "".join(str(int(hit)) for hit in hits)}


def median(values: Sequence[float]) -> dict:
    """The median, its interval by the percentile bootstrap, and the smallest and largest value."""
    values = np.asarray(values, float)
    if len(values) > 1 and values.std() > 0:
        interval = bootstrap((values,), np.median, method="percentile", n_resamples=2000, rng=0).confidence_interval
        low, high = float(interval.low), float(interval.high)
    else:
        low = high = float(np.median(values))
    spread = {"smallest": float(values.min()), "largest": float(values.max())}
    return {"value": float(np.median(values)), "low": low, "high": high, "n": len(values), **spread}


def mean(values: Sequence[float]) -> dict:
    """The mean and its bootstrap interval."""
    return difference(values, np.zeros(len(values)))


def difference(a: Sequence[float], b: Sequence[float]) -> dict:
    """The mean of ``a - b`` over the same samples, with its bootstrap interval: 0 outside it means that they differ."""
    values = np.asarray(a, float) - np.asarray(b, float)
    if values.std() == 0:
        return {
            "value": float(values.mean()),
            "low": float(values.mean()),
            "high": float(values.mean()),
            "n": len(values),
        }
    interval = bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=0).confidence_interval
    return {"value": float(values.mean()), "low": float(interval.low), "high": float(interval.high), "n": len(values)}
