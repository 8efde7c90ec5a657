"""Loading a pipeline: the shipped miniature by name, the official weights, or any folder in their layout.

load()             the miniature with a guidance input, as FLUX.1-dev; or the model that FLUXEDU_MODEL names
load("nano-base")  the miniature before distillation, for classifier-free guidance
load("nano-fill")  and nano-schnell, -canny, -depth, -kontext, -redux: the family in miniature
load("nano-flux2") FLUX.2 in miniature
load("dev")        the official weights from the Hugging Face cache; also schnell, krea, fill, canny, depth, kontext
load("path/to/FLUX.1-dev")  a folder as on the hub: transformer, vae, two text encoders, two tokenizers
load("klein")      FLUX.2: also klein-9b, klein-base, klein-base-9b, flux2-dev, a folder as on the hub, or a file
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from fluxedu.checkpoints import (
    OFFICIAL,
    Official,
    config_of,
    find,
    find_flux2,
    flux2_error,
    load_into,
    lora_in_channels,
    read,
    widen_input,
)
from fluxedu.checkpoints.contents import own_dtype
from fluxedu.checkpoints.lora import is_scale, merge_lazily, merged_while_loading
from fluxedu.checkpoints.lora_files import read_lora
from fluxedu.errors import CheckpointError, RequestError, check_choice, check_device, check_keys, checked, describe
from fluxedu.files import read_json_file
from fluxedu.memory import open_networks
from fluxedu.memory.compiled import compile_blocks
from fluxedu.models import FLUX2_MODELS, VARIANTS, Flux, Flux2Config, FluxConfig, Sampling
from fluxedu.models.meta_init import meta_init
from fluxedu.models.redux import Redux, ReduxHead
from fluxedu.nano.networks import VisionEncoder
from fluxedu.nano.shipped import FAMILY, LORA_FILE, LORAS, NANO_SHIFT, SHIPPED, SHIPPED_MODELS, WEIGHTS
from fluxedu.nano.vocabulary import prompt_problem
from fluxedu.sampling.flux2 import Flux2Pipeline, read_prompt_encoder
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import PromptEncoder, T5Prompts, Tokenizer
from fluxedu.sampling.request import checked_dtype


@checked(RequestError, "name", "transformer", "memory")
def load(
    name: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    transformer: str = "transformer",
    memory: str = "auto",
    quantise: str | None = None,
    compile: bool | str = False,
    variant: str | None = None,
    revision: str | None = None,
    like: str | None = None,
    lora: str | Path | tuple | list | None = None,
    lora_scale: float | list[float] = 1.0,
) -> FluxPipeline:
    """Load a pipeline: a shipped model, a variant of the official weights, a folder, or a transformer's file.

    name: by default the environment variable FLUXEDU_MODEL, else ``nano`` · device, dtype: by default the CPU and
    float32; for other weights than the miniature's, a GPU if there is one, and the dtype of the transformer's file
    (bfloat16 for fp8) · transformer: the transformer's folder inside ``name`` · memory: auto, full, no-modulations or
    stream (:mod:`fluxedu.memory`) · quantise: int8, fp8 or nf4, not exact (:mod:`fluxedu.memory.quantised`) ·
    compile: True, or a backend of torch.compile; a run with an instrument is uncompiled, and its latents differ by
    about 6e-5 from compiled ones · variant: a set of files such as fp16, as in diffusers · revision: a branch, tag or
    commit of a repository in the cache · like: the model whose sampling settings are used, such as dev; needed only
    where the files do not tell schnell from a de-distilled dev, or klein from klein-base · lora: a file, a folder, or
    ``hollow``, the style that ships; or a list of them. ``lora_scale`` times its change is merged into the transformer
    and the text encoders (of FLUX.2, the transformer); it is one number, or one for each LoRA, or stands beside the
    file: ``lora=["a.safetensors", ("b.safetensors", 0.5)]``. ``pipe.lora.unmerge()`` reverts them, but not the input
    channels that a LoRA such as canny's adds.

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
        if variant is not None or revision is not None:
            hint = f"; load 'nano-{variant}' instead" if f"nano-{variant}" in SHIPPED_MODELS else ""
            raise RequestError(f"variant= and revision= do not apply to {name}, which ships with fluxedu{hint}.")
        files, sampling, size, head = find(WEIGHTS, shipped.transformer), shipped.sampling, 128, shipped.head
    elif (flux2 := find_flux2(name, revision)) is not None:
        if variant is not None or transformer != "transformer":
            raise RequestError("variant= and transformer= are for FLUX.1; load FLUX.2 without them.")
        sampling, loras = _flux2_sampling(flux2, like), requested_loras(lora, lora_scale)
        return load_flux2(flux2, sampling, device, dtype, memory, quantise, compile, loras)
    else:
        files, head = find(name, transformer, variant, revision), None
        sampling = _sampling_of(files.scheduler, transformer)
        size = 1024 if sampling is None else 128
    is_miniature = sampling is not None
    tensors = read(files.parts["transformer"], "transformer")
    config = config_of(tensors)
    is_flux2 = isinstance(config, Flux2Config)  # the miniature's, which has T5 for its text encoder
    if is_flux2 and not is_miniature:
        raise flux2_error(files.parts["transformer"])
    if not is_miniature:
        like = _like(config, like, files)
        sampling = VARIANTS[like].sampling
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or own_dtype((entry.dtype, entry.nbytes) for entry in tensors.entries.values())
    elif like is not None:
        raise RequestError(f"like= does not apply to the miniature, {name}, which has its own sampling settings.")
    device, dtype = check_device("cpu" if device is None else device), checked_dtype(dtype)

    groups = [[(WEIGHTS / shipped.lora / LORA_FILE, 1.0)] if shipped and shipped.lora else []]
    groups.append(requested_loras(lora, lora_scale))
    opened_with_lora: dict[str, tuple] = {}

    def merge_loras(opened: dict[str, tuple]) -> dict[str, tuple]:
        opened_with_lora.update(with_loras(opened, groups, dtype))
        return opened | opened_with_lora

    parts = {part: path for part, path in files.parts.items() if not is_flux2 or part != "text_encoder"}
    networks = open_networks(parts, device, dtype, memory, quantise, change=merge_loras)
    t5, flux, vae = (networks[name] for name in ("t5", "flux", "ae"))
    t5_tokenizer = Tokenizer(files.parts["tokenizer_2"], "<pad>", "</s>", sampling.text_length, truncate=False)
    if is_flux2:
        prompts = T5Prompts(t5_tokenizer, t5)
    else:
        clip = networks["clip"]
        clip_length = clip.config.max_position_embeddings
        clip_tokenizer = Tokenizer(
            files.parts["tokenizer"], "<|endoftext|>", "<|endoftext|>", clip_length, truncate=True
        )
        prompts = PromptEncoder(clip_tokenizer, clip, t5_tokenizer, t5)
    vae = vae.to(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    try:
        pipe = FluxPipeline(prompts, flux, vae, sampling, size)
    except RequestError as error:
        raise CheckpointError(f"{describe(str(name))} cannot be loaded: {error}") from None
    if is_miniature:
        edits = FAMILY["nano-kontext"].transformer in (transformer, shipped.transformer if shipped else None)
        pipe.prompt_problem = partial(prompt_problem, instruction=edits)
    if head is not None:
        with meta_init():
            vision_encoder = VisionEncoder(clip.config)
            redux_head = ReduxHead(clip.config.hidden_size, flux.config.context_in_dim)
        vision_encoder.load_state_dict(load_file(WEIGHTS / head / "eye.safetensors"), assign=True)
        redux_head.load_state_dict(load_file(WEIGHTS / head / "model.safetensors"), assign=True)
        pipe.redux = build_redux(vision_encoder, redux_head).to(device, dtype)
    pipe.lora = merged_while_loading(opened_with_lora) if groups[1] else None
    if compile is not False:
        compile_blocks(pipe.flux, compile)
    return pipe


def load_flux2(
    files: Official,
    sampling: Sampling,
    device: object,
    dtype: object,
    memory: str,
    quantise: str | None,
    compile: bool | str,
    loras: list[tuple[Path, float]],
) -> Flux2Pipeline:
    """A pipeline of FLUX.2 from the files that ``find_flux2`` returns; the arguments are those of :func:`load`.

    loras: files and scales; their changes are merged into the transformer.
    """
    tensors = read(files.parts["transformer"], "transformer")
    device = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = checked_dtype(dtype or own_dtype((entry.dtype, entry.nbytes) for entry in tensors.entries.values()))
    prompts = read_prompt_encoder(files.parts["tokenizer"], files.parts["text_encoder"], dtype, sampling.text_length)
    parts = {part: files.parts[part] for part in ("transformer", "vae")}
    opened_with_lora: dict[str, tuple] = {}

    def merge_loras(opened: dict[str, tuple]) -> dict[str, tuple]:
        opened_with_lora.update(with_loras(opened, [loras], dtype))
        return opened | opened_with_lora

    more = {"change": merge_loras, "language_model": prompts.language_model}
    networks = open_networks(parts, device, dtype, memory, quantise, **more)
    vae = networks["ae"].to(memory_format=torch.channels_last)
    try:
        pipe = Flux2Pipeline(prompts, networks["flux"], vae, sampling, 1024)
    except RequestError as error:
        raise CheckpointError(f"these files cannot be loaded as FLUX.2: {error}") from None
    pipe.lora = merged_while_loading(opened_with_lora) if loras else None
    if compile is not False:
        compile_blocks(pipe.flux, compile)
    return pipe


def requested_loras(lora: object, lora_scale: object) -> list[tuple[Path, float]]:
    """The files and scales of ``load(lora=, lora_scale=)``; raises RequestError for anything else."""
    if lora is None:
        if lora_scale != 1.0:
            raise RequestError("lora_scale needs lora=, the LoRA whose change it scales.")
        return []
    items = lora if isinstance(lora, list) else [lora]
    scales = lora_scale if isinstance(lora_scale, (list, tuple)) else [lora_scale] * len(items)
    if len(scales) != len(items):
        raise RequestError(f"lora_scale must be one number or one for each of the {len(items)} LoRAs, not {scales}.")
    requested = []
    for item, scale in zip(items, scales, strict=True):
        file, scale = item if isinstance(item, tuple) and len(item) == 2 else (item, scale)
        if not is_scale(scale):
            raise RequestError(f"lora_scale must be a number, 1 for the change as trained, not {describe(scale)}.")
        if not isinstance(file, (str, Path)):
            raise RequestError(f"lora must be a file or one of {', '.join(LORAS)}, not {describe(file)}.")
        requested.append((WEIGHTS / LORAS[file] / LORA_FILE if file in LORAS else Path(file), scale))
    return requested


def with_loras(
    opened: dict[str, tuple], groups: list[list[tuple[Path, float]]], dtype: torch.dtype
) -> dict[str, tuple]:
    """The transformer and the text encoders of ``opened``, with one group of LoRAs after another in their tensors.

    The transformer's input is widened for a LoRA with more channels, such as canny's.
    """
    merged = {name: opened[name] for name in ("flux", "clip", "t5") if name in opened}
    for group in groups:
        loras = [(read_lora(file), scale) for file, scale in group]
        flux, tensors = merged["flux"]
        in_channels = max([flux.config.in_channels, *(lora_in_channels(tensors) or 0 for tensors, _ in loras)])
        with meta_init():
            wide = type(flux)(flux.config.with_(in_channels=in_channels)).eval()
        if loras:
            merged = merge_lazily(merged | {"flux": (wide, tensors)}, loras, dtype)
    return merged


def widened(flux: Flux, in_channels: int) -> Flux:
    """The same network with more input channels, whose weights are zero; all other weights are those of ``flux``."""
    with meta_init():
        wide = Flux(flux.config.with_(in_channels=in_channels))
    load_into(wide, widen_input(flux.state_dict(), in_channels))
    return wide.train(flux.training).requires_grad_(flux.img_in.weight.requires_grad)


def build_redux(vision_encoder: VisionEncoder, head: ReduxHead) -> Redux:
    """The miniature's vision encoder with a Redux head after it, for inference."""
    return Redux(vision_encoder, head, tokens=VisionEncoder.TOKENS).eval().requires_grad_(False)


def _scheduler(path: Path | None) -> dict:
    """The settings of a scheduler; none if there is no file."""
    return check_keys(f"{path}", read_json_file(path), error=CheckpointError) if path else {}


def _sampling_of(scheduler: Path | None, transformer: str) -> Sampling | None:
    """The sampling settings of a folder that holds the miniature, recognised by its scheduler's shift; else None."""
    values = _scheduler(scheduler)
    if (values.get("base_shift"), values.get("max_shift")) != NANO_SHIFT:
        return None
    return next((m.sampling for m in SHIPPED_MODELS.values() if m.transformer == transformer), SHIPPED["nano"].sampling)


def _flux2_sampling(files: Official, like: str | None) -> Sampling:
    """The sampling settings of FLUX.2: those of ``like``, or of a distilled or an undistilled model.

    klein and klein-base have the same tensors; ``model_index.json`` or the file's name says which it is.
    """
    if like is not None:
        return FLUX2_MODELS[check_choice("like", like, FLUX2_MODELS)].sampling
    index = {}
    if files.index is not None and files.index.is_file():
        index = check_keys("model_index.json", read_json_file(files.index))
    elif files.variant is None and not config_of(read(files.parts["transformer"], "transformer")).guidance_embed:
        raise RequestError(
            f"{files.parts['transformer'].name} may be klein, which is distilled, or klein-base, since both have the "
            "same tensors; say which with like='klein' or like='klein-base'."
        )
    is_distilled = index.get("is_distilled", files.variant in ("klein", "klein-9b"))
    return FLUX2_MODELS["klein" if is_distilled else "klein-base"].sampling


def _like(config: FluxConfig, like: str | None, files: Official) -> str:
    """The variant whose sampling settings a transformer gets: ``like``, that of its name, or the one that it fits.

    schnell and a de-distilled dev have the same tensors. Their schedulers differ: only dev's shifts the times.
    """
    if like is not None:
        check_choice("like", like, OFFICIAL)
    elif files.variant is not None:
        like = files.variant
    elif config.guidance_embed:
        like = {6.0: "fill", 2.0: "depth"}.get(config.in_channels / config.out_channels, "dev")
    elif files.scheduler is not None:
        like = "dev" if _scheduler(files.scheduler).get("use_dynamic_shifting") else "schnell"
    else:
        raise RequestError(
            f"{files.parts['transformer']} has no guidance input, as schnell and as a de-distilled dev; "
            "say which with like='schnell' or like='dev'."
        )
    theirs = VARIANTS[like].flux
    if config.in_channels * theirs.out_channels != theirs.in_channels * config.out_channels:
        raise RequestError(
            f"a transformer like {like} has {theirs.in_channels} input channels for {theirs.out_channels} output "
            f"channels, but this one has {config.in_channels} for {config.out_channels}; choose another like=."
        )
    if config.guidance_embed and not theirs.guidance_embed:
        raise RequestError(f"this transformer has a guidance input, which {like} has not; choose like='dev'.")
    return like
