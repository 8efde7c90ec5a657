"""T5's encoder: a prompt becomes a vector per token, each having read the whole prompt.

Different from CLIP: every token sees every other; places enter only as a bias on the scores that
depends on the distance (the first layer's table, shared by all); RMSNorm; a gated MLP; scores are not
divided by sqrt(d). FLUX gives it padded prompts and **no padding mask**: pads take part.
Tensor names are those of the official ``text_encoder_2`` folder.
Source: arXiv 1910.10683, v1.1; transformers, models/t5/modeling_t5.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.attention import attention_or_map, merge_heads
from fluxedu.models.attention_map import AttentionMap
from fluxedu.models.config import T5Config
from fluxedu.probe import Probed, name_sites


class T5Norm(nn.Module):
    """RMSNorm: ``x / sqrt(mean(x^2) + eps) * weight``, in float32 at least."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def distance_buckets(length: int, config: T5Config, device: torch.device | None = None) -> Tensor:
    """Which row of the bias table serves each (query, key): int ``[L, L]``.

    Half of the buckets are for keys behind, half for keys ahead; in each half the near distances have
    a bucket each and the far ones share buckets that widen logarithmically up to the largest distance.
    """
    half = config.relative_attention_num_buckets // 2
    near = half // 2
    place = torch.arange(length, device=device)
    offset = place[None, :] - place[:, None]  # key - query
    distance = offset.abs()
    reach = math.log(config.relative_attention_max_distance / near)
    far = near + (torch.log(distance.float().clamp(min=1) / near) / reach * (half - near)).long()
    bucket = torch.where(distance < near, distance, far.clamp(max=half - 1))
    return bucket + half * (offset > 0)


class T5Attention(Probed):
    """Self-attention with a distance bias; the first layer owns the table, the others are handed it."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        for name in ("q", "k", "v"):
            self.add_module(name, nn.Linear(config.d_model, inner, bias=False))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if owns_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def bias(self, length: int) -> Tensor:
        """What each head adds to the scores: ``[1, H, L, L]``."""
        table = self.relative_attention_bias
        bias = table(distance_buckets(length, self.config, table.weight.device)).permute(2, 0, 1).unsqueeze(0)
        return self.probe("bias", bias)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # [B, L, D]
        q, k, v = (  # [B, H, L, d]
            self.probe(name, proj(x).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2))
            for name, proj in (("q", self.q), ("k", self.k), ("v", self.v))
        )
        heads = attention_or_map(
            self,
            "map",
            lambda: AttentionMap(q, k, v, x.shape[1], bias, scale=1.0),
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0),
        )
        return self.o(merge_heads(self.probe("heads", heads)))


class T5GatedMLP(Probed):
    """``wo(gelu(wi_0 x) * wi_1 x)``, GELU in its tanh approximation."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.probe("hidden", F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)))


class T5Sublayer(nn.Module):
    """A norm and the one thing that follows it, under the official name."""

    def __init__(self, config: T5Config, name: str, inner: nn.Module):
        super().__init__()
        self.add_module(name, inner)
        self.layer_norm = T5Norm(config.d_model, config.layer_norm_epsilon)


class T5Block(Probed):
    """``x += attention(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList(
            [
                T5Sublayer(config, "SelfAttention", T5Attention(config, owns_bias)),
                T5Sublayer(config, "DenseReluDense", T5GatedMLP(config)),
            ]
        )

    @property
    def attention(self) -> T5Attention:
        return self.layer[0].SelfAttention

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attn, mlp = self.layer
        x = x + self.probe("attn_out", attn.SelfAttention(self.probe("norm1", attn.layer_norm(x)), bias))
        x = x + self.probe("mlp_out", mlp.DenseReluDense(self.probe("norm2", mlp.layer_norm(x))))
        return self.probe("out", x)


class T5Stack(nn.Module):
    """The blocks and the last norm."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList(T5Block(config, owns_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = T5Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.block[0].attention.bias(x.shape[1])
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(Probed):
    """``forward(ids [B, L]) -> [B, L, d_model]``; ``T5Encoder()`` is T5-v1.1-XXL's encoder."""

    def __init__(self, config: T5Config | None = None):
        super().__init__()
        self.config = config or T5Config()
        self.shared = nn.Embedding(self.config.vocab_size, self.config.d_model)
        self.encoder = T5Stack(self.config)
        name_sites(self, "t5")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.probe("embedded", self.shared(ids))
        return self.probe("states", self.encoder(x))
