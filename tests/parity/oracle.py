"""The reference implementations, and the networks and inputs on which ours are compared with them.

Weights are converted from our names to theirs by *their* converters, never by ours, so that a mistake in our layouts
cannot cancel a mistake in our networks.
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
from rounding import Float64, WithoutNoise
from torch import Tensor, nn

from fluxedu.models import Flux, Flux2Config, FluxConfig, attention, modulation
from fluxedu.models.config import PyramidConfig


def examples(number: int) -> settings:
    """Hypothesis draws this many examples, the same ones on every run, without a time limit."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=slow)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random values in every tensor: weights, biases and norm scales, hence also in every shift and gate."""
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
    """The gradient of every tensor, zeros for one that was not used."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def worst_gradient(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of one tensor's gradient.

    The error of a gradient smaller than a hundredth of the largest one is divided by that hundredth instead of its own
    norm, because it consists mostly of the rounding errors of the large ones.
    """
    assert result.keys() == expected.keys()
    floor = 1e-2 * max(float(g.norm()) for g in expected.values())
    return max(float((result[n].double() - g).norm()) / max(float(g.norm()), floor) for n, g in expected.items())


# --- the flow transformer -------------------------------------------------------------------------


def to_diffusers(state: dict[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """Convert with diffusers' own one-way converter, after replacing the hidden size it hard-codes (3072) by ours."""
    code = convert_flux_transformer_checkpoint_to_diffusers.__code__
    assert 3072 in code.co_consts
    widths = tuple(config.hidden_size if c == 3072 else c for c in code.co_consts)
    convert = FunctionType(code.replace(co_consts=widths), convert_flux_transformer_checkpoint_to_diffusers.__globals__)

    state = dict(state)
    for name in [n for n in state if n.endswith("_attn.qkv.weight")]:  # diffusers has no qkv_bias=False: a bias of zero
        state.setdefault(name.replace("weight", "bias"), torch.zeros_like(state[name][:, 0]))
    for kind in ("double_blocks", "single_blocks"):  # it takes the highest index + 1 as their number; fails without any
        if not any(n.startswith(kind) for n in state):
            state[f"{kind}.-1."] = torch.empty(0)
    return convert(state)


def transformer_arguments(config: FluxConfig | Flux2Config) -> dict[str, object]:
    """What diffusers' models of FLUX.1 and of FLUX.2 call by the same names."""
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": config.axes_dim,
    }


def pyramid_arguments(config: PyramidConfig) -> dict[str, object]:
    """What diffusers' autoencoders of FLUX.1 and of FLUX.2 call by the same names."""
    levels = len(config.ch_mult)
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "block_out_channels": tuple(config.ch * m for m in config.ch_mult),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "norm_num_groups": config.norm_groups,
    }


# ---------------------------------------------------------------- mistakes that both comparisons have to notice


def layer_norm_eps(patch, model):
    patch.setattr(modulation, "LN_EPS", 1e-5)


def rms_norm_eps(patch, model):
    patch.setattr(attention, "RMS_EPS", 1e-5)


def last_layer_takes_scale_first(patch, model):
    plan = model.final_layer.plan
    patch.setattr(model.final_layer, "plan", lambda vec: torch.cat(plan(vec).chunk(2, dim=-1)[::-1], dim=-1))


# ---------------------------------------------------------------- FLUX.1's transformer


def diffusers_flux(config: FluxConfig, state: dict[str, Tensor]) -> FluxTransformer2DModel:
    """diffusers' model with our weights. Every name and shape must match."""
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(
            **transformer_arguments(config),
            pooled_projection_dim=config.vec_in_dim,
        )
    theirs.load_state_dict(to_diffusers(state, config), strict=True, assign=True)
    theirs.pos_embed.theta = config.theta
    return theirs.eval()


def float64_flux(config: FluxConfig, state: dict[str, Tensor]) -> FluxTransformer2DModel:
    """diffusers' model in float64, to be run in the mode :class:`rounding.Float64` for an exact result.

    The time embedding stays as it is written, in float32: 1000 t and its waves, in the same operations, are part of the
    definition of the network in all public implementations, and any rounding of 1000 t is far larger than an error in
    the network. The angles of RoPE are computed in float64 by every implementation, so they get no noise.
    """
    theirs = diffusers_flux(config, state).double()
    theirs.time_text_embed.time_proj = WithoutNoise(theirs.time_text_embed.time_proj)
    theirs.pos_embed = WithoutNoise(theirs.pos_embed, Float64)
    return theirs


# The size of the values decides which mistakes can be seen. "small": tokens, queries and keys so small that the eps of
# the norms matters as much as they do. "large": inputs thirty times those of unit variance.
REGIMES = ("unit", "small", "large")


@dataclass(frozen=True)
class Case:
    """A network, an input, and the seed of their values."""

    config: FluxConfig
    batch: int = 1
    grid: tuple[int, int] = (3, 5)
    txt_len: int = 4
    with_reference: bool = False  # tokens of a second image, with frame index 1, as in Kontext
    regime: str = "unit"
    seed: int = 0
    bf16_times: bool = False  # only times and guidance scales t for which bfloat16 holds 1000 t exactly

    def model(self) -> Flux:
        model = randomise(Flux(self.config), self.seed)
        if self.regime == "small":
            dim = self.config.hidden_size
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.startswith(("img_in", "txt_in")) or ".qkv." in name:
                        p *= 1e-3
                    elif ".linear1." in name:
                        p[: 3 * dim] *= 1e-3
        return model

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of ``Flux.forward``, in float32."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        c, (rows, columns) = self.config, self.grid
        frames = torch.arange(1.0 + self.with_reference)
        ids = torch.cartesian_prod(frames, torch.arange(1.0 * rows), torch.arange(1.0 * columns)).reshape(-1, 3)
        size = 30 if self.regime == "large" else 1

        def normal(*shape):
            return size * torch.randn(shape, generator=generator)

        def choice(values):
            return values[torch.randint(len(values), (self.batch,), generator=generator)]

        eighths = torch.tensor([0, 0.125, 0.25, 0.5, 1])
        return {
            "img": normal(self.batch, len(ids), c.in_channels),
            "img_ids": ids.expand(self.batch, -1, -1),
            "txt": normal(self.batch, self.txt_len, c.context_in_dim),
            "txt_ids": torch.zeros(self.batch, self.txt_len, 3),
            "timesteps": choice(eighths if self.bf16_times else torch.arange(1025) / 1024),
            "y": normal(self.batch, c.vec_in_dim),
            "guidance": choice(8 * eighths if self.bf16_times else torch.arange(800) / 16),
        }


ALWAYS_FLOAT32 = ("img_ids", "txt_ids", "timesteps", "guidance")  # whatever the dtype of the network


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: x if n in ALWAYS_FLOAT32 else x.to(dtype) for n, x in inputs.items()}


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
    """Odd widths, depths, axes, grids, batch sizes and text lengths; ``fixed`` are fields of :class:`Case`."""

    def integer(low, high):
        return draw(st.integers(low, high))

    axes = tuple(2 * integer(1, 6) for _ in range(3))
    heads = integer(1, 3)
    config = FluxConfig(
        in_channels=integer(1, 70),
        out_channels=integer(1, 70),
        vec_in_dim=integer(1, 40),
        context_in_dim=integer(1, 50),
        hidden_size=heads * sum(axes),
        num_heads=heads,
        depth=integer(0, 3),
        depth_single_blocks=integer(0, 3),
        axes_dim=axes,
        theta=draw(st.sampled_from((10_000, 500))),
        qkv_bias=draw(st.booleans()) if qkv_bias is None else qkv_bias,
        guidance_embed=draw(st.booleans()),
    )
    drawn = {
        "batch": integer(1, 3),
        "grid": (integer(1, 7), integer(1, 9)),
        "txt_len": integer(1, 13),
        "with_reference": draw(st.booleans()),
        "regime": draw(st.sampled_from(REGIMES)),
        "seed": integer(0, 2**31),
    }
    return Case(config, **{**drawn, **fixed})
