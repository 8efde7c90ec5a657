"""Guidance: paying more heed to the prompt than the network would by itself.

There are two kinds. FLUX.1-dev was distilled with the strength as an *input* (``guidance_embed``): one
pass a step. The classic kind, classifier-free guidance, asks twice, with and without the prompt, and
goes further in the direction in which the prompt moves the answer (arXiv 2207.12598):

    v = v_negative + scale * (v_prompt - v_negative)

Scale 1 is no guidance. The two passes are one batch of twice the size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def guide(negative: Tensor, prompted: Tensor, scale: float) -> Tensor:
    """The guided velocity."""
    return negative + scale * (prompted - negative)


def doubled(x: Tensor) -> Tensor:
    """The batch for both passes: first the negative half, then the prompted half."""
    return torch.cat([x, x])


def active(t: float, interval: tuple[float, float]) -> bool:
    """Is guidance on at time ``t``? It helps most in the middle of the run (arXiv 2404.07724)."""
    low, high = interval
    return low <= t <= high
