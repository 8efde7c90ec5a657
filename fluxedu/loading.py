"""Opening a model: the shipped miniature by name, the official weights, or any folder in their layout.

load()             the miniature with guidance built in, as FLUX.1-dev; or what FLUXEDU_MODEL names
load("nano-base")  the miniature before distillation, for classifier-free guidance
load("nano-fill")  and nano-schnell, -canny, -depth, -kontext, -redux: the family in miniature
load("dev")        the official weights from the Hugging Face cache; also schnell, krea, fill, canny, depth, kontext
load("path/to/FLUX.1-dev")  a folder as on the hub: transformer, vae, two encoders, two tokenizers
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from fluxedu.checkpoints import Merged, find, inputs_of, load_into, merge, read, widen_input
from fluxedu.checkpoints.lora import is_scale
from fluxedu.errors import CompileError, RequestError, describe
from fluxedu.memory import open_networks
from fluxedu.models import VARIANTS, Flux, FluxConfig, Sampling
from fluxedu.models.meta_init import meta_init
from fluxedu.models.redux import Redux, ReduxHead
from fluxedu.nano.networks import Eye
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import PromptEncoder, Tokenizer
from fluxedu.sampling.request import checked_device, checked_dtype

WEIGHTS = Path(__file__).parent / "nano" / "weights"
#: mu of the miniature, ln 3 at any size: chosen, as the guidance is, on prompts that are not the exam's
NANO_SHIFT = (1.0986, 1.0986)


class Ours(NamedTuple):
    """One of our own: the transformer's folder among the weights, how it is sampled, a head's folder, a LoRA's."""

    transformer: str
    sampling: Sampling
    head: str | None = None
    lora: str | None = None

    def folder(self, weights: Path) -> Path:
        """What is this model's alone."""
        return Path(weights) / (self.head or self.lora or self.transformer)


def _as_dev(guidance: float) -> Sampling:
    return Sampling(20, guidance, 32, shift=True, shift_ends=NANO_SHIFT)


SHIPPED = {"nano": Ours("transformer", _as_dev(6.0)), "nano-base": Ours("transformer_base", _as_dev(5.0))}
#: the rest of the family; ``fluxedu train --variant NAME`` makes them
FAMILY = {
    "nano-schnell": Ours("transformer_schnell", Sampling(4, 0.0, 32, shift=False)),
    "nano-fill": Ours("transformer_fill", _as_dev(1.0)),
    "nano-canny": Ours("transformer", _as_dev(1.0), lora="lora_canny"),
    "nano-depth": Ours("transformer", _as_dev(1.0), lora="lora_depth"),
    "nano-kontext": Ours("transformer_kontext", _as_dev(1.0)),
    "nano-redux": Ours("transformer", _as_dev(3.0), head="redux"),
}
OURS = SHIPPED | FAMILY
#: styles that ship, by name: folders of a LoRA for ``nano``
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
    """Open a pipeline: a shipped model, a variant of the official weights, a folder or a transformer's file.

    name: what the environment variable FLUXEDU_MODEL says if not given, else ``nano`` · device, dtype: the CPU and
    float32 if not given; of the official weights a GPU where there is one, and bfloat16 · transformer: the folder
    of the transformer inside · memory: auto, full, no-modulations or stream (:mod:`fluxedu.memory`) · quantise:
    int8, fp8 or nf4, not exact (:mod:`fluxedu.memory.quantised`) · compile: True, or a backend of torch.compile; what
    is recorded stays the same · lora: a file, or ``hollow``, the style that ships; ``lora_scale`` times its change is
    merged. ``pipe.lora.unmerge()`` takes it back, but not the inputs that a LoRA such as canny's adds.

    Raises RequestError for a device or dtype that is not there, CheckpointError for files that are missing or do
    not fit, with the command that gets them, QuantiseError and CompileError where those cannot be had.
    """
    if name is None or (isinstance(name, str) and not name):
        name = os.environ.get("FLUXEDU_MODEL") or "nano"
    ours = OURS.get(name) if isinstance(name, str) else None
    if ours is not None:
        if transformer not in ("transformer", ours.transformer):
            raise RequestError(f"{name!r} has its own transformer; of transformer={transformer!r} load the folder.")
        if not ours.folder(WEIGHTS).is_dir():
            variant = name.removeprefix("nano-")
            raise RequestError(f"{name} does not ship yet; `fluxedu train --variant {variant} --ship-to {WEIGHTS}`.")
        files, sampling, size, head = find(WEIGHTS, ours.transformer), ours.sampling, 128, ours.head
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
    places = clip.config.max_position_embeddings
    prompts = PromptEncoder(
        Tokenizer(files.parts["tokenizer"], "<|endoftext|>", "<|endoftext|>", places, cut=True),
        clip,
        Tokenizer(files.parts["tokenizer_2"], "<pad>", "</s>", sampling.text_length, cut=False),
        t5,
    )
    vae = vae.to(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    pipe = FluxPipeline(prompts, flux, vae, sampling, size)
    if head is not None:
        with meta_init():
            eye, behind = Eye(clip.config), ReduxHead(clip.config.hidden_size, flux.config.context_in_dim)
        for part, file in ((eye, "eye.safetensors"), (behind, "model.safetensors")):
            part.load_state_dict(load_file(WEIGHTS / head / file), assign=True)
        pipe.redux = nano_redux(eye, behind).to(device, dtype)
    if ours is not None and ours.lora:
        pipe.flux, _ = with_lora(pipe.flux, ours.folder(WEIGHTS) / LORA_FILE, called=name)
    if lora is not None:
        pipe.flux, pipe.lora = with_lora(pipe.flux, lora, lora_scale)
    elif lora_scale != 1.0:
        raise RequestError("lora_scale is how much of a LoRA's change is merged; say lora= as well.")
    if compile is not False:
        compile_blocks(pipe.flux, compile)
    return pipe


def with_lora(flux: Flux, lora: str | Path, scale: float = 1.0, called: str = "a LoRA") -> tuple[Flux, Merged]:
    """``flux`` with a LoRA merged, first widened where the LoRA is for more inputs, as those of canny and depth are."""
    if not is_scale(scale):
        raise RequestError(f"lora_scale is a number, 1 being the change as it was learned, not {describe(scale)}.")
    if not isinstance(lora, (str, Path)):
        raise RequestError(f"lora is a file, or one of {', '.join(LORAS)}, not {describe(lora)}.")
    if getattr(flux, "visitors", ()):
        raise RequestError(f"{called} is merged into weights that stay; say memory='full'.")
    if getattr(flux, "quantised", None):
        raise RequestError(f"{called} is merged into whole weights; load without quantise, then quantise pipe.flux.")
    tensors = read(WEIGHTS / LORAS[lora] / LORA_FILE if lora in LORAS else lora)
    wanted = inputs_of(tensors) or 0
    flux = widened(flux, wanted) if wanted > flux.config.in_channels else flux
    return flux, merge(flux, tensors, scale)


def widened(flux: Flux, in_channels: int) -> Flux:
    """The same network with more channels going in, the new ones unread; all other weights are those of ``flux``."""
    with meta_init():
        wide = Flux(flux.config.with_(in_channels=in_channels))
    load_into(wide, widen_input(flux.state_dict(), in_channels))
    return wide.train(flux.training).requires_grad_(flux.img_in.weight.requires_grad)


def nano_redux(eye: Eye, head: ReduxHead) -> Redux:
    """The miniature's eye and a Redux head behind it."""
    return Redux(eye, head, tokens=Eye.TOKENS).eval().requires_grad_(False)


def _sampling_of(folder: str | Path, transformer: str) -> Sampling | None:
    """How a folder is sampled that holds the miniature, told by its scheduler, whose shift no official model has."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    if (told.get("base_shift"), told.get("max_shift")) != NANO_SHIFT:
        return None
    return next((ours.sampling for ours in OURS.values() if ours.transformer == transformer), SHIPPED["nano"].sampling)


def _like(config: FluxConfig) -> str:
    """The variant whose way of sampling fits a transformer that has no name."""
    if not config.guidance_embed:
        return "schnell"
    return {384: "fill", 128: "depth"}.get(config.in_channels, "dev")


# ------------------------------------------------------------ loading.py
# torch.compile, block by block: one graph for all double blocks, one for all single ones.
#
# Only the blocks: they are where the time goes, and a graph of one is made in seconds where the whole takes minutes.
# While an instrument looks or changes, what is compiled runs as it is written (``fluxedu.instruments.watching``).
#


def compile_blocks(flux: Flux, backend: str | bool = True, dynamic: bool | None = None) -> Flux:
    """Have every block compiled at its first call, in place; returns ``flux``.

    backend: True, which is inductor, or the name of another, as ``eager`` or ``aot_eager`` · dynamic: as
    torch.compile's. Raises CompileError, at once, where the compiler does not work, or blocks visit.
    """
    backend = "inductor" if backend is True else backend
    known = ("eager", "aot_eager", *torch.compiler.list_backends())
    if not isinstance(backend, str) or backend not in known:
        raise CompileError(f"compile is True or one of {', '.join(dict.fromkeys(known))}, not {describe(backend)}.")
    blocks = [*flux.double_blocks, *flux.single_blocks]
    if set(getattr(flux, "visitors", ())).intersection(blocks):
        raise CompileError('blocks that visit cannot be compiled; load with memory="full" or "no-modulations".')
    _try(backend, flux.img_in.weight.device)
    for block in blocks:
        block.compile(backend=backend, dynamic=dynamic)
    return flux


def _try(backend: str, device: torch.device) -> None:
    """A compiler is code that is generated and built, in C++ on a CPU: whether it works shows when it is used."""
    tried = torch.compile(lambda x: x.sin() + 1, backend=backend)
    try:
        tried(torch.zeros(8, device=device))
    except Exception as error:  # whatever a compiler may fail with
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
        raise CompileError(f"torch.compile does not work here ({why}); load without compile.") from None
