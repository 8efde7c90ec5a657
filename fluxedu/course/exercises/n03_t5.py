"""Notebook 03: T5's layers."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.course.exercises import randomise, run_module, subclass
from fluxedu.models.config import T5Config
from fluxedu.models.t5 import T5Encoder, T5GatedMLP, T5Norm


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
    for batch, heads, length, d in ((2, 3, 5, 4), (1, 2, 7, 6), (1, 4, 32, 32)):
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


def _encoders() -> list[tuple]:
    g = torch.Generator().manual_seed(5)
    cases = []
    for layers, heads, width, length in ((1, 2, 6, 5), (3, 2, 8, 7), (3, 4, 32, 32)):
        sizes = {"d_model": heads * width, "d_ff": 3 * width, "num_layers": layers, "num_heads": heads, "d_kv": width}
        network = randomise(T5Encoder(T5Config(vocab_size=50, **sizes)), g)
        for name, weight in network.named_parameters():
            if name.endswith("norm.weight"):
                weight.data = 1 + 0.3 * torch.randn(weight.shape, generator=g)
        cases.append((network, torch.randint(50, (2, length), generator=g)))
    return cases


@exercise(
    "t5.encode",
    minutes=8,
    difficulty=2,
    cases=_encoders,
    against=lambda t5, ids: t5(ids),
    hints=(
        "A block never replaces the tokens; it adds to them, first the attention's output and then the MLP's. Each of "
        "the two gets the normalised tokens.",
        "`attention, mlp = block.layer`. Call `attention.SelfAttention(..., bias)` on `attention.layer_norm(x)`, and "
        "`mlp.DenseReluDense(...)` on `mlp.layer_norm(x)`, where x contains the attention's output already.",
        "In the loop: `x = x + attention.SelfAttention(attention.layer_norm(x), bias)`, then "
        "`x = x + mlp.DenseReluDense(mlp.layer_norm(x))`. After it: `return t5.encoder.final_layer_norm(x)`.",
    ),
)
def encode(t5: nn.Module, ids: Tensor) -> Tensor:
    """T5's encoder: token ids `[B, L]` -> vectors `[B, L, D]`, with the modules of `t5`.

    `t5.shared(ids)` are the token embeddings, and `t5.encoder.block[0].attention.bias(L)` is the position bias, which
    all blocks share. Each `block` of `t5.encoder.block` has two layers, `block.layer`. The first contains a norm
    `layer_norm` and the attention `SelfAttention(x, bias)`, the second a norm `layer_norm` and the MLP
    `DenseReluDense(x)`. At the end comes `t5.encoder.final_layer_norm`.
    """
    x = t5.shared(ids)  # [B, L, D]
    bias = t5.encoder.block[0].attention.bias(ids.shape[1])  # [1, H, L, L]
    for block in t5.encoder.block:
        attention, mlp = block.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        x = x + mlp.DenseReluDense(mlp.layer_norm(x))
    return t5.encoder.final_layer_norm(x)


@mistakes(
    "t5.encode",
    ("no residual", "each layer replaces the tokens by its output; add the output to the tokens."),
    ("normalised residual", "you add the output to the normalised tokens; add it to the tokens themselves."),
    ("no norms", "the layers get the tokens without the norm."),
    ("norm after", "you normalise after the addition, as the first transformers did; T5 normalises a layer's input."),
    ("parallel", "the MLP gets the tokens from before the attention; it gets those with the attention's output added."),
    ("no final norm", "the last norm, final_layer_norm, is missing."),
    ("first bias", "only the first block gets the position bias; all blocks share it."),
    ("one block", "only the first block is used; loop over all blocks."),
)
def _encode_with(mistake, t5, ids):
    x, bias = t5.shared(ids), t5.encoder.block[0].attention.bias(ids.shape[1])
    for i, block in enumerate(t5.encoder.block):
        if i and mistake == "one block":
            break
        attention, mlp = block.layer
        bias = 0 * bias if i and mistake == "first bias" else bias
        before = x
        for layer, run in ((attention, partial(attention.SelfAttention, bias=bias)), (mlp, mlp.DenseReluDense)):
            inputs = before if mistake == "parallel" else x
            normed = inputs if mistake in ("no norms", "norm after") else layer.layer_norm(inputs)
            residual = 0 if mistake == "no residual" else normed if mistake == "normalised residual" else x
            x = residual + run(normed)
            x = layer.layer_norm(x) if mistake == "norm after" else x
    return x if mistake == "no final norm" else t5.encoder.final_layer_norm(x)
