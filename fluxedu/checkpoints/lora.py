"""LoRA: the change of a large matrix as the product of two thin ones (Hu et al., 2021, arXiv:2106.09685).

    y = W x + b  +  scale * alpha / rank * (B (A x) + b_B)

Merging computes ``W + scale * alpha / rank * B A``, one matrix again, which costs nothing while sampling::

    merged = merge(flux, read("flux1-canny-dev-lora.safetensors"), scale=0.85)
    ...
    merged.unmerge()     # the previous weights, exact to the bit

``fe.load(lora=...)`` merges on the CPU, while the weights are on their way from the file to their device, so it works
with every ``memory=`` and ``quantise=``. :mod:`fluxedu.checkpoints.lora_files` lists the formats.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxedu.checkpoints.configs import Shape, label_of
from fluxedu.checkpoints.layouts import RULES, Piece, dtypes_of, recipes
from fluxedu.checkpoints.lora_files import LayerChange, adapter_config, config_for, layer_changes
from fluxedu.errors import CheckpointError, check_integer, checked, describe, first_of
from fluxedu.models import CLIPTextEncoder, Flux, Flux2, T5Encoder

#: what diffusers calls each network
_DIFFUSERS_NAMES = {
    Flux: "transformer",
    Flux2: "transformer",
    CLIPTextEncoder: "text_encoder",
    T5Encoder: "text_encoder_2",
}


@dataclass
class _Change:
    """The change of some rows of one parameter."""

    stored: LayerChange
    is_bias: bool  # of the two that a layer's change may have
    piece: Piece  # the rows of the parameter
    rows: slice  # the corresponding rows of what is stored,
    stored_rows: int  # which should have this many rows in total
    strength: float  # what is added is multiplied by it

    @property
    def stored_name(self) -> str:
        is_bias_of_B = self.is_bias and self.stored.value is None
        return f"{self.stored.stored_name}.bias" if is_bias_of_B else self.stored.stored_name

    @property
    def shape(self) -> list[int]:
        """The shape of the whole tensor that is stored."""
        stored = self.stored
        if stored.value is not None:
            return list(stored.value.shape)
        return list(stored.bias.shape) if self.is_bias else [stored.B.shape[0], stored.A.shape[1]]

    def apply(self, parameter: Tensor) -> None:
        """Change ``parameter`` in place."""
        stored, rows = self.stored, parameter[self.piece.start : self.piece.stop]
        if stored.replaces:
            rows.copy_(stored.value[self.rows])
        elif stored.value is not None or self.is_bias:
            value = stored.bias if stored.value is None else stored.value
            rows.add_(value[self.rows].to(rows), alpha=self.strength)
        else:
            rows.add_(stored.B[self.rows].to(rows) @ stored.A.to(rows), alpha=self.strength)


@dataclass
class Merged:
    """The result of a merge. :func:`merge` holds the previous weights, as much memory as the changed layers take;
    after ``fe.load(lora=...)`` they are read from the checkpoint again when they are needed.
    """

    networks: Sequence[nn.Module]
    before: Mapping[str, Tensor]
    after: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Memory held for :meth:`unmerge`."""
        return sum(tensor.nbytes for tensor in self.before.values()) if isinstance(self.before, dict) else 0

    def unmerge(self) -> None:
        """Restore the previous weights; after :func:`merge`, the very same tensors. Undo several in reverse order."""
        if any(_is_quantised(network) for network in self.networks):
            raise CheckpointError("a LoRA cannot be taken out of quantised weights; load again without lora=.")
        parameters = _parameters(self.networks)
        for name, tensor in self.after.items():
            if parameters[name].data_ptr() != tensor.data_ptr():
                raise CheckpointError(f"{name!r} was replaced after this LoRA was merged; undo the later change first.")
        for name in self.after:
            parameters[name].data = self.before[name].to(parameters[name])
        self.before, self.after = {}, {}


def is_scale(scale: object) -> bool:
    """Whether a change can be multiplied by it."""
    return isinstance(scale, (int, float)) and not isinstance(scale, bool) and abs(scale) < 1e6


@checked(CheckpointError)
@torch.no_grad()
def merge(
    networks: nn.Module | Sequence[nn.Module],
    lora: Mapping[str, Tensor],
    scale: float = 1.0,
    config: Mapping | None = None,
) -> Merged:
    """Add a LoRA to the weights of a network, computed in float32 at least and rounded once to each weight's dtype.

    ``networks``: the flow transformer, or ``[flux, clip, t5]`` for a LoRA that also changes text encoders. ``scale``
    multiplies the change (the official canny and depth files are meant for 0.85); norm scales and whole tensors in the
    file replace the model's, whatever the scale. ``config`` is PEFT's adapter_config, which has alpha; by default that
    of the file. Raises CheckpointError, before anything is changed, for a layer that the networks do not have, a layer
    of another shape, another kind of change than LoRA, or a scale that is not a number.
    """
    networks = [networks] if isinstance(networks, nn.Module) else list(networks)
    if any(_is_quantised(network) for network in networks):
        raise CheckpointError("a LoRA cannot be merged into quantised weights; merge it before they are quantised.")
    parameters = _parameters(networks)
    before, after = {}, {}
    for name, changes in _changes(networks, [(lora, scale, config)]).items():
        before[name] = parameters[name].data
        after[name] = _changed(before[name], changes).to(before[name].dtype)
    for name, tensor in after.items():
        parameters[name].data = tensor
    return Merged(networks, before, after)


class MergedTensors(Mapping):
    """A network's tensors with LoRAs merged: each is read from ``source`` and changed when it is looked up.

    Those that are changed come in ``dtype``, or in float32 if it has fewer digits. A tensor that ``source`` has in a
    smaller shape is filled up with zeros: these are the input channels that a LoRA such as canny's adds.
    """

    def __init__(
        self,
        source: Mapping[str, Tensor],
        shapes: dict[str, Shape],
        changes: dict[str, list[_Change]],
        dtype: torch.dtype = torch.float32,
    ):
        self.source, self.shapes, self.changes, self.label = source, shapes, changes, label_of(source)
        self.dtype = torch.promote_types(dtype, torch.float32)
        wide = {name: torch.promote_types(stored, self.dtype) for name, stored in dtypes_of(source).items()}
        self.dtypes = {name: (wide if name in changes else dtypes_of(source))[name] for name in shapes}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.source[name]
        if tuple(tensor.shape) != tuple(self.shapes[name]):
            wide = tensor.new_zeros(self.shapes[name])
            wide[tuple(slice(size) for size in tensor.shape)] = tensor
            tensor = wide
        return _changed(tensor.to(self.dtypes[name]), self.changes[name]) if name in self.changes else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def unchanged(self) -> Mapping[str, Tensor]:
        """The tensors that are changed here, as they are without the change."""
        return MergedTensors(self.source, {name: self.shapes[name] for name in self.changes}, {})


def merge_lazily(
    opened: Mapping[str, tuple[nn.Module, Mapping[str, Tensor]]],
    loras: Sequence[tuple[Mapping[str, Tensor], float]],
    dtype: torch.dtype,
) -> dict[str, tuple[nn.Module, Mapping[str, Tensor]]]:
    """Networks without weights and their tensors (see ``open_model``), with LoRAs and their scales merged into these.

    All LoRAs are added up before the sum is rounded to ``dtype``; of several that replace a tensor, the last one does.
    """
    networks = [network for network, _ in opened.values()]
    changes = _changes(networks, [(lora, scale, None) for lora, scale in loras])
    merged = {}
    for name, (network, tensors) in opened.items():
        shapes = {parameter: tuple(tensor.shape) for parameter, tensor in network.state_dict().items()}
        own = {parameter: found for parameter, found in changes.items() if parameter in shapes}
        merged[name] = (network, MergedTensors(tensors, shapes, own, dtype))
    return merged


def merged_while_loading(opened: Mapping[str, tuple[nn.Module, MergedTensors]]) -> Merged:
    """What can be unmerged of networks that were loaded from the tensors of :func:`merge_lazily`."""
    networks = [network for network, _ in opened.values()]
    before = ChainMap(*(tensors.unchanged() for _, tensors in opened.values()))
    if any(_is_quantised(network) for network in networks):
        return Merged(networks, before, {})
    parameters = _parameters(networks)
    return Merged(networks, before, {name: parameters[name].data for name in before})


# ---------------------------------------------------------------- what changes


def _parameters(networks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of several networks; no name of a flow, CLIP or T5 is one of another."""
    return {name: parameter for network in networks for name, parameter in network.named_parameters()}


def _is_quantised(network: nn.Module) -> bool:
    placement = network.placement if isinstance(network, Flux) else None
    return placement is not None and placement.quantised is not None


@torch.no_grad()
def _changed(tensor: Tensor, changes: Sequence[_Change]) -> Tensor:
    """A copy of a parameter with its changes, in float32 at least."""
    new = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    for change in changes:
        change.apply(new)
    return new


def _changes(
    networks: Sequence[nn.Module], loras: Sequence[tuple[Mapping[str, Tensor], float, Mapping | None]]
) -> dict[str, list[_Change]]:
    """Parameter -> its changes by all the LoRAs (tensors, scale, configuration)."""
    parameters, targets = _parameters(networks), [(_DIFFUSERS_NAMES.get(type(n)), _targets(n)) for n in networks]
    found: dict[str, list[_Change]] = {}
    for lora, scale, config in loras:
        if not is_scale(scale):
            raise CheckpointError(f"scale must be a number (1 is the change as it was trained), not {describe(scale)}.")
        of_file = _changes_of_file(lora, scale, adapter_config(lora) if config is None else config, targets)
        for change in of_file:
            _check_fits(change, parameters)
            found.setdefault(change.piece.name, []).append(change)
        _check_no_overlap(of_file, label_of(lora))
    return found


def _changes_of_file(
    lora: Mapping[str, Tensor], scale: float, config: Mapping, targets: Sequence[tuple[str | None, dict]]
) -> list[_Change]:
    label, changes, unknown = label_of(lora), [], []
    layers = layer_changes(lora)
    configs = {network: config_for(config, network, label) for network in (None, *(name for name, _ in targets))}
    for stored in layers:
        stored.check_numbers(label)
        is_whole = stored.value is not None
        leaves = [stored.leaf] if is_whole else ["weight", "bias"][: 1 if stored.bias is None else 2]
        for leaf in leaves:
            names = [f"{stored.layer}.{leaf}", f"{stored.layer}.scale"][: 2 if leaf == "weight" else 1]
            names += [name.replace(".", "_") for name in names]
            network, pieces = next(((n, t[name]) for n, t in targets for name in names if name in t), (None, []))
            if not pieces:
                unknown.append(f"{stored.stored_name}.bias" if leaf == "bias" and not is_whole else stored.stored_name)
            strength = scale * (1.0 if is_whole else stored.strength(configs[network]))
            stored_rows, row = sum(piece.stop - piece.start for piece in pieces), 0
            for piece in pieces:
                height = piece.stop - piece.start
                rows = slice(row, row + height)
                changes.append(_Change(stored, leaf == "bias", piece, rows, stored_rows, strength))
                row += height
    if unknown:
        is_of_encoder = any(name.startswith(("text_encoder", "lora_te", "clip_l.", "t5xxl.")) for name in unknown)
        hint = "; merge([flux, clip, t5], lora) also merges what is for the text encoders"
        hint = hint if is_of_encoder and len(targets) == 1 else ""
        raise CheckpointError(f"{label} changes {first_of(unknown)}, which this model does not have{hint}.")
    if all(stored.replaces for stored in layers):  # it is empty, or a whole network
        raise CheckpointError(f"{label} holds no LoRA.")
    return changes


def _targets(network: nn.Module) -> dict[str, list[Piece]]:
    """Every name that a tensor may have (official, diffusers', kohya's) -> the rows of parameters that it changes."""
    targets: dict[str, list[Piece]] = {}
    config = getattr(network, "config", None)
    if type(config) in RULES:
        targets = dict(recipes(config, "bfl", "diffusers"))
    for name, parameter in network.named_parameters():
        targets[name] = [Piece(name, 0, parameter.shape[0])]
        targets[name.removeprefix("text_model.")] = targets[name]  # as transformers 5 calls CLIP's
    for name in list(targets):  # diffusers' projections after fuse_qkv_projections
        for q, fused in (("to_q", "to_qkv"), ("add_q_proj", "to_added_qkv")):
            if f".attn.{q}." in name:
                start, k = targets[name][0], targets[name.replace(q, q.replace("q", "k", 1))][0]
                targets[name.replace(q, fused)] = [Piece(start.name, 0, start.stop + 2 * (k.stop - k.start))]
    return targets | {name.replace(".", "_"): pieces for name, pieces in targets.items()}


def _check_fits(change: _Change, parameters: dict[str, nn.Parameter]) -> None:
    """Raises CheckpointError unless a change has the shape of its parameter."""
    name = change.piece.name
    expected = [change.stored_rows, *parameters[name].shape[1:]]
    if change.shape != expected:
        hint = "; widen_input adds input channels" if name == "img_in.weight" else ""
        raise CheckpointError(
            f"the change of {change.stored_name!r} is {change.shape}, but {name!r} here takes {expected}{hint}."
        )


def _check_no_overlap(changes: Sequence[_Change], label: str) -> None:
    """Raises CheckpointError if a file has two products B A for the same rows, under two names."""
    products: dict[str, list[_Change]] = {}
    for change in changes:
        if change.stored.value is None and not change.is_bias:
            products.setdefault(change.piece.name, []).append(change)
    for same in products.values():
        same.sort(key=lambda change: change.piece.start)
        for first, second in zip(same, same[1:], strict=False):
            if second.piece.start < first.piece.stop:
                names = f"{first.stored_name!r} and {second.stored_name!r}"
                raise CheckpointError(f"{label} changes the same weights twice, as {names}; remove one of the two.")


# ---------------------------------------------------------------- input channels, and the way back


@checked(CheckpointError)
@torch.no_grad()
def widen_input(tensors: Mapping[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """A flow transformer's tensors with ``img_in`` widened to ``in_channels`` inputs; the new columns are zero.

    The LoRA files of canny and depth are for 128 input channels, FLUX.1 dev has 64. With zeros in the new half the
    network computes the same as before, until the LoRA is merged.
    """
    check_integer("in_channels", in_channels, 1, 1 << 16, error=CheckpointError)
    weight = tensors["img_in.weight"] if "img_in.weight" in tensors else None
    if weight is None or weight.ndim != 2 or weight.shape[1] > in_channels:
        count = "no" if weight is None or weight.ndim != 2 else weight.shape[1]
        raise CheckpointError(f"{label_of(tensors)} has {count} input channels and cannot be widened to {in_channels}.")
    wide = weight.new_zeros(weight.shape[0], in_channels)
    wide[:, : weight.shape[1]] = weight
    return {**tensors, "img_in.weight": wide}


@checked(CheckpointError)
@torch.no_grad()
def extract(after: Mapping[str, Tensor], before: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The LoRA that turns the transformer ``before`` into ``after``, under the official names.

    The change of each matrix is approximated by its ``rank`` largest singular values, the best approximation of that
    rank (Eckart and Young, 1936); biases and norm scales are stored exactly. If ``after`` has more input channels, they
    count as zero in ``before``: see :func:`widen_input`.
    """
    check_integer("rank", rank, 1, 1 << 24, error=CheckpointError)
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
