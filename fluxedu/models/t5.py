"""T5's encoder: a prompt becomes one vector per token, each computed from the whole prompt.

Different from CLIP: every token attends to every other; positions enter only as a bias on the scores that depends on
the distance (the first layer's table, shared by all layers); RMSNorm; a gated MLP; scores are not divided by sqrt(d).
FLUX passes padded prompts and **no padding mask**: padding tokens take part in the attention.
Tensor names are those of the official ``text_encoder_2`` folder.
Source: arXiv 1910.10683, v1.1; transformers, models/t5/modeling_t5.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.attention_map import AttentionMap
from fluxedu.models.attention import merge_heads, to_heads
from fluxedu.models.config import T5Config
from fluxedu.probe import Probed, name_sites


class T5Norm(nn.Module):
    """RMSNorm: ``x / sqrt(mean(x^2) + eps) * weight``, computed in float32 or better."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def distance_buckets(length: int, config: T5Config, device: torch.device | None = None) -> Tensor:
    """The row of the bias table for each (query, key): int ``[L, L]``.

    Half of the buckets are for keys before the query, half for keys after it. In each half the small distances have one
    bucket each; larger ones share buckets that widen logarithmically up to the maximum distance.
    """
    half = config.relative_attention_num_buckets // 2
    near = half // 2
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]  # key - query
    distance = offset.abs()
    log_range = math.log(config.relative_attention_max_distance / near)
    far = near + (torch.log(distance.float().clamp(min=1) / near) / log_range * (half - near)).long()
    bucket = torch.where(distance < near, distance, far.clamp(max=half - 1))
    return bucket + half * (offset > 0)


class T5Attention(Probed):
    """Self-attention with a distance bias. The first layer owns the bias table; the others receive its result."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if owns_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def bias(self, length: int) -> Tensor:
        """The term that each head adds to its scores: ``[1, H, L, L]``."""
        table = self.relative_attention_bias
        bias = table(distance_buckets(length, self.config, table.weight.device)).permute(2, 0, 1).unsqueeze(0)
        return self.probe("bias", bias)  # [1, H, L, L] added to the scores of every layer; depends on distance only

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        heads = self.config.num_heads
        q = self.probe("q", to_heads(self.q(x), heads))  # [B, H, L, d] each head's queries
        k = self.probe("k", to_heads(self.k(x), heads))  # [B, H, L, d] each head's keys
        v = self.probe("v", to_heads(self.v(x), heads))  # [B, H, L, d] each head's values
        if self.is_watched("map"):
            attn_map = AttentionMap(q, k, v, x.shape[1], bias, scale=1.0)
            attn_map = self.probe("map", attn_map)  # [B, H, L, L] attention map (lazy), one row per query
            out = attn_map @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        out = self.probe("heads", out)  # [B, H, L, d] the output of each head
        return self.o(merge_heads(out))


class T5GatedMLP(Probed):
    """``wo(gelu(wi_0 x) * wi_1 x)``, with the tanh approximation of GELU."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        hidden = self.probe("hidden", hidden)  # [B, L, M] inside the gated MLP
        return self.wo(hidden)


class T5SelfAttentionLayer(nn.Module):
    """The norm and the attention, under their official names."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, owns_bias)
        self.layer_norm = T5Norm(config.d_model, config.layer_norm_epsilon)


class T5MLPLayer(nn.Module):
    """The norm and the gated MLP, under their official names."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = T5GatedMLP(config)
        self.layer_norm = T5Norm(config.d_model, config.layer_norm_epsilon)


class T5Block(Probed):
    """``x = x + attention(norm(x)); x = x + mlp(norm(x))``."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList([T5SelfAttentionLayer(config, owns_bias), T5MLPLayer(config)])

    @property
    def attention(self) -> T5Attention:
        return self.layer[0].SelfAttention

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        attn, mlp = self.layer
        normed = self.probe("norm1", attn.layer_norm(x))  # [B, L, D] after RMSNorm: the attention's input
        x = x + self.probe("attn_out", attn.SelfAttention(normed, bias))  # [B, L, D] the attention's contribution
        normed = self.probe("norm2", mlp.layer_norm(x))  # [B, L, D] after RMSNorm: the MLP's input
        x = x + self.probe("mlp_out", mlp.DenseReluDense(normed))  # [B, L, D] the MLP's contribution
        return self.probe("out", x)  # [B, L, D] the tokens as they leave the block


class T5Stack(nn.Module):
    """The blocks and the final norm."""

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
        x = self.probe("embedded", self.shared(ids))  # [B, L, D] token embeddings, without positions
        return self.probe("states", self.encoder(x))  # [B, L, D] the output: what the transformer reads of the prompt
