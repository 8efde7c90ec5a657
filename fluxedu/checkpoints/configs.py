"""Configurations: diffusers' ``config.json``, and what the shapes of the tensors reveal.

Neither layout stores everything. An official (BFL) file has no configuration at all: most of it follows from the
shapes, but not how RoPE divides a head between the axes (``axes_dim``). For FLUX.1, diffusers' ``config.json`` has no
field for another theta, another MLP ratio, or a qkv without bias; for FLUX.2 it has one for each number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from fluxedu.errors import CheckpointError, ConfigError, check_integer, checked, describe, first_of
from fluxedu.models import (
    FLUX2_VARIANTS,
    VARIANTS,
    AutoEncoderConfig,
    CLIPTextConfig,
    Flux2AutoEncoderConfig,
    Flux2Config,
    FluxConfig,
    T5Config,
)
from fluxedu.models.config import LARGEST, Config, PyramidConfig, TransformerConfig

Shape = tuple[int, ...]

#: of each kind of network: our field -> its name in config.json, and the default that diffusers uses where it is absent
_FIELDS: dict[type[Config], dict[str, tuple]] = {
    FluxConfig: {
        "in_channels": ("in_channels", 64),
        "out_channels": ("out_channels", None),
        "vec_in_dim": ("pooled_projection_dim", 768),
        "context_in_dim": ("joint_attention_dim", 4096),
        "num_heads": ("num_attention_heads", 24),
        "depth": ("num_layers", 19),
        "depth_single_blocks": ("num_single_layers", 38),
        "axes_dim": ("axes_dims_rope", (16, 56, 56)),
        "guidance_embed": ("guidance_embeds", False),
    },
    Flux2Config: {
        "in_channels": ("in_channels", 128),
        "out_channels": ("out_channels", None),
        "context_in_dim": ("joint_attention_dim", 15360),
        "mlp_ratio": ("mlp_ratio", 3.0),
        "num_heads": ("num_attention_heads", 48),
        "depth": ("num_layers", 8),
        "depth_single_blocks": ("num_single_layers", 48),
        "axes_dim": ("axes_dims_rope", (32, 32, 32, 32)),
        "theta": ("rope_theta", 2000),
        "guidance_embed": ("guidance_embeds", True),
    },
    AutoEncoderConfig: {
        "in_channels": ("in_channels", 3),
        "out_ch": ("out_channels", 3),
        "num_res_blocks": ("layers_per_block", 1),
        "z_channels": ("latent_channels", 4),
        "norm_groups": ("norm_num_groups", 32),
        "scale_factor": ("scaling_factor", 0.18215),
        "shift_factor": ("shift_factor", 0.0),
    },
    Flux2AutoEncoderConfig: {
        "in_channels": ("in_channels", 3),
        "out_ch": ("out_channels", 3),
        "num_res_blocks": ("layers_per_block", 2),
        "z_channels": ("latent_channels", 32),
        "norm_groups": ("norm_num_groups", 32),
    },
}
#: settings that have only one value in FLUX.1 and in FLUX.2
_FIXED: dict[type[Config], dict] = {
    FluxConfig: {"patch_size": 1},
    Flux2Config: {"patch_size": 1, "timestep_guidance_channels": 256, "eps": 1e-6},
    AutoEncoderConfig: {
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    },
    Flux2AutoEncoderConfig: {
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "batch_norm_eps": 1e-4,
        "patch_size": [2, 2],
    },
    CLIPTextConfig: {"hidden_act": "quick_gelu"},
    T5Config: {"feed_forward_proj": "gated-gelu"},
}
#: settings that are read separately, or have no effect
_IGNORED = {"attention_head_dim", "block_out_channels", "sample_size", "force_upcast"}
_IGNORED |= {"down_block_types", "up_block_types", "batch_norm_momentum"}
#: the class that diffusers or transformers builds from each configuration, and what we call it in messages
_CLASSES = {
    FluxConfig: ("FluxTransformer2DModel", "a flow transformer"),
    Flux2Config: ("Flux2Transformer2DModel", "a flow transformer of FLUX.2"),
    AutoEncoderConfig: ("AutoencoderKL", "an autoencoder"),
    Flux2AutoEncoderConfig: ("AutoencoderKLFlux2", "an autoencoder of FLUX.2"),
    CLIPTextConfig: ("CLIPTextModel", "a CLIP text encoder"),
    T5Config: ("T5EncoderModel", "a T5 encoder"),
}
#: classes of transformers that contain these encoders
_LARGER_CLASSES = {"CLIPModel": "CLIPTextModel", "CLIPTextModelWithProjection": "CLIPTextModel"}
_LARGER_CLASSES |= {"T5ForConditionalGeneration": "T5EncoderModel", "T5Model": "T5EncoderModel"}


# ---------------------------------------------------------------- config.json


@checked(CheckpointError)
def to_diffusers_config(config: Config) -> dict:
    """The ``config.json`` that diffusers (or transformers) stores beside these weights.

    Raises CheckpointError for a network that diffusers' layout cannot describe.
    """
    kind, values = type(config), config.to_dict()
    class_name = _CLASSES[kind][0]
    if isinstance(config, FluxConfig):
        for name, only in (("theta", 10_000), ("mlp_ratio", 4.0), ("qkv_bias", True)):
            if values[name] != only:
                raise CheckpointError(f"diffusers' layout always has {name} {only} and cannot store {values[name]}.")
        if len(config.axes_dim) != 3:
            raise CheckpointError(f"diffusers' layout has three axes and cannot store axes_dim {config.axes_dim}.")
    if isinstance(config, TransformerConfig):
        fields = {theirs: values[ours] for ours, (theirs, _) in _FIELDS[kind].items()}
        return {"_class_name": class_name, **_FIXED[kind], "attention_head_dim": config.head_dim, **fields}
    if isinstance(config, PyramidConfig):
        if config.ch_mult[0] != 1:
            raise CheckpointError(
                f"diffusers' layout takes ch as the width of the first level and cannot store ch_mult {config.ch_mult}."
            )
        levels = len(config.ch_mult)
        return {
            "_class_name": class_name,
            **_FIXED[kind],
            "block_out_channels": [config.ch * mult for mult in config.ch_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **{theirs: values[ours] for ours, (theirs, _) in _FIELDS[kind].items()},
        }
    model_type = "clip_text_model" if isinstance(config, CLIPTextConfig) else "t5"
    return {"architectures": [class_name], "model_type": model_type, **_FIXED[kind], **values}


@checked(CheckpointError, "kind")
def from_diffusers_config(values: dict, kind: type[Config] | None = None) -> Config:
    """Our configuration for the values of a ``config.json``.

    ``kind`` is the expected class of configuration, if it is known. Raises CheckpointError for another network, and
    for a setting that FLUX does not have.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"config.json must hold names and values, not {describe(values)}.")
    architectures = values.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    class_name = values.get("_class_name") or first
    if isinstance(class_name, str):
        class_name = _LARGER_CLASSES.get(class_name, class_name)
    expected = {name: known for known, (name, _) in _CLASSES.items() if kind in (None, known)}
    if class_name is None and len(expected) == 1:
        (class_name,) = expected
    if not isinstance(class_name, str) or class_name not in expected:
        raise CheckpointError(f"config.json is for {describe(class_name)}, but should be for {' or '.join(expected)}.")
    kind = expected[class_name]
    try:
        if issubclass(kind, TransformerConfig):
            return _flux_from_diffusers(values, kind)
        if issubclass(kind, PyramidConfig):
            return _autoencoder_from_diffusers(values, kind)
        return _text_from_transformers(kind, values)
    except ConfigError as error:
        raise CheckpointError(f"config.json describes no valid network: {error}") from None


def _flux_from_diffusers(values: dict, kind: type[TransformerConfig]) -> TransformerConfig:
    fields = _our_fields(values, kind)
    fields["out_channels"] = fields["out_channels"] or fields["in_channels"]
    head_dim = values.get("attention_head_dim", 128)
    for name, value in (("num_attention_heads", fields["num_heads"]), ("attention_head_dim", head_dim)):
        check_integer(f"config.json's {name}", value, 1, LARGEST, error=CheckpointError)
    return kind(**fields, hidden_size=fields["num_heads"] * head_dim)


def _autoencoder_from_diffusers(values: dict, kind: type[PyramidConfig]) -> PyramidConfig:
    values = {"use_quant_conv": True, "use_post_quant_conv": True, **values}  # diffusers' defaults
    fields = _our_fields(values, kind)
    widths = values.get("block_out_channels", [64] if kind is AutoEncoderConfig else [128, 256, 512, 512])
    if kind is AutoEncoderConfig:
        fields["shift_factor"] = fields["shift_factor"] or 0.0
    if not isinstance(widths, list) or not widths:
        raise CheckpointError(f"config.json has block_out_channels {describe(widths)}, not a list of whole numbers.")
    for width in widths:
        check_integer("config.json's block_out_channels", width, 1, LARGEST, error=CheckpointError)
    if any(width % widths[0] for width in widths):
        raise CheckpointError(
            f"config.json has block_out_channels {describe(widths)}, which are not multiples of the first."
        )
    return kind(**fields, ch=widths[0], ch_mult=tuple(width // widths[0] for width in widths))


def _text_from_transformers(kind: type[Config], values: dict) -> Config:
    if isinstance(values.get("text_config"), dict):  # all of CLIP; transformers may omit its own defaults there
        values = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, **values["text_config"]}
    for name, only in _FIXED[kind].items():
        if values.get(name, only) != only:
            raise CheckpointError(f"config.json has {name} {describe(values[name])}, but FLUX.1's is {only!r}.")
    config = kind(**{name: values[name] for name in kind().to_dict() if name in values})
    if kind is CLIPTextConfig and config.eos_token_id == 2:
        # an error in CLIP's own file, which transformers corrects too: 2 stands for the last token of the vocabulary
        config = config.with_(eos_token_id=config.vocab_size - 1)
    return config


def _our_fields(values: dict, kind: type[Config]) -> dict:
    """Our fields, read from diffusers' ``values``; CheckpointError for an unknown or unsupported setting."""
    names, fixed = _FIELDS[kind], _FIXED[kind]
    family = "FLUX.2" if kind in (Flux2Config, Flux2AutoEncoderConfig) else "FLUX.1"
    known = {theirs for theirs, _ in names.values()} | _IGNORED
    for name, value in values.items():
        if name in fixed:
            if not isinstance(value, type(fixed[name])) or value != fixed[name]:
                raise CheckpointError(f"config.json has {name} {describe(value)}, but {family}'s is {fixed[name]!r}.")
        elif name not in known and not name.startswith("_") and value is not None:
            raise CheckpointError(f"config.json has an unknown setting {describe(name)} ({describe(value)}).")
    fields = {ours: values.get(theirs, default) for ours, (theirs, default) in names.items()}
    return {ours: tuple(value) if isinstance(value, list) else value for ours, value in fields.items()}


# ---------------------------------------------------------------- shapes

#: names by which a network and its layout are recognised; any one of them is enough. FLUX.2's networks have many names
#: in common with FLUX.1's, so they are looked for first
MARKS: dict[tuple[type[Config], str], tuple[str, ...]] = {
    (Flux2Config, "bfl"): (
        "double_stream_modulation_img.lin.weight",
        "double_stream_modulation_txt.lin.weight",
        "single_stream_modulation.lin.weight",
    ),
    (Flux2Config, "diffusers"): (
        "double_stream_modulation_img.linear.weight",
        "double_stream_modulation_txt.linear.weight",
        "single_stream_modulation.linear.weight",
    ),
    (Flux2AutoEncoderConfig, "bfl"): ("encoder.quant_conv.weight", "decoder.post_quant_conv.weight"),
    (Flux2AutoEncoderConfig, "diffusers"): ("bn.running_mean", "bn.running_var"),
    (FluxConfig, "bfl"): ("img_in.weight", "final_layer.linear.weight", "txt_in.weight"),
    (FluxConfig, "diffusers"): ("x_embedder.weight", "norm_out.linear.weight", "context_embedder.weight"),
    (AutoEncoderConfig, "bfl"): ("encoder.mid.block_1.norm1.weight", "decoder.mid.block_1.norm1.weight"),
    (AutoEncoderConfig, "diffusers"): (
        "encoder.mid_block.resnets.0.norm1.weight",
        "decoder.mid_block.resnets.0.norm1.weight",
    ),
    (CLIPTextConfig, "bfl"): ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"),
    (T5Config, "bfl"): ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
}


def recognise(names: Mapping[str, object]) -> tuple[type[Config], str] | None:
    """The network and the layout that these tensor names belong to; None if they are of neither."""
    return next((known for known, marks in MARKS.items() if any(mark in names for mark in marks)), None)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Name -> shape, without reading any data if the tensors come from a file."""
    known = getattr(tensors, "shapes", None)
    return known if known is not None else {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def label_of(tensors: Mapping[str, Tensor]) -> str:
    """What an error message calls these tensors: the name of their file, or "the state dict"."""
    return getattr(tensors, "label", "the state dict")


@checked(CheckpointError)
def infer_config(tensors: Mapping[str, Tensor], like: Config | None = None) -> Config:
    """The configuration that follows from the shapes of these tensors.

    What the shapes leave open is taken from ``like``. Without it the official value is used where one fits:
    ``axes_dim`` for heads of 128, 32 norm groups for an autoencoder, heads of 64 for CLIP. Raises CheckpointError
    where none does.
    """
    shapes, label = shapes_of(tensors), label_of(tensors)
    recognised = recognise(shapes)
    if recognised is None:
        raise CheckpointError(f"{label} is no network of FLUX.1 or FLUX.2: {first_of(shapes)} is none of its names.")
    kind = recognised[0]
    try:
        fields = fields_from_shapes(kind, shapes)
    except KeyError as error:
        raise CheckpointError(
            f"{label} is too incomplete to infer its configuration ({error.args[0]}); pass config."
        ) from None
    base = like if isinstance(like, kind) else kind()
    if kind is CLIPTextConfig and like is None:
        fields["num_attention_heads"] = max(1, fields["hidden_size"] // 64)
    try:
        return base.with_(**fields)
    except ConfigError as error:
        raise CheckpointError(f"the shapes in {label} leave the configuration open, pass config: {error}") from None


def fields_from_shapes(kind: type[Config], shapes: dict[str, Shape]) -> dict:
    """The fields of a configuration that follow from the shapes, in either layout.

    Raises KeyError, with the reason, if tensors are missing or have impossible shapes.
    """
    readers = {FluxConfig: _flux_fields, AutoEncoderConfig: _autoencoder_fields}
    readers |= {Flux2Config: _flux2_fields, Flux2AutoEncoderConfig: _autoencoder_fields}
    readers |= {CLIPTextConfig: _clip_fields, T5Config: _t5_fields}
    lookup = _Shapes(shapes)
    try:
        return readers[kind](lookup)
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        raise KeyError(lookup.last_fault()) from None


class _Shapes:
    """Looks shapes up by a name in either layout, and remembers the last lookup for the error message."""

    def __init__(self, shapes: dict[str, Shape]):
        self.shapes = shapes
        self.last: tuple[str, ...] = ()

    def __call__(self, *names: str) -> Shape | None:
        """The shape of the tensor that has one of ``names``; None if there is none."""
        self.last = names
        return next((self.shapes[name] for name in names if name in self.shapes), None)

    def count(self, *prefixes: str) -> int:
        """How many numbered modules there are under any of ``prefixes``: one more than the largest number."""
        pattern = re.compile("|".join(rf"{re.escape(prefix)}\.(\d+)\." for prefix in prefixes))
        matches = [pattern.match(name) for name in self.shapes]
        return max((int(match[match.lastindex]) + 1 for match in matches if match), default=0)

    def last_fault(self) -> str:
        """What is wrong with the tensor that was looked up last."""
        present = next((name for name in self.last if name in self.shapes), None)
        return f"{self.last[0]!r} is missing" if present is None else f"{present!r} is {list(self.shapes[present])}"


def _transformer_fields(shape: _Shapes) -> dict:
    """The fields that both families have, except those of the MLP and the heads."""
    dim, in_channels = shape("img_in.weight", "x_embedder.weight")
    return {
        "in_channels": in_channels,
        "out_channels": shape("final_layer.linear.weight", "proj_out.weight")[0],
        "context_in_dim": shape("txt_in.weight", "context_embedder.weight")[1],
        "hidden_size": dim,
        "depth": shape.count("double_blocks", "transformer_blocks"),
        "depth_single_blocks": shape.count("single_blocks", "single_transformer_blocks"),
        "guidance_embed": any("guidance_in." in name or "guidance_embedder." in name for name in shape.shapes),
    }


def _flux_fields(shape: _Shapes) -> dict:
    fields = _transformer_fields(shape)
    fields["vec_in_dim"] = shape("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight")[1]
    bias = shape("double_blocks.0.img_attn.qkv.bias", "transformer_blocks.0.attn.to_q.bias")
    fields["qkv_bias"] = not fields["depth"] or bias is not None
    mlp_out = shape("double_blocks.0.img_mlp.2.weight", "transformer_blocks.0.ff.net.2.weight")
    attn_and_mlp_out = shape("single_blocks.0.linear2.weight", "single_transformer_blocks.0.proj_out.weight")
    return fields | _mlp_and_heads(shape, fields["hidden_size"], mlp_out, attn_and_mlp_out)


def _flux2_fields(shape: _Shapes) -> dict:
    fields = _transformer_fields(shape)
    mlp_out = shape("double_blocks.0.img_mlp.2.weight", "transformer_blocks.0.ff.linear_out.weight")
    attn_and_mlp_out = shape("single_blocks.0.linear2.weight", "single_transformer_blocks.0.attn.to_out.weight")
    return fields | _mlp_and_heads(shape, fields["hidden_size"], mlp_out, attn_and_mlp_out)


def _mlp_and_heads(shape: _Shapes, dim: int, mlp_out: Shape | None, attn_and_mlp_out: Shape | None) -> dict:
    """From the last layer of a double block's MLP, or of a single block; nothing if there is no block."""
    if mlp_out is None and attn_and_mlp_out is None:
        return {}
    mlp_hidden = mlp_out[1] if mlp_out else attn_and_mlp_out[1] - dim
    ratio = mlp_hidden / dim  # the next larger number where rounding makes int(dim * ratio) one too small
    ratio = ratio if int(dim * ratio) == mlp_hidden else math.nextafter(ratio, math.inf)
    (head_dim,) = shape(
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "single_blocks.0.norm.query_norm.scale",
        "transformer_blocks.0.attn.norm_q.weight",
        "single_transformer_blocks.0.attn.norm_q.weight",
    )
    if dim % head_dim:
        raise KeyError(shape.last_fault())
    return {"mlp_ratio": ratio, "num_heads": dim // head_dim}


def _autoencoder_fields(shape: _Shapes) -> dict:
    ch, in_channels = shape("encoder.conv_in.weight")[:2]
    widths = [
        shape(f"encoder.down.{i}.block.0.conv1.weight", f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0]
        for i in range(shape.count("encoder.down", "encoder.down_blocks"))
    ]
    return {
        "in_channels": in_channels,
        "out_ch": shape("decoder.conv_out.weight")[0],
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": shape.count("encoder.down.0.block", "encoder.down_blocks.0.resnets"),
        "z_channels": shape("decoder.conv_in.weight")[1],
    }


def _clip_fields(shape: _Shapes) -> dict:
    vocab_size, dim = shape("text_model.embeddings.token_embedding.weight")
    return {
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": shape.count("text_model.encoder.layers"),
        "max_position_embeddings": shape("text_model.embeddings.position_embedding.weight")[0],
        "eos_token_id": vocab_size - 1,
    }


def _t5_fields(shape: _Shapes) -> dict:
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shape(f"{attention}.relative_attention_bias.weight")
    vocab_size, dim = shape("shared.weight")
    return {
        "vocab_size": vocab_size,
        "d_model": dim,
        "d_kv": shape(f"{attention}.q.weight")[0] // heads,
        "d_ff": shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": shape.count("encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def kind_name(kind: type[Config]) -> str:
    """``a flow transformer``, ``an autoencoder``, … for a class of configuration."""
    return _CLASSES[kind][1]


def network_name(config: Config) -> str:
    """``FLUX.1 dev``, ``a FLUX network of 2 + 3 blocks, 64 wide``, or the kind of another network."""
    if not isinstance(config, TransformerConfig):
        return kind_name(type(config))
    family, variants = "FLUX.2", [name for name, flux in FLUX2_VARIANTS.items() if flux == config]
    if isinstance(config, FluxConfig):
        family, variants = "FLUX.1", [name for name, variant in VARIANTS.items() if variant.flux == config]
    if variants:
        return f"{family} " + (variants[0] if len(variants) == 1 else f"{variants[0]} (or {', '.join(variants[1:])})")
    family = "FLUX" if isinstance(config, FluxConfig) else family
    return f"a {family} network of {config.depth} + {config.depth_single_blocks} blocks, {config.hidden_size} wide"
