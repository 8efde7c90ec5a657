"""Notebook 08: the single-stream block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.course.exercises import build_module, randomise
from fluxedu.course.exercises.n07_double import CONFIG, rotations
from fluxedu.models.attention import QKNorm, rotate, split_heads
from fluxedu.models.blocks import SingleStreamBlock
from fluxedu.models.modulation import Modulation


def _layers() -> list[tuple]:
    g = torch.Generator().manual_seed(80)
    cases = []
    for dim, hidden in ((6, 15), (4, 4)):
        layers = tuple(randomise(nn.Linear(dim, width), g) for width in (dim, dim, dim, hidden))
        cases.append((torch.randn(2, 3, dim, generator=g), *layers))
    return cases


def _concatenated(*layers: nn.Linear):
    """The reference: run the four layers one by one and concatenate their outputs."""
    return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


@exercise(
    "single.fuse",
    minutes=8,
    difficulty=1,
    cases=_layers,
    call=lambda answer, x, *layers: answer(*layers)(x),
    against=_concatenated,
    hints=(
        "Each output of a linear layer is computed by one row of its weight. More outputs simply mean more rows.",
        "`nn.Linear` stores its weight as `[out, in]`, so `torch.cat([...])` along axis 0 stacks the rows of all four "
        "layers. The biases are concatenated in the same order.",
        "With `fused = nn.Linear(to_q.in_features, n)`: `fused.weight.data = torch.cat([l.weight for l in layers])`, "
        "and the same for `bias`.",
    ),
)
def fuse(to_q: nn.Linear, to_k: nn.Linear, to_v: nn.Linear, proj_mlp: nn.Linear) -> nn.Linear:
    """Fuse four linear layers that read the same tokens into one layer with the concatenated outputs.

    The output order is q, k, v, MLP hidden layer. All four layers have the same `in_features`, and each has a bias.
    """
    layers = [to_q, to_k, to_v, proj_mlp]
    fused = nn.Linear(to_q.in_features, sum(layer.out_features for layer in layers))
    fused.weight.data = torch.cat([layer.weight for layer in layers])  # [3 D + M, D], one row per output
    fused.bias.data = torch.cat([layer.bias for layer in layers])  # [3 D + M]
    return fused


@wrong("single.fuse", "the biases are missing: each output has a bias, and biases are concatenated like the rows.")
def _no_bias(*layers):
    fused = fuse(*layers)
    fused.bias.data = torch.zeros_like(fused.bias)
    return fused


wrong("single.fuse", "the rows of the MLP's layer come first in yours; the order is q, k, v, MLP.")(
    lambda to_q, to_k, to_v, proj_mlp: fuse(proj_mlp, to_q, to_k, to_v)
)
wrong("single.fuse", "keys and values are exchanged: the order is q, k, v, MLP.")(
    lambda to_q, to_k, to_v, proj_mlp: fuse(to_q, to_v, to_k, proj_mlp)
)


@wrong("single.fuse", "the weights are right, but the biases are in a different order than the rows.")
def _biases_reversed(*layers):
    fused = fuse(*layers)
    fused.bias.data = torch.cat([layer.bias for layer in reversed(layers)])
    return fused


def _fused_outputs() -> list[tuple]:
    g = torch.Generator().manual_seed(81)
    cases = []
    for dim, hidden in ((6, 15), (5, 7)):
        linear2 = randomise(nn.Linear(dim + hidden, dim), g)
        cases.append((linear2, torch.randn(2, 3, dim, generator=g), torch.randn(2, 3, hidden, generator=g)))
    return cases


def _both_layers(answer, linear2, attn_out, hidden):
    """What each layer does to its input without its bias, and the sum of both layers with it."""
    attn_proj, mlp_proj = answer(linear2, attn_out.shape[-1])
    attn_part = attn_proj(attn_out) - attn_proj(torch.zeros_like(attn_out))
    mlp_part = mlp_proj(hidden) - mlp_proj(torch.zeros_like(hidden))
    return attn_part, mlp_part, attn_proj(attn_out) + mlp_proj(hidden)


def _zero_padded(linear2: nn.Linear, dim: int):
    """The reference: call `linear2` itself with zeros in place of the other input; the bias counts once."""
    hidden_size = linear2.in_features - dim
    attn_proj = lambda attn_out: linear2(F.pad(attn_out, (0, hidden_size)))  # noqa: E731
    mlp_proj = lambda hidden: linear2(F.pad(hidden, (dim, 0))) - linear2.bias  # noqa: E731
    return attn_proj, mlp_proj


@exercise(
    "single.split",
    minutes=10,
    difficulty=2,
    cases=_fused_outputs,
    call=_both_layers,
    against=_zero_padded,
    hints=(
        "Each input of a linear layer is read by one column of its weight: the first columns read the attention "
        "output, the others the MLP's hidden layer.",
        "`linear2.weight` is `[D, D + M]`, and `weight[:, :dim]` are the columns for the attention output. The bias "
        "is added once, so only one of the two layers may have it.",
        "`attn_proj = nn.Linear(dim, dim)`, `mlp_proj = nn.Linear(linear2.in_features - dim, dim, bias=False)`; set "
        "their `weight.data`, and `attn_proj.bias.data = linear2.bias`.",
    ),
)
def split(linear2: nn.Linear, dim: int) -> tuple[nn.Linear, nn.Linear]:
    """Undo the other fusion: return `(attn_proj, mlp_proj)` whose outputs add up to that of `linear2`.

    That is, `attn_proj(attn_out) + mlp_proj(hidden)` equals `linear2(torch.cat([attn_out, hidden], dim=-1))`. The first
    `dim` inputs of `linear2` are the attention output, the rest the MLP's hidden layer; it has `dim` outputs.
    """
    attn_proj = nn.Linear(dim, dim)
    attn_proj.weight.data = linear2.weight[:, :dim]  # [D, D]
    attn_proj.bias.data = linear2.bias.data
    mlp_proj = nn.Linear(linear2.in_features - dim, dim, bias=False)
    mlp_proj.weight.data = linear2.weight[:, dim:]  # [D, M]
    return attn_proj, mlp_proj


@mistakes(
    "single.split",
    ("bias twice", "both layers have the bias, so it is added twice."),
    ("bias lost", "the bias is lost: one of the two layers must have it."),
    (
        "wrong end",
        "your columns start at the wrong end: linear2 reads the attention output first, then the MLP's hidden layer.",
    ),
)
def _split_with(mistake, linear2, dim):
    attn_proj, mlp_proj = split(linear2, dim)
    if mistake == "bias twice":
        mlp_proj.bias = nn.Parameter(linear2.bias.data)
    if mistake == "bias lost":
        attn_proj.bias = None
    if mistake == "wrong end":
        attn_proj.weight.data, mlp_proj.weight.data = linear2.weight[:, -dim:], linear2.weight[:, :-dim]
    return attn_proj, mlp_proj


def block_inputs(seed: int = 82) -> list[tuple]:
    """A small block's weights, tokens, vec and rotations: two cases, the first of the miniature's size."""
    cases = []
    for i, (batch, txt_len, size) in enumerate(((2, 32, (16, 16)), (1, 5, (2, 6)))):
        g = torch.Generator().manual_seed(seed + i)
        state = randomise(SingleStreamBlock(CONFIG), g).state_dict()
        rope = rotations(txt_len, *size)
        x = 3 * torch.randn(batch, rope.shape[-2], 24, generator=g)
        cases.append((state, x, torch.randn(batch, 24, generator=g), rope))
    return cases


def _run_block(block_class, state, x, vec, rope):
    block = build_module(block_class, (24, 2, 48), state)
    return block(x, block.plan(vec), rope)


@exercise(
    "single.block",
    minutes=12,
    difficulty=2,
    cases=block_inputs,
    call=_run_block,
    against=lambda dim, num_heads, hidden: SingleStreamBlock(CONFIG),
    hints=(
        "Normalise and modulate once. linear1 computes q, k, v and the MLP's hidden layer. Attention and GELU run side "
        "by side, linear2 combines their outputs, and the gate scales what is added to x.",
        "`self.linear1(y).split(self.widths, dim=-1)` gives qkv and hidden; `split_heads(qkv, 3, self.num_heads)` "
        "gives q, k, v as `[B, H, N, d]`; `self.norm(q, k)` is the QKNorm, which comes before the rotation.",
        "`attn_out = self.attention(q, k, v, rope)`, `hidden = F.gelu(hidden, approximate='tanh')`, and finally "
        "`x + gate * self.linear2(torch.cat([attn_out, hidden], dim=-1))`.",
    ),
)
class Block(nn.Module):
    """Write `forward(x, mods, rope)` of the block: it returns the new `x [B, L + N, D]`, text tokens first.

    1. Normalise and modulate: `y = (1 + scale) * LN(x) + shift`, with eps 1e-6.
    2. `linear1(y)` gives qkv `[B, L + N, 3 D]` and hidden `[B, L + N, M]`.
    3. QKNorm of q and k, then attention (`self.attention`, which rotates q and k first, as in notebook 06b).
    4. GELU of hidden, in its tanh approximation.
    5. `linear2` of [attention output, hidden].
    6. `x + gate * (the output of linear2)`.

    The argument `txt_len` (the number of text tokens) is not needed.
    """

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int):
        super().__init__()
        self.num_heads, self.widths = num_heads, [3 * dim, mlp_hidden]
        self.linear1 = nn.Linear(dim, 3 * dim + mlp_hidden)
        self.linear2 = nn.Linear(dim + mlp_hidden, dim)
        self.norm = QKNorm(dim // num_heads)
        self.modulation = Modulation(dim, double=False)

    def plan(self, vec: Tensor) -> Tensor:  # [..., D] -> [..., 3 D]
        return self.modulation(vec)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:  # [B, H, T, d] -> [B, T, D]
        attn_out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
        return attn_out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mods: Tensor, rope: Tensor, txt_len: int = 0) -> Tensor:
        shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)  # each [B, 1, D]
        # your turn
        y = (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift
        qkv, hidden = self.linear1(y).split(self.widths, dim=-1)  # [B, L + N, 3 D], [B, L + N, M]
        q, k, v = split_heads(qkv, 3, self.num_heads)  # each [B, H, L + N, d]
        q, k = self.norm(q, k)
        attn_out = self.attention(q, k, v, rope)  # [B, L + N, D]
        hidden = F.gelu(hidden, approximate="tanh")
        return x + gate * self.linear2(torch.cat([attn_out, hidden], dim=-1))


@mistakes(
    "single.block",
    ("exact GELU", "this is the exact GELU; FLUX was trained with its tanh approximation."),
    ("second GELU", "the GELU is applied to the attention output too; it belongs to the MLP's hidden layer only."),
    ("MLP first", "you concatenate the MLP's hidden layer first; linear2 reads the attention output first."),
    ("gate blends", "your gate blends, (1 - gate) x + gate f; in FLUX all of x is kept: x + gate f."),
    ("no QKNorm", "the QKNorm is missing: q and k are used as they come out of linear1."),
    ("values normalised", "you normalise the values; the QKNorm is for queries and keys."),
    ("no residual", "x itself is missing: a block adds to x and does not replace it."),
    ("no LayerNorm", "the tokens are modulated, but not normalised before."),
)
class _Mistaken(Block):
    def forward(self, x, mods, rope, txt_len=0):
        shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)
        normed = x if self.mistake == "no LayerNorm" else F.layer_norm(x, x.shape[-1:], eps=1e-6)
        qkv, hidden = self.linear1((1 + scale) * normed + shift).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, 3, self.num_heads)
        if self.mistake != "no QKNorm":
            q, k = self.norm(q, k)
        if self.mistake == "values normalised":
            v = self.norm(v, v)[1]
        attn_out = self.attention(q, k, v, rope)
        if self.mistake == "second GELU":
            attn_out = F.gelu(attn_out, approximate="tanh")
        hidden = F.gelu(hidden, approximate="none" if self.mistake == "exact GELU" else "tanh")
        parts = [hidden, attn_out] if self.mistake == "MLP first" else [attn_out, hidden]
        update = gate * self.linear2(torch.cat(parts, dim=-1))
        if self.mistake == "no residual":
            return update
        return (1 - gate) * x + update if self.mistake == "gate blends" else x + update
