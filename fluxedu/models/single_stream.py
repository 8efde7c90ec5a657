"""The single-stream block: one sequence, and attention and MLP side by side.

    q, k, v, hidden  <-  linear1(modulate(x))
    x += gate * linear2([attention(q, k, v), gelu(hidden)])

Two wide matrix products instead of four narrow ones, and one modulation for both halves.
Source: black-forest-labs/flux, modules/layers.py (SingleStreamBlock); arXiv 2302.05442.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.attention import QKNorm, attend, normed_qkv, split_heads
from fluxedu.models.config import FluxConfig
from fluxedu.models.modulation import Modulation, ShiftScaleGate, gated, modulate, normalised
from fluxedu.probe import Probed


class SingleStreamBlock(Probed):
    """``forward(x, mods, rope)`` over text and image as one sequence; ``mods`` from :meth:`plan`."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        dim, self.num_heads = config.hidden_size, config.num_heads
        self.widths = [3 * dim, config.mlp_hidden]
        self.linear1 = nn.Linear(dim, sum(self.widths))
        self.linear2 = nn.Linear(dim + config.mlp_hidden, dim)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(dim, double=False)

    def plan(self, vec: Tensor) -> Tensor:
        """The modulation for ``vec [..., D]``: ``[..., 3 D]``."""
        return self.modulation(vec)

    def forward(self, x: Tensor, mods: Tensor, rope: Tensor, words: int = 0) -> Tensor:
        """``x [B, L + N, D]``, ``rope [..., 1, L + N, d/2]`` -> the new x; of the tokens, ``words`` are text."""
        x = self.probe("x", x)
        (mod,) = self.modulation.split(mods)
        added = self.probe("added", self.linear2(self._side_by_side(x, mod, rope, words)))
        return self.probe("out", gated(x, mod.gate, added, self, "contribution"))

    def _side_by_side(self, x: Tensor, mod: ShiftScaleGate, rope: Tensor, words: int) -> Tensor:
        """What attention and MLP make of the same tokens, one behind the other: ``[B, L + N, D + M]``, M wide."""
        normed = self.probe("norm", normalised(x))
        wide = self.linear1(self.probe("modulated", modulate(normed, mod.shift, mod.scale)))
        del normed
        qkv, hidden = wide.split(self.widths, dim=-1)  # [B, L + N, 3 D], [B, L + N, M]
        hidden = self.probe("mlp_hidden", F.gelu(hidden, approximate="tanh"))
        q, k, v = split_heads(qkv, 3, self.num_heads)
        del wide, qkv  # the widest tensor of the network need not wait out the attention
        heard = attend(*normed_qkv(self.probe, self.norm, q, k, v), rope, words, self)
        return torch.cat([heard, hidden], dim=-1)
