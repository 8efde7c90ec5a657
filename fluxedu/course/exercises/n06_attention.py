"""Notebook 06: attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.course.exercises import random_weights, run_module, subclass
from fluxedu.models import attention as library


def _qkv_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(6)
    shapes = ((2, 3, 7, 4), (1, 2, 5, 9), (1, 5, 96, 32))
    return [tuple(1.5 * torch.randn(*shape, generator=g) for _ in range(3)) for shape in shapes]


@exercise(
    "attention.attend",
    minutes=8,
    difficulty=1,
    cases=_qkv_cases,
    against=F.scaled_dot_product_attention,
    hints=(
        "The scores are a table with one row per query and one column per key. The softmax turns each row into "
        "weights, and the output is the weighted sum of the values.",
        "`q @ k.transpose(-1, -2)` is the table, `[B, H, N, N]`; `softmax(dim=-1)` makes each row sum to 1.",
        "`weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)`, and the answer is `weights @ v`.",
    ),
)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v`, separately in every head: three tensors `[B, H, N, d]` -> `[B, H, N, d]`."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [B, H, N, N], one row per query
    weights = scores.softmax(dim=-1)  # each row sums to 1
    return weights @ v  # [B, H, N, d]


wrong("attention.attend", "the scores are not divided by sqrt(d), so the softmax is too sharp.")(
    lambda q, k, v: attend(q * q.shape[-1] ** 0.5, k, v)
)
wrong("attention.attend", "you divide the scores by d; divide them by its square root.")(
    lambda q, k, v: attend(q * q.shape[-1] ** -0.5, k, v)
)
wrong("attention.attend", "your columns sum to 1; the rows, one per query, should (softmax over the last axis).")(
    lambda q, k, v: (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-2) @ v
)
wrong("attention.attend", "queries and keys are exchanged: a row of the table belongs to a query.")(
    lambda q, k, v: attend(k, q, v)
)
wrong("attention.attend", "the softmax is missing: you multiply the values by the scores themselves.")(
    lambda q, k, v: q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 @ v
)


def _norm_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(7)
    cases = []
    for shape, size in (
        ((2, 3, 5, 4), 3.0),
        ((1, 2, 3, 6), 0.01),
        ((1, 5, 64, 32), 4.0),
    ):  # with small vectors the value of eps matters
        q, k = (size * (torch.randn(*shape, generator=g) + 0.5) for _ in range(2))
        cases.append(((shape[-1],), _weights(library.QKNorm(shape[-1]), shape[-1]), q, k))
    q, k = (1e-2 * torch.randn(1, 2, 4, 8, generator=g) for _ in range(2))
    return [*cases, ((8,), _weights(library.QKNorm(8), 8), q.bfloat16(), k.bfloat16())]


def _weights(module: nn.Module, seed: int) -> dict[str, Tensor]:
    return random_weights(module, seed, mean=0.2, std=0.6)


class _Float64Norm(library.QKNorm):
    """The formula in float64, converted back to the input's dtype at the end."""

    def forward(self, q, k):
        outputs = []
        for x, scale in ((q, self.query_norm.scale), (k, self.key_norm.scale)):
            rms = (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
            outputs.append((x.double() / rms * scale.double()).type_as(x))
        return outputs


@exercise(
    "attention.qknorm",
    minutes=10,
    difficulty=2,
    cases=_norm_cases,
    call=run_module,
    against=_Float64Norm,
    tolerance=3e-5,
    hints=(
        "Divide every query and every key of every head by its own root mean square, then multiply by a learned number "
        "per channel. Do not subtract the mean.",
        "The mean is over the last axis: `x.float().square().mean(-1, keepdim=True)`; eps 1e-6 goes under the root.",
        "`x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale`, then `.type_as(x)`; q with "
        "`self.query_norm.scale`, k with `self.key_norm.scale`.",
    ),
)
class QKNorm(nn.Module):
    """Bring every query and key `[B, H, N, d]` to root mean square 1, then multiply by a learned `scale [d]`.

    The formula is `x / sqrt(mean(x^2) + 1e-6) * scale`, with the mean over the d numbers of one head of one token.
    Compute in float32 and convert back to the dtype of x. Return (q, k); each has its own scale.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = nn.ParameterDict({"scale": torch.ones(head_dim)})
        self.key_norm = nn.ParameterDict({"scale": torch.ones(head_dim)})

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        # your turn
        return self.rms_norm(q, self.query_norm.scale), self.rms_norm(k, self.key_norm.scale)

    def rms_norm(self, x: Tensor, scale: Tensor) -> Tensor:
        wide = x.float()
        rms = (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # [B, H, N, 1]
        return (wide / rms * scale).type_as(x)


def _norm_with(normalise: Callable[[Tensor], Tensor]) -> type[QKNorm]:
    """QKNorm with another function in place of the division by the root mean square."""
    return subclass(QKNorm, rms_norm=lambda self, x, scale: (normalise(x.float()) * scale).type_as(x))


wrong("attention.qknorm", "you bring the vectors to length 1; root mean square 1 means length sqrt(d).")(
    _norm_with(lambda x: F.normalize(x, dim=-1))
)
wrong("attention.qknorm", "you subtract the mean first, as LayerNorm does; RMSNorm does not.")(
    _norm_with(lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6))
)
wrong("attention.qknorm", "the learned scale is missing.")(
    subclass(QKNorm, rms_norm=lambda self, x, scale: QKNorm.rms_norm(self, x, torch.ones_like(scale)))
)
wrong("attention.qknorm", "you add eps outside the root; add it to the mean square, under the root.")(
    _norm_with(lambda x: x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6))
)
wrong("attention.qknorm", "you multiply q and k by the query's scale; the keys have their own.")(
    subclass(QKNorm, forward=lambda self, q, k: [self.rms_norm(x, self.query_norm.scale) for x in (q, k)])
)
wrong("attention.qknorm", "your mean is over all heads and channels of a token; each head has its own.")(
    _norm_with(lambda x: x / (x.square().mean((1, 3), keepdim=True) + 1e-6).sqrt())
)


@wrong("attention.qknorm", "you compute in bfloat16, which loses digits; convert to float32 first and back at the end.")
class _Bfloat16(QKNorm):
    def rms_norm(self, x, scale):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale.type_as(x)


def _stream_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(8)
    cases = []
    for b, n, dim, heads, bias in ((2, 5, 12, 3, True), (1, 7, 8, 2, False), (1, 64, 160, 5, True)):
        weights = _weights(library.SelfAttention(dim, heads, bias), dim)
        cases.append(((dim, heads, bias), weights, torch.randn(b, n, dim, generator=g)))
    return cases


@exercise(
    "attention.stream",
    minutes=12,
    difficulty=2,
    cases=_stream_cases,
    call=run_module,
    against=library.SelfAttention,
    hints=(
        "One linear layer computes q, k and v of all heads side by side. You have to split its `3 D` outputs correctly "
        "and normalise q and k.",
        "The last axis is `3 x H x d`, in this order: `unflatten(-1, (3, H, -1))` gives `[B, N, 3, H, d]`, and "
        "`permute` moves the 3 to the front and the heads before the tokens.",
        "`q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)`, then "
        "`q, k = self.norm(q, k)`.",
    ),
)
class SelfAttention(nn.Module):
    """Compute one stream's q, k and v: `x [B, N, D]` -> three tensors `[B, H, N, d]`, q and k normalised.

    `qkv` computes all three at once, `D -> 3 D`: all of q, then all of k, then all of v, and in each of them one head
    after another. `norm` is the QKNorm. `proj` is applied to the attention output,
    by the block; you do not need it here.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = library.QKNorm(dim // num_heads)  # or your own
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # your turn
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        q, k = self.norm(q, k)
        return q, k, v


class _Split(SelfAttention):
    """SelfAttention with another way to split the output of the linear layer, for the wrong answers to override."""

    def forward(self, x):
        q, k, v = self.split(self.qkv(x))
        return *self.norm(q, k), v


wrong("attention.stream", "you split the row as H x 3 x d; it is 3 x H x d.")(
    subclass(_Split, split=lambda self, qkv: qkv.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4))
)
wrong("attention.stream", "you give every H-th number to the same head; a head is d neighbouring numbers.")(
    subclass(_Split, split=lambda self, qkv: qkv.unflatten(-1, (3, -1, self.num_heads)).permute(2, 0, 4, 1, 3))
)


@wrong("attention.stream", "you reshape `[B, N, H d]` directly to `[B, H, N, d]`, which mixes tokens; transpose.")
class _Reshaped(_Split):
    def split(self, qkv):
        b, n, _ = qkv.shape
        return [part.reshape(b, self.num_heads, n, -1) for part in qkv.chunk(3, dim=-1)]


@wrong("attention.stream", "q and k are not normalised: call the QKNorm.")
class _NotNormalised(SelfAttention):
    def forward(self, x):
        return tuple(self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4))


@wrong("attention.stream", "q, k and v are in another order; the row holds queries, keys, values.")
class _Order(_Split):
    def split(self, qkv):
        k, q, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v
