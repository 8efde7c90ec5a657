"""The double-stream block, the single-stream block and the last layer.

Source: black-forest-labs/flux, modules/layers.py (DoubleStreamBlock, SingleStreamBlock, LastLayer); parallel attention
and MLP: arXiv 2302.05442.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.attention import QKNorm, SelfAttention, attend, split_heads
from fluxedu.models.config import FluxConfig
from fluxedu.models.modulation import Modulation, gated, layer_norm, modulate
from fluxedu.models.terms import head_changes, linear_share, share
from fluxedu.probe import Probed


class MLP(Probed, nn.Sequential):
    """Linear, GELU (tanh approximation), Linear; applied to each token independently."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        hidden = self.probe("hidden", self[1](self[0](x)))  # [B, S, M] inside the MLP, after the activation function
        return self[2](hidden)


def joined(txt: Tensor, img: Tensor, block: Probed, site: str) -> tuple[Tensor, Tensor]:
    """Both streams pass ``block``'s ``site`` as one tensor ``[B, T, D]``, text first, if it is watched."""
    if block.is_watched(site):
        x = torch.cat([txt, img], dim=1)
        probed = block.probe(site, x)
        if probed is not x or probed.requires_grad:
            txt, img = probed.split([txt.shape[1], img.shape[1]], dim=1)
    return txt, img


class DoubleStreamBlock(Probed):
    """Text and image have their own weights and share one attention.

    for each stream:  q, k, v = qkv(modulate(LN(x)));   q, k = QKNorm(q, k)
    jointly:          attention over [text, image], with RoPE on q and k
    for each stream:  x = x + gate1 * proj(attention);   x = x + gate2 * mlp(modulate(LN(x)))
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        heads = self.num_heads = config.num_heads
        self.img_mod = Modulation(dim, double=True)
        self.img_attn = SelfAttention(dim, heads, config.qkv_bias)
        self.img_mlp = MLP(dim, config.mlp_hidden)
        self.txt_mod = Modulation(dim, double=True)
        self.txt_attn = SelfAttention(dim, heads, config.qkv_bias)
        self.txt_mlp = MLP(dim, config.mlp_hidden)

    def plan(self, vec: Tensor) -> dict[str, Tensor]:
        """Both streams' modulation for ``vec [..., D]``: stream name -> ``[..., 6 D]``."""
        return {"txt": self.txt_mod(vec), "img": self.img_mod(vec)}

    def forward(self, img: Tensor, txt: Tensor, mods: dict[str, Tensor], rope: Tensor) -> tuple[Tensor, Tensor]:
        """``img [B, N, D]``, ``txt [B, L, D]``, ``mods`` from :meth:`plan`, ``rope [1, T, d/2]`` with T = L + N."""
        txt, img = joined(txt, img, self, "x")  # [B, T, D] text and image tokens as they enter the block
        img = self.probe("img", img)  # [B, N, D] the image stream as it enters the block
        txt = self.probe("txt", txt)  # [B, L, D] the text stream as it enters the block
        img_mod1, img_mod2 = self.img_mod.split(mods["img"])
        txt_mod1, txt_mod2 = self.txt_mod.split(mods["txt"])

        # image: norm, modulate, q k v
        img_attn_in = self.probe("img_norm1", layer_norm(img))  # [B, N, D] layer-normalised, before shift and scale
        img_attn_in = modulate(img_attn_in, img_mod1.shift, img_mod1.scale)
        img_attn_in = self.probe("img_modulated1", img_attn_in)  # [B, N, D] shifted and scaled: the attention's input
        img_q, img_k, img_v = self.img_attn(img_attn_in)  # [B, H, N, d] each

        # text: the same with its own weights
        txt_attn_in = self.probe("txt_norm1", layer_norm(txt))  # [B, L, D] layer-normalised, before shift and scale
        txt_attn_in = modulate(txt_attn_in, txt_mod1.shift, txt_mod1.scale)
        txt_attn_in = self.probe("txt_modulated1", txt_attn_in)  # [B, L, D] shifted and scaled: the attention's input
        txt_q, txt_k, txt_v = self.txt_attn(txt_attn_in)  # [B, H, L, d] each

        # joint attention, text first
        q = torch.cat([txt_q, img_q], dim=2)  # [B, H, T, d]
        k = torch.cat([txt_k, img_k], dim=2)
        v = torch.cat([txt_v, img_v], dim=2)
        del img_attn_in, img_q, img_k, img_v, txt_attn_in, txt_q, txt_k, txt_v  # q, k, v are copies; free their parts
        attn = attend(q, k, v, rope, txt.shape[1], self)  # [B, T, D] with RoPE
        txt_attn, img_attn = attn.split([txt.shape[1], img.shape[1]], dim=1)

        # image: add the attention, then the MLP, each scaled by its gate
        gate, proj = img_mod1.gate, self.img_attn.proj
        change = head_changes(proj, img_attn, gate, self, "img_head_contribution")  # [B, H, N, D] what each head adds
        img_attn = proj(img_attn)
        img_attn = self.probe("img_attn_out", img_attn)  # [B, N, D] attention output, before gating
        img = gated(img, gate, img_attn, self, "img_attn_contribution", change)  # [B, N, D] gate * attn_out
        img_mlp_in = self.probe("img_norm2", layer_norm(img))  # [B, N, D] layer-normalised, before shift and scale
        img_mlp_in = modulate(img_mlp_in, img_mod2.shift, img_mod2.scale)
        img_mlp_in = self.probe("img_modulated2", img_mlp_in)  # [B, N, D] shifted and scaled: the MLP's input
        img_mlp = self.img_mlp(img_mlp_in)
        img_mlp = self.probe("img_mlp_out", img_mlp)  # [B, N, D] MLP output, before gating
        img = gated(img, img_mod2.gate, img_mlp, self, "img_mlp_contribution")  # [B, N, D] gate * MLP output

        # text: the same
        gate, proj = txt_mod1.gate, self.txt_attn.proj
        change = head_changes(proj, txt_attn, gate, self, "txt_head_contribution")  # [B, H, L, D] what each head adds
        txt_attn = proj(txt_attn)
        txt_attn = self.probe("txt_attn_out", txt_attn)  # [B, L, D] attention output, before gating
        txt = gated(txt, gate, txt_attn, self, "txt_attn_contribution", change)  # [B, L, D] gate * attn_out
        txt_mlp_in = self.probe("txt_norm2", layer_norm(txt))  # [B, L, D] layer-normalised, before shift and scale
        txt_mlp_in = modulate(txt_mlp_in, txt_mod2.shift, txt_mod2.scale)
        txt_mlp_in = self.probe("txt_modulated2", txt_mlp_in)  # [B, L, D] shifted and scaled: the MLP's input
        txt_mlp = self.txt_mlp(txt_mlp_in)
        txt_mlp = self.probe("txt_mlp_out", txt_mlp)  # [B, L, D] MLP output, before gating
        txt = gated(txt, txt_mod2.gate, txt_mlp, self, "txt_mlp_contribution")  # [B, L, D] gate * MLP output

        img = self.probe("img_out", img)  # [B, N, D] the image stream as it leaves the block
        txt = self.probe("txt_out", txt)  # [B, L, D] the text stream as it leaves the block
        txt, img = joined(txt, img, self, "out")  # [B, T, D] text and image tokens as they leave the block
        return img, txt


class SingleStreamBlock(Probed):
    """Text and image as one sequence; attention and MLP side by side, with one modulation for both.

    qkv, hidden = linear1(modulate(LN(x)))
    x = x + gate * linear2([attention(qkv), gelu(hidden)])

    That is two wide matrix products in place of four narrower ones.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        dim, self.num_heads = config.hidden_size, config.num_heads
        self.widths = [3 * dim, config.mlp_hidden]  # of linear1's output: qkv, hidden
        self.linear1 = nn.Linear(dim, sum(self.widths))
        self.linear2 = nn.Linear(dim + config.mlp_hidden, dim)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(dim, double=False)

    def plan(self, vec: Tensor) -> Tensor:
        """The modulation for ``vec [..., D]``: ``[..., 3 D]``."""
        return self.modulation(vec)

    def forward(self, x: Tensor, mods: Tensor, rope: Tensor, txt_len: int = 0) -> Tensor:
        """``x [B, T, D]``, whose first ``txt_len`` are text; ``mods`` from :meth:`plan`; ``rope [1, T, d/2]``."""
        x = self.probe("x", x)  # [B, T, D] text and image tokens as they enter the block
        (mod,) = self.modulation.split(mods)

        # norm, modulate, and the first linear layer, for attention and MLP at once
        h = self.probe("norm", layer_norm(x))  # [B, T, D] layer-normalised, before shift and scale
        h = modulate(h, mod.shift, mod.scale)
        h = self.probe("modulated", h)  # [B, T, D] shifted and scaled: the input of attention and MLP
        h = self.linear1(h)
        qkv, hidden = h.split(self.widths, dim=-1)  # [B, T, 3 D], [B, T, M]
        hidden = self.activation(hidden)  # GELU
        hidden = self.probe("mlp_hidden", hidden)  # [B, T, M] inside the MLP, after the activation function

        # attention
        q, k, v = split_heads(qkv, 3, self.num_heads)  # [B, H, T, d] each
        del h, qkv  # free h, the network's widest tensor; q, k, v are copies
        q = self.probe("q", q)  # [B, H, T, d] queries, before QKNorm
        k = self.probe("k", k)  # [B, H, T, d] keys, before QKNorm
        v = self.probe("v", v)  # [B, H, T, d] values: what a token passes on to the tokens that attend to it
        q, k = self.norm(q, k)
        q = self.probe("q_norm", q)  # [B, H, T, d] queries after QKNorm
        k = self.probe("k_norm", k)  # [B, H, T, d] keys after QKNorm
        attn = attend(q, k, v, rope, txt_len, self)  # [B, T, D] with RoPE
        del q, k, v

        # the second linear layer, for attention and MLP at once; its output is added through the gate
        out = self.linear2(torch.cat([attn, hidden], dim=-1))
        out, change = self.probe_shares(out, attn, hidden, mod.gate)
        x = gated(x, mod.gate, out, self, "contribution", change)  # [B, T, D] gate * added
        return self.probe("out", x)  # [B, T, D] the tokens as they leave the block

    def activation(self, hidden: Tensor) -> Tensor:
        """The MLP's activation function: GELU, in its tanh approximation."""
        return F.gelu(hidden, approximate="tanh")

    def probe_shares(self, out: Tensor, attn: Tensor, hidden: Tensor, gate: Tensor) -> tuple[Tensor, Tensor | float]:
        """The shares of attention and MLP in ``out = linear2([attn, hidden])``, for instruments; no share has the bias.

        Returns ``out``, and the change that instruments make after the gate.
        """
        attn_share = partial(linear_share, self.linear2, attn)
        mlp_share = partial(linear_share, self.linear2, hidden, attn.shape[-1])
        out, attn_out = share(out, attn_share, self, "attn_out")  # [B, T, D] attention's share of added, without bias
        out, mlp_out = share(out, mlp_share, self, "mlp_out")  # [B, T, D] the MLP's share; the bias is in neither
        out = self.probe("added", out)  # [B, T, D] output of attention and MLP together, before gating
        change = head_changes(self.linear2, attn, gate, self, "head_contribution")  # [B, H, T, D] what each head adds
        attn_part, mlp_part = lambda: gate * attn_out() + change, lambda: gate * mlp_out()
        change, _ = share(change, attn_part, self, "attn_contribution")  # [B, T, D] gate * attn_out
        change, _ = share(change, mlp_part, self, "mlp_contribution")  # [B, T, D] gate * mlp_out
        return out, change


class LastLayer(Probed):
    """A last modulation (shift and scale, no gate), then each token is mapped to the velocity of its patch."""

    def __init__(self, dim: int, out_channels: int, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(dim, out_channels, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, bias=bias))

    def plan(self, vec: Tensor) -> Tensor:  # [..., D] -> [..., 2 D]
        return self.adaLN_modulation(vec)

    def forward(self, x: Tensor, mods: Tensor) -> Tensor:  # [B, N, D] -> [B, N, out_channels]
        shift, scale = mods.unsqueeze(-2).chunk(2, dim=-1)
        shift = self.probe("shift", shift)  # [B, 1, D] added to the normalised image tokens
        scale = self.probe("scale", scale)  # [B, 1, D] the normalised image tokens are multiplied by 1 + scale
        x = self.probe("norm", layer_norm(x))  # [B, N, D] image tokens, layer-normalised
        x = self.probe("modulated", modulate(x, shift, scale))  # [B, N, D] shifted and scaled: the last linear's input
        return self.linear(x)
