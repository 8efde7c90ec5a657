"""Notebook 05: time and modulation."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.course.exercises import build_module, random_weights, run_module, subclass
from fluxedu.models import modulation
from fluxedu.models.modulation import ShiftScaleGate


def _times() -> list[tuple]:
    return [(torch.tensor([0.0, 0.25, 0.9045, 1.0]), 8), (torch.tensor([0.3337, 3.5]), 12)]


@exercise(
    "modulation.waves",
    minutes=10,
    difficulty=2,
    cases=_times,
    against=modulation.timestep_embedding,
    tolerance=3e-4,  # a phase of 3,500 radians has lost four digits in float32
    hints=(
        "Evaluate `dim / 2` waves of different frequencies at `1000 t`; each wave gives a cosine and a sine.",
        "Wave `i` has the frequency `10_000 ** (-i / (dim / 2))`. Multiply every time by every frequency (an outer "
        "product) to get `[B, dim / 2]`.",
        "`phase = 1000 * t[:, None] * 10_000 ** (-torch.arange(dim // 2) / (dim // 2))`, then "
        "`torch.cat([phase.cos(), phase.sin()], dim=-1)`.",
    ),
)
def waves(t: Tensor, dim: int) -> Tensor:
    """Encode a number as waves: `t [B]` -> `[B, dim]`, first `dim / 2` cosines, then as many sines.

    The phase of wave `i` is `1000 t * 10_000 ** (-i / (dim / 2))` radians. Do not round `1000 t` to an integer.
    """
    frequency = 10_000 ** (-torch.arange(dim // 2) / (dim // 2))  # [dim/2], from 1 down to nearly 1/10,000
    phase = 1000 * t[:, None] * frequency[None, :]  # [B, dim/2]
    return torch.cat([phase.cos(), phase.sin()], dim=-1)  # [B, dim]


wrong("modulation.waves", "in your answer the sines come first; FLUX puts the cosines first.")(
    lambda t, dim: waves(t, dim).roll(dim // 2, dims=-1)
)
wrong("modulation.waves", "in your answer cosines and sines alternate; FLUX puts all cosines first, then all sines.")(
    lambda t, dim: waves(t, dim).unflatten(-1, (2, -1)).mT.flatten(-2)
)
wrong("modulation.waves", "the time is not multiplied by 1000, so even the fastest wave has a phase below 1 radian.")(
    lambda t, dim: waves(t / 1000, dim)
)
wrong("modulation.waves", "you round 1000 t to an integer; it is a real number, not the index of a step.")(
    lambda t, dim: waves((1000 * t).round() / 1000, dim)
)


@wrong("modulation.waves", "your exponent is -i / dim; it is -i / (dim / 2), so that frequencies go down to 1/10,000.")
def _half_exponent(t, dim):
    phase = 1000 * t[:, None] * 10_000 ** (-torch.arange(dim // 2) / dim)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def _vectors() -> list[tuple]:
    g = torch.Generator().manual_seed(5)
    return [
        ((6, 4), random_weights(modulation.MLPEmbedder(6, 4), 1), torch.randn(2, 6, generator=g)),
        ((3, 8), random_weights(modulation.MLPEmbedder(3, 8), 2), torch.randn(3, 2, 3, generator=g)),
    ]


@exercise(
    "modulation.embedder",
    minutes=6,
    difficulty=1,
    cases=_vectors,
    call=run_module,
    against=modulation.MLPEmbedder,
    hints=(
        "A linear layer to the hidden width, an activation function, and a linear layer of that width.",
        "Two `nn.Linear` with biases; the activation function is SiLU, `x * sigmoid(x)`, in torch `F.silu`.",
        "`self.in_layer = nn.Linear(in_dim, hidden_dim)`, `self.out_layer = nn.Linear(hidden_dim, hidden_dim)`, and "
        "forward returns `self.out_layer(F.silu(self.in_layer(x)))`.",
    ),
)
class MLPEmbedder(nn.Module):
    """Map a vector `[..., in_dim]` to the hidden width `[..., hidden_dim]`: `out_layer(silu(in_layer(x)))`.

    The two linear layers must be named `in_layer` and `out_layer`, so that the trained weights fit.
    """

    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        # your turn
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        # your turn
        return self.out_layer(F.silu(self.in_layer(x)))  # [..., in_dim] -> [..., hidden_dim]


wrong("modulation.embedder", "there is no activation function between the layers; put a SiLU there.")(
    subclass(MLPEmbedder, forward=lambda self, x: self.out_layer(self.in_layer(x)))
)
wrong("modulation.embedder", "your activation function is GELU; FLUX uses SiLU here and GELU in the blocks' MLPs.")(
    subclass(MLPEmbedder, forward=lambda self, x: self.out_layer(F.gelu(self.in_layer(x))))
)
wrong("modulation.embedder", "there is a second activation function; nothing comes after the second layer.")(
    subclass(MLPEmbedder, forward=lambda self, x: F.silu(MLPEmbedder.forward(self, x)))
)
wrong("modulation.embedder", "your SiLU comes before the first layer; it belongs between the two.")(
    subclass(MLPEmbedder, forward=lambda self, x: self.out_layer(self.in_layer(F.silu(x))))
)


def _vecs() -> list[tuple]:
    g = torch.Generator().manual_seed(6)
    cases = []
    for dim, double, shape in ((4, True, (2, 4)), (6, False, (3, 6)), (2, True, (5, 2, 2))):
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
    minutes=14,
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

    `forward`: `vec [..., D]` -> a row `[..., 3 D]` or `[..., 6 D]`, `lin(silu(vec))`. `split`: a row `[B, 3 D]` or
    `[B, 6 D]` -> a list of `ShiftScaleGate(shift, scale, gate)`, each `[B, 1, D]`: the attention's, then the MLP's.
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
    for b, n, d, size in ((2, 5, 4, 1.0), (1, 3, 6, 0.02)):  # with small tokens the value of eps matters
        x = size * (torch.randn(b, n, d, generator=g) + 0.5)
        layer = partial(_tanh_layer, torch.randn(d, d, generator=g))
        cases.append((x, layer, *(torch.randn(b, 1, d, generator=g) for _ in range(3))))
    return cases


def _library_step(x: Tensor, layer, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, layer(modulation.modulate(modulation.layer_norm(x), shift, scale)))


@exercise(
    "modulation.adaln",
    minutes=12,
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
