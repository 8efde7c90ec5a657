"""Opening a model: the shipped miniature by name, or any folder in the official layout.

load()             the miniature with guidance built in, as FLUX.1-dev
load("nano-base")  the miniature before distillation, for classifier-free guidance
load("path/to/FLUX.1-dev")  a folder as on the hub: transformer, vae, two encoders, two tokenizers
"""

from __future__ import annotations

from pathlib import Path

import torch

from fluxedu.checkpoints import load_model
from fluxedu.models import VARIANTS, Sampling
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


def load(
    name: str | Path = "nano",
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    transformer: str = "transformer",
) -> FluxPipeline:
    """Open a pipeline: ``nano``, ``nano-base``, or a folder in the official repositories' layout.

    ``transformer`` names the folder of the transformer inside. Raises RequestError for a model, device
    or dtype that is not there, CheckpointError for files that do not fit.
    """
    device, dtype = checked_device(device), checked_dtype(dtype)
    if isinstance(name, str) and name in SHIPPED:
        if transformer not in ("transformer", SHIPPED[name][0]):
            raise RequestError(f"{name!r} has its own transformer; of transformer={transformer!r} load the folder.")
        folder, (transformer, sampling) = WEIGHTS, SHIPPED[name]
        size = 128
    else:
        folder, sampling, size = Path(name), None, 1024
        if not folder.is_dir():
            raise RequestError(f"there is no model {str(name)!r}: say {', '.join(SHIPPED)}, or the path of a folder.")

    part = lambda name: load_model(folder / name, dtype=dtype, device=device).requires_grad_(False)  # noqa: E731
    clip, t5, flux, vae = (part(name) for name in ("text_encoder", "text_encoder_2", transformer, "vae"))
    sampling = sampling or VARIANTS["dev" if flux.config.guidance_embed else "schnell"].sampling
    places = clip.config.max_position_embeddings
    prompts = PromptEncoder(
        Tokenizer(folder / "tokenizer", "<|endoftext|>", "<|endoftext|>", places, cut=True),
        clip,
        Tokenizer(folder / "tokenizer_2", "<pad>", "</s>", sampling.text_length, cut=False),
        t5,
    )
    vae = vae.to(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    return FluxPipeline(prompts, flux, vae, sampling, size)
