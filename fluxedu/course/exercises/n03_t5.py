"""Notebook 03: T5."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.models.config import T5Config
from fluxedu.models.t5 import T5GatedMLP, T5Norm, distance_buckets


def _lengths() -> list[tuple]:
    return [(9, 8, 6), (40, 32, 128), (21, 16, 20)]


def _ours(length: int, count: int, furthest: int) -> Tensor:
    config = T5Config(relative_attention_num_buckets=count, relative_attention_max_distance=furthest)
    return distance_buckets(length, config)


@exercise(
    "t5.buckets",
    minutes=15,
    difficulty=3,
    cases=_lengths,
    call=lambda answer, *case: answer(*case).long(),
    against=_ours,
    tolerance=0,
    hints=(
        "Two tables of offsets come first: key minus query, and its size without the sign. Then one rule for near "
        "distances, one for far ones, and `torch.where` to choose.",
        "`place[None, :] - place[:, None]` is key minus query. With `half = count // 2` and `near = half // 2`, the "
        "far rule goes from `near` at distance `near` to `half` at distance `furthest`, evenly in the logarithm.",
        "`far = near + (torch.log(distance.clamp(min=1) / near) / math.log(furthest / near) * (half - near)).long()`, "
        "clamped to `half - 1`; choose with `torch.where(distance < near, distance, far)`, and add `half` where the "
        "offset is above 0.",
    ),
)
def buckets(length: int, count: int, furthest: int) -> Tensor:
    """Which row of the bias table serves a query and a key: whole numbers `[length, length]`, a row a query.

    Half of the `count` buckets are for keys at or before the query (numbers from 0), half for keys after it (numbers
    from `count // 2`). In each half, the first half of the buckets are for one distance each: 0, 1, 2, ... The rest
    share the distances up to `furthest`, evenly in the logarithm and rounded down; what is further gets the last one.
    """
    half = count // 2
    near = half // 2
    place = torch.arange(length)
    offset = place[None, :] - place[:, None]  # key minus query, [L, L]
    distance = offset.abs()
    share = torch.log(distance.clamp(min=1) / near) / math.log(furthest / near)  # 0 at near, 1 at furthest
    far = (near + (share * (half - near)).long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


@wrong("t5.buckets", "the two halves have changed places: the offset is key minus query, and the upper half is ahead.")
def _mirrored(length, count, furthest):
    return buckets(length, count, furthest).T


@wrong("t5.buckets", "behind and ahead share their buckets; each direction needs a half of its own.")
def _undirected(length, count, furthest):
    return buckets(length, count, furthest) % (count // 2)


@wrong("t5.buckets", "every distance has a bucket of its own until they run out; the far ones must share them.")
def _all_near(length, count, furthest):
    place = torch.arange(length)
    offset = place[None, :] - place[:, None]
    return offset.abs().clamp(max=count // 2 - 1) + count // 2 * (offset > 0)


@wrong("t5.buckets", "the far distances share their buckets evenly in the distance; it is evenly in its logarithm.")
def _linear(length, count, furthest):
    half, near = count // 2, count // 4
    place = torch.arange(length)
    offset = place[None, :] - place[:, None]
    distance = offset.abs()
    far = (near + ((distance - near) / (furthest - near) * (half - near)).long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


@wrong("t5.buckets", "the far ones are rounded to the nearest; round them down.")
def _rounded(length, count, furthest):
    half, near = count // 2, count // 4
    place = torch.arange(length)
    offset = place[None, :] - place[:, None]
    distance = offset.abs()
    share = torch.log(distance.clamp(min=1) / near) / math.log(furthest / near)
    far = (near + (share * (half - near)).round().long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


def _vectors() -> list[tuple]:
    g = torch.Generator().manual_seed(2)
    return [
        (torch.randn(2, 3, 6, generator=g) + 0.7, torch.randn(6, generator=g), 1e-6),
        (1e-3 * torch.randn(1, 4, 5, generator=g), torch.randn(5, generator=g), 1e-6),
        (torch.randn(7, generator=g), torch.randn(7, generator=g), 0.3),
    ]


def _normed(answer: type[nn.Module], x: Tensor, weight: Tensor, eps: float) -> Tensor:
    module = answer(len(weight), eps)
    module.load_state_dict({"weight": weight})
    return module(x)


@exercise(
    "t5.RMSNorm",
    minutes=6,
    difficulty=1,
    cases=_vectors,
    call=_normed,
    against=T5Norm,
    stub='''
    class RMSNorm(nn.Module):
        """Every vector (the last axis) divided by its root mean square, then times `weight`, number by number.

        `eps` is added to the mean of the squares, under the root. No mean is subtracted and there is no bias.
        """

        def __init__(self, dim: int, eps: float):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

        def forward(self, x: Tensor) -> Tensor:  # [..., D]
            raise NotImplementedError("your turn")
    ''',
    hints=(
        "Root mean square, read backwards: square, take the mean over the vector, take the root.",
        "`x.square().mean(dim=-1, keepdim=True)` keeps the axis, so that it divides x as it is. `torch.rsqrt` is one "
        "over the root.",
        "`return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight`.",
    ),
)
class RMSNorm(nn.Module):
    """Every vector (the last axis) divided by its root mean square, then times `weight`, number by number.

    `eps` is added to the mean of the squares, under the root. No mean is subtracted and there is no bias.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:  # [..., D]
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


class _Norm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps


@wrong("t5.RMSNorm", "that is LayerNorm: T5's does not subtract the mean.")
class _Layer(_Norm):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


@wrong("t5.RMSNorm", "eps stands outside of the root; it is added to the mean of the squares, under it.")
class _Outside(_Norm):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


@wrong("t5.RMSNorm", "you divide by the vector's length, the root of the sum; it is the root of the mean.")
class _Sum(_Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps) * self.weight


@wrong("t5.RMSNorm", "the weight is missing.")
class _Bare(_Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@wrong("t5.RMSNorm", "the root is missing: you divide by the mean of the squares.")
class _NoRoot(_Norm):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps) * self.weight


_MATRICES = ("wi_0", "wi_1", "wo")


def _tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(3)
    cases = []
    for shape, hidden in (((2, 3, 6), 10), ((1, 5, 4), 7)):
        d = shape[-1]
        sizes = {"wi_0": (hidden, d), "wi_1": (hidden, d), "wo": (d, hidden)}
        weights = {f"{name}.weight": torch.randn(size, generator=g) for name, size in sizes.items()}
        cases.append((torch.randn(shape, generator=g), hidden, weights))
    return cases


def _gated(answer: type[nn.Module], x: Tensor, hidden: int, weights: dict[str, Tensor]) -> Tensor:
    if answer is T5GatedMLP:
        module = T5GatedMLP(T5Config(d_model=x.shape[-1], d_ff=hidden))
    else:
        module = answer(x.shape[-1], hidden)
    module.load_state_dict(weights)
    return module(x)


@exercise(
    "t5.GatedMLP",
    minutes=8,
    difficulty=1,
    cases=_tokens,
    call=_gated,
    against=T5GatedMLP,
    stub='''
    class GatedMLP(nn.Module):
        """T5's MLP: what `wi_1` makes of a token, each number let through as far as `wi_0` says, brought back by `wo`.

        The gate is the GELU, in its tanh approximation, of what `wi_0` makes of the same token.
        """

        def __init__(self, dim: int, hidden: int):
            super().__init__()
            self.wi_0 = nn.Linear(dim, hidden, bias=False)
            self.wi_1 = nn.Linear(dim, hidden, bias=False)
            self.wo = nn.Linear(hidden, dim, bias=False)

        def forward(self, x: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
            raise NotImplementedError("your turn")
    ''',
    hints=(
        "Two widenings of the same token are multiplied, number by number; only one of them is bent.",
        "`F.gelu(x, approximate='tanh')` is the GELU that T5 v1.1 was trained with.",
        "`return self.wo(F.gelu(self.wi_0(x), approximate='tanh') * self.wi_1(x))`.",
    ),
)
class GatedMLP(nn.Module):
    """T5's MLP: what `wi_1` makes of a token, each number let through as far as `wi_0` says, brought back by `wo`.

    The gate is the GELU, in its tanh approximation, of what `wi_0` makes of the same token.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.wi_0 = nn.Linear(dim, hidden, bias=False)
        self.wi_1 = nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class _MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        for name in _MATRICES:
            self.add_module(name, nn.Linear(*((hidden, dim) if name == "wo" else (dim, hidden)), bias=False))


@wrong("t5.GatedMLP", "gate and content have changed places: wi_0 goes through the GELU, wi_1 does not.")
class _Exchanged(_MLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_1(x), approximate="tanh") * self.wi_0(x))


@wrong("t5.GatedMLP", "that is the exact GELU, with the error function; T5 v1.1 was trained with the tanh one.")
class _Exact(_MLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x)) * self.wi_1(x))


@wrong("t5.GatedMLP", "there is no gate: wi_1 is not used.")
class _Plain(_MLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh"))


@wrong("t5.GatedMLP", "the gate is a sigmoid, as in the first gated units; T5's is a GELU.")
class _Sigmoid(_MLP):
    def forward(self, x):
        return self.wo(torch.sigmoid(self.wi_0(x)) * self.wi_1(x))


@wrong("t5.GatedMLP", "both halves are bent; the content passes straight.")
class _BothBent(_MLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * F.gelu(self.wi_1(x), approximate="tanh"))


def _heads() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    cases = []
    for batch, heads, length, d in ((2, 3, 5, 4), (1, 2, 7, 6)):
        q, k, v = (torch.randn(batch, heads, length, d, generator=g) for _ in range(3))
        cases.append((0.6 * q, k, v, torch.randn(1, heads, length, length, generator=g)))
    return cases


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


@exercise(
    "t5.attend",
    minutes=8,
    difficulty=2,
    cases=_heads,
    against=_fused,
    hints=(
        "Scores, shares, sum of values. The bias is part of the scores.",
        "`q @ k.transpose(-1, -2)` is `[B, H, L, L]`, a row a query; the shares of a row sum to 1, so the softmax is "
        "over the last axis.",
        "`return (q @ k.transpose(-1, -2) + bias).softmax(dim=-1) @ v`.",
    ),
)
def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """T5's attention: `q`, `k`, `v [B, H, L, d]` and `bias [1, H, L, L]` give the heads `[B, H, L, d]`.

    The bias is added to the scores. The scores are **not** divided by the root of d: T5 was trained so from the start.
    """
    scores = q @ k.transpose(-1, -2) + bias  # [B, H, L, L], a row a query
    return scores.softmax(dim=-1) @ v


@wrong("t5.attend", "the scores are divided by the root of d; T5's are not.")
def _divided(q, k, v, bias):
    return attend(q * q.shape[-1] ** -0.5, k, v, bias)


@wrong("t5.attend", "the bias is missing, so nobody knows where anybody stands.")
def _unbiased(q, k, v, bias):
    return attend(q, k, v, 0 * bias)


@wrong("t5.attend", "the bias is added after the softmax; it belongs to the scores, before it.")
def _late(q, k, v, bias):
    return ((q @ k.transpose(-1, -2)).softmax(dim=-1) + bias) @ v


@wrong("t5.attend", "the softmax runs over the queries; it is the keys that share a query's attention (dim=-1).")
def _over_queries(q, k, v, bias):
    return (q @ k.transpose(-1, -2) + bias).softmax(dim=-2) @ v


@wrong("t5.attend", "the bias is transposed: its rows are queries, its columns keys.")
def _turned(q, k, v, bias):
    return attend(q, k, v, bias.transpose(-1, -2))
