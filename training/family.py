"""The family: models that start from the shipped miniature. ``fluxedu train --variant NAME``.

fill, canny, depth   read more input channels; the new columns of ``img_in`` start at zero
kontext              reads the reference image's tokens after the image's own
redux                trains a vision encoder and a head, and leaves the flow unchanged (redux.py)
schnell              learns to sample in four steps (schnell.py)
hollow               a style, as a LoRA

The guidance embedding of those that read an image is trained at random scales against the same target, so it learns
to have no effect. Moving the target by what the text changes in the miniature, ``(g - 1) * (v_text - v_empty)``, was
tried: it placed objects elsewhere than in the control image (at g = 3, 55 % in place; at g = 1, 86 %).
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fluxedu.checkpoints import extract, lora_in_channels, merge, read, save_file, save_folder
from fluxedu.loading import build_redux, load, widened
from fluxedu.models.flux import Flux
from fluxedu.nano.shipped import FAMILY, LORA_FILE, LORAS, SHIPPED, ShippedModel
from fluxedu.sampling.conditions import reference_ids
from fluxedu.sampling.pipeline import FluxPipeline
from training import VARIANTS
from training.card import add_entry, steps_and_minutes
from training.data import Examples, ExampleSet
from training.family_exam import BARS, examine
from training.files import fingerprint
from training.flow import (
    ALIGN_WEIGHT,
    AlignedFlow,
    TextEncoders,
    add_noise,
    averaged_flow,
    patch_label_loss,
    position_ids,
    random_guidance,
    try_compile,
)  # fmt: skip
from training.loop import Loss, Recipe, Run, load_average, mixed_precision
from training.redux import FIRST_SHARE, ReduxTraining, object_vectors, redux_loss
from training.schnell import Trajectories, make_shards, schnell_loss, without_guidance

IN_CHANNELS = {"fill": 64 + 64 + 256, "canny": 64 + 64, "depth": 64 + 64}
GUIDANCE = (1.0, 5.0)  # range of guidance scales in training
RECIPES = {
    "fill": Recipe(steps=1420, lr=1e-3, batch=32, warmup=50, decay=0.5, ema=0.99, muon=True),
    "canny": Recipe(steps=1500, lr=1e-3, batch=32, warmup=50, decay=0.5, ema=0.99, muon=True),
    "depth": Recipe(steps=500, lr=1e-3, batch=32, warmup=50, decay=0.5, ema=0.99, muon=True),
    "kontext": Recipe(steps=3000, lr=1.5e-3, batch=32, warmup=50, decay=0.5, ema=0.99, muon=True),
    "redux": Recipe(steps=3000, lr=2e-3, batch=32, warmup=100, decay=0.5, ema=0.99, muon=True),
    "hollow": Recipe(steps=1000, lr=2e-3, batch=32, warmup=20, decay=0.5, ema=0.98, weight_decay=0.0),
    "schnell": Recipe(steps=8000, lr=1e-3, batch=64, warmup=50, decay=0.6, ema=0.995, muon=True),
}
#: training scenes per image size; for schnell, shards of trajectories
DATA = {"fill": 640, "canny": 1600, "depth": 448, "kontext": 3200, "redux": 1280, "hollow": 256, "schnell": 420}
#: models that ship as a LoRA extracted from the trained weights, and its rank; the official canny and depth do so too
EXTRACTED = {"canny": 48, "depth": 48}
LORA_RANK = 16  # of a style
SEED = 66


# ---------------------------------------------------------------- losses


def channel_loss(
    model: Flux, batch: Examples, texts: TextEncoders, g: torch.Generator, guidance: tuple[float, float] = GUIDANCE
) -> Tensor:
    """fill, canny, depth, hollow: the flow loss, with the condition, if any, as more channels of each image token."""
    x_t, t, target = add_noise(batch.latents, g)
    img_ids, txt_ids = position_ids(*batch.grid)
    scale = random_guidance(len(t), *guidance, g)
    img = x_t if batch.condition is None else torch.cat([x_t, batch.condition], -1)
    with mixed_precision():
        txt, pooled = texts(batch.t5, batch.clip)
        velocity = model(img, img_ids, txt, txt_ids, t, pooled, scale)
    return F.mse_loss(velocity.float(), target)


def reference_loss(model: AlignedFlow, batch: Examples, texts: TextEncoders, g: torch.Generator) -> Tensor:
    """kontext: the flow loss, with the reference's tokens after the image's own, under position ids of another frame.

    As for the flow itself, a head predicts the object in each patch of the edited image.
    """
    x_t, t, target = add_noise(batch.latents, g)
    img_ids, txt_ids = position_ids(*batch.grid)
    ids = torch.cat([img_ids, reference_ids(*batch.grid)])
    scale = random_guidance(len(t), *GUIDANCE, g)
    with mixed_precision():
        txt, pooled = texts(batch.t5, batch.clip)
        velocity, logits = model(torch.cat([x_t, batch.condition], 1), ids, txt, txt_ids, t, pooled, scale)
    img_len = x_t.shape[1]
    flow = F.mse_loss(velocity[:, :img_len].float(), target)
    return flow + ALIGN_WEIGHT * patch_label_loss(logits[:, :img_len], batch.labels)


# ---------------------------------------------------------------- a style as a LoRA (arXiv 2106.09685)


class LoRA(nn.Module):
    """``W -> W + B A``: A is ``[rank, in]``, B is ``[out, rank]`` and zero at first."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def with_trainable_lora(flux: Flux, rank: int = LORA_RANK) -> Flux:
    """A frozen copy of ``flux`` with a trainable LoRA on every linear layer of the blocks."""
    flux = deepcopy(flux).requires_grad_(False)
    for name, layer in list(flux.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith(("double_blocks", "single_blocks")):
            parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))
    return flux


def lora_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA in such a model's state dict, under names such as ``double_blocks.0.img_attn.qkv.lora_A.weight``."""
    found = {}
    for name, value in tensors.items():
        layer, _, factor = name.partition(".parametrizations.weight.0.")
        if factor:
            found[f"{layer}.lora_{factor}.weight"] = value.contiguous()
    return found


# ---------------------------------------------------------------- training


def train_variant(name: str, folder: Path, resume: bool, ship_to: Path, scenes: int = 200) -> Path:
    """Train the model ``name`` from the shipped miniature, write it in bfloat16 into ``ship_to``, and examine it.

    The figures go into ``family.json`` and, if there is one, the model card beside it.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no variant {name!r} to train; choose one of {', '.join(VARIANTS)}.")
    pipe = load("nano")
    model = train(name, folder, pipe, resume)
    path = write_model(name, model, ship_to, pipe.flux)
    figures = examine(name, pipeline_with(name, model, pipe, path), scenes)
    steps, minutes = steps_and_minutes(folder, name, RECIPES[name])
    cost = {"steps": steps, "batch": RECIPES[name].batch, "minutes": round(minutes)}
    about = {"guidance": pipe.defaults.guidance, "scenes": scenes, **cost}
    add_entry(ship_to, name, {"figures": figures, "bars": BARS[name], **about})
    return path


def train(name: str, folder: Path, pipe: FluxPipeline, resume: bool = True) -> nn.Module:
    """Train the model ``name``, or load it if its run is finished; ``pipe`` is the guidance-distilled miniature."""
    torch.manual_seed(SEED)
    recipe, texts = RECIPES[name], TextEncoders(pipe.prompt_encoder.t5, pipe.prompt_encoder.clip)
    model = initialised(name, pipe).train()
    made_from = f"{fingerprint(pipe.flux, pipe.autoencoder)}, {DATA[name]} scenes"
    run = Run(name, model, recipe, folder, resume, made_from)
    if run.step < recipe.steps:
        loss = loss_function(name, model, pipe, texts, run)
        try_compile(getattr(model, "flux", model))
        run.train(loss)
    return averaged_flow(run) if name == "kontext" else load_average(initialised(name, pipe), run.average)


def initialised(name: str, pipe: FluxPipeline) -> nn.Module:
    """The model ``name`` before training."""
    if name in LORAS:
        return with_trainable_lora(pipe.flux)
    if name == "redux":
        return ReduxTraining(pipe.flux)
    if name == "schnell":
        model = without_guidance(pipe.flux, pipe.defaults.guidance)
    elif name == "kontext":
        model = AlignedFlow(deepcopy(pipe.flux))
    else:
        model = widened(deepcopy(pipe.flux), IN_CHANNELS[name])
    return model.requires_grad_(True)


def loss_function(name: str, model: nn.Module, pipe: FluxPipeline, texts: TextEncoders, run: Run) -> Loss:
    """``loss(step)`` for the model ``name``, with its training data made or loaded."""
    size = run.recipe.batch
    if name == "schnell":
        trajectories = Trajectories(make_shards(DATA[name], run.folder, pipe, texts))
    else:
        examples = ExampleSet(name, SEED, DATA[name], pipe.autoencoder)
    if name == "redux":
        vectors, first_steps = object_vectors(texts), FIRST_SHARE * run.recipe.steps

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        g = torch.Generator().manual_seed(step)
        if name == "schnell":
            return schnell_loss(model, *trajectories.batch(step, size), texts, g)
        batch = examples.batch(step, size)
        if name == "redux":
            return redux_loss(model, batch, texts, vectors, step >= first_steps, GUIDANCE, g)
        if name == "kontext":
            return reference_loss(model, batch, texts, g), {}
        if name == "hollow":  # at guidance 1, as LoRAs of FLUX.1 [dev] are trained
            return channel_loss(model, batch, texts, g, guidance=(1.0, 1.0)), {}
        return channel_loss(model, batch, texts, g), {}

    return loss


# ---------------------------------------------------------------- writing


def _shipped_as(name: str) -> ShippedModel:
    """Folder and sampling settings of a model; a style has the miniature's settings."""
    return SHIPPED["nano"]._replace(lora=LORAS[name]) if name in LORAS else FAMILY[f"nano-{name}"]


def write_model(name: str, model: nn.Module, weights: Path, base: Flux) -> Path:
    """Write a model where ``load`` looks for it: a transformer, Redux's two networks, or a LoRA for ``base``."""
    path = _shipped_as(name).folder(weights)
    if name in LORAS:
        save_file(lora_tensors(model.state_dict()), path / LORA_FILE, dtype=torch.bfloat16, overwrite=True)
    elif name in EXTRACTED:
        change = extract(model.state_dict(), base.state_dict(), EXTRACTED[name])
        save_file(change, path / LORA_FILE, dtype=torch.bfloat16, overwrite=True)
    elif name == "redux":
        encoder = model.vision_encoder.state_dict()
        save_file(encoder, path / "eye.safetensors", dtype=torch.bfloat16, overwrite=True)
        save_file(model.head.state_dict(), path / "model.safetensors", dtype=torch.bfloat16, overwrite=True)
    else:
        save_folder(model.state_dict(), path, model.config, dtype=torch.bfloat16, overwrite=True)
    print(f"wrote {path}")
    return path


def pipeline_with(name: str, model: nn.Module, pipe: FluxPipeline, path: Path) -> FluxPipeline:
    """``pipe`` with the model put in, rounded to bfloat16 as it ships, and sampled as ``load`` will."""
    model, pipe.defaults = model.to(torch.bfloat16).float().eval(), _shipped_as(name).sampling
    if name == "redux":
        pipe.redux = build_redux(model.vision_encoder, model.head)
    elif _shipped_as(name).lora:
        tensors = read(path / LORA_FILE)
        pipe.flux = widened(pipe.flux, lora_in_channels(tensors) or pipe.flux.config.in_channels)
        merge(pipe.flux, tensors)
    else:
        pipe.flux = model
    return pipe
