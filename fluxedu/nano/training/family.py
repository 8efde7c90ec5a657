"""The family, each member from the miniature that is there: ``fluxedu train --variant NAME``.

fill, canny, depth   more channels going in, at first unread: the new columns of ``img_in`` begin at zero
kontext              the reference's tokens behind the picture's own
redux                an eye and the head learn; the flow stays as it is: see redux.py
schnell              four steps learn to go where twenty of the teacher's went: see schnell.py
hollow               a style as a LoRA: see style.py

The guidance input of those that read a picture hears every strength and learns to ignore it: moving their velocity by
what the words change in the miniature (``(g - 1) * (v_text - v_empty)``) was tried, and put things elsewhere than the
control picture has them (at g = 3 55 % in place, at g = 1 86 %).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.checkpoints import extract, save_file, save_folder
from fluxedu.loading import FAMILY, LORA_FILE, LORAS, SHIPPED, Ours, load, nano_redux, widened, with_lora
from fluxedu.models.flux import Flux
from fluxedu.nano.family import BARS, sit
from fluxedu.nano.training.card import clock, write_member
from fluxedu.nano.training.flow import ALIGN, Texts, WithAlignment, faster, flow_of, misnamed, noisy, places, strengths
from fluxedu.nano.training.loop import Loss, Recipe, Run, fingerprint, mixed_precision, use_average
from fluxedu.nano.training.members import Examples, Shelf
from fluxedu.nano.training.redux import SEEING, HeadAtWork, redux_loss, spellings
from fluxedu.nano.training.rivals import RECIPES as RIVALS
from fluxedu.nano.training.schnell import Ways, ladder_loss, make_ways, without_guidance
from fluxedu.nano.training.style import adapted, lora_of
from fluxedu.sampling.conditions import reference_ids
from fluxedu.sampling.pipeline import FluxPipeline

CHANNELS = {"fill": 64 + 64 + 256, "canny": 64 + 64, "depth": 64 + 64}
STRENGTHS = (1.0, 5.0)
RECIPES = {
    "fill": Recipe(steps=1420, lr=1e-3, batch=32, warmup=50, decay=0.5, ema=0.99, muon=True),
    "canny": Recipe(steps=1500, lr=1e-3, batch=32, warmup=50, decay=0.5, ema=0.99, muon=True),
    "depth": Recipe(steps=500, lr=1e-3, batch=32, warmup=50, decay=0.5, ema=0.99, muon=True),
    "kontext": Recipe(steps=3000, lr=1.5e-3, batch=32, warmup=50, decay=0.5, ema=0.99, muon=True),
    "redux": Recipe(steps=3000, lr=2e-3, batch=32, warmup=100, decay=0.5, ema=0.99, muon=True),
    "hollow": Recipe(steps=1000, lr=2e-3, batch=32, warmup=20, decay=0.5, ema=0.98, weight_decay=0.0),
    "schnell": Recipe(steps=8000, lr=1e-3, batch=64, warmup=50, decay=0.6, ema=0.995, muon=True),
}
#: scenes of each shape; of schnell ways by the shard
EACH = {"fill": 640, "canny": 1600, "depth": 448, "kontext": 3200, "redux": 1280, "hollow": 256, "schnell": 420}
#: members that ship as the LoRA which leads to them, of this rank, as the official canny and depth do too
EXTRACTED = {"canny": 48, "depth": 48}
SEED = 66


def channel_loss(model: Flux, batch: Examples, texts: Texts, g: torch.Generator, between=STRENGTHS) -> Tensor:
    """Fill, canny, depth: what is given, if anything, stands in more channels of each token."""
    x_t, t, target = noisy(batch.latents, g)
    img_ids, txt_ids = places(*batch.cells)
    strength = strengths(len(t), between, g)
    reads = x_t if batch.given is None else torch.cat([x_t, batch.given], -1)
    with mixed_precision():
        txt, pooled = texts(batch.t5, batch.clip)
        velocity = model(reads, img_ids, txt, txt_ids, t, pooled, strength)
    return F.mse_loss(velocity.float(), target)


def reference_loss(model: WithAlignment, batch: Examples, texts: Texts, g: torch.Generator) -> Tensor:
    """Kontext: what is given stands behind the picture's tokens, in another frame.

    As in the miniature's own training a head must name, half way up, what will lie in each patch when the edit is done.
    """
    x_t, t, target = noisy(batch.latents, g)
    img_ids, txt_ids = places(*batch.cells)
    ids = torch.cat([img_ids, reference_ids(*batch.cells)])
    strength = strengths(len(t), STRENGTHS, g)
    with mixed_precision():
        txt, pooled = texts(batch.t5, batch.clip)
        velocity, read = model(torch.cat([x_t, batch.given], 1), ids, txt, txt_ids, t, pooled, strength)
    own = x_t.shape[1]
    return F.mse_loss(velocity[:, :own].float(), target) + ALIGN * misnamed(read[:, :own], batch.labels)


LOSSES: dict[str, Callable] = {
    "fill": channel_loss,
    "canny": channel_loss,
    "depth": channel_loss,
    "kontext": reference_loss,
    "hollow": partial(channel_loss, between=(1.0, 1.0)),  # guidance 1, as LoRAs of FLUX.1 [dev] are trained
}


def train_variant(name: str, folder: Path, resume: bool, ship_to: Path, scenes: int = 200) -> Path:
    """Train the member ``name`` from the shipped miniature, write it in bfloat16 into ``ship_to``, and judge that.

    The figures go into ``family.json`` and, where there is one, the model card beside it.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no member {name!r} to train; there are {', '.join([*RECIPES, *RIVALS])}.")
    pipe = load("nano")
    member = train(name, folder, pipe, resume)
    path = ship(name, member, ship_to, pipe.flux)
    figures = sit(name, seated(name, member, pipe, path), scenes)
    steps, minutes = clock(folder, name, RECIPES[name])
    cost = {"steps": steps, "batch": RECIPES[name].batch, "minutes": round(minutes)}
    about = {"guidance": pipe.defaults.guidance, "scenes": scenes, **cost}
    write_member(ship_to, name, {"figures": figures, "bars": BARS[name], **about})
    return path


def ship(name: str, member: nn.Module, to: Path, base: Flux) -> Path:
    """Write a member where ``load`` looks for it: a transformer, Redux's eye and head, a LoRA for ``base``."""
    path = _ours(name).folder(to)
    if name in LORAS:
        save_file(lora_of(member.state_dict()), path / LORA_FILE, dtype=torch.bfloat16, overwrite=True)
    elif name in EXTRACTED:
        change = extract(member.state_dict(), base.state_dict(), EXTRACTED[name])
        save_file(change, path / LORA_FILE, dtype=torch.bfloat16, overwrite=True)
    elif name == "redux":
        for part, file in ((member.eye, "eye.safetensors"), (member.head, "model.safetensors")):
            save_file(part.state_dict(), path / file, dtype=torch.bfloat16, overwrite=True)
    else:
        save_folder(member.state_dict(), path, member.config, dtype=torch.bfloat16, overwrite=True)
    print(f"wrote {path}")
    return path


def seated(name: str, member: nn.Module, pipe: FluxPipeline, path: Path) -> FluxPipeline:
    """The miniature with the member in its place, rounded as it ships and sampled as ``load`` will."""
    member, pipe.defaults = member.to(torch.bfloat16).float().eval(), _ours(name).sampling
    if name == "redux":
        pipe.redux = nano_redux(member.eye, member.head)
    elif _ours(name).lora:
        pipe.flux, _ = with_lora(pipe.flux, path / LORA_FILE)
    else:
        pipe.flux = member
    return pipe


def _ours(name: str) -> Ours:
    """A member's place, and how it is sampled; a style's is the miniature's own."""
    return SHIPPED["nano"]._replace(lora=LORAS[name]) if name in LORAS else FAMILY[f"nano-{name}"]


def train(name: str, folder: Path, pipe: FluxPipeline, resume: bool = True) -> nn.Module:
    """Train (or take the finished) member ``name``; ``pipe`` is the miniature with guidance."""
    torch.manual_seed(SEED)
    recipe, texts = RECIPES[name], Texts(pipe.prompt_encoder.t5, pipe.prompt_encoder.clip)
    model = _start(name, pipe).train()
    made_from = f"{fingerprint(pipe.flux, pipe.autoencoder)}, {EACH[name]} scenes"
    run = Run(name, model, recipe, folder, resume, made_from)
    if run.step < recipe.steps:
        loss = _loss(name, model, pipe, texts, run)
        faster(getattr(model, "flux", model))
        run.train(loss)
    return flow_of(run) if name == "kontext" else use_average(_start(name, pipe), run.average)


def _start(name: str, pipe: FluxPipeline) -> nn.Module:
    if name in LORAS:
        return adapted(pipe.flux)
    if name == "redux":
        return HeadAtWork(pipe.flux)
    if name == "schnell":
        made = without_guidance(pipe.flux, pipe.defaults.guidance)
    elif name == "kontext":
        made = WithAlignment(deepcopy(pipe.flux))
    else:
        made = widened(deepcopy(pipe.flux), CHANNELS[name])
    return made.requires_grad_(True)


def _loss(name: str, model: nn.Module, pipe: FluxPipeline, texts: Texts, run: Run) -> Loss:
    batch, draw = run.recipe.batch, lambda step: torch.Generator().manual_seed(step)
    if name == "schnell":
        all_ways = Ways(make_ways(EACH[name], run.folder, pipe, texts))
        return lambda step: ladder_loss(model, *all_ways.batch(step, batch), texts, draw(step))
    shelf = Shelf(name, SEED, EACH[name], pipe.autoencoder)
    if name == "redux":
        words, seeing = spellings(texts), SEEING * run.recipe.steps
        return lambda step: redux_loss(
            model, shelf.batch(step, batch), texts, words, step >= seeing, STRENGTHS, draw(step)
        )
    return lambda step: (LOSSES[name](model, shelf.batch(step, batch), texts, draw(step)), {})
