"""LoRA: a change of a large matrix, written as the product of two thin ones (arXiv 2106.09685).

    y = W x + b  +  scale * (B (A x) + b_B)

Merged, that is one matrix again, ``W + scale * B A``, and costs nothing while sampling::

    merged = merge(flux, read("flux1-canny-dev-lora.safetensors"), scale=0.85)
    ...
    merged.unmerge()     # the weights of before, to the bit

Understood are the official files (``double_blocks.0.img_attn.qkv.lora_A.weight``; their B has a bias,
and they also bring norm scales, which replace the model's), diffusers' and PEFT's
(``transformer.transformer_blocks.0.attn.to_q.lora_A.weight``) and kohya's
(``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`` with ``alpha``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fluxedu.checkpoints.tables import TABLES, Piece, label_of, recipes
from fluxedu.errors import CheckpointError, describe, first_of

_ROLES = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}
_FACTOR = re.compile(r"(?P<stem>.+)\.(?P<role>lora_A|lora_B|lora_down|lora_up)(\.default)?\.(?P<leaf>weight|bias)")
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.diffusion_model.")


@dataclass
class _Factors:
    """What a file says of one linear layer."""

    stem: str  # the layer's name in the file
    A: Tensor | None = None  # [rank, in]
    B: Tensor | None = None  # [out, rank]
    bias: Tensor | None = None  # [out]
    alpha: float | None = None

    def delta(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``alpha / rank * B A``: ``[out, in]``; kohya's alpha is absent elsewhere, and then counts as the rank."""
        strength = 1.0 if self.alpha is None else self.alpha / self.A.shape[0]
        return strength * (self.B.to(device, dtype) @ self.A.to(device, dtype))


@dataclass
class _Change:
    """A change of some rows of one tensor of the module."""

    name: str  # in the file
    piece: Piece  # in the module
    rows: slice  # of what the file brings,
    height: int  # which should have so many rows in all
    factors: _Factors | None = None
    value: Tensor | None = None


@dataclass
class Merged:
    """What :func:`merge` has changed. The weights of before are kept (as much memory as the changed layers)."""

    module: nn.Module
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes_kept(self) -> int:
        """Memory held for :meth:`unmerge`."""
        return sum(tensor.nbytes for tensor in self.before.values())

    def unmerge(self) -> None:
        """Put the weights of before back, the very same tensors; several merges are undone last first."""
        parameters = dict(self.module.named_parameters())
        for name, tensor in self.after.items():
            if parameters[name].data_ptr() != tensor.data_ptr():
                raise CheckpointError(f"{name!r} was replaced after this LoRA was merged; undo the later change first.")
        for name, tensor in self.before.items():
            parameters[name].data = tensor
        self.before, self.after = {}, {}


@torch.no_grad()
def is_scale(scale: object) -> bool:
    """Can a change be multiplied by it?"""
    return isinstance(scale, (int, float)) and not isinstance(scale, bool) and abs(scale) < 1e6


def merge(module: nn.Module, lora: Mapping[str, Tensor], scale: float = 1.0) -> Merged:
    """Add a LoRA to the weights of ``module``, in float32 at least, rounded once to each weight's dtype.

    ``scale`` multiplies the change (the official canny and depth files are meant for 0.85); norm scales in
    the file replace the model's whatever the scale. Raises CheckpointError, before anything is changed,
    for a layer the module does not have or one of another shape, or a scale that is no number.
    """
    if not is_scale(scale):
        raise CheckpointError(f"scale is a number, 1 being the change as it was learned, not {describe(scale)}.")
    if getattr(module, "quantised", None):
        raise CheckpointError("a LoRA is merged into whole weights; merge it before they are quantised.")
    parameters = dict(module.named_parameters())
    by_target: dict[str, list[_Change]] = {}
    for change in _changes(module, lora):
        _check_fits(change, parameters)
        by_target.setdefault(change.piece.source, []).append(change)
    merged = Merged(module)
    for target, changes in by_target.items():
        old = parameters[target].data
        new = old.to(torch.promote_types(old.dtype, torch.float32), copy=True)
        for change in changes:
            _apply(change, new, target.endswith(".bias"), scale)
        merged.before[target], merged.after[target] = old, new.to(old.dtype)
    for target, tensor in merged.after.items():
        parameters[target].data = tensor
    return merged


def _apply(change: _Change, new: Tensor, to_bias: bool, scale: float) -> None:
    rows = new[change.piece.start : change.piece.stop]
    if change.factors is None:
        rows.copy_(change.value[change.rows])
    elif to_bias:
        rows.add_(change.factors.bias.to(new)[change.rows], alpha=scale)
    else:
        rows.add_(change.factors.delta(new.dtype, new.device)[change.rows], alpha=scale)


def _changes(module: nn.Module, lora: Mapping[str, Tensor]) -> list[_Change]:
    """What the file wants changed, layer by layer."""
    places, layers, plain = _places(module), _layers(lora), _without_factors(lora)
    changes, strangers = [], []

    def add(name: str, stored: str, **what) -> None:
        found = places.get(name) or places.get(name.replace(".", "_"), [])
        strangers.extend([] if found else [stored])
        changes.extend(_Change(stored, piece, rows, found[-1][1].stop, **what) for piece, rows in found)

    for stem, factors in layers.items():
        _check_whole(factors, label_of(lora))
        add(f"{stem}.weight", factors.stem, factors=factors)
        if factors.bias is not None:
            add(f"{stem}.bias", f"{factors.stem}.bias", factors=factors)
    for name, (stored, value) in plain.items():
        add(name, stored, value=value)
    if strangers:
        raise CheckpointError(f"{label_of(lora)} changes {first_of(strangers)}, which this model does not have.")
    if not changes or not layers:  # a whole network is all plain tensors
        raise CheckpointError(f"{label_of(lora)} holds no LoRA.")
    return changes


def _stripped(name: str) -> str:
    """A name without what PEFT, diffusers or kohya put before it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name.removeprefix("lora_unet_").removeprefix("lora_transformer_")


def _layers(lora: Mapping[str, Tensor]) -> dict[str, _Factors]:
    """Layer -> its factors, whichever convention the names follow."""
    layers: dict[str, _Factors] = {}
    for name in lora:
        match = _FACTOR.fullmatch(name)
        stem = match["stem"] if match else name.removesuffix(".alpha")
        if stem == name:
            continue
        factors = layers.setdefault(_stripped(stem), _Factors(stem))
        if not match:
            factors.alpha = float(lora[name])
        elif match["leaf"] == "weight":
            setattr(factors, _ROLES[match["role"]], lora[name])
        elif _ROLES[match["role"]] == "B":
            factors.bias = lora[name]
        else:
            raise CheckpointError(f"{label_of(lora)} has {name!r}, but the first factor of a LoRA has no bias.")
    return layers


def _without_factors(lora: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Plain name -> (name in the file, value) of the tensors that replace the model's."""
    plain = [name for name in lora if not _FACTOR.fullmatch(name) and not name.endswith(".alpha")]
    return {_stripped(name): (name, lora[name]) for name in plain}


def _places(module: nn.Module) -> dict[str, list[tuple[Piece, slice]]]:
    """Where the rows of a tensor go, by every name it may be called: official, diffusers', kohya's."""
    places: dict[str, list[tuple[Piece, slice]]] = {}
    config = getattr(module, "config", None)
    if type(config) in TABLES:
        for step in recipes(config, "bfl", "diffusers"):
            row, found = 0, []
            for piece in step.pieces:
                height = piece.stop - piece.start
                found.append((piece, slice(row, row + height)))
                row += height
            places[step.target] = found
    for name, parameter in module.named_parameters():
        rows = parameter.shape[0]
        places[name] = [(Piece(name, 0, rows), slice(0, rows))]
    return places | {name.replace(".", "_"): found for name, found in places.items()}


def _check_whole(factors: _Factors, label: str) -> None:
    for role, value in (("lora_A", factors.A), ("lora_B", factors.B)):
        if value is None:
            raise CheckpointError(f"{label} lacks the {role} of {factors.stem!r}.")
        if value.ndim != 2:
            raise CheckpointError(f"the {role} of {factors.stem!r} must be a matrix, not {list(value.shape)}.")
    if factors.A.shape[0] != factors.B.shape[1]:
        both = f"A is {list(factors.A.shape)}, B is {list(factors.B.shape)}"
        raise CheckpointError(f"the factors of {factors.stem!r} do not fit each other: {both}.")


def _check_fits(change: _Change, parameters: dict[str, nn.Parameter]) -> None:
    """What the file brings must have the shape of what it is for."""
    target, factors = parameters[change.piece.source], change.factors
    wanted = [change.height, *target.shape[1:]]
    if factors is None:
        given = list(change.value.shape)
    elif target.ndim == 1:
        given = list(factors.bias.shape)
    else:
        given = [factors.B.shape[0], factors.A.shape[1]]
    if given != wanted:
        hint = "; widen_input makes room for more inputs" if change.piece.source == "img_in.weight" else ""
        name = change.piece.source
        raise CheckpointError(f"the change of {change.name!r} is {given}, but {name!r} here takes {wanted}{hint}.")


def widen_input(tensors: Mapping[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """A flow transformer's tensors with ``img_in`` widened by zeros to ``in_channels`` inputs.

    The LoRA files of canny and depth are for 128 inputs, FLUX.1 dev has 64; with zeros in the new half
    the network gives what it gave, until the LoRA is merged.
    """
    weight = tensors["img_in.weight"] if "img_in.weight" in tensors else None
    if weight is None or weight.shape[1] > in_channels:
        have = "none" if weight is None else weight.shape[1]
        raise CheckpointError(f"{label_of(tensors)} has {have} of the inputs that are to become {in_channels}.")
    wide = weight.new_zeros(weight.shape[0], in_channels)
    wide[:, : weight.shape[1]] = weight
    return {**tensors, "img_in.weight": wide}


def inputs_of(lora: Mapping[str, Tensor]) -> int | None:
    """How many numbers a token the LoRA's first layer reads; None if it leaves that layer alone."""
    for stem, factors in _layers(lora).items():
        if stem.replace(".", "_") in ("img_in", "x_embedder") and factors.A is not None:
            return factors.A.shape[-1]
    return None


def extract(after: Mapping[str, Tensor], before: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The LoRA that leads from one transformer's tensors to another's, under the official names.

    Of the change of each matrix the ``rank`` largest singular values are kept, the nearest that a matrix of that rank
    can come (Eckart and Young 1936); biases and norm scales as they are. What ``after`` reads more, ``before`` reads
    not at all: see :func:`widen_input`.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"a rank is a whole number from 1 on, not {describe(rank)}.")
    if set(after) != set(before) or "img_in.weight" not in after:
        apart = sorted(set(after) ^ set(before)) or ["img_in.weight"]
        raise CheckpointError(f"a LoRA is of two transformers of one kind; only one of these has {first_of(apart)}.")
    before = widen_input(before, after["img_in.weight"].shape[1])
    for name, value in after.items():
        if value.shape != before[name].shape:
            both = f"{list(before[name].shape)} and {list(value.shape)}"
            raise CheckpointError(f"{name!r} has other shapes in the two transformers: {both}.")
    found: dict[str, Tensor] = {}
    for name, value in after.items():
        layer, _, leaf = name.rpartition(".")
        change = value.float() - before[name].float()
        if leaf == "scale":
            found[name] = value
        elif leaf == "bias":
            found[f"{layer}.lora_B.bias"] = change
        else:
            left, size, right = torch.linalg.svd(change, full_matrices=False)
            share = size[:rank].sqrt()
            found[f"{layer}.lora_A.weight"] = share[:, None] * right[:rank]
            found[f"{layer}.lora_B.weight"] = left[:, :rank] * share
    return found
