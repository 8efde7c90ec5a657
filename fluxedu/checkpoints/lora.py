"""LoRA: the change of a large matrix as the product of two thin ones (Hu et al., 2021, arXiv:2106.09685).

    y = W x + b  +  scale * (B (A x) + b_B)

Merging computes ``W + scale * B A``, one matrix again, which costs nothing while sampling::

    merged = merge(flux, read("flux1-canny-dev-lora.safetensors"), scale=0.85)
    ...
    merged.unmerge()     # the previous weights, exact to the bit

Supported formats: the official files (``double_blocks.0.img_attn.qkv.lora_A.weight``; their B has a bias, and they
contain norm scales, which replace the model's), diffusers' and PEFT's
(``transformer.transformer_blocks.0.attn.to_q.lora_A.weight``) and kohya's
(``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`` with ``alpha``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fluxedu.checkpoints.configs import label_of
from fluxedu.checkpoints.layouts import RULES, Piece, recipes
from fluxedu.errors import CheckpointError, describe, first_of
from fluxedu.models import Flux

_FACTOR = re.compile(r"(?P<layer>.+)\.(?P<factor>lora_(A|B|down|up))(\.default)?\.(?P<leaf>weight|bias)")
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.diffusion_model.")
_PREFIXES += ("lora_unet_", "lora_transformer_")


@dataclass
class _Factors:
    """The tensors of one linear layer in a LoRA file."""

    stored_name: str  # the layer's name in the file
    A: Tensor | None = None  # [rank, in]
    B: Tensor | None = None  # [out, rank]
    bias: Tensor | None = None  # [out]
    alpha: float | None = None  # kohya's; the product is scaled by alpha / rank, by 1 without alpha

    def check(self, label: str) -> None:
        """Raises CheckpointError unless A and B are there and can be multiplied."""
        for name, factor in (("lora_A", self.A), ("lora_B", self.B)):
            if factor is None:
                raise CheckpointError(f"{label} lacks the {name} of {self.stored_name!r}.")
            if factor.ndim != 2:
                raise CheckpointError(f"the {name} of {self.stored_name!r} must be a matrix, not {list(factor.shape)}.")
        if self.A.shape[0] != self.B.shape[1]:
            shapes = f"A is {list(self.A.shape)}, B is {list(self.B.shape)}"
            raise CheckpointError(f"the factors of {self.stored_name!r} do not fit each other: {shapes}.")

    def delta(self, like: Tensor) -> Tensor:
        """``alpha / rank * B A``, ``[out, in]``, in the dtype and on the device of ``like``."""
        alpha = 1.0 if self.alpha is None else self.alpha / self.A.shape[0]
        return alpha * (self.B.to(like) @ self.A.to(like))


@dataclass
class _Change:
    """The change of some rows of one parameter."""

    stored_name: str
    piece: Piece  # the rows of the parameter
    rows: slice  # the corresponding rows of what is stored,
    stored_rows: int  # which should have this many rows in total
    factors: _Factors | None = None  # to be added, or
    value: Tensor | None = None  # to replace the parameter


@dataclass
class Merged:
    """The result of :func:`merge`. It holds the previous weights, as much memory as the changed layers take."""

    module: nn.Module
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory held for :meth:`unmerge`."""
        return sum(tensor.nbytes for tensor in self.before.values())

    def unmerge(self) -> None:
        """Restore the previous weights, the very same tensors. Undo several merges in reverse order."""
        parameters = dict(self.module.named_parameters())
        for name, tensor in self.after.items():
            if parameters[name].data_ptr() != tensor.data_ptr():
                raise CheckpointError(f"{name!r} was replaced after this LoRA was merged; undo the later change first.")
        for name, tensor in self.before.items():
            parameters[name].data = tensor
        self.before, self.after = {}, {}


def is_scale(scale: object) -> bool:
    """Whether a change can be multiplied by it."""
    return isinstance(scale, (int, float)) and not isinstance(scale, bool) and abs(scale) < 1e6


@torch.no_grad()
def merge(module: nn.Module, lora: Mapping[str, Tensor], scale: float = 1.0) -> Merged:
    """Add a LoRA to the weights of ``module``, computed in float32 at least and rounded once to each weight's dtype.

    ``scale`` multiplies the change (the official canny and depth files are meant for 0.85); norm scales in the file
    replace the model's, whatever the scale. Raises CheckpointError, before anything is changed, for a layer that the
    module does not have, a layer of another shape, or a scale that is not a number.
    """
    if not is_scale(scale):
        raise CheckpointError(f"scale must be a number (1 is the change as it was trained), not {describe(scale)}.")
    if isinstance(module, Flux) and module.placement is not None and module.placement.quantised:
        raise CheckpointError("a LoRA cannot be merged into quantised weights; merge it before they are quantised.")
    parameters = dict(module.named_parameters())
    changes_of: dict[str, list[_Change]] = {}
    for change in _changes(module, lora):
        _check_fits(change, parameters)
        changes_of.setdefault(change.piece.name, []).append(change)
    merged = Merged(module)
    for name, changes in changes_of.items():
        old = parameters[name].data
        new = old.to(torch.promote_types(old.dtype, torch.float32), copy=True)
        for change in changes:
            rows = new[change.piece.start : change.piece.stop]
            if change.factors is None:
                rows.copy_(change.value[change.rows])
            elif name.endswith(".bias"):
                rows.add_(change.factors.bias.to(new)[change.rows], alpha=scale)
            else:
                rows.add_(change.factors.delta(new)[change.rows], alpha=scale)
        merged.before[name], merged.after[name] = old, new.to(old.dtype)
    for name, tensor in merged.after.items():
        parameters[name].data = tensor
    return merged


def _changes(module: nn.Module, lora: Mapping[str, Tensor]) -> list[_Change]:
    """All changes that the LoRA makes to ``module``."""
    targets, layers, label = _targets(module), _layers(lora), label_of(lora)
    changes, unknown = [], []

    def add(name: str, stored_name: str, factors: _Factors | None = None, value: Tensor | None = None) -> None:
        pieces = targets.get(name) or targets.get(name.replace(".", "_"), ())
        if not pieces:
            unknown.append(stored_name)
        stored_rows = sum(piece.stop - piece.start for piece in pieces)
        row = 0
        for piece in pieces:
            height = piece.stop - piece.start
            changes.append(_Change(stored_name, piece, slice(row, row + height), stored_rows, factors, value))
            row += height

    for layer, factors in layers.items():
        factors.check(label)
        add(f"{layer}.weight", factors.stored_name, factors)
        if factors.bias is not None:
            add(f"{layer}.bias", f"{factors.stored_name}.bias", factors)
    for name in lora:
        if not _FACTOR.fullmatch(name) and not name.endswith(".alpha"):
            add(_without_prefix(name), name, value=lora[name])
    if unknown:
        raise CheckpointError(f"{label} changes {first_of(unknown)}, which this model does not have.")
    if not changes or not layers:  # without factors it is a whole network
        raise CheckpointError(f"{label} holds no LoRA.")
    return changes


def _layers(lora: Mapping[str, Tensor]) -> dict[str, _Factors]:
    """Layer -> its factors, whichever format the names follow."""
    layers: dict[str, _Factors] = {}
    for name in lora:
        match = _FACTOR.fullmatch(name)
        if match is None and not name.endswith(".alpha"):
            continue
        stored_name = match["layer"] if match else name.removesuffix(".alpha")
        factors = layers.setdefault(_without_prefix(stored_name), _Factors(stored_name))
        if match is None:
            if lora[name].numel() != 1:
                raise CheckpointError(f"{label_of(lora)} has {name!r} in shape {list(lora[name].shape)}, not a number.")
            factors.alpha = float(lora[name])
        elif match["factor"] in ("lora_A", "lora_down"):
            if match["leaf"] == "bias":
                raise CheckpointError(f"{label_of(lora)} has {name!r}, but the first factor of a LoRA has no bias.")
            factors.A = lora[name]
        elif match["leaf"] == "weight":
            factors.B = lora[name]
        else:
            factors.bias = lora[name]
    return layers


def _without_prefix(name: str) -> str:
    """A name without what PEFT, diffusers or kohya put before it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _targets(module: nn.Module) -> dict[str, list[Piece]]:
    """Every name that a tensor may have (official, diffusers', kohya's) -> the rows of parameters that it changes."""
    targets: dict[str, list[Piece]] = {}
    config = getattr(module, "config", None)
    if type(config) in RULES:
        targets = recipes(config, "bfl", "diffusers")
    for name, parameter in module.named_parameters():
        targets[name] = [Piece(name, 0, parameter.shape[0])]
    return targets | {name.replace(".", "_"): pieces for name, pieces in targets.items()}


def _check_fits(change: _Change, parameters: dict[str, nn.Parameter]) -> None:
    """Raises CheckpointError unless a change has the shape of its parameter."""
    name, factors = change.piece.name, change.factors
    expected = [change.stored_rows, *parameters[name].shape[1:]]
    if factors is None:
        shape = list(change.value.shape)
    elif len(expected) == 1:
        shape = list(factors.bias.shape)
    else:
        shape = [factors.B.shape[0], factors.A.shape[1]]
    if shape != expected:
        hint = "; widen_input adds input channels" if name == "img_in.weight" else ""
        raise CheckpointError(
            f"the change of {change.stored_name!r} is {shape}, but {name!r} here takes {expected}{hint}."
        )


def widen_input(tensors: Mapping[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """A flow transformer's tensors with ``img_in`` widened to ``in_channels`` inputs; the new columns are zero.

    The LoRA files of canny and depth are for 128 input channels, FLUX.1 dev has 64. With zeros in the new half the
    network computes the same as before, until the LoRA is merged.
    """
    weight = tensors["img_in.weight"] if "img_in.weight" in tensors else None
    if weight is None or weight.shape[1] > in_channels:
        count = "no" if weight is None else weight.shape[1]
        raise CheckpointError(f"{label_of(tensors)} has {count} input channels and cannot be widened to {in_channels}.")
    wide = weight.new_zeros(weight.shape[0], in_channels)
    wide[:, : weight.shape[1]] = weight
    return {**tensors, "img_in.weight": wide}


def lora_in_channels(lora: Mapping[str, Tensor]) -> int | None:
    """The number of input channels that the LoRA is for; None if it does not change the first layer."""
    for layer, factors in _layers(lora).items():
        if layer.replace(".", "_") in ("img_in", "x_embedder") and factors.A is not None:
            return factors.A.shape[-1]
    return None


def extract(after: Mapping[str, Tensor], before: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The LoRA that turns the transformer ``before`` into ``after``, under the official names.

    The change of each matrix is approximated by its ``rank`` largest singular values, the best approximation of that
    rank (Eckart and Young, 1936); biases and norm scales are stored exactly. If ``after`` has more input channels, they
    count as zero in ``before``: see :func:`widen_input`.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"rank must be a whole number of at least 1, not {describe(rank)}.")
    if set(after) != set(before) or "img_in.weight" not in after:
        differing = sorted(set(after) ^ set(before)) or ["img_in.weight"]
        raise CheckpointError(
            f"a LoRA needs two transformers of one kind; only one of these has {first_of(differing)}."
        )
    before = widen_input(before, after["img_in.weight"].shape[1])
    for name, value in after.items():
        if value.shape != before[name].shape:
            both = f"{list(before[name].shape)} and {list(value.shape)}"
            raise CheckpointError(f"{name!r} has different shapes in the two transformers: {both}.")
    lora: dict[str, Tensor] = {}
    for name, value in after.items():
        layer, _, leaf = name.rpartition(".")
        change = value.float() - before[name].float()
        if leaf == "scale":
            lora[name] = value
        elif leaf == "bias":
            lora[f"{layer}.lora_B.bias"] = change
        else:
            U, S, Vh = torch.linalg.svd(change, full_matrices=False)
            root = S[:rank].sqrt()
            lora[f"{layer}.lora_A.weight"] = root[:, None] * Vh[:rank]
            lora[f"{layer}.lora_B.weight"] = U[:, :rank] * root
    return lora
