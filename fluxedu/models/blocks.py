"""The double-stream block: text and image have their own weights and one attention in common.

    for each stream:  q, k, v  <-  qkv(modulate(x));   q, k  <-  QKNorm(q, k)
    together:         attention over [text, image], q and k turned by RoPE
    for each stream:  x += gate1 * proj(attention);   x += gate2 * mlp(modulate(x))

Source: black-forest-labs/flux, modules/layers.py (DoubleStreamBlock).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.attention import QKNorm, SelfAttention, attend, normed_qkv, split_heads
from fluxedu.models.config import FluxConfig
from fluxedu.models.modulation import Modulation, ShiftScaleGate, gated, modulate, normalised
from fluxedu.probe import Probed


class MLP(Probed, nn.Sequential):
    """Widen, bend (GELU, its tanh approximation), narrow; each token for itself."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D]
        widen, bend, narrow = self
        return narrow(self.probe("hidden", bend(widen(x))))


class DoubleStreamBlock(Probed):
    """Two streams, one attention. ``forward(img, txt, mods, rope)``; ``mods`` from :meth:`plan`."""

    STREAMS = ("txt", "img")  # also the order of the tokens in the joint attention

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(dim, double=True))
            self.add_module(f"{stream}_attn", SelfAttention(dim, config.num_heads, config.qkv_bias))
            self.add_module(f"{stream}_mlp", MLP(dim, config.mlp_hidden))

    def plan(self, vec: Tensor) -> dict[str, Tensor]:
        """Both streams' modulation for ``vec [..., D]``: a dict stream -> ``[..., 6 D]``."""
        return {s: self.get_submodule(f"{s}_mod")(vec) for s in self.STREAMS}

    def forward(self, img: Tensor, txt: Tensor, mods: dict[str, Tensor], rope: Tensor) -> tuple[Tensor, Tensor]:
        """``img [B, N, D]``, ``txt [B, L, D]``, ``rope [..., 1, L + N, d/2]`` -> the new (img, txt)."""
        x = {"txt": self.probe("txt", txt), "img": self.probe("img", img)}
        mod = {s: self.get_submodule(f"{s}_mod").split(mods[s]) for s in self.STREAMS}

        entered = (self._enter(s, x[s], mod[s][0]) for s in self.STREAMS)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*entered, strict=True))  # [B, H, L + N, d]
        joint = attend(q, k, v, rope, txt.shape[1], self)  # [B, L + N, D]
        heard = dict(zip(self.STREAMS, joint.split([txt.shape[1], img.shape[1]], dim=1), strict=True))

        for s in self.STREAMS:
            x[s] = self._leave(s, x[s], heard[s], *mod[s])
        return self.probe("img_out", x["img"]), self.probe("txt_out", x["txt"])

    def _enter(self, stream: str, x: Tensor, mod: ShiftScaleGate) -> tuple[Tensor, ...]:
        """One stream into the attention: modulated, then q, k, v."""
        normed = self.probe(f"{stream}_norm1", normalised(x))
        x = self.probe(f"{stream}_modulated1", modulate(normed, mod.shift, mod.scale))
        del normed
        return self.get_submodule(f"{stream}_attn")(x)

    def _leave(self, stream: str, x: Tensor, heard: Tensor, attn: ShiftScaleGate, mlp: ShiftScaleGate) -> Tensor:
        """One stream out of the attention and through its MLP, each added through its gate."""
        added = self.probe(f"{stream}_attn_out", self.get_submodule(f"{stream}_attn").proj(heard))
        x = gated(x, attn.gate, added, self, f"{stream}_attn_contribution")
        normed = self.probe(f"{stream}_norm2", normalised(x))
        inner = self.probe(f"{stream}_modulated2", modulate(normed, mlp.shift, mlp.scale))
        del normed
        added = self.probe(f"{stream}_mlp_out", self.get_submodule(f"{stream}_mlp")(inner))
        return gated(x, mlp.gate, added, self, f"{stream}_mlp_contribution")


# ------------------------------------------------------------ models/blocks.py
# The single-stream block: one sequence, and attention and MLP side by side.
#
#     q, k, v, hidden  <-  linear1(modulate(x))
#     x += gate * linear2([attention(q, k, v), gelu(hidden)])
#
# Two wide matrix products instead of four narrow ones, and one modulation for both halves.
# Source: black-forest-labs/flux, modules/layers.py (SingleStreamBlock); arXiv 2302.05442.
#


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
