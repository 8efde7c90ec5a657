"""AdaLN modulation: how the time, the guidance scale and the pooled text control every block.

    vec = time_in(embed(t)) + guidance_in(embed(g)) + vector_in(pooled)

    y = (1 + scale) * LN(x) + shift          before a layer
    x = x + gate * layer(y)                  after it

LN has no weights of its own; shift, scale and gate are linear in ``silu(vec)``. With gate 0 a block does nothing, which
is how such networks are usually initialised ("AdaLN-Zero", DiT, arXiv 2212.09748).
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
TIMESTEP_DIM = 256


def timestep_embedding(
    t: Tensor, dim: int = TIMESTEP_DIM, max_period: float = 10_000, time_factor: float = 1000.0
) -> Tensor:
    """Sinusoidal embedding of a number: ``t [B]`` -> ``[B, dim]`` in float32, cosines first, then sines.

    A time in [0, 1] or a guidance scale such as 3.5 is multiplied by 1000 and stays a real number (it is not the index
    of a step). Frequencies fall from 1 radian per unit of ``1000 t`` almost to ``1 / max_period``. Always float32, as
    in BFL's code and diffusers: in bfloat16 ``1000 t`` would be off by whole units. Source: Vaswani et al. 2017.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    phase = (time_factor * t.float())[:, None] * frequency  # [B, dim/2]
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Two layers from any vector to the hidden width: ``out(silu(in(x)))``."""

    def __init__(self, in_dim: int, hidden_dim: int, bias: bool = True):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim, bias=bias)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_dim] -> [..., hidden]
        return self.out_layer(F.silu(self.in_layer(x)))


class ShiftScaleGate(NamedTuple):
    """The modulation of one layer, each ``[B, 1, D]``: the same for every token of an image."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class SplitModulation(Probed):
    """Splits a row of modulation into one or two (shift, scale, gate) triples, at the sites of a block; no weights."""

    def __init__(self, double: bool):
        super().__init__()
        self.is_double = double

    def split(self, row: Tensor) -> list[ShiftScaleGate]:
        """``row [B, 6 D]`` -> the attention's and the MLP's modulation; ``[B, 3 D]`` -> one, for a single block."""
        row = row.unsqueeze(-2)  # [B, 1, 6 D]: the axis of size 1 broadcasts over the tokens
        if not self.is_double:
            shift, scale, gate = row.chunk(3, dim=-1)
            shift = self.probe("shift", shift)  # [B, 1, D] added to the normalised tokens before attention and MLP
            scale = self.probe("scale", scale)  # [B, 1, D] the normalised tokens are multiplied by 1 + scale
            gate = self.probe("gate", gate)  # [B, 1, D] the factor of the block's contribution to the residual stream
            return [ShiftScaleGate(shift, scale, gate)]
        shift1, scale1, gate1, shift2, scale2, gate2 = row.chunk(6, dim=-1)
        shift1 = self.probe("shift1", shift1)  # [B, 1, D] added to the normalised tokens before the attention
        scale1 = self.probe("scale1", scale1)  # [B, 1, D] the normalised tokens are multiplied by 1 + scale
        gate1 = self.probe("gate1", gate1)  # [B, 1, D] the factor of the attention's contribution
        shift2 = self.probe("shift2", shift2)  # [B, 1, D] added to the normalised tokens before the MLP
        scale2 = self.probe("scale2", scale2)  # [B, 1, D] the normalised tokens are multiplied by 1 + scale
        gate2 = self.probe("gate2", gate2)  # [B, 1, D] the factor of the MLP's contribution
        return [ShiftScaleGate(shift1, scale1, gate1), ShiftScaleGate(shift2, scale2, gate2)]


class Modulation(SplitModulation):
    """The linear layer that maps ``vec`` to one or two (shift, scale, gate) triples.

    It is called in two parts, because the first depends only on the time, the guidance scale and the pooled text, and
    can be computed ahead of the sampling loop: ``row = mod(vec)``, then ``mod.split(row)``.
    """

    def __init__(self, dim: int, double: bool):
        super().__init__(double)
        self.lin = nn.Linear(dim, 6 * dim if double else 3 * dim)

    def forward(self, vec: Tensor) -> Tensor:  # [..., D] -> [..., 3 D] or [..., 6 D]
        return self.lin(F.silu(vec))


def layer_norm(x: Tensor) -> Tensor:
    """``LN(x)``: every token ``[..., D]`` to mean 0 and variance 1; no weights."""
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(1 + scale) * LN(x) + shift`` for ``LN(x) [B, N, D]``."""
    return torch.addcmul(shift, normed, 1 + scale)


def gated(x: Tensor, gate: Tensor, out: Tensor, block: Probed, site: str, change: Tensor | float = 0.0) -> Tensor:
    """The residual step ``x + gate * out`` for a layer's output ``out``; ``gate * out`` passes ``block``'s ``site``.

    change: what instruments have added to ``gate * out`` at the sites of its terms.
    """
    if isinstance(change, Tensor) or block.is_watched(site):
        contribution = gate * out + change if isinstance(change, Tensor) else gate * out
        probed = block.probe(site, contribution)
        if isinstance(change, Tensor) or probed is not contribution or probed.requires_grad:
            return x + probed
    return torch.addcmul(x, gate, out)  # the same in one kernel, without the product in memory
