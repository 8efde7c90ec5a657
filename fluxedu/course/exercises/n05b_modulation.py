"""Notebook 05b: modulation."""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.course.exercises import build_module, random_weights, subclass
from fluxedu.models import modulation
from fluxedu.models.modulation import ShiftScaleGate


def _vecs() -> list[tuple]:
    g = torch.Generator().manual_seed(6)
    cases = []
    for dim, double, shape in ((4, True, (2, 4)), (6, False, (3, 6)), (2, True, (5, 2, 2)), (160, True, (1, 160))):
        weights = random_weights(modulation.Modulation(dim, double), dim)
        cases.append((torch.randn(*shape, generator=g), (dim, double), weights))
    return cases


def _row_and_parts(answer, vec: Tensor, arguments: tuple, weights: dict[str, Tensor]) -> list | None:
    """The output of `forward`, and what `split` returns for it. If it has an axis of steps, only the last is split."""
    module = build_module(answer, arguments, weights)
    row = module(vec)
    if row is None:
        return None
    return [row, *module.split(row if row.ndim == 2 else row[-1])]


@exercise(
    "modulation.modulation",
    minutes=12,
    difficulty=2,
    cases=_vecs,
    call=_row_and_parts,
    against=modulation.Modulation,
    hints=(
        "One linear layer computes all vectors at once: 3 for each layer that is modulated, so 6 for two layers. "
        "`split` only cuts its output into pieces.",
        "`row.unsqueeze(-2)` inserts the axis of tokens, `[B, 1, ...]`; `.chunk(6, dim=-1)` cuts the last axis.",
        "`parts = row.unsqueeze(-2).chunk(3 * self.layers, dim=-1)`; for one layer return `[ShiftScaleGate(*parts)]`, "
        "for two `[ShiftScaleGate(*parts[:3]), ShiftScaleGate(*parts[3:])]`.",
    ),
)
class Modulation(nn.Module):
    """The layer that computes one (shift, scale, gate) from `vec`, or two if `double`.

    `forward`: `vec [..., D]` -> one vector `[..., 3 D]` or `[..., 6 D]`, `lin(silu(vec))`. `split`: this vector,
    `[B, 3 D]` or `[B, 6 D]` -> a list of `ShiftScaleGate(shift, scale, gate)`, each `[B, 1, D]`: the
    attention's, then the MLP's.
    """

    def __init__(self, dim: int, double: bool):
        super().__init__()
        self.layers = 2 if double else 1
        # your turn: self.lin
        self.lin = nn.Linear(dim, 3 * self.layers * dim)

    def forward(self, vec: Tensor) -> Tensor:
        # your turn
        return self.lin(F.silu(vec))  # [..., D] -> [..., 3 D] or [..., 6 D]

    def split(self, row: Tensor) -> list[ShiftScaleGate]:
        # your turn
        parts = row.unsqueeze(-2).chunk(3 * self.layers, dim=-1)  # each [B, 1, D], the 1 for the tokens
        if self.layers == 1:
            return [ShiftScaleGate(*parts)]
        return [ShiftScaleGate(*parts[:3]), ShiftScaleGate(*parts[3:])]


wrong("modulation.modulation", "the SiLU before the layer is missing: it is lin(silu(vec)).")(
    subclass(Modulation, forward=lambda self, vec: self.lin(vec))
)
wrong("modulation.modulation", "your SiLU comes after the linear layer; it belongs before it: lin(silu(vec)).")(
    subclass(Modulation, forward=lambda self, vec: F.silu(self.lin(vec)))
)


@wrong("modulation.modulation", "in your answer scale comes before shift; BFL's order is shift, scale, gate.")
class _ScaleFirst(Modulation):
    def split(self, row):
        return [ShiftScaleGate(m.scale, m.shift, m.gate) for m in super().split(row)]


@wrong(
    "modulation.modulation",
    "one vector of yours is every third or sixth number of the row; it should be D neighbouring numbers.",
)
class _Interleaved(Modulation):
    def split(self, row):
        parts = row.unflatten(-1, (-1, 3 * self.layers)).unsqueeze(-3).unbind(-1)
        return [ShiftScaleGate(*parts[i : i + 3]) for i in range(0, len(parts), 3)]


@wrong(
    "modulation.modulation",
    "your order is both shifts, both scales, both gates; the attention's three vectors come first, then the MLP's.",
)
class _ByKind(Modulation):
    def split(self, row):
        parts = row.unsqueeze(-2).chunk(3 * self.layers, dim=-1)
        return [ShiftScaleGate(*parts[i :: self.layers]) for i in range(self.layers)]


def _tanh_layer(weights: Tensor, x: Tensor) -> Tensor:
    return (x @ weights + 0.3).tanh()


def _tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(7)
    cases = []
    for b, n, d, size in (
        (2, 5, 4, 1.0),
        (1, 3, 6, 0.02),
        (1, 96, 160, 3.0),
    ):  # with small tokens the value of eps matters
        x = size * (torch.randn(b, n, d, generator=g) + 0.5)
        layer = partial(_tanh_layer, torch.randn(d, d, generator=g))
        cases.append((x, layer, *(torch.randn(b, 1, d, generator=g) for _ in range(3))))
    return cases


def _library_step(x: Tensor, layer, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, layer(modulation.modulate(modulation.layer_norm(x), shift, scale)))


@exercise(
    "modulation.adaln",
    minutes=10,
    difficulty=2,
    cases=_tokens,
    against=_library_step,
    hints=(
        "Four steps: normalise each token, scale and shift it, apply the layer, add the gated output to x.",
        "Mean and variance are taken over the last axis, with `keepdim=True`; the variance divides by D, "
        "`correction=0`; eps goes under the root.",
        "`y = (x - mean) / (variance + 1e-6).sqrt()`, then `y = (1 + scale) * y + shift`, then `x + gate * layer(y)`.",
    ),
)
def adaln(x: Tensor, layer, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """One modulated residual step: `x + gate * layer((1 + scale) * LN(x) + shift)`.

    `x [B, N, D]`, the three modulation vectors `[B, 1, D]`, `layer` a function of tokens. LN brings each token to mean
    0 and variance 1, with eps 1e-6 and no weights. Write LN yourself, without `F.layer_norm`.
    """
    mean = x.mean(-1, keepdim=True)  # [B, N, 1]
    variance = x.var(-1, correction=0, keepdim=True)  # [B, N, 1]
    normed = (x - mean) / (variance + 1e-6).sqrt()  # [B, N, D]
    return x + gate * layer((1 + scale) * normed + shift)


def _step(x, layer, shift, scale, gate, eps=1e-6, correction=0):
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=correction, keepdim=True) + eps).sqrt()
    return x + gate * layer((1 + scale) * normed + shift)


wrong("modulation.adaln", "you multiply by scale; it is 1 + scale, so that a scale of 0 changes nothing.")(
    lambda x, layer, shift, scale, gate: _step(x, layer, shift, scale - 1, gate)
)
wrong("modulation.adaln", "your eps is 1e-5, PyTorch's default; FLUX uses 1e-6.")(
    lambda x, layer, shift, scale, gate: _step(x, layer, shift, scale, gate, eps=1e-5)
)


@wrong("modulation.adaln", "you add eps outside the root; add it to the variance, under the root.")
def _eps_outside(x, layer, shift, scale, gate):
    normed = (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 1e-6)
    return x + gate * layer((1 + scale) * normed + shift)


wrong("modulation.adaln", "your variance divides by D - 1; LayerNorm's divides by D (correction=0).")(
    lambda x, layer, shift, scale, gate: _step(x, layer, shift, scale, gate, correction=1)
)
wrong("modulation.adaln", "your gate blends old and new, (1 - gate) x + gate f; FLUX adds: x + gate f.")(
    lambda x, layer, shift, scale, gate: (1 - gate) * x + gate * (_step(x, layer, shift, scale, 1.0) - x)
)


@wrong("modulation.adaln", "you add the output to the modulated tokens; add it to the original x.")
def _to_modulated(x, layer, shift, scale, gate):
    y = (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift
    return y + gate * layer(y)


wrong("modulation.adaln", "your gate acts before the layer; it multiplies the layer's output.")(
    lambda x, layer, shift, scale, gate: _step(x, lambda y: layer(gate * y), shift, scale, 1.0)
)


STREAMS = ("img", "txt")
SITES = [
    *(f"double.{i}.{stream}_mod.{kind}" for i in (0, 1) for stream in STREAMS for kind in ("scale2", "gate1", "gate2")),
    *(f"single.{i}.{kind}" for i in (0, 1, 2, 10, 12) for kind in ("shift", "scale", "gate")),
]


def _chosen_blocks() -> list[tuple]:
    g = torch.Generator().manual_seed(9)
    return [
        (blocks, torch.randn(len(SITES), *shape, generator=g))
        for blocks, shape in (
            (["single.1"], (2, 1, 4)),
            (["double.0", "single.10", "single.2"], (1, 1, 160)),
            (["double.1"], (1, 1, 3)),
            ([], (1, 1, 2)),
        )
    ]


def _change_all(answer, blocks: list[str], values: Tensor) -> list:
    """What the student's intervention makes of one value at each site."""
    change = answer(blocks)
    if not callable(change):
        raise TypeError(f"it must return a function (value, ctx) -> value, not {type(change).__name__}")
    contexts = (SimpleNamespace(site=site, step=3, time=0.7) for site in SITES)
    return [change(value.clone(), ctx) for value, ctx in zip(values, contexts, strict=True)]


@exercise(
    "modulation.gates",
    minutes=6,
    difficulty=2,
    cases=_chosen_blocks,
    call=_change_all,
    hints=(
        "Write a function inside your function and return the inner one. It must find out from `ctx.site` which block "
        "the value belongs to, and whether the value is a gate.",
        '`ctx.site.split(".")` gives `["double", "0", "img_mod", "gate1"]` or `["single", "3", "gate"]`: the first two '
        "parts are the block, the last one says what the value is.",
        '`parts = ctx.site.split(".")`; the value is chosen if `".".join(parts[:2]) in blocks` and '
        '`parts[-1].startswith("gate")`; then return `torch.zeros_like(value)`, otherwise `value`.',
    ),
)
def close_gates(blocks: list[str]):
    """Return a function `change(value, ctx)` for `fe.intervene` that sets all gates of the named blocks to zero.

    `blocks` is a list such as `["double.0", "single.3"]`. `ctx.site` is the name of the site that the value comes from:
    `"double.0.img_mod.gate1"`, `"double.0.txt_mod.scale2"` or `"single.3.gate"`, say. Return zeros in place of a gate
    of a chosen block, and every other value unchanged.
    """

    def change(value: Tensor, ctx) -> Tensor:
        parts = ctx.site.split(".")
        is_chosen = ".".join(parts[:2]) in blocks and parts[-1].startswith("gate")
        return torch.zeros_like(value) if is_chosen else value

    return change


@mistakes(
    "modulation.gates",
    ("prefix", "closing single.1 also closes single.10 and single.12: compare the whole name of the block."),
    ("all kinds", "you also set shifts and scales to zero; change only the gates."),
    ("first gate", "a double block has two gates per stream, gate1 and gate2; one of the two stays open."),
    ("image", "the gates of the text stream (txt_mod) stay open; close those of both streams."),
    ("every block", "you close the gates of all blocks; close only those of the blocks in the list."),
    ("others", "you close the gates of the blocks that are not in the list."),
    ("one", "you set the gates to one, which leaves the block's contribution as it is; a closed gate is 0."),
    ("single only", "the gates of double blocks stay open: their names end in gate1 and gate2, not in gate."),
)
def gates_with(mistake, blocks):
    def change(value, ctx):
        parts = ctx.site.split(".")
        in_list = ".".join(parts[:2]) in blocks
        if mistake == "prefix":
            in_list = any(ctx.site.startswith(block) for block in blocks)
        is_chosen = {"every block": True, "others": not in_list}.get(mistake, in_list)
        is_gate = parts[-1].startswith("gate")
        if mistake == "all kinds":
            is_gate = True
        if mistake == "first gate":
            is_gate = parts[-1] in ("gate", "gate1")
        if mistake == "image":
            is_gate = is_gate and "txt_mod" not in parts
        if mistake == "single only":
            is_gate = parts[-1] == "gate"
        if is_chosen and is_gate:
            return torch.ones_like(value) if mistake == "one" else torch.zeros_like(value)
        return value

    return change
