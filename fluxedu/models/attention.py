"""Attention: queries and keys are normalised, turned by position, and compared.

    out = softmax(q k^T / sqrt(d)) v

Source: black-forest-labs/flux, modules/layers.py and math.py; QKNorm: arXiv 2302.05442.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.attention_map import AttentionMap
from fluxedu.models.rope import rotate
from fluxedu.probe import Probed

RMS_EPS = 1e-6


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, computed in float32 at least."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, RMS_EPS)


class QKNorm(nn.Module):
    """Each head's query and key vector (``[B, H, N, d]``) is brought to root mean square 1, that is to length
    ``sqrt(d)``, then scaled by a learned number a channel: no score can explode, whatever comes in.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """``[B, N, parts * D] -> parts x [B, H, N, d]`` with ``D = H d``, copied once so that each is in one piece."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous().unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, N, d] -> [B, N, H d]``."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(Probed):
    """The weights of one stream's attention: in to q, k, v, and out again.

    The attention itself happens in between, over both streams together: see :func:`attend`.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [B, N, D]`` -> q, k (normalised) and v, each ``[B, H, N, d]``."""
        return normed_qkv(self.probe, self.norm, *split_heads(self.qkv(x), 3, self.num_heads))


def normed_qkv(seen: Callable[[str, Any], Any], norm: QKNorm, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Pass q, k, v through their sites and the QKNorm."""
    q, k, v = seen("q", q), seen("k", k), seen("v", v)
    q, k = norm(q, k)
    return seen("q_norm", q), seen("k_norm", k), v


SHORT = 256  # tokens up to which three plain steps train faster on a CPU than the fused kernel


def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v``, ``[B, H, N, d]``, by the fastest exact way for the size."""
    if q.requires_grad and q.device.type == "cpu" and q.shape[2] <= SHORT:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, words: int, block: Probed) -> Tensor:
    """Turn q and k by position, attend, merge heads: ``3 x [B, H, N, d] -> [B, N, H d]``.

    The sites are ``block``'s: ``attn.rope``, ``attn.q``, ``attn.k`` (turned), ``attn.map`` (a lazy
    :class:`AttentionMap`; give back a tensor ``[B, H, N, N]`` to replace the map) and ``heads``.
    ``words`` is how many tokens are text.
    """
    rope = block.probe("attn.rope", rope)
    q, k = block.probe("attn.q", rotate(q, rope)), block.probe("attn.k", rotate(k, rope))
    heads = looked_at(block, "attn.map", lambda: AttentionMap(q, k, v, words), lambda: mix(q, k, v))
    return merge_heads(block.probe("heads", heads))


def looked_at(block: Probed, site: str, promised: Callable[[], AttentionMap], attended: Callable[[], Tensor]) -> Tensor:
    """What attention gives, ``[B, H, N, d]``; its map is promised only if somebody looks at it or changes it."""
    if not block.wanted(site):
        return attended()
    lazy = promised()
    weights = block.probe(site, lazy)
    if isinstance(weights, Tensor):
        return weights.to(lazy.v.dtype) @ lazy.v
    return attended() if lazy.out is None else lazy.out  # asked for its log-sum-exp, the map has attended already
