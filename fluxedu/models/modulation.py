"""AdaLN modulation: how time, guidance and the pooled text steer every block.

    y = (1 + scale) * LN(x) + shift          before a layer
    x = x + gate * layer(y)                  after it

LN has no weights of its own; shift, scale and gate are linear in ``silu(vec)``. With gate 0 a block
does nothing, which is how such networks are usually begun ("AdaLN-Zero", DiT, arXiv 2212.09748).
Source: black-forest-labs/flux, modules/layers.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.probe import Probed

LN_EPS = 1e-6


class ShiftScaleGate(NamedTuple):
    """What modulates one layer, each ``[B, 1, D]``: the same for every token of a picture."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def normalised(x: Tensor) -> Tensor:
    """``LN(x)``: every token ``[..., D]`` to mean 0 and variance 1, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(1 + scale) * LN(x) + shift`` for ``LN(x) [B, N, D]``."""
    return torch.addcmul(shift, normed, 1 + scale)


def gated(x: Tensor, gate: Tensor, added: Tensor, block: Probed, site: str) -> Tensor:
    """The residual step ``x + gate * added``; what it adds passes through ``block``'s ``site``."""
    if block.is_watched(site):  # made as a value of its own for who wants to see it
        step = gate * added
        seen = block.probe(site, step)
        if seen is not step:
            return x + seen
    return torch.addcmul(x, gate, added)


class Modulation(Probed):
    """The linear layer that turns ``vec`` into one or two (shift, scale, gate).

    Two steps, because the first depends only on the time, the guidance and the pooled text and can be
    done for all steps of a picture before the first one: ``row = lin(silu(vec))``, then ``split``.
    """

    def __init__(self, dim: int, double: bool):
        super().__init__()
        self.layers = 2 if double else 1
        self.lin = nn.Linear(dim, 3 * self.layers * dim)

    def forward(self, vec: Tensor) -> Tensor:  # [..., D] -> [..., 3 D] or [..., 6 D]
        return self.lin(F.silu(vec))

    def split(self, row: Tensor) -> list[ShiftScaleGate]:
        """``row [B, 3 D * layers]`` -> a (shift, scale, gate) per layer, through their sites."""
        parts = row.unsqueeze(-2).chunk(3 * self.layers, dim=-1)  # each [B, 1, D]
        if self.layers == 1:
            names = ("shift", "scale", "gate")
        else:  # the attention's, then the MLP's
            names = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
        seen = [self.probe(name, part) for name, part in zip(names, parts, strict=True)]
        return [ShiftScaleGate(*seen[i : i + 3]) for i in range(0, len(seen), 3)]


# ------------------------------------------------------------ models/modulation.py
# Numbers become vectors: the time, the guidance strength and the pooled text.
#
#     vec = time_in(wave(t)) + guidance_in(wave(g)) + vector_in(pooled)
#
# ``vec`` is one vector a picture; it never meets the tokens directly, it only sets every block's
# shift, scale and gate. Source: black-forest-labs/flux, modules/layers.py.
#

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
