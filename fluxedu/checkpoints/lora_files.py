"""What LoRA files contain: the names that trainers give to layers, the scale of each layer, and other kinds by name.

=================  =================================================================================================
PEFT, diffusers    ``transformer.transformer_blocks.0.attn.to_q.lora_A.weight``, also with an adapter's name before
                   ``weight``; alpha, patterns and rsLoRA in adapter_config.json or in the file's metadata
diffusers, older   ``…to_q.lora.down.weight``, ``…q_proj.lora_linear_layer.down.weight``, ``…processor.to_q_lora.down…``
kohya, OneTrainer  ``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`` with ``.alpha``; ``lora_te1_`` is CLIP,
                   ``lora_te3_`` T5; ``lora_transformer_`` stands before diffusers' names
XLabs              ``double_blocks.0.processor.qkv_lora1.down.weight`` (1: image, 2: text)
BFL                ``double_blocks.0.img_attn.qkv.lora_A.weight``; lora_B has a bias, norm scales replace the model's
differences        ``.diff``, ``.diff_b``, ``.w_norm``, ``.b_norm``: added to a weight or bias
=================  =================================================================================================

A layer's product B A is multiplied by alpha / rank (Hu et al., 2021), or by alpha / sqrt(rank) with rsLoRA
(Kalajdzievski, 2023, arXiv:2312.03732), and by 1 where a file states no alpha.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fluxedu.checkpoints.configs import label_of
from fluxedu.checkpoints.headers import read_entries
from fluxedu.checkpoints.reading import TensorFile
from fluxedu.errors import CheckpointError, check_keys, check_number, checked, describe, first_of
from fluxedu.files import read_json, read_json_file

_FACTOR = re.compile(
    r"(?P<layer>.+?)\.(lora_(?P<AB>A|B|down|up)|(lora\.|lora_linear_layer\.)?(?P<older>down|up))"
    r"(\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)"
)
_DIFFERENCE = re.compile(r"(?P<layer>.+)\.(?P<leaf>diff|diff_b|w_norm|b_norm)")
_PREFIXES = re.compile(
    r"(base_model\.model\.|(model\.)?diffusion_model\.|transformer\.|unet\.|text_encoders?(_2)?\.|clip_l\.|t5xxl\."
    r"|_orig_mod\.|module\.|lora_unet_|lora_transformer_|lora_te[123]?_|lycoris_)+"
)
#: names of layers that differ from both layouts -> their names in one of them
_RENAMED = {
    r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1": r"\1.img_attn.\2",
    r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2": r"\1.txt_attn.\2",
    r"single_blocks\.(\d+)\.processor\.qkv_lora": r"single_transformer_blocks.\1.attn.to_qkv",
    r"(single_blocks\.\d+)\.processor\.proj_lora": r"\1.linear2",
    r"(.+\.self_attn)\.to_(q|k|v|out)_lora": r"\1.\2_proj",
    r"(.+)\.processor\.to_out_lora": r"\1.to_out.0",
    r"(.+)\.processor\.(\w+)_lora": r"\1.\2",
}
#: other kinds of change, by the names of their tensors
_OTHER_KINDS = {
    "a LoKr": r"lokr_\w+",
    "a LoHa": r"hada_\w+",
    "a BOFT": r"boft_\w+",
    "an OFT": r"oft_\w+",
    "a DoRA": r"dora_scale|lora_magnitude_vector",
    "an IA3": r"ia3_\w+",
    "a VeRA": r"vera_\w+",
    "a GLoRA": r"glora_\w+|[ab][12]",
    "an AdaLoRA": r"lora_E|ranknum",
    "a LoRA of convolutions": r"lora_mid",
    "a LoRA of embeddings": r"lora_embedding_[AB]",
    "a textual inversion": r"emb_params|bundle_emb|string_to_param",
    "an IP-Adapter": r"ip_adapter\w*",
}
#: options of PEFT with which the result is not W + scale B A
_OTHER_OPTIONS = {"use_dora": "a DoRA", "use_qalora": "a QALoRA", "use_bdlora": "a BD-LoRA", "kasa_config": "a KaSA"}
_OTHER_OPTIONS |= {"alora_invocation_tokens": "an activated LoRA", "layer_replication": "a LoRA of replicated layers"}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights
#: CLIP's projection, which FLUX does not use
_UNUSED = re.compile(r"(text_model\.|text_model_)?text_projection")


@dataclass
class LayerChange:
    """What a file holds for one layer: factors, or one tensor that is added to or replaces a parameter."""

    stored_name: str  # the layer's name in the file
    layer: str  # the same without prefixes, still with underscores where the file has them
    A: Tensor | None = None  # [rank, in]
    B: Tensor | None = None  # [out, rank]
    bias: Tensor | None = None  # [out], of B
    alpha: float | None = None
    value: Tensor | None = None
    leaf: str = "weight"  # the parameter that ``value`` is for
    replaces: bool = False  # or is added

    def check(self, label: str) -> None:
        """Raises CheckpointError unless A and B are there and can be multiplied."""
        for name, factor in (("lora_A", self.A), ("lora_B", self.B)):
            if factor is None:
                raise CheckpointError(f"{label} lacks the {name} of {self.stored_name!r}.")
            if factor.ndim != 2 or not factor.numel():
                raise CheckpointError(f"the {name} of {self.stored_name!r} must be a matrix, not {list(factor.shape)}.")
        if self.A.shape[0] != self.B.shape[1]:
            shapes = f"A is {list(self.A.shape)}, B is {list(self.B.shape)}"
            raise CheckpointError(f"the factors of {self.stored_name!r} do not fit each other: {shapes}.")

    def check_numbers(self, label: str) -> None:
        """Raises CheckpointError unless the tensors are finite floating-point numbers."""
        for name, tensor in (("lora_A", self.A), ("lora_B", self.B), ("bias", self.bias), ("tensor", self.value)):
            if tensor is not None and not (tensor.is_floating_point() and tensor.float().isfinite().all()):
                fault = (
                    "NaN or infinity" if tensor.is_floating_point() else f"{tensor.dtype}, not floating-point numbers"
                )
                raise CheckpointError(f"{label} has {fault} in the {name} of {self.stored_name!r}.")

    def strength(self, config: Mapping) -> float:
        """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) if ``config`` says rsLoRA; 1 without alpha."""
        alpha, rank = self.alpha, self.A.shape[0]
        if alpha is not None:
            return alpha / rank
        patterns = config.get("alpha_pattern") or {}
        found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", self.layer))
        alpha = next(found, config.get("lora_alpha"))
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_lora(path: str | Path) -> TensorFile:
    """Open a LoRA's file, or a folder with one, without loading it; names are those of the file."""
    return TensorFile(Path(path), *read_entries(Path(path)))


def layer_changes(lora: Mapping[str, Tensor]) -> list[LayerChange]:
    """Everything that a file changes, whichever names it uses; raises CheckpointError for kinds that are not LoRA."""
    label = label_of(lora)
    _check_kind(lora, label)
    layers: dict[str, LayerChange] = {}
    others: list[LayerChange] = []
    adapters: dict[str | None, str] = {}
    for name in lora:
        match, tensor = _FACTOR.fullmatch(name), lora[name]
        stored_name = match["layer"] if match else name.removesuffix(".alpha")
        if match is None and not name.endswith(".alpha"):
            others.append(_whole_tensor(name, tensor))
            continue
        change = layers.setdefault(stored_name, LayerChange(stored_name, plain_name(stored_name)))
        if match is None:
            if tensor.numel() != 1 or not math.isfinite(float(tensor)):
                what = f"in shape {list(tensor.shape)}" if tensor.numel() != 1 else f"of {float(tensor)}"
                raise CheckpointError(f"{label} has {name!r} {what}, not a number.")
            change.alpha = float(tensor)
            continue
        factor = match["AB"] or match["older"]
        adapters[match["adapter"]] = name
        if match["leaf"] == "bias" and factor in ("A", "down"):
            raise CheckpointError(f"{label} has {name!r}, but the first factor of a LoRA has no bias.")
        field = "bias" if match["leaf"] == "bias" else "A" if factor in ("A", "down") else "B"
        if getattr(change, field) is not None and len(adapters) == 1:
            raise CheckpointError(f"{label} has the {factor} of {stored_name!r} twice.")
        setattr(change, field, tensor)
    if len(adapters) > 1:
        raise CheckpointError(f"{label} holds several adapters, in {' and '.join(map(repr, adapters.values()))}.")
    for change in layers.values():
        change.check(label)
    changes = [*others, *layers.values()]  # what replaces a parameter comes before what is added to it
    if unused := [change.stored_name for change in changes if _UNUSED.match(change.layer)]:
        warnings.warn(f"{label} also changes {first_of(unused)}, which FLUX does not use.", stacklevel=1)
    return [change for change in changes if not _UNUSED.match(change.layer)]


@checked(CheckpointError)
def lora_in_channels(lora: Mapping[str, Tensor]) -> int | None:
    """The number of input channels that the LoRA is for; None if it does not change the first layer."""
    for change in layer_changes(lora):
        if change.layer in ("img_in", "x_embedder") and change.A is not None:
            return change.A.shape[-1]
    return None


def _whole_tensor(name: str, tensor: Tensor) -> LayerChange:
    if match := _DIFFERENCE.fullmatch(name):
        leaf = "bias" if match["leaf"] in ("diff_b", "b_norm") else "weight"
        return LayerChange(name, plain_name(match["layer"]), value=tensor, leaf=leaf)
    layer, _, leaf = plain_name(name).rpartition(".")
    layer = re.sub(r"\.base_layer$|\.modules_to_save(\.\w+)?$", "", layer)
    return LayerChange(name, layer, value=tensor, leaf=leaf, replaces=True)


def plain_name(name: str) -> str:
    """A layer's name without what trainers put before it, and in a layout that fluxedu knows."""
    name = name[match.end() :] if (match := _PREFIXES.match(name)) else name
    for pattern, replacement in _RENAMED.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def _check_kind(lora: Mapping[str, Tensor], label: str) -> None:
    """Raises CheckpointError, with its name, for a kind of change that is not W + scale B A."""
    for kind, pattern in _OTHER_KINDS.items():
        pattern = re.compile(rf"(.+\.)?({pattern})(\..+)?")
        if names := [name for name in lora if pattern.fullmatch(name)]:
            raise CheckpointError(
                f"{label} is {kind} (it has {first_of(names)}), which cannot be merged; fluxedu merges LoRA."
            )


def adapter_config(lora: Mapping[str, Tensor]) -> dict:
    """PEFT's configuration of a LoRA: from its metadata, or from the adapter_config.json beside it; else empty.

    kohya's metadata has an alpha too; it counts for files with kohya's names.
    """
    metadata, path = getattr(lora, "metadata", {}), getattr(lora, "path", None)
    folder = path if path is None or path.is_dir() else path.parent
    beside = folder / "adapter_config.json" if folder else None
    if "lora_adapter_metadata" in metadata:
        text, source = metadata["lora_adapter_metadata"], "lora_adapter_metadata"
    elif beside and beside.is_file() and (path.is_dir() or _is_of_the_folder(path)):
        return read_json_file(beside)
    else:
        if path and any(name.startswith("base_model.model.") for name in lora) and not any(".alpha" in n for n in lora):
            warnings.warn(
                f"{label_of(lora)} has no adapter_config.json beside it, so alpha is taken to be each layer's rank.",
                stacklevel=1,
            )
        is_kohyas = any(".lora_down" in name for name in lora)
        alpha = metadata.get("ss_network_alpha" if is_kohyas else "lora_alpha", "None")
        text, source = "{}" if alpha == "None" else f'{{"lora_alpha": {alpha}}}', "the alpha in the metadata"
    try:
        return read_json(text)
    except ValueError:
        raise CheckpointError(f"{label_of(lora)}: {source} cannot be read.") from None


def _is_of_the_folder(path: Path) -> bool:
    """Whether a folder's adapter_config.json is for this file: it has PEFT's name, or there is no other."""
    return path.name.startswith("adapter_model") or len(list(path.parent.glob("*.safetensors"))) == 1


def config_for(config: Mapping, network: str | None, label: str) -> dict:
    """The part of a configuration that is for one network (transformer, text_encoder, …), checked.

    diffusers puts the network before each key, ``transformer.lora_alpha``; PEFT's file is for one network.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"the configuration of {label} must be a mapping, not {describe(config)}.")
    scoped = [key for key in config if re.match(r"(transformer|unet|text_encoder(_2)?)\.", str(key))]
    if scoped:
        config = {k.removeprefix(f"{network}."): config[k] for k in scoped if k.startswith(f"{network}.")}
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        raise CheckpointError(f"{label} is of the kind {describe(kind)}, which cannot be merged; fluxedu merges LoRA.")
    for option, kind in _OTHER_OPTIONS.items():
        if config.get(option):
            raise CheckpointError(f"{label} is {kind} ({option} is set), which cannot be merged; fluxedu merges LoRA.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{label} was initialised with {start}, which changes the model's own weights; convert it to a LoRA "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    config = {key: value for key, value in config.items() if value is not None}
    patterns = check_keys("alpha_pattern", config.get("alpha_pattern", {}), error=CheckpointError)
    for alpha in (config.get("lora_alpha", 1.0), *patterns.values()):
        check_number("every alpha of a LoRA", alpha, -1e6, 1e6, error=CheckpointError)
    return config
