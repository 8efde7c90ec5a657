"""Numbers become vectors: the time, the guidance strength and the pooled text.

    vec = time_in(wave(t)) + guidance_in(wave(g)) + vector_in(pooled)

``vec`` is one vector a picture; it never meets the tokens directly, it only sets every block's
shift, scale and gate. Source: black-forest-labs/flux, modules/layers.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WAVES = 256


def timestep_embedding(t: Tensor, dim: int = WAVES, max_period: float = 10_000, time_factor: float = 1000.0) -> Tensor:
    """A number as waves: ``t [B]`` -> ``[B, dim]`` in float32, cosines first, then sines.

    A time in [0, 1] or a guidance strength such as 3.5 is multiplied by 1000 and stays a real number (it is
    not the index of a step). The waves get slower, from 1 radian per unit of ``1000 t`` to
    ``1 / max_period``. Always float32, as in both public codes: in bfloat16 ``t * 1000``
    would be off by whole units. Source: Vaswani et al. 2017.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    phase = (time_factor * t.float())[:, None] * frequency  # [B, dim/2]
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Two layers from any vector to the hidden width: ``out(silu(in(x)))``."""

    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_dim] -> [..., hidden]
        return self.out_layer(F.silu(self.in_layer(x)))
