"""The same weights under two sets of names: the official (BFL) layout and diffusers'.

Almost everything is renaming. The exceptions:

- BFL stacks the rows of queries, keys and values in one matrix (in single blocks also the first layer of the MLP);
  diffusers has a matrix for each, except in the single blocks of FLUX.2;
- the last layer's modulation is (shift, scale) in BFL's layout and (scale, shift) in diffusers';
- the autoencoder's attention consists of 1x1 convolutions in BFL's layout and of linear layers in diffusers', which
  also numbers the decoder's levels from the lowest resolution up.

All of that moves whole rows. So a list of pairs, "these rows here are those rows there", joins the layouts; it is
derived from one table and works in both directions. Values are only copied: there and back is exact to the bit.

>>> from fluxedu.models import Flux, FluxConfig
>>> config = FluxConfig(hidden_size=16, num_heads=2, axes_dim=(2, 2, 4), depth=1, depth_single_blocks=1)
>>> theirs = convert(Flux(config).state_dict(), to="diffusers", config=config)
>>> theirs["transformer_blocks.0.attn.to_q.weight"].shape
torch.Size([16, 16])
>>> ours = convert(theirs, to="bfl", config=config)
>>> ours["double_blocks.0.img_attn.qkv.weight"].shape
torch.Size([48, 16])
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fluxedu.checkpoints.configs import (
    Shape,
    fields_from_shapes,
    infer_config,
    kind_name,
    label_of,
    network_name,
    recognise,
    shapes_of,
    to_diffusers_config,
)
from fluxedu.checkpoints.contents import PARTS, without_prefixes
from fluxedu.errors import CheckpointError, ConfigError, checked, first_of
from fluxedu.models import (
    AutoEncoder,
    AutoEncoderConfig,
    CLIPTextConfig,
    CLIPTextEncoder,
    Flux,
    Flux2,
    Flux2AutoEncoder,
    Flux2AutoEncoderConfig,
    Flux2Config,
    FluxConfig,
    T5Config,
    T5Encoder,
)
from fluxedu.models.config import Config, TransformerConfig
from fluxedu.models.meta_init import meta_init

LAYOUTS = ("bfl", "diffusers")
MODELS = {FluxConfig: Flux, AutoEncoderConfig: AutoEncoder, CLIPTextConfig: CLIPTextEncoder, T5Config: T5Encoder}
MODELS |= {Flux2Config: Flux2, Flux2AutoEncoderConfig: Flux2AutoEncoder}


# ---------------------------------------------------------------- the table of names


@dataclass(frozen=True)
class Rule:
    """One line of the table. ``#`` is a number, ``~`` the same number counted from the other end."""

    bfl: str
    diffusers: tuple[str, ...]  # if there are several, BFL stacks their rows
    swaps_halves: bool = False  # the upper and the lower half of the rows are exchanged
    is_conv1x1: bool = False  # BFL's weight is a 1x1 convolution, diffusers' a matrix


_FLUX_RENAMED = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "double_blocks.#.img_mod.lin": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_mod.lin": "transformer_blocks.#.norm1_context.linear",
    "double_blocks.#.img_attn.norm.query_norm": "transformer_blocks.#.attn.norm_q",
    "double_blocks.#.img_attn.norm.key_norm": "transformer_blocks.#.attn.norm_k",
    "double_blocks.#.txt_attn.norm.query_norm": "transformer_blocks.#.attn.norm_added_q",
    "double_blocks.#.txt_attn.norm.key_norm": "transformer_blocks.#.attn.norm_added_k",
    "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.net.2",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.net.2",
    "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
    "single_blocks.#.norm.query_norm": "single_transformer_blocks.#.attn.norm_q",
    "single_blocks.#.norm.key_norm": "single_transformer_blocks.#.attn.norm_k",
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "final_layer.linear": "proj_out",
}
_DOUBLE_STACKED = {
    "double_blocks.#.img_attn.qkv": [f"transformer_blocks.#.attn.to_{x}" for x in "qkv"],
    "double_blocks.#.txt_attn.qkv": [f"transformer_blocks.#.attn.add_{x}_proj" for x in "qkv"],
}
_FLUX_STACKED = {
    **_DOUBLE_STACKED,
    "single_blocks.#.linear1": [
        *(f"single_transformer_blocks.#.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.#.proj_mlp",
    ],
}


#: FLUX.2: the names that are not FLUX.1's
_FLUX2_RENAMED = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.linear_in",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.linear_out",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.linear_in",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.linear_out",
    "single_blocks.#.linear1": "single_transformer_blocks.#.attn.to_qkv_mlp_proj",
    "single_blocks.#.linear2": "single_transformer_blocks.#.attn.to_out",
}


def _autoencoder_rules() -> Iterator[Rule]:
    resnet_blocks = {
        "encoder.down.#.block.#": "encoder.down_blocks.#.resnets.#",
        "decoder.up.#.block.#": "decoder.up_blocks.~.resnets.#",
    }
    renamed = {
        "encoder.down.#.downsample.conv": "encoder.down_blocks.#.downsamplers.0.conv",
        "decoder.up.#.upsample.conv": "decoder.up_blocks.~.upsamplers.0.conv",
    }
    for half in ("encoder", "decoder"):
        resnet_blocks[f"{half}.mid.block_1"] = f"{half}.mid_block.resnets.0"
        resnet_blocks[f"{half}.mid.block_2"] = f"{half}.mid_block.resnets.1"
        renamed[f"{half}.conv_in"] = f"{half}.conv_in"
        renamed[f"{half}.conv_out"] = f"{half}.conv_out"
        renamed[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        attention = f"{half}.mid_block.attentions.0"
        renamed[f"{half}.mid.attn_1.norm"] = f"{attention}.group_norm"
        for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            yield Rule(f"{half}.mid.attn_1.{ours}", (f"{attention}.{theirs}",), is_conv1x1=True)
    for ours, theirs in resnet_blocks.items():
        for layer in ("norm1", "conv1", "norm2", "conv2"):
            renamed[f"{ours}.{layer}"] = f"{theirs}.{layer}"
        renamed[f"{ours}.nin_shortcut"] = f"{theirs}.conv_shortcut"
    yield from (Rule(ours, (theirs,)) for ours, theirs in renamed.items())


_LAST_LAYER = Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swaps_halves=True)

#: the rules of the networks whose two layouts differ; the text encoders have the same names in both
RULES = {
    FluxConfig: (
        *(Rule(ours, (theirs,)) for ours, theirs in _FLUX_RENAMED.items()),
        *(Rule(ours, tuple(theirs)) for ours, theirs in _FLUX_STACKED.items()),
        _LAST_LAYER,
    ),
    Flux2Config: (
        *(Rule(ours, (theirs,)) for ours, theirs in (_FLUX_RENAMED | _FLUX2_RENAMED).items()),
        *(Rule(ours, tuple(theirs)) for ours, theirs in _DOUBLE_STACKED.items()),
        _LAST_LAYER,
    ),
    AutoEncoderConfig: tuple(_autoencoder_rules()),
    Flux2AutoEncoderConfig: (
        *_autoencoder_rules(),
        Rule("encoder.quant_conv", ("quant_conv",)),
        Rule("decoder.post_quant_conv", ("post_quant_conv",)),
    ),
}


@dataclass(frozen=True)
class Piece:
    """The rows ``start:stop`` of the tensor ``name``."""

    name: str
    start: int
    stop: int


@checked(CheckpointError)
@lru_cache(maxsize=64)
def shapes(config: Config, layout: str = "bfl") -> dict[str, Shape]:
    """Name -> shape of every tensor of the network, in either layout. The result is cached: do not modify it."""
    if layout == "diffusers":
        return _join(config)[1]
    with meta_init():
        network = MODELS[type(config)](config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@lru_cache(maxsize=64)
def _join(config: Config) -> tuple[list[tuple[Piece, Piece]], dict[str, Shape]]:
    """Which rows of the BFL tensors are which rows of diffusers' tensors; and the shapes of diffusers' tensors."""
    pairs, theirs = [], {}
    for name, shape in shapes(config).items():
        rule, targets = _rule_for(name, config)
        if not shape:  # a single number, the counter of a batch norm
            theirs[targets[0]] = shape
            pairs.append((Piece(name, 0, 1), Piece(targets[0], 0, 1)))
            continue
        heights = [shape[0]]  # the rows of each target
        if len(targets) > 1:  # q, k, v, and in single blocks the MLP
            dim = config.hidden_size
            heights = [dim, dim, dim, shape[0] - 3 * dim][: len(targets)]
        row = 0
        for target, height in zip(targets, heights, strict=True):
            theirs[target] = (height, *(shape[1:2] if rule.is_conv1x1 else shape[1:]))
            if rule.swaps_halves:
                half = height // 2
                pairs.append((Piece(name, 0, half), Piece(target, half, height)))
                pairs.append((Piece(name, half, height), Piece(target, 0, half)))
            else:
                pairs.append((Piece(name, row, row + height), Piece(target, 0, height)))
            row += height
    return pairs, theirs


def _rule_for(name: str, config: Config) -> tuple[Rule, list[str]]:
    """The rule for a BFL tensor, and the names of its diffusers tensors."""
    module, leaf = name.rsplit(".", 1)
    for rule in RULES.get(type(config), ()):
        match = re.fullmatch(re.escape(rule.bfl).replace(r"\#", r"(\d+)"), module)
        if match is None:
            continue
        targets = []
        for target in rule.diffusers:
            for number in match.groups():
                marker = re.search("[#~]", target)[0]
                if marker == "~":
                    number = str(len(config.ch_mult) - 1 - int(number))
                target = target.replace(marker, number, 1)
            targets.append(f"{target}.{'weight' if leaf == 'scale' else leaf}")
        return rule, targets
    return Rule(name, (name,)), [name]


# ---------------------------------------------------------------- from one layout to the other


def recipes(config: Config, source: str, to: str) -> dict[str, list[Piece]]:
    """Each tensor of the layout ``to`` -> the pieces of tensors of the layout ``source`` that it concatenates."""
    if source == to:
        return {name: [Piece(name, 0, shape[0] if shape else 1)] for name, shape in shapes(config, to).items()}
    found: dict[str, list[tuple[int, Piece]]] = {}
    for ours, theirs in _join(config)[0]:
        target, piece = (theirs, ours) if to == "diffusers" else (ours, theirs)
        found.setdefault(target.name, []).append((target.start, piece))
    return {name: [piece for _, piece in sorted(pieces)] for name, pieces in found.items()}


class ConvertedTensors(Mapping):
    """The tensors of another layout; each is made from ``source`` when it is looked up."""

    def __init__(self, source: Mapping[str, Tensor], recipes: dict[str, list[Piece]], shapes: dict[str, Shape]):
        self.source, self.label, self.recipes, self.shapes = source, label_of(source), recipes, shapes

    def __getitem__(self, name: str) -> Tensor:
        """A view of the source where the tensor is one piece of it, a copy where it is several."""
        parts = [torch.atleast_1d(self.source[p.name])[p.start : p.stop] for p in self.recipes[name]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype; raises CheckpointError where the pieces of one tensor have different dtypes."""
        known = dtypes_of(self.source)
        for name, (first, *others) in self.recipes.items():
            for piece in others:
                if known[piece.name] != known[first.name]:
                    raise CheckpointError(
                        f"{first.name!r} is {known[first.name]} and {piece.name!r} is {known[piece.name]}, "
                        f"but they are parts of one tensor, {name!r}, and must have the same dtype."
                    )
        return {name: known[pieces[0].name] for name, pieces in self.recipes.items()}


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Name -> dtype, without reading any data if the tensors come from a file."""
    known = getattr(tensors, "dtypes", None)
    return known if known is not None else {name: tensor.dtype for name, tensor in tensors.items()}


@checked(CheckpointError)
def convert(state_dict: Mapping[str, Tensor], to: str, config: Config | None = None) -> dict[str, Tensor]:
    """The same weights in the other layout.

    ``state_dict`` is that of a flow transformer or an autoencoder, in either layout; ``to`` is ``"bfl"`` or
    ``"diffusers"``; ``config`` may be omitted where it follows from the shapes. Values are only copied, so converting
    there and back is exact to the bit. Tensors that are only renamed, cut or reshaped share memory with ``state_dict``.

    Raises CheckpointError for a missing or unexpected name, a wrong shape, the tensors of another variant, or a
    network that the other layout cannot describe.
    """
    return dict(convert_lazily(state_dict, to, config))


@checked(CheckpointError)
def convert_lazily(tensors: Mapping[str, Tensor], to: str, config: Config | None = None) -> ConvertedTensors:
    """Like :func:`convert`, but each tensor is made when it is looked up."""
    if to not in LAYOUTS:
        raise CheckpointError(f"there is no layout called {to!r}; there are {' and '.join(LAYOUTS)}.")
    tensors = without_prefixes(tensors, part_of(config))
    found = shapes_of(tensors)
    config = config or _config_for_names(tensors, found)
    layout = "bfl"
    if type(config) in RULES:
        layout = max(LAYOUTS, key=lambda layout: len(found.keys() & shapes(config, layout).keys()))
    check_network(found, config, layout, label_of(tensors))
    if to == "diffusers":
        to_diffusers_config(config)  # raises if that layout cannot describe the network
    converted = ConvertedTensors(tensors, recipes(config, layout, to), shapes(config, to))
    converted.dtypes  # noqa: B018  (raises for mixed dtypes, before anything is made)
    return converted


def _config_for_names(tensors: Mapping[str, Tensor], found: dict[str, Shape]) -> Config:
    """A configuration with these names and shapes; for a flow transformer, ``axes_dim`` makes no difference to them."""
    recognised = recognise(found)
    if recognised and issubclass(recognised[0], TransformerConfig):
        kind = recognised[0]
        try:
            return _with_fields(kind(), fields_from_shapes(kind, found))
        except (KeyError, ConfigError):
            pass
    return infer_config(tensors)


def _with_fields(config: Config, fields: dict) -> Config:
    """``config`` with other fields, and an ``axes_dim`` that adds up to a head."""
    if not isinstance(config, TransformerConfig):
        return config.with_(**fields)
    head_dim = fields["hidden_size"] // fields.get("num_heads", config.num_heads)
    axes_dim = config.axes_dim if sum(config.axes_dim) == head_dim else (2, 2, head_dim - 4)
    return config.with_(**fields, axes_dim=axes_dim)


# ---------------------------------------------------------------- checks


def part_of(config: Config | None) -> str | None:
    """The name of the network that ``config`` describes, as in ``PARTS``; None for anything else."""
    return next((part for part, kinds in PARTS.items() if type(config) in kinds), None)


def check_network(found: dict[str, Shape], config: Config, layout: str, label: str) -> None:
    """Raises CheckpointError, with the most helpful reason, unless these are all tensors of the network ``config``."""
    expected = shapes(config, layout)
    if found == expected:
        return
    recognised = recognise(found)
    if recognised is not None:
        kind, its_layout = recognised
        if kind is not type(config):
            raise CheckpointError(f"{label} is {kind_name(kind)}, but {kind_name(type(config))} is needed.")
        if its_layout != layout and type(config) in RULES:
            raise CheckpointError(f"{label} is in {its_layout}'s layout, but {layout}'s is needed; convert it first.")
    try:
        fields = fields_from_shapes(type(config), found)
        theirs = _with_fields(config, fields)
        is_complete = found == shapes(theirs, layout)
    except (KeyError, ConfigError):
        is_complete = False
    if is_complete:  # a complete checkpoint, but of another network
        differences = [f"{n} is {v}, not {getattr(config, n)}" for n, v in fields.items() if v != getattr(config, n)]
        raise CheckpointError(
            f"{label} is {network_name(theirs)}, but the config is that of {network_name(config)}: "
            f"{', '.join(differences)}."
        )
    check_names_and_shapes(found, expected, label)


def check_names_and_shapes(found: dict[str, Shape], expected: dict[str, Shape], label: str) -> None:
    """Raises CheckpointError unless every expected tensor is there, no other, and each in its shape."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    faults = [f"lacks the key {first_of(missing)}"] if missing else []
    faults += [f"has an unexpected key {first_of(extra)}"] if extra else []
    if faults:
        raise CheckpointError(f"{label} {' and '.join(faults)}.")
    wrong = [name for name in expected if tuple(found[name]) != tuple(expected[name])]
    if wrong:
        shape, right = list(found[wrong[0]]), list(expected[wrong[0]])
        raise CheckpointError(f"{label} has {first_of(wrong)} in shape {shape}, but it should be {right}.")
