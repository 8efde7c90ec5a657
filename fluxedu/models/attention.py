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
    heads = attention_or_map(block, "attn.map", lambda: AttentionMap(q, k, v, words), lambda: mix(q, k, v))
    return merge_heads(block.probe("heads", heads))


def attention_or_map(
    block: Probed, site: str, promised: Callable[[], AttentionMap], attended: Callable[[], Tensor]
) -> Tensor:
    """What attention gives, ``[B, H, N, d]``; its map is promised only if somebody looks at it or changes it."""
    if not block.is_watched(site):
        return attended()
    lazy = promised()
    weights = block.probe(site, lazy)
    if isinstance(weights, Tensor):
        return weights.to(lazy.v.dtype) @ lazy.v
    return attended() if lazy.out is None else lazy.out  # asked for its log-sum-exp, the map has attended already


# ------------------------------------------------------------ models/attention.py
# Rotary positions: how a token knows where it is.
#
# Every token has a position of three integers, (frame, row, column). A head's numbers are taken in
# pairs; each pair is a point in the plane, and it is turned by an angle proportional to one of the
# three coordinates. Positions then enter the score of a query and a key through their *difference* only,
# since turning both by the same angle changes nothing.
#
#     head of 128 numbers = 8 pairs turned by the frame, 28 by the row, 28 by the column
#
# Turning a point of the plane is multiplying a complex number, and that is how it is written here.
# Source: RoFormer (arXiv 2104.09864); black-forest-labs/flux, math.py.
#


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float = 10_000) -> Tensor:
    """The turn of every pair of every token: ``ids [..., N, axes] -> complex [..., 1, N, d/2]``.

    Pair ``i`` of an axis with ``d_axis`` numbers turns by ``position * theta ** (-2 i / d_axis)``
    radians: the first pair turns fast, the last almost not at all. Angles are taken in float64, since
    a position times a frequency loses digits in float32. The 1 is for the heads, which share the table.

    Raises ValueError when ``ids`` has not one coordinate per axis.
    """
    if ids.shape[-1] != len(axes_dim):
        raise ValueError(
            f"ids have {ids.shape[-1]} coordinates a token, but axes_dim {axes_dim} needs {len(axes_dim)}."
        )
    ids = ids.cpu() if ids.device.type == "mps" else ids  # which has no float64
    angles = []
    for axis, dim in enumerate(axes_dim):
        pair = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device)
        frequency = theta ** (-pair / dim)  # [d_axis/2]
        angles.append(ids[..., axis, None].double() * frequency)  # [..., N, d_axis/2]
    angle = torch.cat(angles, dim=-1)  # [..., N, d/2]
    return torch.polar(torch.ones_like(angle), angle).unsqueeze(-3)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn every pair of ``x [B, H, N, d]`` by ``table [..., 1, N, d/2]``; keeps shape and dtype.

    Pairs are neighbours, (x0, x1), (x2, x3), ..., not halves as in Llama.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if torch.compiler.is_compiling():  # compilers fuse plain arithmetic, not complex numbers: the same by hand
        cos, sin = torch.view_as_real(table).to(wide.dtype).unbind(-1)
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # [B, H, N, d/2]
    return torch.view_as_real(pairs * table.to(pairs.dtype)).flatten(-2).type_as(x)
