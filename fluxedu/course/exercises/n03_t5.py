"""Notebook 03: T5."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.course.exercises import run_module, subclass
from fluxedu.models.config import T5Config
from fluxedu.models.t5 import T5GatedMLP, T5Norm, distance_buckets


def _lengths() -> list[tuple]:
    return [(9, 8, 6), (40, 32, 128), (21, 16, 20)]


def _library_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    config = T5Config(relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance)
    return distance_buckets(length, config)


@exercise(
    "t5.buckets",
    minutes=15,
    difficulty=3,
    cases=_lengths,
    call=lambda answer, *case: answer(*case).long(),
    against=_library_buckets,
    tolerance=0,
    hints=(
        "Compute two tables first: the offset, which is key position minus query position, and the distance, its "
        "absolute value. Then compute one formula for near distances and one for far ones, and choose with "
        "`torch.where`.",
        "`position[None, :] - position[:, None]` is the offset. With `half = num_buckets // 2` and `near = half // 2`, "
        "the formula for far distances goes from `near` at distance `near` to `half` at `max_distance`, linearly in "
        "the logarithm of the distance.",
        "`far = near + (torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near) * (half - near))"
        ".long()`, clamped to `half - 1`; choose with `torch.where(distance < near, distance, far)`, and add `half` "
        "where the offset is above 0.",
    ),
)
def buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """The row of the bias table for each query and key: integers `[length, length]`, one row per query.

    Half of the `num_buckets` buckets are for keys at or before the query (numbers from 0), half for keys after it
    (numbers from `num_buckets // 2`). In each half, the first half of the buckets hold one distance each: 0, 1, 2, ...
    The rest share the distances up to `max_distance`, with limits that are equally spaced in the logarithm; round the
    bucket number down. Distances from `max_distance` on get the last bucket.
    """
    half = num_buckets // 2
    near = half // 2
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]  # key minus query, [L, L]
    distance = offset.abs()
    fraction = torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near)  # 0 at near, 1 at max_distance
    far = (near + (fraction * (half - near)).long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


wrong("t5.buckets", "the two halves are exchanged: the upper half is for keys after the query.")(
    lambda length, num_buckets, max_distance: buckets(length, num_buckets, max_distance).T
)
wrong("t5.buckets", "earlier and later keys share their buckets; each direction needs its own half.")(
    lambda length, num_buckets, max_distance: buckets(length, num_buckets, max_distance) % (num_buckets // 2)
)


@mistakes(
    "t5.buckets",
    ("none shared", "every distance has its own bucket until they run out; far distances must share buckets."),
    ("linear", "your far buckets are equally spaced in the distance; use its logarithm."),
    ("rounded", "the bucket numbers of far distances are rounded to the nearest; round them down."),
)
def _buckets_with(mistake, length, num_buckets, max_distance):
    half = num_buckets // 2
    near = half if mistake == "none shared" else half // 2  # this many distances have their own bucket
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]
    distance = offset.abs()
    fraction = torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near)
    if mistake == "linear":
        fraction = (distance - near) / (max_distance - near)
    buckets_after_near = fraction * (half - near)
    if mistake == "rounded":
        buckets_after_near = buckets_after_near.round()
    far = (near + buckets_after_near.long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


def _vectors() -> list[tuple]:
    g = torch.Generator().manual_seed(2)
    cases = []
    for shape, size, mean, eps in (((2, 3, 6), 1, 0.7, 1e-6), ((1, 4, 5), 1e-3, 0, 1e-6), ((7,), 1, 0, 0.3)):
        x = size * torch.randn(shape, generator=g) + mean
        cases.append(((shape[-1], eps), {"weight": torch.randn(shape[-1], generator=g)}, x))
    return cases


@exercise(
    "t5.RMSNorm",
    minutes=6,
    difficulty=1,
    cases=_vectors,
    call=run_module,
    against=T5Norm,
    hints=(
        "Read *root mean square* backwards: square, take the mean over the vector, take the root.",
        "`x.square().mean(dim=-1, keepdim=True)` keeps the last axis, so that x can be divided by it. `torch.rsqrt` is "
        "one over the square root.",
        "`return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight`.",
    ),
)
class RMSNorm(nn.Module):
    """Divide every vector (the last axis) by its root mean square, then multiply element by element by `weight`.

    `eps` is added to the mean square, under the root. No mean is subtracted, and there is no bias.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:  # [..., D]
        # your turn
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


wrong("t5.RMSNorm", "that is LayerNorm: T5's norm does not subtract the mean.")(
    subclass(RMSNorm, forward=lambda self, x: F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps))
)
wrong("t5.RMSNorm", "you add eps outside the root; add it to the mean square, under the root.")(
    subclass(RMSNorm, forward=lambda self, x: x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight)
)


@wrong("t5.RMSNorm", "you divide by the vector's length, the root of the sum of squares; use the root of their mean.")
class _Length(RMSNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps) * self.weight


wrong("t5.RMSNorm", "the weight is missing.")(
    subclass(RMSNorm, forward=lambda self, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))
)
wrong("t5.RMSNorm", "the root is missing: you divide by the mean square.")(
    subclass(RMSNorm, forward=lambda self, x: x / (x.square().mean(-1, keepdim=True) + self.eps) * self.weight)
)


def _tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(3)
    cases = []
    for shape, hidden in (((2, 3, 6), 10), ((1, 5, 4), 7)):
        d = shape[-1]
        sizes = {"wi_0": (hidden, d), "wi_1": (hidden, d), "wo": (d, hidden)}
        weights = {f"{name}.weight": torch.randn(size, generator=g) for name, size in sizes.items()}
        cases.append(((d, hidden), weights, torch.randn(shape, generator=g)))
    return cases


@exercise(
    "t5.GatedMLP",
    minutes=8,
    difficulty=1,
    cases=_tokens,
    call=run_module,
    against=lambda dim, hidden: T5GatedMLP(T5Config(d_model=dim, d_ff=hidden)),
    hints=(
        "Apply both hidden layers to the same token and multiply their outputs element by element. Only one of the two "
        "goes through the activation function.",
        "`F.gelu(x, approximate='tanh')` is the GELU that T5 v1.1 was trained with.",
        "`return self.wo(F.gelu(self.wi_0(x), approximate='tanh') * self.wi_1(x))`.",
    ),
)
class GatedMLP(nn.Module):
    """T5's MLP: multiply the output of `wi_1` element by element by a gate, then apply `wo`.

    The gate is the GELU, in its tanh approximation, of the output of `wi_0`. Both layers get the same token.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.wi_0 = nn.Linear(dim, hidden, bias=False)
        self.wi_1 = nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        # your turn
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


wrong("t5.GatedMLP", "the two hidden layers are exchanged: wi_0 goes through the GELU, wi_1 does not.")(
    subclass(GatedMLP, forward=lambda self, x: self.wo(F.gelu(self.wi_1(x), approximate="tanh") * self.wi_0(x)))
)
wrong("t5.GatedMLP", "that is the exact GELU, with the error function; T5 v1.1 uses the tanh approximation.")(
    subclass(GatedMLP, forward=lambda self, x: self.wo(F.gelu(self.wi_0(x)) * self.wi_1(x)))
)
wrong("t5.GatedMLP", "there is no gate: wi_1 is not used.")(
    subclass(GatedMLP, forward=lambda self, x: self.wo(F.gelu(self.wi_0(x), approximate="tanh")))
)
wrong("t5.GatedMLP", "your gate is a sigmoid, as in the first gated linear units; T5's is a GELU.")(
    subclass(GatedMLP, forward=lambda self, x: self.wo(torch.sigmoid(self.wi_0(x)) * self.wi_1(x)))
)


@wrong("t5.GatedMLP", "both hidden layers go through the GELU; wi_1 has no activation function.")
class _TwoGELUs(GatedMLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * F.gelu(self.wi_1(x), approximate="tanh"))


def _heads() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    cases = []
    for batch, heads, length, d in ((2, 3, 5, 4), (1, 2, 7, 6)):
        q, k, v = (torch.randn(batch, heads, length, d, generator=g) for _ in range(3))
        cases.append((0.6 * q, k, v, torch.randn(1, heads, length, length, generator=g)))
    return cases


@exercise(
    "t5.attend",
    minutes=8,
    difficulty=2,
    cases=_heads,
    against=lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0),
    hints=(
        "Compute the scores, then the weights, then the weighted sum of the values. The bias is part of the scores.",
        "`q @ k.transpose(-1, -2)` is `[B, H, L, L]`, one row per query; the weights of a row sum to 1, so the softmax "
        "is over the last axis.",
        "`return (q @ k.transpose(-1, -2) + bias).softmax(dim=-1) @ v`.",
    ),
)
def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """T5's attention: `q`, `k`, `v [B, H, L, d]` and `bias [1, H, L, L]` give the heads' outputs `[B, H, L, d]`.

    The bias is added to the scores. The scores are **not** divided by the root of d: T5 was trained without that.
    """
    scores = q @ k.transpose(-1, -2) + bias  # [B, H, L, L], one row per query
    return scores.softmax(dim=-1) @ v


wrong("t5.attend", "you divide the scores by the root of d; T5 does not.")(
    lambda q, k, v, bias: attend(q * q.shape[-1] ** -0.5, k, v, bias)
)
wrong("t5.attend", "the bias is missing, so the attention has no information about positions.")(
    lambda q, k, v, bias: attend(q, k, v, 0 * bias)
)
wrong("t5.attend", "you add the bias after the softmax; add it to the scores, before the softmax.")(
    lambda q, k, v, bias: ((q @ k.transpose(-1, -2)).softmax(dim=-1) + bias) @ v
)
wrong("t5.attend", "your softmax is over the queries; the weights of one query must sum to 1 over the keys (dim=-1).")(
    lambda q, k, v, bias: (q @ k.transpose(-1, -2) + bias).softmax(dim=-2) @ v
)
wrong("t5.attend", "the bias is transposed: its rows are queries, its columns keys.")(
    lambda q, k, v, bias: attend(q, k, v, bias.transpose(-1, -2))
)
