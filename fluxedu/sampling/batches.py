"""How many images the pipeline computes at once.

Matrix products with more rows round differently, so an image that is computed beside others differs from the same image
alone in its last digits: the miniature's latents after 20 steps in float32 by 6e-7 of their norm (the median of 16
images; at most 5e-5). With ``batch=1`` an image is the same to the last bit, whatever else is in the list.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fluxedu.errors import check_integer
from fluxedu.memory.placement import Networks, Placement, activations, free_bytes, modulations
from fluxedu.models.flux import TIMES_AT_ONCE
from fluxedu.probe import current_watcher
from fluxedu.sampling.gradients import gradient_mode
from fluxedu.sampling.request import Request

#: tokens in one pass of the transformer on a CPU. Up to here, larger matrix products need less time per token;
#: beyond, the activations no longer fit into the caches.
TOKENS_ON_CPU = 768


def parts(count: int, size: int) -> Iterator[slice]:
    """``count`` images in batches of ``size``; the last one may be smaller."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def batch_size(
    batch: int | None, requests: list[Request], networks: Networks, device: torch.device, txt_len: int
) -> int:
    """The number of images to compute at once, ``batch`` itself or a default; raises RequestError.

    By default one while an intervention applies to all images, because a function that keeps a value from one site for
    the next would keep that of another image; else as many as ``TOKENS_ON_CPU`` allow on a CPU, and on a GPU as many as
    fit in its free memory. There, images with gradients are computed one at a time: the size of their graph is unknown.
    """
    count, passes = len(requests), 2 if requests[0].uses_cfg else 1
    if batch is not None:
        hint = "it is the number of images computed at once"
        return min(count, check_integer("batch", batch, 1, 4096, hint))
    if getattr(current_watcher(), "changes_all_images", False):
        return 1
    height, width = requests[0].shape
    if device.type not in ("cuda", "mps"):
        return min(count, max(1, TOKENS_ON_CPU // (passes * (txt_len + height * width // 4))))
    if count == 1 or gradient_mode() is not None:
        return 1
    flux, ae = networks.flux, networks.ae
    tiled = (flux.placement or Placement()).tiled
    pixels = (side * ae.config.downscale for side in (height, width))
    step, decode = activations(flux.config, ae.config, *pixels, txt_len, networks.dtype, tiled)
    plan = networks.dtype.itemsize * TIMES_AT_ONCE * sum(linear.out_features for linear in modulations(flux))
    free = free_bytes(device)
    if device.type == "cuda":  # memory that PyTorch holds in reserve is free too
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(
        count, max(1, int(0.8 * free / max(passes * (step + plan), decode)))
    )  # the rest is lost to fragmentation


def decoder_batch(count: int, device: torch.device) -> int:
    """How many of ``count`` images to decode at once: one on a CPU, where two do not fit into the caches."""
    return 1 if device.type == "cpu" else count
