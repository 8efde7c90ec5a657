"""Notebook 02: CLIP's text encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.course.exercises import random_weights, run_module
from fluxedu.models.clip import CLIPAttention
from fluxedu.models.clip import quick_gelu as library_quick_gelu


def _numbers() -> list[tuple]:
    g = torch.Generator().manual_seed(1)
    return [(torch.linspace(-4, 4, 33),), (2 * torch.randn(2, 3, 5, generator=g),)]


@exercise(
    "clip.quick_gelu",
    minutes=4,
    difficulty=1,
    cases=_numbers,
    against=library_quick_gelu,
    hints=(
        "It is a gate: x times a number between 0 and 1 that grows with x.",
        "`torch.sigmoid` is the gate; 1.702 makes it steeper.",
        "`return x * torch.sigmoid(1.702 * x)`.",
    ),
)
def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation function: multiply every number by the sigmoid of 1.702 times that number. Any shape."""
    return x * torch.sigmoid(1.702 * x)


wrong("clip.quick_gelu", "that is the exact GELU, with the error function; CLIP was trained with the quick one.")(
    lambda x: F.gelu(x)
)
wrong("clip.quick_gelu", "that is the tanh approximation, which the MLPs of FLUX and T5 use; CLIP's is the quick one.")(
    lambda x: F.gelu(x, approximate="tanh")
)
wrong("clip.quick_gelu", "that is SiLU: the 1.702 inside the sigmoid is missing.")(lambda x: F.silu(x))
wrong("clip.quick_gelu", "the factor 1.702 belongs inside the sigmoid only.")(
    lambda x: 1.702 * x * torch.sigmoid(1.702 * x)
)


def _sequences() -> list[tuple]:
    g = torch.Generator().manual_seed(2)
    cases = []
    for batch, length, dim, heads in ((2, 5, 12, 3), (1, 7, 8, 2)):
        weights = random_weights(CLIPAttention(dim, heads), seed=dim)
        cases.append(((dim, heads), weights, torch.randn(batch, length, dim, generator=g)))
    return cases


@exercise(
    "clip.CausalAttention",
    minutes=15,
    difficulty=2,
    cases=_sequences,
    call=run_module,
    against=CLIPAttention,
    hints=(
        "If you set the weights of later tokens to 0 after the softmax, rows no longer sum to 1. Set their scores to "
        "minus infinity before the softmax instead.",
        "`torch.ones(n, n, dtype=torch.bool).triu(1)` is True where the key comes after the query; `masked_fill` "
        "writes `-torch.inf` there. The width of a head is `q.shape[-1]`.",
        "`scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5`, mask it, then "
        "`heads = scores.softmax(dim=-1) @ v`, and `self.out_proj(heads.transpose(1, 2).reshape(x.shape))`.",
    ),
)
class CausalAttention(nn.Module):
    """Self-attention in which a token attends only to itself and to earlier tokens: `[B, L, D] -> [B, L, D]`.

    Scores are divided by the square root of a head's width. Later tokens must get a weight of exactly 0. The outputs of
    the H heads are put side by side, `[B, L, D]`, and `out_proj` maps them to the result.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D]
        b, n, _ = x.shape
        q = self.q_proj(x).reshape(b, n, self.num_heads, -1).transpose(1, 2)  # [B, H, L, d]
        k = self.k_proj(x).reshape(b, n, self.num_heads, -1).transpose(1, 2)  # [B, H, L, d]
        v = self.v_proj(x).reshape(b, n, self.num_heads, -1).transpose(1, 2)  # [B, H, L, d]
        # your turn: scores, mask, softmax, weighted sum of values, out_proj
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, L, L], one row per query
        later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)  # the key comes after the query
        heads = scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ v  # [B, H, L, d]
        return self.out_proj(heads.transpose(1, 2).reshape(x.shape))  # [B, L, D], heads side by side


@mistakes(
    "clip.CausalAttention",
    ("no mask", "every token attends to every other: the mask is missing."),
    ("reversed", "the mask is reversed: your tokens attend to later tokens instead of earlier ones."),
    ("after softmax", "you mask the weights after the softmax, so a row no longer sums to 1; mask the scores."),
    ("zero scores", "a score of 0 gives the weight exp(0) = 1 before normalisation; use minus infinity."),
    ("whole width", "you divide the scores by the root of the whole width; use the width of one head."),
    ("no transpose", "you reshape the heads without transposing first, which mixes up the tokens."),
)
class _MistakenAttention(CausalAttention):
    def forward(self, x):
        b, n, _ = x.shape
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).reshape(b, n, self.num_heads, -1).transpose(1, 2) for layer in layers)
        width = x.shape[-1] if self.mistake == "whole width" else q.shape[-1]
        scores = q @ k.transpose(-1, -2) * width**-0.5
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        if self.mistake == "reversed":
            later = later.T
        if self.mistake not in ("no mask", "after softmax"):
            scores = scores.masked_fill(later, 0 if self.mistake == "zero scores" else -torch.inf)
        weights = scores.softmax(dim=-1)
        if self.mistake == "after softmax":
            weights = weights.tril()
        heads = weights @ v
        if self.mistake != "no transpose":
            heads = heads.transpose(1, 2)
        return self.out_proj(heads.reshape(x.shape))


def _states() -> list[tuple]:
    g = torch.Generator().manual_seed(3)
    ids = torch.tensor([[8, 3, 2, 9, 9, 9], [8, 4, 4, 5, 1, 9], [8, 9, 9, 9, 9, 9]])
    more = torch.tensor([[20, 31, 7, 25, 7, 7, 7], [20, 7, 7, 7, 7, 7, 7]])  # here the end token is not the largest id
    return [(torch.randn(3, 6, 4, generator=g), ids, 9), (torch.randn(2, 7, 5, generator=g), more, 7)]


@exercise(
    "clip.pooled",
    minutes=8,
    difficulty=2,
    cases=_states,
    hints=(
        "For each prompt, find the position of its first end token; then take the state at that position.",
        "`(ids == end)` is True at every end token, and `argmax` of integers returns the first of the largest. To take "
        "one position per row, index with `torch.arange(batch)` and the positions.",
        "`first = (ids == end).int().argmax(dim=1)`, then `states[torch.arange(len(ids)), first]`.",
    ),
)
def pooled(states: Tensor, ids: Tensor, end: int) -> Tensor:
    """One vector per prompt: `states [B, L, D]` at the **first** `end` token of `ids [B, L]`, as `[B, D]`.

    The states are already normalised: do not apply the LayerNorm again. CLIP pads with the same token, so a row may end
    with many of them; and prompts have different lengths.
    """
    first = (ids == end).int().argmax(dim=1)  # [B]
    return states[torch.arange(len(ids), device=ids.device), first]


wrong("clip.pooled", "you take the last token, which is usually padding; take the first end token.")(
    lambda states, ids, end: states[:, -1]
)
wrong("clip.pooled", "you take the first token, which attends only to itself.")(lambda states, ids, end: states[:, 0])
wrong("clip.pooled", "you average over the tokens; CLIP takes the state of one token.")(
    lambda states, ids, end: states.mean(dim=1)
)
wrong("clip.pooled", "you look for the largest id, which is the end token only if it is the vocabulary's last token.")(
    lambda states, ids, end: states[torch.arange(len(ids)), ids.argmax(dim=1)]
)
wrong("clip.pooled", "you take the last word, the token before the end token; CLIP takes the state of the end token.")(
    lambda states, ids, end: states[torch.arange(len(ids)), (ids == end).int().argmax(dim=1) - 1]
)
wrong("clip.pooled", "you apply a LayerNorm; the states are already normalised.")(
    lambda states, ids, end: F.layer_norm(pooled(states, ids, end), states.shape[-1:])
)
