"""What a file contains, by the names of its tensors: which networks, under which prefixes, and which scales.

People share FLUX in many forms: the networks in one file or in several, with a prefix before every name, encoders
with parts that FLUX does not use, weights in 8 bits with a scale. Nothing here depends on the name of a file. A tensor
without a place in its network stays in the list, and the strict check of names refuses it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fluxedu.checkpoints.configs import MARKS, Shape, kind_name, label_of
from fluxedu.errors import CheckpointError, check_choice, first_of
from fluxedu.models import (
    AutoEncoderConfig,
    CLIPTextConfig,
    Flux2AutoEncoderConfig,
    Flux2Config,
    FluxConfig,
    T5Config,
)

#: a pipeline's networks, under the names of their folders on the hub, each in FLUX.1 and, where it is ours, in FLUX.2
PARTS = {
    "transformer": (FluxConfig, Flux2Config),
    "vae": (AutoEncoderConfig, Flux2AutoEncoderConfig),
    "text_encoder": (CLIPTextConfig,),
    "text_encoder_2": (T5Config,),
}
#: modules that torch.compile, DistributedDataParallel, FSDP and activation checkpointing put around others
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
#: of CLIP its image half and projections, of T5 its output layer; indices 0, 1, 2, …; a tokenizer. FLUX uses none
_UNUSED = {"logit_scale", "logit_bias", "text_projection", "visual_projection", "vision_model", "position_ids"}
_UNUSED |= {"lm_head", "spiece_model"}
#: marks of a scaled fp8 file, and the scales of activations: we compute with dequantised weights
_UNUSED |= {"scaled_fp8", "comfy_quant", "input_scale", "scale_input", "output_scale", "scale_output"}
#: whole numbers that are no weights: how many batches the statistics of a batch norm come from
_COUNTERS = ("num_batches_tracked",)
#: a scaled weight's value is ``weight * scale``: X.weight with X.scale_weight, or with X.weight_scale
_SCALES = (".scale_weight", ".weight_scale")
#: the scale of the official layout's norms, as some programs call it
_NORM_WEIGHT = re.compile(r"(query|key)_norm\.weight$")
_QUANTISED = "holds weights quantised with {}, which cannot be read; use the bfloat16 or fp8 weights, with quantise="
#: what can be recognised and not read
_REFUSED = {
    r"\.quant_state\.bitsandbytes__(nf4|fp4)$|\.(nested_)?(absmax|quant_map)$": _QUANTISED.format(
        "bitsandbytes nf4/fp4"
    ),
    r"\.SCB$": _QUANTISED.format("bitsandbytes int8"),
    r"\.weight_scale_2$": _QUANTISED.format("NVFP4"),
    r"\.weight\._(data|scale)$": _QUANTISED.format("optimum-quanto"),
    r"\.(qweight|wscales)$": _QUANTISED.format("SVDQuant, GPTQ or AWQ"),
    r"(^|\.)distilled_guidance_layer\.": "is Chroma, which has no modulation layers and is not a FLUX.1 network",
    r"(^|\.)controlnet_": "is a ControlNet, not the whole network that it is attached to",
}


class StoredNetwork(NamedTuple):
    """One network of a file: its names -> the stored names; and those of its scaled weights -> their scales'."""

    names: dict[str, str]
    scales: dict[str, str]


def stored_networks(names: Iterable[str], label: str) -> dict[str, StoredNetwork]:
    """The networks that the tensors with these names belong to, by part; none if they are of no network or a LoRA's.

    A prefix is what stands before the names by which a network is recognised. CLIP gets its ``text_model.`` back where
    a newer transformers omitted it, T5's token embedding is called ``shared.weight``, and the official layout's norms
    have a ``scale``.
    Raises CheckpointError for a format that cannot be read, by its name, and for a network that occurs twice.
    """
    names = list(names)
    if any("lora" in name for name in names):
        return {}
    for pattern, reason in _REFUSED.items():
        if found := [name for name in names if re.search(pattern, name)]:
            raise CheckpointError(f"{label} {reason} (it has {first_of(found)}).")
    unwrapped = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    prefixes = {part: prefix for part in PARTS if (prefix := _prefix(part, unwrapped.values(), label)) is not None}
    networks: dict[str, dict[str, str]] = {part: {} for part in prefixes}
    for stored, name in unwrapped.items():
        if _UNUSED & set(name.split(".")):
            continue
        owners = [part for part, prefix in prefixes.items() if name.startswith(prefix)]
        if owners:
            owners = [max(owners, key=lambda part: len(prefixes[part]))]
            name = _NORM_WEIGHT.sub(r"\1_norm.scale", name.removeprefix(prefixes[owners[0]]))
        if owners == ["text_encoder_2"] and name.startswith("decoder."):  # T5's other half
            continue
        for owner in owners or networks:  # a name that belongs to no network is refused, whichever is opened
            if name in networks[owner]:
                raise CheckpointError(f"{label} holds {name!r} twice, as {networks[owner][name]!r} and {stored!r}.")
            networks[owner][name] = stored
    return {part: _with_usual_names(names) for part, names in networks.items()}


def _with_usual_names(names: dict[str, str]) -> StoredNetwork:
    """Add CLIP's ``text_model.``, separate the scales from the weights, and keep one name of T5's embedding."""
    if "embeddings.token_embedding.weight" in names:
        names = {f"text_model.{name}": stored for name, stored in names.items()}
    scales = {}
    for name in [name for name in names if name.endswith(_SCALES)]:
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight in names and weight not in scales:
            scales[weight] = names.pop(name)
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in names and "encoder.embed_tokens.weight" in names:
        duplicate, scale = names.pop("encoder.embed_tokens.weight"), scales.pop("encoder.embed_tokens.weight", None)
        if names.setdefault("shared.weight", duplicate) == duplicate and scale:
            scales["shared.weight"] = scale
    return StoredNetwork(names, scales)


def _prefix(part: str, names: Iterable[str], label: str) -> str | None:
    """What stands before the names of this part; None if it is not there."""
    marks = [mark for (kind, _), marks in MARKS.items() if kind in PARTS[part] for mark in marks]
    marks += ["embeddings.token_embedding.weight"] if part == "text_encoder" else []
    counts = Counter(
        name.removesuffix(mark).removesuffix("text_model.")
        for mark in marks
        for name in names
        if name == mark or name.endswith(f".{mark}")
    )
    (best, count), *others = counts.most_common(2) or [(None, 0)]
    if others and others[0][1] == count:
        raise CheckpointError(
            f"{label} holds {kind_name(PARTS[part][0])} twice, under {best!r} and {others[0][0]!r}; save one of them."
        )
    return best


def the_network(names: Iterable[str], label: str, part: str | None = None) -> StoredNetwork | None:
    """The network ``part``, or the only one; None if the names belong to no network."""
    networks = stored_networks(names, label)
    if part is None:
        if len(networks) > 1:
            raise CheckpointError(f"{label} holds several networks; choose one with part= ({', '.join(networks)}).")
        return next(iter(networks.values()), None)
    check_choice("part", part, PARTS, error=CheckpointError)
    if networks and part not in networks:
        found = " and ".join(kind_name(PARTS[other][0]) for other in networks)
        raise CheckpointError(f"{label} is {found}, but {kind_name(PARTS[part][0])} is needed.")
    return networks.get(part)


# ---------------------------------------------------------------- dtypes and scales


def own_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The dtype of most bytes, from (dtype, bytes); bfloat16 if that has 8 bits, too few to compute with."""
    total = Counter()
    for dtype, nbytes in sizes:
        total[dtype] += nbytes
    dtype = total.most_common(1)[0][0] if total else torch.bfloat16
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16


def check_stored(
    network: StoredNetwork, dtypes: Mapping[str, torch.dtype], shapes: Mapping[str, Shape], label: str
) -> dict[str, torch.dtype]:
    """Name -> dtype. Scaled weights get the dtype that most weights with 16 bits or more have, bfloat16 without any.

    Raises CheckpointError for weights that are no floating-point numbers, and for a scale that is neither one number
    nor one for each row.
    """
    for stored in network.names.values():
        if not dtypes[stored].is_floating_point and not stored.endswith(_COUNTERS):
            raise CheckpointError(
                f"{label} has {stored!r} in {dtypes[stored]}; weights must be floating-point numbers."
            )
    for name, stored in network.scales.items():
        shape, rows = shapes[stored], shapes[network.names[name]][:1]
        if not dtypes[stored].is_floating_point or not (
            math.prod(shape) == 1 or shape[:1] == rows == (math.prod(shape),)
        ):
            raise CheckpointError(
                f"{label} has the scale {stored!r} in {dtypes[stored]} and shape {list(shape)}, but it must be one "
                "floating-point number, or one for each row."
            )
    plain = [stored for name, stored in network.names.items() if name not in network.scales]
    wide = own_dtype((dtypes[s], math.prod(shapes[s]) * dtypes[s].itemsize) for s in plain if dtypes[s].itemsize > 1)
    return {name: wide if name in network.scales else dtypes[stored] for name, stored in network.names.items()}


def dequantised(rows: Tensor, scale: Tensor, start: int = 0) -> Tensor:
    """``rows * scale`` in float32, where ``rows`` begin with row ``start`` of the weight.

    ``scale`` is one number, or one for each row of the whole weight.
    """
    scale = scale.float().reshape(-1)
    if len(scale) > 1:
        scale = scale[start : start + len(rows)].reshape(-1, *[1] * (rows.ndim - 1))
    return rows.float() * scale


def without_prefixes(tensors: Mapping[str, Tensor], part: str | None = None) -> Mapping[str, Tensor]:
    """The tensors of one network under its names, dequantised; those that come from a file are so already."""
    if hasattr(tensors, "shapes"):
        return tensors
    label = label_of(tensors)
    network = the_network(tensors, label, part)
    if network is None:
        return tensors
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = check_stored(network, dtypes, shapes, label)
    plain = {name: tensors[stored] for name, stored in network.names.items()}
    for name, stored in network.scales.items():
        plain[name] = dequantised(plain[name], tensors[stored]).to(dtypes[name])
    return plain
