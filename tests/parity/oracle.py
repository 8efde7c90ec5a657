"""The public implementations as oracles, and one ruler for every comparison.

Weights go from ours to theirs through *their* converters, never through ours, so that a mistake in
our layouts cannot cancel a mistake in our networks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType

import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fluxedu.models import Flux, FluxConfig


def drawn(examples: int) -> settings:
    """The same draws on every run, and no stopwatch."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=quiet)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """``|ours - theirs| / |theirs|``, the one ruler; a NaN is never within a bar."""
    assert ours.shape == theirs.shape, f"{list(ours.shape)} against {list(theirs.shape)}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random values in every tensor: weights, biases, norm scales, and so also shifts and gates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            if p.ndim > 1:
                noise = noise / p[0].numel() ** 0.5
            elif "norm" in name and not name.endswith("bias"):
                noise = 1 + 0.3 * noise
            else:
                noise = 0.3 * noise
            p.copy_(noise)
    return model


def gradients(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of every tensor; zeros for one that was not used."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def worst_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative error of one tensor's gradient.

    A tensor whose gradient is below a hundredth of the largest is judged against that hundredth:
    what is left of it is the rounding of the large ones.
    """
    assert ours.keys() == theirs.keys()
    floor = 1e-2 * max(float(g.norm()) for g in theirs.values())
    return max(float((ours[n] - g).norm()) / max(float(g.norm()), floor) for n, g in theirs.items())


# --- the flow transformer -------------------------------------------------------------------------


def to_diffusers(state: dict[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """diffusers' own one-way converter, with the hidden width it hard-codes (3072) set to ours."""
    code = convert_flux_transformer_checkpoint_to_diffusers.__code__
    assert 3072 in code.co_consts
    widths = tuple(config.hidden_size if c == 3072 else c for c in code.co_consts)
    convert = FunctionType(code.replace(co_consts=widths), convert_flux_transformer_checkpoint_to_diffusers.__globals__)

    state = dict(state)
    for name in [n for n in state if n.endswith("_attn.qkv.weight")]:  # diffusers has no qkv_bias=False: a bias of zero
        state.setdefault(name.replace("weight", "bias"), torch.zeros_like(state[name][:, 0]))
    for kind in ("double_blocks", "single_blocks"):  # it counts blocks as the highest index + 1 and trips over none
        if not any(n.startswith(kind) for n in state):
            state[f"{kind}.-1."] = torch.empty(0)
    return convert(state)


def diffusers_flux(config: FluxConfig, state: dict[str, Tensor]) -> FluxTransformer2DModel:
    """diffusers' model with our weights; every key and shape must fit."""
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_in_dim,
            pooled_projection_dim=config.vec_in_dim,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=config.axes_dim,
        )
    theirs.load_state_dict(to_diffusers(state, config), strict=True, assign=True)
    theirs.pos_embed.theta = config.theta
    return theirs.eval()


# Where the values lie decides which mistakes can be seen. "faint": tokens and their q, k so small that
# the norms' eps weighs as much as they do. "loud": inputs far outside what a unit-variance test draws.
REGIMES = ("plain", "faint", "loud")


@dataclass(frozen=True)
class Case:
    """A network, an input and the seed of all their values."""

    config: FluxConfig
    batch: int = 1
    grid: tuple[int, int] = (3, 5)
    text: int = 4
    reference: bool = False  # a second picture's tokens, frame 1, as Kontext has them
    regime: str = "plain"
    seed: int = 0
    coarse_time: bool = False  # only times and guidances whose thousandfold is exact in bfloat16

    def model(self) -> Flux:
        model = randomise(Flux(self.config), self.seed)
        if self.regime == "faint":
            dim = self.config.hidden_size
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.startswith(("img_in", "txt_in")) or ".qkv." in name:
                        p *= 1e-3
                    elif ".linear1." in name:
                        p[: 3 * dim] *= 1e-3
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Forward's arguments, in float32."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        c, (rows, columns) = self.config, self.grid
        ids = torch.cartesian_prod(
            torch.arange(1.0 + self.reference), torch.arange(1.0 * rows), torch.arange(1.0 * columns)
        )
        ids = ids.reshape(-1, 3)
        size = 30 if self.regime == "loud" else 1

        def normal(*shape):
            return size * torch.randn(shape, generator=generator)

        def choice(values):
            return values[torch.randint(len(values), (self.batch,), generator=generator)]

        exact = torch.tensor([0, 0.125, 0.25, 0.5, 1])
        return {
            "img": normal(self.batch, len(ids), c.in_channels),
            "img_ids": ids.expand(self.batch, -1, -1),
            "txt": normal(self.batch, self.text, c.context_in_dim),
            "txt_ids": torch.zeros(self.batch, self.text, 3),
            "timesteps": choice(exact if self.coarse_time else torch.arange(1025) / 1024),
            "y": normal(self.batch, c.vec_in_dim),
            "guidance": choice(8 * exact if self.coarse_time else torch.arange(800) / 16),
        }


KEPT = ("img_ids", "txt_ids", "timesteps", "guidance")  # float32 whatever the network computes in


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: x if n in KEPT else x.to(dtype) for n, x in inputs.items()}


def run_ours(model: Flux, x: dict[str, Tensor]) -> Tensor:
    return model(**x)


def run_theirs(theirs: FluxTransformer2DModel, x: dict[str, Tensor]) -> Tensor:
    return theirs(
        hidden_states=x["img"],
        encoder_hidden_states=x["txt"],
        pooled_projections=x["y"],
        timestep=x["timesteps"],
        img_ids=x["img_ids"][0],
        txt_ids=x["txt_ids"][0],
        guidance=x["guidance"] if theirs.config.guidance_embeds else None,
        return_dict=False,
    )[0]


@st.composite
def cases(draw, qkv_bias: bool | None = None, **fixed) -> Case:
    """Odd widths, depths, axes, grids, batches and text lengths; ``fixed`` are fields of the Case."""

    def count(low, high):
        return draw(st.integers(low, high))

    axes = tuple(2 * count(1, 6) for _ in range(3))
    heads = count(1, 3)
    config = FluxConfig(
        in_channels=count(1, 70),
        out_channels=count(1, 70),
        vec_in_dim=count(1, 40),
        context_in_dim=count(1, 50),
        hidden_size=heads * sum(axes),
        num_heads=heads,
        depth=count(0, 3),
        depth_single_blocks=count(0, 3),
        axes_dim=axes,
        theta=draw(st.sampled_from((10_000, 500))),
        qkv_bias=draw(st.booleans()) if qkv_bias is None else qkv_bias,
        guidance_embed=draw(st.booleans()),
    )
    drawn_case = {
        "batch": count(1, 3),
        "grid": (count(1, 7), count(1, 9)),
        "text": count(1, 13),
        "reference": draw(st.booleans()),
        "regime": draw(st.sampled_from(REGIMES)),
        "seed": count(0, 2**31),
    }
    return Case(config, **{**drawn_case, **fixed})
