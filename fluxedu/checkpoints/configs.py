"""Configurations beside the weights: diffusers' ``config.json``, and what the shapes alone tell.

Neither layout's files say everything. An official file has no configuration at all: most of it can be
read off the shapes, but not how a head's numbers are shared by the axes (``axes_dim``). diffusers'
configuration has no room for another theta, MLP ratio or a qkv without bias.
"""

from __future__ import annotations

import math
import re
from functools import partial

from fluxedu.checkpoints.tables import Shape
from fluxedu.errors import CheckpointError, ConfigError, describe
from fluxedu.models import VARIANTS, AutoEncoderConfig, CLIPTextConfig, FluxConfig, T5Config
from fluxedu.models.config import LARGEST, Config

#: our field -> the name in the other config.json, and the value that code takes when it is not there
_FLUX = {
    "in_channels": ("in_channels", 64),
    "out_channels": ("out_channels", None),
    "vec_in_dim": ("pooled_projection_dim", 768),
    "context_in_dim": ("joint_attention_dim", 4096),
    "num_heads": ("num_attention_heads", 24),
    "depth": ("num_layers", 19),
    "depth_single_blocks": ("num_single_layers", 38),
    "axes_dim": ("axes_dims_rope", (16, 56, 56)),
    "guidance_embed": ("guidance_embeds", False),
}
_AUTOENCODER = {
    "in_channels": ("in_channels", 3),
    "out_ch": ("out_channels", 3),
    "num_res_blocks": ("layers_per_block", 1),
    "z_channels": ("latent_channels", 4),
    "norm_groups": ("norm_num_groups", 32),
    "scale_factor": ("scaling_factor", 0.18215),
    "shift_factor": ("shift_factor", 0.0),
}
#: what must be so for the network to be ours
_FLUX_FIXED = {"patch_size": 1}
_AUTOENCODER_FIXED = {
    "act_fn": "silu",
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
#: read elsewhere, or of no consequence
_INDIFFERENT = {"attention_head_dim", "block_out_channels", "sample_size", "force_upcast"}
_INDIFFERENT |= {"down_block_types", "up_block_types"}
_TEXT = {
    CLIPTextConfig: {"_": "CLIPTextModel", "model_type": "clip_text_model", "hidden_act": "quick_gelu"},
    T5Config: {"_": "T5EncoderModel", "model_type": "t5", "feed_forward_proj": "gated-gelu"},
}


def to_diffusers_config(config: Config) -> dict:
    """The ``config.json`` that diffusers (or transformers) puts beside these weights.

    Raises CheckpointError for a network that diffusers has no words for.
    """
    if isinstance(config, FluxConfig):
        return _flux_to_diffusers(config)
    if isinstance(config, AutoEncoderConfig):
        return _autoencoder_to_diffusers(config)
    known = dict(_TEXT[type(config)])
    return {"architectures": [known.pop("_")], **known, **config.to_dict()}


def _flux_to_diffusers(config: FluxConfig) -> dict:
    for name, only in (("theta", 10_000), ("mlp_ratio", 4.0), ("qkv_bias", True)):
        value = getattr(config, name)
        if value != only:
            raise CheckpointError(f"diffusers' layout has {name} {only} built in and cannot say {value}.")
    if len(config.axes_dim) != 3:
        raise CheckpointError(f"diffusers' layout has three axes and cannot say axes_dim {config.axes_dim}.")
    values = config.to_dict()
    named = {theirs: values[ours] for ours, (theirs, _) in _FLUX.items()}
    return {"_class_name": "FluxTransformer2DModel", **_FLUX_FIXED, "attention_head_dim": config.head_dim, **named}


def _autoencoder_to_diffusers(config: AutoEncoderConfig) -> dict:
    if config.ch_mult[0] != 1:
        raise CheckpointError(
            f"diffusers' layout takes ch for the first level's width and cannot say ch_mult {config.ch_mult}."
        )
    levels = len(config.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        **_AUTOENCODER_FIXED,
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _AUTOENCODER.items()},
    }


def from_diffusers_config(values: dict, kind: type[Config] | None = None) -> Config:
    """The other way: our configuration for a ``config.json``'s values.

    ``kind`` is the configuration that is wanted, if that is known. Raises CheckpointError for another
    network, or for a setting that ours does not have.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"config.json is made of names and values, not {describe(values)}.")
    classes = values.get("architectures")
    named = values.get("_class_name") or (classes[0] if isinstance(classes, list) and classes else None)
    readers = {
        "FluxTransformer2DModel": (FluxConfig, _flux_from_diffusers),
        "AutoencoderKL": (AutoEncoderConfig, _autoencoder_from_diffusers),
        "CLIPTextModel": (CLIPTextConfig, partial(_text_from_transformers, CLIPTextConfig)),
        "T5EncoderModel": (T5Config, partial(_text_from_transformers, T5Config)),
    }
    wanted = [name for name, (made, _) in readers.items() if kind in (None, made)]
    if named is None and len(wanted) == 1:
        named = wanted[0]
    if named not in wanted:
        raise CheckpointError(f"config.json is for {describe(named)}, but should be for {' or '.join(wanted)}.")
    try:
        return readers[named][1](values)
    except ConfigError as error:
        raise CheckpointError(f"config.json describes no network: {error}") from None


def _read(values: dict, names: dict[str, tuple], fixed: dict) -> dict:
    """Our fields from theirs, strictly."""
    for name, value in values.items():
        if name in fixed and value != fixed[name]:
            raise CheckpointError(f"config.json has {name} {describe(value)}, but FLUX.1's is {fixed[name]!r}.")
        if name not in fixed and name not in _INDIFFERENT and name not in {theirs for theirs, _ in names.values()}:
            if not name.startswith("_") and value is not None:
                raise CheckpointError(f"config.json has an unknown setting {describe(name)} ({describe(value)}).")
    found = {ours: values.get(theirs, default) for ours, (theirs, default) in names.items()}
    return {ours: tuple(value) if isinstance(value, list) else value for ours, value in found.items()}


def _whole(**values) -> None:
    """Numbers that are reckoned with before a configuration looks at them."""
    for name, value in values.items():
        if type(value) is not int or not 0 < value <= LARGEST:
            raise CheckpointError(
                f"config.json has {name} {describe(value)}, not a whole number of at most {LARGEST:,}."
            )


def _flux_from_diffusers(values: dict) -> FluxConfig:
    fields = _read(values, _FLUX, _FLUX_FIXED)
    fields["out_channels"] = fields["out_channels"] or fields["in_channels"]
    head = values.get("attention_head_dim", 128)
    _whole(num_attention_heads=fields["num_heads"], attention_head_dim=head)
    return FluxConfig(**fields, hidden_size=fields["num_heads"] * head)


def _autoencoder_from_diffusers(values: dict) -> AutoEncoderConfig:
    # left out, diffusers takes these as True
    values = {"use_quant_conv": True, "use_post_quant_conv": True, **values}
    fields = _read(values, _AUTOENCODER, _AUTOENCODER_FIXED)
    widths = values.get("block_out_channels", [64])
    if not isinstance(widths, list) or not widths:
        raise CheckpointError(f"config.json has block_out_channels {describe(widths)}, not a list of whole numbers.")
    for width in widths:
        _whole(block_out_channels=width)
    if any(width % widths[0] for width in widths):
        raise CheckpointError(
            f"config.json has block_out_channels {describe(widths)}, which are not multiples of the first."
        )
    fields["shift_factor"] = fields["shift_factor"] or 0.0
    return AutoEncoderConfig(**fields, ch=widths[0], ch_mult=tuple(width // widths[0] for width in widths))


def _text_from_transformers(kind: type[Config], values: dict) -> Config:
    for name, only in _TEXT[kind].items():
        if name not in ("_", "model_type") and values.get(name, only) != only:
            raise CheckpointError(f"config.json has {name} {describe(values[name])}, but FLUX.1's is {only!r}.")
    config = kind(**{name: values[name] for name in kind().to_dict() if name in values})
    if kind is CLIPTextConfig and config.eos_token_id == 2:  # an old mistake in CLIP's own file: 2 means the last token
        config = config.with_(eos_token_id=config.vocab_size - 1)
    return config


_NAMES = {AutoEncoderConfig: "an autoencoder", CLIPTextConfig: "a CLIP text encoder", T5Config: "a T5 encoder"}


class _Shapes:
    """Shapes asked for by a name in either layout."""

    def __init__(self, shapes: dict[str, Shape]):
        self.shapes = shapes
        self.last: tuple[str, ...] = ()  # the names of the tensor asked for last, in one layout or another

    def describe(self) -> str:
        """What is wrong with the tensor asked for last."""
        there = next((name for name in self.last if name in self.shapes), None)
        return f"{self.last[0]!r} is missing" if there is None else f"{there!r} is {list(self.shapes[there])}"

    def __call__(self, *names: str) -> Shape | None:
        self.last = names
        return next((self.shapes[name] for name in names if name in self.shapes), None)

    def count(self, pattern: str) -> int:
        """One more than the largest number in the place of ``#``."""
        found = (re.match(pattern.replace(".", r"\.").replace("#", r"(\d+)"), name) for name in self.shapes)
        return max((int(match[1]) + 1 for match in found if match), default=0)


def read_off(kind: type[Config], shapes: dict[str, Shape]) -> dict:
    """The fields of a configuration that the shapes tell, in either layout; raises KeyError if they are too few."""
    text = {CLIPTextConfig: _read_clip, T5Config: _read_t5}
    readers = {FluxConfig: _read_flux, AutoEncoderConfig: _read_autoencoder, **text}
    at = _Shapes(shapes)
    try:
        return readers[kind](at)
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        raise KeyError(at.said()) from None


def _read_flux(at: _Shapes) -> dict:
    dim, in_channels = at("img_in.weight", "x_embedder.weight")
    bias = at("double_blocks.0.img_attn.qkv.bias", "transformer_blocks.0.attn.to_q.bias")
    double = max(at.count("double_blocks.#."), at.count("transformer_blocks.#."))
    fields = {
        "in_channels": in_channels,
        "out_channels": at("final_layer.linear.weight", "proj_out.weight")[0],
        "vec_in_dim": at("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight")[1],
        "context_in_dim": at("txt_in.weight", "context_embedder.weight")[1],
        "hidden_size": dim,
        "depth": double,
        "depth_single_blocks": max(at.count("single_blocks.#."), at.count("single_transformer_blocks.#.")),
        "guidance_embed": any("guidance" in name for name in at.shapes),
        "qkv_bias": not double or bias is not None,
    }
    hidden = at("double_blocks.0.img_mlp.2.weight", "transformer_blocks.0.ff.net.2.weight")
    joined = at("single_blocks.0.linear2.weight", "single_transformer_blocks.0.proj_out.weight")
    if hidden or joined:
        fields["mlp_ratio"] = _ratio(hidden[1] if hidden else joined[1] - dim, dim)
        ours = "double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.0.norm.query_norm.scale"
        theirs = (f"{kind}transformer_blocks.0.attn.norm_q.weight" for kind in ("", "single_"))
        (head,) = at(*ours, *theirs)
        if dim % head:
            raise KeyError(at.said())
        fields["num_heads"] = dim // head
    return fields


def _ratio(hidden: int, dim: int) -> float:
    """The mlp_ratio for which ``int(dim * mlp_ratio)`` is ``hidden``, whatever the rounding."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _read_autoencoder(at: _Shapes) -> dict:
    ch, in_channels = at("encoder.conv_in.weight")[:2]
    levels = max(at.count("encoder.down.#."), at.count("encoder.down_blocks.#."))
    rows = [
        at(f"encoder.down.{i}.block.0.conv1.weight", f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0]
        for i in range(levels)
    ]
    return {
        "in_channels": in_channels,
        "out_ch": at("decoder.conv_out.weight")[0],
        "ch": ch,
        "ch_mult": tuple(row // ch for row in rows),
        "num_res_blocks": max(at.count("encoder.down.0.block.#."), at.count("encoder.down_blocks.0.resnets.#.")),
        "z_channels": at("decoder.conv_in.weight")[1],
    }


def _read_clip(at: _Shapes) -> dict:
    vocabulary, dim = at("text_model.embeddings.token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": at("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": at.count("text_model.encoder.layers.#."),
        "max_position_embeddings": at("text_model.embeddings.position_embedding.weight")[0],
        "eos_token_id": vocabulary - 1,
    }


def _read_t5(at: _Shapes) -> dict:
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = at(f"{attention}.relative_attention_bias.weight")
    vocabulary, dim = at("shared.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_kv": at(f"{attention}.q.weight")[0] // heads,
        "d_ff": at("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": at.count("encoder.block.#."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def described(config: Config) -> str:
    """``FLUX.1 dev``, or ``a FLUX network of 2 + 3 blocks, 64 wide``; the name of another network."""
    if not isinstance(config, FluxConfig):
        return _NAMES[type(config)]
    names = [name for name, variant in VARIANTS.items() if variant.flux == config]
    if names:
        return "FLUX.1 " + (names[0] if len(names) == 1 else f"{names[0]} (or {', '.join(names[1:])})")
    return f"a FLUX network of {config.depth} + {config.depth_single_blocks} blocks, {config.hidden_size} wide"
