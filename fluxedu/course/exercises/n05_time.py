"""Notebook 05: time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.course.exercises import random_weights, run_module, subclass
from fluxedu.models import modulation
from fluxedu.models.modulation import timestep_embedding


def _times() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    return [
        (torch.tensor([0.0, 0.25, 0.9045, 1.0]), 8),
        (torch.tensor([0.3337, 3.5]), 12),
        (torch.rand(20, generator=g), 256),
    ]


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
        ((96, 160), random_weights(modulation.MLPEmbedder(96, 160), 3, std=0.1), torch.randn(1, 96, generator=g)),
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


class _Embedders(nn.Module):
    """The three embedders of a model, or two if it has no guidance input."""

    def __init__(self, pooled_dim: int, dim: int, has_guidance: bool):
        super().__init__()
        self.time_in = modulation.MLPEmbedder(modulation.TIMESTEP_DIM, dim)
        self.vector_in = modulation.MLPEmbedder(pooled_dim, dim)
        if has_guidance:
            self.guidance_in = modulation.MLPEmbedder(modulation.TIMESTEP_DIM, dim)


def _parts() -> list[tuple]:
    g = torch.Generator().manual_seed(8)
    cases = []
    for pooled_dim, dim, has_guidance, dtype, times in (
        (6, 4, True, torch.float32, [0.25, 0.9045]),
        (96, 160, True, torch.float64, [1.0]),
        (5, 8, False, torch.float32, [0.3337, 0.5, 0.75]),
    ):
        flux = _Embedders(pooled_dim, dim, has_guidance)
        flux.load_state_dict(random_weights(flux, dim, std=0.2))
        flux.requires_grad_(False).to(dtype)
        t = torch.tensor(times)
        guidance = torch.linspace(3.5, 6.0, len(t)) if has_guidance else None
        cases.append((flux, t, guidance, torch.randn(len(t), pooled_dim, generator=g).to(dtype)))
    return cases


@exercise(
    "modulation.vec",
    minutes=10,
    difficulty=2,
    cases=_parts,
    hints=(
        "Each of the three parts goes through its own embedder. The results have the same shape `[B, D]`; add them up.",
        "Time and guidance scale are numbers, so encode them first: `timestep_embedding(t)`. The pooled vector goes "
        "into `flux.vector_in` as it is. Without a guidance scale there are only two terms.",
        "`vec = flux.time_in(timestep_embedding(t).to(pooled.dtype)) + flux.vector_in(pooled)`, and "
        "`if guidance is not None:` add `flux.guidance_in(timestep_embedding(guidance).to(pooled.dtype))`.",
    ),
)
def build_vec(flux: nn.Module, t: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
    """Compute `vec [B, D]` from the time `t [B]`, the guidance scale `guidance [B]` and CLIP's vector `pooled [B, P]`.

    `flux.time_in`, `flux.guidance_in` and `flux.vector_in` are the model's embedders. `timestep_embedding(number)` are
    the library's waves, in float32; convert them to the dtype of `pooled` before they enter an embedder. For a model
    without a guidance input `guidance` is None, and there is no `flux.guidance_in`.
    """
    vec = flux.time_in(timestep_embedding(t).to(pooled.dtype)) + flux.vector_in(pooled)  # [B, D]
    if guidance is not None:
        vec = vec + flux.guidance_in(timestep_embedding(guidance).to(pooled.dtype))
    return vec


@mistakes(
    "modulation.vec",
    ("time_in", "the guidance scale goes through time_in; it has an embedder of its own, guidance_in."),
    ("small", "you divide the guidance scale by 1000; it is encoded exactly like the time."),
    ("mean", "you take the mean of the terms; vec is their sum."),
    ("no text", "the pooled vector is missing: add vector_in(pooled)."),
    ("no guidance", "the guidance scale is missing, although the model has a guidance input."),
    ("no time", "the time is missing: add time_in of its waves."),
    ("silu", "you apply a SiLU to the sum; that is the first step of each block's modulation, not a part of vec."),
    ("product", "you multiply the terms; vec is their sum."),
)
def vec_with(mistake, flux, t, guidance, pooled):
    def embed(number):
        return timestep_embedding(number).to(pooled.dtype)

    terms = {"time": flux.time_in(embed(t)), "text": flux.vector_in(pooled)}
    if guidance is not None:
        module = flux.time_in if mistake == "time_in" else flux.guidance_in
        terms["guidance"] = module(embed(guidance / 1000 if mistake == "small" else guidance))
    terms.pop(mistake.removeprefix("no "), None)
    vec = sum(terms.values())
    if mistake == "product":
        return torch.stack(list(terms.values())).prod(0)
    return vec / len(terms) if mistake == "mean" else F.silu(vec) if mistake == "silu" else vec
