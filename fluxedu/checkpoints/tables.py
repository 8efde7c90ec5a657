"""The same weights under two sets of names: the official (BFL) layout and diffusers'.

Almost everything is a rename. What is not:

- BFL keeps queries, keys and values in one matrix (single blocks: the MLP's first layer too), one
  below the other; diffusers keeps them apart;
- the last layer's modulation is (shift, scale) at BFL's and (scale, shift) at diffusers';
- the autoencoder's attention is made of 1x1 convolutions at BFL's, of linear layers at diffusers', and
  diffusers counts the decoder's levels from the coarse end.

All of that moves whole rows, so the two layouts are joined by a list of :class:`Span`, "these rows
here are those rows there". It is made from one table and read in either direction; no value is ever
computed, and a round trip is exact to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from fluxedu.errors import CheckpointError
from fluxedu.models import (
    AutoEncoder,
    AutoEncoderConfig,
    CLIPTextConfig,
    CLIPTextEncoder,
    Flux,
    FluxConfig,
    T5Config,
    T5Encoder,
)
from fluxedu.models.config import Config
from fluxedu.models.meta_init import meta_init

LAYOUTS = ("bfl", "diffusers")
MODELS = {FluxConfig: Flux, AutoEncoderConfig: AutoEncoder, CLIPTextConfig: CLIPTextEncoder, T5Config: T5Encoder}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One line of the table. ``#`` is a number, ``~`` the same number counted from the other end."""

    bfl: str
    diffusers: tuple[str, ...]  # more than one: BFL stacks them along the rows
    swap: bool = False  # the upper and lower half trade places
    point: bool = False  # BFL's weight is a 1x1 convolution, diffusers' a matrix


def _flux_rules() -> Iterator[Rule]:
    pairs = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
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
    for ours, theirs in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")):
        pairs[f"{ours}.in_layer"] = f"time_text_embed.{theirs}_embedder.linear_1"
        pairs[f"{ours}.out_layer"] = f"time_text_embed.{theirs}_embedder.linear_2"
    yield from (Rule(ours, (theirs,)) for ours, theirs in pairs.items())

    def several(ours: str, block: str, *parts: str) -> Rule:
        return Rule(ours, tuple(f"{block}.#.{part}" for part in parts))

    double, single = "transformer_blocks", "single_transformer_blocks"
    yield several("double_blocks.#.img_attn.qkv", double, "attn.to_q", "attn.to_k", "attn.to_v")
    yield several("double_blocks.#.txt_attn.qkv", double, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    yield several("single_blocks.#.linear1", single, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)


def _autoencoder_rules() -> Iterator[Rule]:
    places = {
        "encoder.down.#.block.#": "encoder.down_blocks.#.resnets.#",
        "decoder.up.#.block.#": "decoder.up_blocks.~.resnets.#",
    }
    pairs = {
        "encoder.down.#.downsample.conv": "encoder.down_blocks.#.downsamplers.0.conv",
        "decoder.up.#.upsample.conv": "decoder.up_blocks.~.upsamplers.0.conv",
    }
    for half in ("encoder", "decoder"):
        places |= {f"{half}.mid.block_{i + 1}": f"{half}.mid_block.resnets.{i}" for i in (0, 1)}
        pairs |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        pairs[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        attention = f"{half}.mid_block.attentions.0"
        pairs[f"{half}.mid.attn_1.norm"] = f"{attention}.group_norm"
        for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            yield Rule(f"{half}.mid.attn_1.{ours}", (f"{attention}.{theirs}",), point=True)
    for ours, theirs in places.items():
        pairs |= {f"{ours}.{name}": f"{theirs}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
        pairs[f"{ours}.nin_shortcut"] = f"{theirs}.conv_shortcut"
    yield from (Rule(ours, (theirs,)) for ours, theirs in pairs.items())


#: the two tables; a network that is not here has the same names in both layouts
TABLES = {FluxConfig: tuple(_flux_rules()), AutoEncoderConfig: tuple(_autoencoder_rules())}


@dataclass(frozen=True)
class Span:
    """``rows`` rows of the BFL tensor, from ``bfl_row`` on, are diffusers' from ``diffusers_row`` on."""

    bfl: str
    bfl_row: int
    diffusers: str
    diffusers_row: int
    rows: int


@lru_cache(maxsize=64)
def shapes(config: Config, layout: str = "bfl") -> dict[str, Shape]:
    """Name -> shape of every tensor the network has, in either layout. Treat it as read-only."""
    if layout == "diffusers":
        return _join(config)[1]
    with meta_init():
        network = MODELS[type(config)](config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@lru_cache(maxsize=64)
def _join(config: Config) -> tuple[tuple[Span, ...], dict[str, Shape]]:
    """What joins the two layouts of a network, and diffusers' shapes."""
    spans, theirs = [], {}
    for name, shape in shapes(config).items():
        rule, found = _rule_for(name, config)
        sizes = _heights(rule, shape[0], config)
        rest = shape[1:2] if rule.point else shape[1:]
        for target, size, row in zip(found, sizes, accumulate(sizes, initial=0), strict=False):
            theirs[target] = (size, *rest)
            if rule.swap:
                half = size // 2
                spans += [Span(name, 0, target, half, half), Span(name, half, target, 0, half)]
            else:
                spans.append(Span(name, row, target, 0, size))
    return tuple(spans), theirs


def _rule_for(name: str, config: Config) -> tuple[Rule, list[str]]:
    """The line of the table that speaks of a BFL tensor, and the diffusers names it gives."""
    stem, leaf = name.rsplit(".", 1)
    for rule in TABLES.get(type(config), ()):
        match = re.fullmatch(re.escape(rule.bfl).replace(r"\#", r"(\d+)"), stem)
        if match:
            leaf = "weight" if leaf == "scale" else leaf
            return rule, [f"{_numbered(theirs, match.groups(), config)}.{leaf}" for theirs in rule.diffusers]
    return Rule(name, (name,)), [name]


def _numbered(pattern: str, numbers: tuple[str, ...], config: Config) -> str:
    for number in numbers:
        marker = re.search("[#~]", pattern)[0]
        if marker == "~":
            number = str(len(config.ch_mult) - 1 - int(number))
        pattern = pattern.replace(marker, number, 1)
    return pattern


def _heights(rule: Rule, rows: int, config: Config) -> list[int]:
    """How many of a BFL tensor's rows each of its diffusers tensors gets: q, k, v, and the rest."""
    if len(rule.diffusers) == 1:
        return [rows]
    dim = config.hidden_size
    return [dim, dim, dim, rows - 3 * dim][: len(rule.diffusers)]


@dataclass(frozen=True)
class Piece:
    """The rows ``start:stop`` of the tensor ``source``."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class Recipe:
    """A tensor of the wanted layout: its pieces, one below the other, seen in ``shape``."""

    target: str
    shape: Shape
    pieces: tuple[Piece, ...]

    def build(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Make the tensor; a view of the source where there is one piece, a copy where there are more."""
        parts = [tensors[p.source][p.start : p.stop] for p in self.pieces]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.shape)


def recipes(config: Config, source: str, to: str) -> list[Recipe]:
    """How each tensor of the layout ``to`` is made from tensors of the layout ``source``."""
    if source == to:
        return [Recipe(name, shape, (Piece(name, 0, shape[0]),)) for name, shape in shapes(config, to).items()]
    pieces: dict[str, list[tuple[int, Piece]]] = {}
    for span in _join(config)[0]:
        ours, theirs = (span.bfl, span.bfl_row), (span.diffusers, span.diffusers_row)
        (target, at), (origin, row) = (theirs, ours) if to == "diffusers" else (ours, theirs)
        pieces.setdefault(target, []).append((at, Piece(origin, row, row + span.rows)))
    wanted = shapes(config, to)
    ordered = {name: sorted(found, key=lambda pair: pair[0]) for name, found in pieces.items()}
    return [Recipe(name, wanted[name], tuple(piece for _, piece in found)) for name, found in ordered.items()]


class Converted(Mapping):
    """Tensors of the wanted layout, each made when it is asked for."""

    def __init__(self, source: Mapping[str, Tensor], steps: list[Recipe], label: str):
        self.source, self.label = source, label
        self.recipes = {step.target: step for step in steps}

    def __getitem__(self, name: str) -> Tensor:
        return self.recipes[name].build(self.source)

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: step.shape for name, step in self.recipes.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        known = dtypes_of(self.source)
        return {name: _one_dtype(step, known) for name, step in self.recipes.items()}


def _one_dtype(step: Recipe, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    first = step.pieces[0].source
    for piece in step.pieces[1:]:
        if dtypes[piece.source] != dtypes[first]:
            raise CheckpointError(
                f"{first!r} is {dtypes[first]} and {piece.source!r} is {dtypes[piece.source]}, "
                f"but they are parts of one tensor, {step.target!r}, and must be of one dtype."
            )
    return dtypes[first]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Name -> shape, without touching the data if the tensors come from a file."""
    known = getattr(tensors, "shapes", None)
    return known if known is not None else {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Name -> dtype, likewise."""
    known = getattr(tensors, "dtypes", None)
    return known if known is not None else {name: tensor.dtype for name, tensor in tensors.items()}


def label_of(tensors: Mapping[str, Tensor]) -> str:
    """What to call the tensors in a message."""
    return getattr(tensors, "label", "the state dict")
