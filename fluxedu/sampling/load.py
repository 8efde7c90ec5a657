"""Opening a model: the shipped miniature by name, the official weights, or any folder in their layout.

load()             the miniature with guidance built in, as FLUX.1-dev; or what FLUXEDU_MODEL names
load("nano-base")  the miniature before distillation, for classifier-free guidance
load("nano-fill")  and nano-schnell, -canny, -depth, -kontext, -redux: the family in miniature
load("dev")        the official weights from the Hugging Face cache; also schnell, krea, fill, canny, depth, kontext
load("path/to/FLUX.1-dev")  a folder as on the hub: transformer, vae, two encoders, two tokenizers
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from fluxedu.checkpoints import find
from fluxedu.memory import open_networks
from fluxedu.models import VARIANTS, FluxConfig, Sampling
from fluxedu.models.config import CLIPTextConfig
from fluxedu.models.image_tower import PATCH, SIZE, ImageTower, Places
from fluxedu.models.redux import Redux, ReduxHead
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import PromptEncoder, Tokenizer
from fluxedu.sampling.request import RequestError, checked_device, checked_dtype

WEIGHTS = Path(__file__).parent.parent / "nano" / "weights"
#: mu of the miniature, ln 3 at any size: chosen, as the guidance is, on prompts that are not the exam's
NANO_SHIFT = (1.0986, 1.0986)
#: the shipped models: the folder of the transformer, and how they are sampled
SHIPPED = {
    "nano": ("transformer", Sampling(20, 6.0, 32, shift=True, shift_ends=NANO_SHIFT)),
    "nano-base": ("transformer_base", Sampling(20, 5.0, 32, shift=True, shift_ends=NANO_SHIFT)),
}
#: the rest of the family in miniature, the same; ``fluxedu train --variant NAME`` makes them
FAMILY = {
    "nano-schnell": ("transformer_schnell", Sampling(4, 0.0, 32, shift=False)),
    "nano-fill": ("transformer_fill", Sampling(20, 1.0, 32, shift=True, shift_ends=NANO_SHIFT)),
    "nano-canny": ("transformer_canny", Sampling(20, 1.0, 32, shift=True, shift_ends=NANO_SHIFT)),
    "nano-depth": ("transformer_depth", Sampling(20, 1.0, 32, shift=True, shift_ends=NANO_SHIFT)),
    "nano-kontext": ("transformer_kontext", Sampling(20, 2.5, 32, shift=True, shift_ends=NANO_SHIFT)),
    "nano-redux": ("transformer", Sampling(20, 3.0, 32, shift=True, shift_ends=NANO_SHIFT)),
}
OURS = SHIPPED | FAMILY


def load(
    name: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    transformer: str = "transformer",
    memory: str = "auto",
) -> FluxPipeline:
    """Open a pipeline: a shipped model, a variant of the official weights, a folder or a transformer's file.

    name: what the environment variable FLUXEDU_MODEL says if not given, else ``nano`` · device, dtype: the CPU and
    float32 if not given; of the official weights a GPU where there is one, and bfloat16 · transformer: the folder
    of the transformer inside · memory: auto, full, no-modulations or stream (:mod:`fluxedu.memory`).

    Raises RequestError for a device or dtype that is not there, CheckpointError for files that are missing or do
    not fit, with the command that gets them.
    """
    if name is None or (isinstance(name, str) and not name):
        name = os.environ.get("FLUXEDU_MODEL") or "nano"
    if isinstance(name, str) and name in OURS:
        if transformer not in ("transformer", OURS[name][0]):
            raise RequestError(f"{name!r} has its own transformer; of transformer={transformer!r} load the folder.")
        transformer, sampling = OURS[name]
        needs = WEIGHTS / ("redux" if name == "nano-redux" else transformer)
        if not needs.is_dir():
            variant = name.removeprefix("nano-")
            raise RequestError(f"{name} does not ship yet; `fluxedu train --variant {variant} --ship-to {WEIGHTS}`.")
        files, size = find(WEIGHTS, transformer), 128
    else:
        files, sampling, size = find(name, transformer), None, 1024
    if files.variant is not None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or "bfloat16"
    device, dtype = checked_device(device or "cpu"), checked_dtype(dtype)

    networks = open_networks(files.parts, device, dtype, memory)
    clip, t5, flux, vae = (networks[name] for name in ("clip", "t5", "flux", "ae"))
    sampling = sampling or VARIANTS[files.variant or _like(flux.config)].sampling
    places = clip.config.max_position_embeddings
    prompts = PromptEncoder(
        Tokenizer(files.parts["tokenizer"], "<|endoftext|>", "<|endoftext|>", places, cut=True),
        clip,
        Tokenizer(files.parts["tokenizer_2"], "<pad>", "</s>", sampling.text_length, cut=False),
        t5,
    )
    vae = vae.to(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    pipe = FluxPipeline(prompts, flux, vae, sampling, size)
    if name == "nano-redux":
        pipe.redux = nano_redux(clip.config).to(device, dtype)
    return pipe


def nano_redux(config: CLIPTextConfig, weights: Path = WEIGHTS) -> Redux:
    """The miniature's image tower and the Redux head behind it."""
    tower = image_tower(config, weights)
    tensors = load_file(weights / "redux" / "model.safetensors")
    txt_dim, hidden = tensors["redux_down.weight"].shape
    head = ReduxHead(tensors["redux_up.weight"].shape[1], txt_dim)
    head.load_state_dict(tensors)
    return Redux(Places(tower), head, tokens=(SIZE // PATCH) ** 2).eval().requires_grad_(False)


def image_tower(config: CLIPTextConfig, weights: Path = WEIGHTS) -> ImageTower:
    """The tower of the shipped CLIP that looks at pictures."""
    tower = ImageTower(config)
    tensors = load_file(weights / "image_tower" / "model.safetensors")
    tower.load_state_dict({k.removeprefix("image."): v for k, v in tensors.items() if k.startswith("image.")})
    return tower.eval().requires_grad_(False)


def _like(config: FluxConfig) -> str:
    """The variant whose way of sampling fits a transformer that has no name."""
    if not config.guidance_embed:
        return "schnell"
    return {384: "fill", 128: "depth"}.get(config.in_channels, "dev")
