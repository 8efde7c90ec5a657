"""Notebook 05: time and modulation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
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
        "`dim / 2` waves of different speeds are read off at the point `1000 t`; each gives a cosine and a sine.",
        "Wave `i` has the speed `10_000 ** (-i / (dim / 2))`. The time of every picture times every speed is an outer "
        "product, `[B, dim / 2]`.",
        "`phase = 1000 * t[:, None] * 10_000 ** (-torch.arange(dim // 2) / (dim // 2))`, then "
        "`torch.cat([phase.cos(), phase.sin()], dim=-1)`.",
    ),
)
def waves(t: Tensor, dim: int) -> Tensor:
    """A number as waves: `t [B]` -> `[B, dim]`, first `dim / 2` cosines, then as many sines.

    Wave `i` turns by `1000 t * 10_000 ** (-i / (dim / 2))` radians. `1000 t` stays a real number.
    """
    speed = 10_000 ** (-torch.arange(dim // 2) / (dim // 2))  # [dim/2], from 1 down to nearly 1/10,000
    phase = 1000 * t[:, None] * speed[None, :]  # [B, dim/2]
    return torch.cat([phase.cos(), phase.sin()], dim=-1)  # [B, dim]


@wrong("modulation.waves", "the sines come first; FLUX puts the cosines first.")
def _sines_first(t, dim):
    sines, cosines = waves(t, dim).chunk(2, dim=-1)
    return torch.cat([cosines, sines], dim=-1)


@wrong("modulation.waves", "cosines and sines alternate; FLUX puts all cosines first, then all sines.")
def _alternating(t, dim):
    cosines, sines = waves(t, dim).chunk(2, dim=-1)
    return torch.stack([cosines, sines], dim=-1).flatten(-2)


@wrong("modulation.waves", "the time is not multiplied by 1000, so even the fastest wave turns by at most 1 radian.")
def _not_scaled(t, dim):
    return waves(t / 1000, dim)


@wrong("modulation.waves", "1000 t is rounded to a whole number; it is a real number, not the index of a step.")
def _rounded(t, dim):
    return waves((1000 * t).round() / 1000, dim)


@wrong("modulation.waves", "the exponent is -i / dim; it is -i / (dim / 2), so that the speeds reach down to 1/10,000.")
def _half_way(t, dim):
    phase = 1000 * t[:, None] * 10_000 ** (-torch.arange(dim // 2) / dim)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def _built(answer, made_with: tuple, weights: dict[str, Tensor]) -> nn.Module:
    """A learner's module with given weights; says in one sentence when its tensors are called otherwise."""
    module = answer(*made_with)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{type(module).__name__} is no torch.nn.Module")
    mine = module.state_dict()
    if mine.keys() != weights.keys():
        have, want = (", ".join(names) or "none" for names in (mine, weights))
        raise ValueError(f"its tensors are {have}, and should be {want}")
    module.load_state_dict(weights)
    return module


def _random(module: nn.Module, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: 0.7 * torch.randn(x.shape, generator=g) for name, x in module.state_dict().items()}


def _vectors() -> list[tuple]:
    g = torch.Generator().manual_seed(5)
    a, b = modulation.MLPEmbedder(6, 4), modulation.MLPEmbedder(3, 8)
    return [
        (torch.randn(2, 6, generator=g), (6, 4), _random(a, 1)),
        (torch.randn(3, 2, 3, generator=g), (3, 8), _random(b, 2)),
    ]


def _embed(answer, x: Tensor, made_with: tuple, weights: dict[str, Tensor]) -> Tensor:
    return _built(answer, made_with, weights)(x)


@exercise(
    "modulation.embedder",
    minutes=6,
    difficulty=1,
    cases=_vectors,
    call=_embed,
    against=modulation.MLPEmbedder,
    hints=(
        "Widen or narrow to the hidden width, bend, and one more layer of that width. There is one bend, in between.",
        "Two `nn.Linear` with biases; the bend is SiLU, `x * sigmoid(x)`, in torch `F.silu`.",
        "`self.in_layer = nn.Linear(in_dim, hidden_dim)`, `self.out_layer = nn.Linear(hidden_dim, hidden_dim)`, and "
        "forward returns `self.out_layer(F.silu(self.in_layer(x)))`.",
    ),
    stub='''
    class MLPEmbedder(nn.Module):
        """Any vector `[..., in_dim]` to the hidden width `[..., hidden_dim]`: `out_layer(silu(in_layer(x)))`.

        Its two linear layers are called `in_layer` and `out_layer`, so that the trained weights fit.
        """

        def __init__(self, in_dim: int, hidden_dim: int):
            super().__init__()
            raise NotImplementedError("your turn")

        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("your turn")
    ''',
)
class MLPEmbedder(nn.Module):
    """Any vector `[..., in_dim]` to the hidden width `[..., hidden_dim]`: `out_layer(silu(in_layer(x)))`.

    Its two linear layers are called `in_layer` and `out_layer`, so that the trained weights fit.
    """

    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))  # [..., in_dim] -> [..., hidden_dim]


@wrong("modulation.embedder", "there is no bend between the layers, so the two could be one; put a SiLU there.")
class _Flat(MLPEmbedder):
    def forward(self, x):
        return self.out_layer(self.in_layer(x))


@wrong("modulation.embedder", "the bend is GELU; FLUX uses SiLU for its vectors and GELU inside the blocks' MLPs.")
class _Gelu(MLPEmbedder):
    def forward(self, x):
        return self.out_layer(F.gelu(self.in_layer(x)))


@wrong("modulation.embedder", "it bends once too often: nothing comes after the second layer.")
class _BentTwice(MLPEmbedder):
    def forward(self, x):
        return F.silu(super().forward(x))


@wrong("modulation.embedder", "it bends before the first layer; the SiLU stands between the two.")
class _BentFirst(MLPEmbedder):
    def forward(self, x):
        return self.out_layer(self.in_layer(F.silu(x)))


def _rows() -> list[tuple]:
    g = torch.Generator().manual_seed(6)
    cases = []
    for dim, double, shape in ((4, True, (2, 4)), (6, False, (3, 6)), (2, True, (5, 2, 2))):
        weights = _random(modulation.Modulation(dim, double), dim)
        cases.append((torch.randn(*shape, generator=g), (dim, double), weights))
    return cases


def _modulations(answer, vec: Tensor, made_with: tuple, weights: dict[str, Tensor]) -> list:
    """The row, and of its last step (a run is planned with an axis of steps in front) what ``split`` makes."""
    module = _built(answer, made_with, weights)
    row = module(vec)
    if row is None:
        return None
    return [row, *module.split(row if row.ndim == 2 else row[-1])]


@exercise(
    "modulation.modulation",
    minutes=14,
    difficulty=2,
    cases=_rows,
    call=_modulations,
    against=modulation.Modulation,
    hints=(
        "One linear layer makes all of them at once: 3 vectors for a layer that is to be modulated, 6 for two layers. "
        "`split` only cuts the row into pieces.",
        "`row.unsqueeze(-2)` puts the axis of tokens in, `[B, 1, ...]`; `.chunk(6, dim=-1)` cuts the last axis.",
        "`parts = row.unsqueeze(-2).chunk(3 * self.layers, dim=-1)`, and the answer is "
        "`[ShiftScaleGate(*parts[i : i + 3]) for i in range(0, len(parts), 3)]`.",
    ),
    stub='''
    class Modulation(nn.Module):
        """The layer that turns `vec` into one (shift, scale, gate), or into two if `double`.

        `forward`: `vec [..., D]` -> a row `[..., 3 D]` or `[..., 6 D]`, `lin(silu(vec))`. `split`: a row `[B, 3 D]` or
        `[B, 6 D]` -> a list of `ShiftScaleGate(shift, scale, gate)`, each `[B, 1, D]`: the attention's, then the MLP's.
        """

        def __init__(self, dim: int, double: bool):
            super().__init__()
            self.layers = 2 if double else 1
            raise NotImplementedError("your turn: self.lin")

        def forward(self, vec: Tensor) -> Tensor:
            raise NotImplementedError("your turn")

        def split(self, row: Tensor) -> list[ShiftScaleGate]:
            raise NotImplementedError("your turn")
    ''',
)
class Modulation(nn.Module):
    """The layer that turns `vec` into one (shift, scale, gate), or into two if `double`.

    `forward`: `vec [..., D]` -> a row `[..., 3 D]` or `[..., 6 D]`, `lin(silu(vec))`. `split`: a row `[B, 3 D]` or
    `[B, 6 D]` -> a list of `ShiftScaleGate(shift, scale, gate)`, each `[B, 1, D]`: the attention's, then the MLP's.
    """

    def __init__(self, dim: int, double: bool):
        super().__init__()
        self.layers = 2 if double else 1
        self.lin = nn.Linear(dim, 3 * self.layers * dim)

    def forward(self, vec: Tensor) -> Tensor:
        return self.lin(F.silu(vec))  # [..., D] -> [..., 3 D] or [..., 6 D]

    def split(self, row: Tensor) -> list[ShiftScaleGate]:
        parts = row.unsqueeze(-2).chunk(3 * self.layers, dim=-1)  # each [B, 1, D], the 1 for the tokens
        return [ShiftScaleGate(*parts[i : i + 3]) for i in range(0, len(parts), 3)]


@wrong("modulation.modulation", "the SiLU before the layer is missing: it is lin(silu(vec)).")
class _NoSilu(Modulation):
    def forward(self, vec):
        return self.lin(vec)


@wrong("modulation.modulation", "the SiLU comes after the layer, so that nothing can be far below 0; it comes before.")
class _SiluLast(Modulation):
    def forward(self, vec):
        return F.silu(self.lin(vec))


@wrong("modulation.modulation", "scale comes before shift; BFL's order is shift, scale, gate.")
class _ScaleFirst(Modulation):
    def split(self, row):
        return [ShiftScaleGate(m.scale, m.shift, m.gate) for m in super().split(row)]


@wrong("modulation.modulation", "neighbouring numbers were taken apart; shift is the first D numbers of the row.")
class _Interleaved(Modulation):
    def split(self, row):
        parts = row.unflatten(-1, (-1, 3 * self.layers)).unsqueeze(-3).unbind(-1)
        return [ShiftScaleGate(*parts[i : i + 3]) for i in range(0, len(parts), 3)]


@wrong("modulation.modulation", "the row is kind by kind: both shifts, both scales, both gates; it is layer by layer.")
class _ByKind(Modulation):
    def split(self, row):
        parts = row.unsqueeze(-2).chunk(3 * self.layers, dim=-1)
        return [ShiftScaleGate(*parts[i :: self.layers]) for i in range(self.layers)]


class Tanh:
    """Something that is done to tokens, for the exercise's cases."""

    def __init__(self, weights: Tensor):
        self.weights = weights

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.weights + 0.3).tanh()


def _tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(7)
    cases = []
    for b, n, d, size in ((2, 5, 4, 1.0), (1, 3, 6, 0.02)):  # of small tokens eps shows
        x = size * (torch.randn(b, n, d, generator=g) + 0.5)
        layer = Tanh(torch.randn(d, d, generator=g))
        cases.append((x, layer, *(torch.randn(b, 1, d, generator=g) for _ in range(3))))
    return cases


def _by_library(x: Tensor, layer, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, layer(modulation.modulate(modulation.normalised(x), shift, scale)))


@exercise(
    "modulation.adaln",
    minutes=12,
    difficulty=2,
    cases=_tokens,
    against=_by_library,
    hints=(
        "Four steps: normalise each token, scale and shift it, let the layer work, add the gated result to what came "
        "in.",
        "Mean and variance are taken over the last axis, `keepdim=True`; the variance divides by D, `correction=0`; "
        "eps goes under the root.",
        "`y = (x - mean) / (variance + 1e-6).sqrt()`, then `y = (1 + scale) * y + shift`, then `x + gate * layer(y)`.",
    ),
)
def adaln(x: Tensor, layer, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """One modulated step: `x + gate * layer((1 + scale) * LN(x) + shift)`.

    `x [B, N, D]`, the three modulations `[B, 1, D]`, `layer` a function of tokens. LN brings each token to mean 0 and
    variance 1, with eps 1e-6 and no weights of its own. Write LN out by hand.
    """
    mean = x.mean(-1, keepdim=True)  # [B, N, 1]
    variance = x.var(-1, correction=0, keepdim=True)  # [B, N, 1]
    normed = (x - mean) / (variance + 1e-6).sqrt()  # [B, N, D]
    return x + gate * layer((1 + scale) * normed + shift)


def _step(x, layer, shift, scale, gate, eps=1e-6, correction=0):
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=correction, keepdim=True) + eps).sqrt()
    return x + gate * layer((1 + scale) * normed + shift)


@wrong("modulation.adaln", "the tokens are multiplied by scale; it is 1 + scale, so that scale 0 changes nothing.")
def _without_one(x, layer, shift, scale, gate):
    return _step(x, layer, shift, scale - 1, gate)


@wrong("modulation.adaln", "eps is 1e-5, PyTorch's own default; FLUX has 1e-6.")
def _eps(x, layer, shift, scale, gate):
    return _step(x, layer, shift, scale, gate, eps=1e-5)


@wrong("modulation.adaln", "eps is added outside of the root; it belongs under it, with the variance.")
def _eps_outside(x, layer, shift, scale, gate):
    normed = (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 1e-6)
    return x + gate * layer((1 + scale) * normed + shift)


@wrong("modulation.adaln", "the variance divides by D - 1; LayerNorm's divides by D (correction=0).")
def _unbiased(x, layer, shift, scale, gate):
    return _step(x, layer, shift, scale, gate, correction=1)


@wrong("modulation.adaln", "the gate blends old and new, (1 - gate) x + gate f; FLUX adds: x + gate f.")
def _blend(x, layer, shift, scale, gate):
    return (1 - gate) * x + gate * (_step(x, layer, shift, scale, 1.0) - x)


@wrong("modulation.adaln", "the result is added to the modulated tokens; it is added to x as it came in.")
def _to_modulated(x, layer, shift, scale, gate):
    y = (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift
    return y + gate * layer(y)


@wrong("modulation.adaln", "the gate acts before the layer; it multiplies what the layer gives.")
def _gate_inside(x, layer, shift, scale, gate):
    return x + layer(gate * ((1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift))
