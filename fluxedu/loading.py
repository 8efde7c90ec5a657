"""Loading a pipeline: the shipped miniature by name, the official weights, or any folder in their layout.

load()             the miniature with a guidance input, as FLUX.1-dev; or the model that FLUXEDU_MODEL names
load("nano-base")  the miniature before distillation, for classifier-free guidance
load("nano-fill")  and nano-schnell, -canny, -depth, -kontext, -redux: the family in miniature
load("dev")        the official weights from the Hugging Face cache; also schnell, krea, fill, canny, depth, kontext
load("path/to/FLUX.1-dev")  a folder as on the hub: transformer, vae, two text encoders, two tokenizers
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from fluxedu.checkpoints import Merged, find, load_into, lora_in_channels, merge, read, widen_input
from fluxedu.checkpoints.lora import is_scale
from fluxedu.errors import RequestError, describe
from fluxedu.memory import open_networks
from fluxedu.memory.compiled import compile_blocks
from fluxedu.models import VARIANTS, Flux, FluxConfig, Sampling
from fluxedu.models.meta_init import meta_init
from fluxedu.models.redux import Redux, ReduxHead
from fluxedu.nano.networks import VisionEncoder
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import PromptEncoder, Tokenizer
from fluxedu.sampling.request import checked_device, checked_dtype

WEIGHTS = Path(__file__).parent / "nano" / "weights"
#: mu of the miniature, ln 3 at any size; like the guidance scales, chosen on prompts that are not in the exam
NANO_SHIFT = (1.0986, 1.0986)


class ShippedModel(NamedTuple):
    """A model in ``WEIGHTS``: folder of its transformer, sampling settings, folder of its Redux head or its LoRA."""

    transformer: str
    sampling: Sampling
    head: str | None = None
    lora: str | None = None

    def folder(self, weights: Path) -> Path:
        """The folder that only this model has."""
        return Path(weights) / (self.head or self.lora or self.transformer)


def _as_dev(guidance: float) -> Sampling:
    return Sampling(20, guidance, 32, shift=True, shift_ends=NANO_SHIFT)


SHIPPED = {
    "nano": ShippedModel("transformer", _as_dev(6.0)),
    "nano-base": ShippedModel("transformer_base", _as_dev(5.0)),
}
#: the rest of the family; ``fluxedu train --variant NAME`` makes them
FAMILY = {
    "nano-schnell": ShippedModel("transformer_schnell", Sampling(4, 0.0, 32, shift=False)),
    "nano-fill": ShippedModel("transformer_fill", _as_dev(1.0)),
    "nano-canny": ShippedModel("transformer", _as_dev(1.0), lora="lora_canny"),
    "nano-depth": ShippedModel("transformer", _as_dev(1.0), lora="lora_depth"),
    "nano-kontext": ShippedModel("transformer_kontext", _as_dev(1.0)),
    "nano-redux": ShippedModel("transformer", _as_dev(3.0), head="redux"),
}
SHIPPED_MODELS = SHIPPED | FAMILY
#: style LoRAs for ``nano`` by name, with their folders
LORAS = {"hollow": "lora_hollow"}
LORA_FILE = "pytorch_lora_weights.safetensors"


def load(
    name: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    transformer: str = "transformer",
    memory: str = "auto",
    quantise: str | None = None,
    compile: bool | str = False,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
) -> FluxPipeline:
    """Load a pipeline: a shipped model, a variant of the official weights, a folder, or a transformer's file.

    name: by default the environment variable FLUXEDU_MODEL, else ``nano`` · device, dtype: by default the CPU and
    float32; for the official weights a GPU if there is one, and bfloat16 · transformer: the transformer's folder inside
    ``name`` · memory: auto, full, no-modulations or stream (:mod:`fluxedu.memory`) · quantise: int8, fp8 or nf4, not
    exact (:mod:`fluxedu.memory.quantised`) · compile: True, or a backend of torch.compile; recordings stay the same ·
    lora: a file, or ``hollow``, the style that ships; ``lora_scale`` times its change is merged.
    ``pipe.lora.unmerge()`` reverts it, but not the input channels that a LoRA such as canny's adds.

    Raises RequestError for a device or dtype that cannot be used, CheckpointError for files that are missing or do not
    fit, with the command that downloads them, QuantiseError and CompileError where those are not available.
    """
    if name is None or (isinstance(name, str) and not name):
        name = os.environ.get("FLUXEDU_MODEL") or "nano"
    shipped = SHIPPED_MODELS.get(name) if isinstance(name, str) else None
    if shipped is not None:
        if transformer not in ("transformer", shipped.transformer):
            raise RequestError(f"transformer= does not apply to {name!r}, which has one; load its folder instead.")
        if not shipped.folder(WEIGHTS).is_dir():
            variant = name.removeprefix("nano-")
            raise RequestError(f"{name} does not ship yet; `fluxedu train --variant {variant} --ship-to {WEIGHTS}`.")
        files, sampling, size, head = find(WEIGHTS, shipped.transformer), shipped.sampling, 128, shipped.head
    else:
        files, head = find(name, transformer), None
        sampling = _sampling_of(name, transformer)
        size = 1024 if sampling is None else 128
    if files.variant is not None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or "bfloat16"
    device, dtype = checked_device(device or "cpu"), checked_dtype(dtype)

    networks = open_networks(files.parts, device, dtype, memory, quantise)
    clip, t5, flux, vae = (networks[name] for name in ("clip", "t5", "flux", "ae"))
    sampling = sampling or VARIANTS[files.variant or _like(flux.config)].sampling
    clip_length = clip.config.max_position_embeddings
    prompts = PromptEncoder(
        Tokenizer(files.parts["tokenizer"], "<|endoftext|>", "<|endoftext|>", clip_length, truncate=True),
        clip,
        Tokenizer(files.parts["tokenizer_2"], "<pad>", "</s>", sampling.text_length, truncate=False),
        t5,
    )
    vae = vae.to(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    pipe = FluxPipeline(prompts, flux, vae, sampling, size)
    if head is not None:
        with meta_init():
            vision_encoder = VisionEncoder(clip.config)
            redux_head = ReduxHead(clip.config.hidden_size, flux.config.context_in_dim)
        vision_encoder.load_state_dict(load_file(WEIGHTS / head / "eye.safetensors"), assign=True)
        redux_head.load_state_dict(load_file(WEIGHTS / head / "model.safetensors"), assign=True)
        pipe.redux = build_redux(vision_encoder, redux_head).to(device, dtype)
    if shipped is not None and shipped.lora:
        pipe.flux, _ = with_lora(pipe.flux, shipped.folder(WEIGHTS) / LORA_FILE, label=name)
    if lora is not None:
        pipe.flux, pipe.lora = with_lora(pipe.flux, lora, lora_scale)
    elif lora_scale != 1.0:
        raise RequestError("lora_scale needs lora=, the LoRA whose change it scales.")
    if compile is not False:
        compile_blocks(pipe.flux, compile)
    return pipe


def with_lora(flux: Flux, lora: str | Path, scale: float = 1.0, label: str = "a LoRA") -> tuple[Flux, Merged]:
    """``flux`` with a LoRA merged; its input is widened for a LoRA with more channels, such as canny's."""
    if not is_scale(scale):
        raise RequestError(f"lora_scale must be a number, 1 for the change as trained, not {describe(scale)}.")
    if not isinstance(lora, (str, Path)):
        raise RequestError(f"lora must be a file or one of {', '.join(LORAS)}, not {describe(lora)}.")
    if flux.placement is not None and flux.placement.mode != "full":
        raise RequestError(f"{label} cannot be merged into streamed weights; load with memory='full'.")
    if flux.placement is not None and flux.placement.quantised:
        raise RequestError(
            f"{label} cannot be merged into quantised weights; load without quantise=, then quantise pipe.flux."
        )
    tensors = read(WEIGHTS / LORAS[lora] / LORA_FILE if lora in LORAS else lora)
    in_channels = lora_in_channels(tensors) or 0
    if in_channels > flux.config.in_channels:
        flux = widened(flux, in_channels)
    return flux, merge(flux, tensors, scale)


def widened(flux: Flux, in_channels: int) -> Flux:
    """The same network with more input channels, whose weights are zero; all other weights are those of ``flux``."""
    with meta_init():
        wide = Flux(flux.config.with_(in_channels=in_channels))
    load_into(wide, widen_input(flux.state_dict(), in_channels))
    return wide.train(flux.training).requires_grad_(flux.img_in.weight.requires_grad)


def build_redux(vision_encoder: VisionEncoder, head: ReduxHead) -> Redux:
    """The miniature's vision encoder with a Redux head after it, for inference."""
    return Redux(vision_encoder, head, tokens=VisionEncoder.TOKENS).eval().requires_grad_(False)


def _sampling_of(folder: str | Path, transformer: str) -> Sampling | None:
    """The sampling settings of a folder that holds the miniature, recognised by its scheduler's shift; else None."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    if (values.get("base_shift"), values.get("max_shift")) != NANO_SHIFT:
        return None
    return next((m.sampling for m in SHIPPED_MODELS.values() if m.transformer == transformer), SHIPPED["nano"].sampling)


def _like(config: FluxConfig) -> str:
    """The variant whose sampling settings fit a transformer without a name."""
    if not config.guidance_embed:
        return "schnell"
    return {384: "fill", 128: "depth"}.get(config.in_channels, "dev")
