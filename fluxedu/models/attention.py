"""Attention: queries and keys are normalised, rotated by position, and compared.

    out = softmax(q k^T / sqrt(d)) v

Source: black-forest-labs/flux, modules/layers.py and math.py; QKNorm: arXiv 2302.05442; RoPE: arXiv 2104.09864.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.attention_map import AttentionMap, at_least_float32
from fluxedu.errors import RequestError
from fluxedu.probe import Probed

RMS_EPS = 1e-6


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, computed in float32 or better."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale, in one kernel
        return F.rms_norm(x, x.shape[-1:], self.scale, RMS_EPS)


class QKNorm(nn.Module):
    """Normalises the query and key vector of each head, ``[B, H, N, d]``, to root mean square 1 (length ``sqrt(d)``),
    then scales each channel by a learned number. This bounds the attention scores, whatever the input.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """``[B, N, parts * D] -> parts x [B, H, N, d]`` with ``D = H * d``; contiguous parts, from a single copy."""
    x = x.unflatten(-1, (parts, num_heads, -1))  # [B, N, parts, H, d]
    return x.permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # [parts, B, H, N, d]


def to_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, N, H * d] -> [B, H, N, d]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, N, d] -> [B, N, H * d]``."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(Probed):
    """The attention layers of one stream: those before the attention (``qkv``, ``norm``) and after it (``proj``).

    The double block calls :meth:`forward` for text and for image, lets both attend together with :func:`attend`, and
    then calls each stream's ``proj``.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, proj_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stream's S tokens ``x [B, S, D]`` -> q, k (both after QKNorm) and v, each ``[B, H, S, d]``."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        q = self.probe("q", q)  # [B, H, S, d] queries, before QKNorm
        k = self.probe("k", k)  # [B, H, S, d] keys, before QKNorm
        v = self.probe("v", v)  # [B, H, S, d] values: what a token passes on to the tokens that attend to it
        q, k = self.norm(q, k)
        q = self.probe("q_norm", q)  # [B, H, S, d] queries after QKNorm
        k = self.probe("k_norm", k)  # [B, H, S, d] keys after QKNorm
        return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, txt_len: int, block: Probed) -> Tensor:
    """Joint attention: each of the T text and image tokens attends to all of them. ``3 x [B, H, T, d] -> [B, T, D]``.

    rope: the rotations ``[1, T, d/2]`` from :func:`rope_table`, for queries and keys · txt_len: the first ``txt_len``
    tokens are text, which only instruments need to know · block: the block that the sites belong to.
    """
    rope = block.probe("attn.rope", rope)  # [1, T, d/2] the rotation of each channel pair, as complex numbers
    q = block.probe("attn.q", rotate(q, rope))  # [B, H, T, d] queries, rotated by position
    k = block.probe("attn.k", rotate(k, rope))  # [B, H, T, d] keys, rotated by position
    if block.is_watched("attn.scores") or block.is_watched("attn.map"):
        attn_map = AttentionMap(q, k, v, txt_len)
        if block.is_watched("attn.scores"):  # the only value of the size of all maps
            scores = attn_map.all_scores()
            probed = block.probe("attn.scores", scores)  # [B, H, T, T] q k^T / sqrt(d), before the softmax
            attn_map = attn_map if probed is scores and not probed.requires_grad else attn_map.with_scores(probed)
        attn_map = block.probe("attn.map", attn_map)  # [B, H, T, T] attention map (lazy), one row per query
        out = attn_map @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v, without storing the map
    out = block.probe("heads", out)  # [B, H, T, d] the output of each head; ablate heads here
    return merge_heads(out)


# ---------------------------------------------------------------- rotary position embedding (RoPE)


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float = 10_000) -> Tensor:
    """The rotation of every channel pair of every token: ``ids [..., N, axes] -> complex [..., 1, N, d/2]``.

    Every token has one position id per axis, (frame, row, column). A head's channels are taken in pairs; each pair is a
    point in the plane, rotated by an angle proportional to one of the ids. Rotating query and key by the same angle
    leaves their product unchanged, so a score depends on positions only through their difference.

    Pair ``i`` of an axis with ``d_axis`` channels rotates by ``id * theta ** (-2 i / d_axis)`` radians: the first pair
    fast, the last hardly at all. At head width 128, 8 pairs rotate with the frame, 28 with the row, 28 with the column.
    Angles are float64, since float32 loses digits of id times frequency. The axis of size 1 broadcasts over the heads.

    Raises ValueError when ``ids`` does not have one id per axis.
    """
    if ids.shape[-1] != len(axes_dim):
        raise RequestError(
            f"ids must have one position id per entry of axes_dim {axes_dim}, so {len(axes_dim)} per token, "
            f"not {ids.shape[-1]}."
        )
    ids = ids.cpu() if ids.device.type == "mps" else ids  # MPS has no float64
    angles = []
    for axis, dim in enumerate(axes_dim):
        pair = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device)
        frequency = theta ** (-pair / dim)  # [d_axis/2]
        angles.append(ids[..., axis, None].double() * frequency)  # [..., N, d_axis/2]
    angle = torch.cat(angles, dim=-1)  # [..., N, d/2]
    return torch.polar(torch.ones_like(angle), angle).unsqueeze(-3)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate every channel pair of ``x [B, H, N, d]`` by ``rope [..., 1, N, d/2]``; keeps shape and dtype.

    Pairs are neighbours, (x0, x1), (x2, x3), ..., not halves as in Llama. Rotating a point of the plane is multiplying
    a complex number by one of absolute value 1.
    """
    wide = at_least_float32(x)
    if torch.compiler.is_compiling():  # compilers fuse real arithmetic, not complex: the same multiplication spelt out
        cos, sin = torch.view_as_real(rope).to(wide.dtype).unbind(-1)
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # [B, H, N, d/2]
    return torch.view_as_real(pairs * rope.to(pairs.dtype)).flatten(-2).type_as(x)
