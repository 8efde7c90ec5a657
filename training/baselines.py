"""Two models trained from scratch on the same budget, for comparison. ``fluxedu train --variant sd`` or ``twin``.

              sd                                     twin
    network   diffusers' UNet2DConditionModel        fluxedu's Flux, of the miniature's size
    text      CLIP's tokens, by cross-attention      T5's tokens in joint attention, CLIP's pooled vector
    target    the noise: DDPM (arXiv 2006.11239)     the velocity of a straight path (arXiv 2403.03206)

Everything else is the same: scenes, captions, text encoders, autoencoder, optimiser, batch size, caption dropout, the
head that predicts patch labels, and the minutes on one core. The number of steps is what fits into these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.arena.stable_diffusion import FILE, GUIDANCE, SD, UNET, StableDiffusion, build_unet, noise_schedule
from fluxedu.checkpoints import save_file, save_folder
from fluxedu.files import write_text
from fluxedu.loading import load
from fluxedu.models.flux import Flux
from fluxedu.nano import exam, networks
from fluxedu.nano.judge import judge
from fluxedu.sampling.pipeline import FluxPipeline
from training.card import add_entry
from training.data import Latents, make_shards
from training.files import fingerprint
from training.flow import (
    ALIGN_SHARE,
    ALIGN_WEIGHT,
    CAPTION_DROPOUT,
    PATCH_CLASSES,
    AlignedFlow,
    TextEncoders,
    averaged_flow,
    flow_loss,
    initialise,
    patch_label_loss,
)  # fmt: skip
from training.loop import Recipe, Run, load_average, mixed_precision

TWIN = "twin"
RECIPES = {
    SD: Recipe(steps=9500, lr=2e-3, batch=32, warmup=100, decay=0.4, ema=0.998, muon=True),
    TWIN: Recipe(steps=7260, lr=2e-3, batch=32, warmup=100, decay=0.4, ema=0.998, muon=True),
}
PATHS = {SD: FILE, TWIN: Path("transformer_twin")}  # inside the folder of weights
SHARDS = 14  # of 2,560 scenes each
SD_ALIGN_FACTOR = 1 / 3  # on the alignment's weight: the noise is easier to predict, its loss about a third
SEED = 88
STEPS = (4, 8, 20, 50)  # numbers of sampling steps that are compared


class AlignedUNet(nn.Module):
    """The U-Net and the head that predicts patch labels from its middle block, which has one cell per FLUX patch."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        self.label_head = nn.Linear(unet.config.block_out_channels[-1], sum(PATCH_CLASSES))
        unet.mid_block.register_forward_hook(lambda module, inputs, output: setattr(self, "hidden", output))

    def forward(self, *args) -> tuple[Tensor, Tensor]:
        noise = self.unet(*args).sample
        return noise, self.label_head(self.hidden.flatten(2).transpose(1, 2))


def noise_loss(
    model: AlignedUNet, batch: dict[str, Tensor], texts: TextEncoders, g: torch.Generator, align: float
) -> tuple[Tensor, dict[str, float]]:
    """Squared error of the predicted noise plus the alignment, the counterpart of :func:`training.flow.flow_loss`."""
    x0 = batch["latents"]
    noise, drop = torch.randn(x0.shape, generator=g), torch.rand(len(x0), 1, generator=g) < CAPTION_DROPOUT
    t = torch.randint(1000, (len(x0),), generator=g)
    with mixed_precision():
        with torch.no_grad():
            txt = texts.clip(torch.where(drop, texts.empty_clip, batch["clip"]))[0].float()
        predicted, logits = model(noise_schedule().add_noise(x0, noise, t), t, txt)
    error = F.mse_loss(predicted.float(), noise)
    labels = patch_label_loss(logits, batch["labels"].flatten(2))
    values = {"noise": float(error.detach()), "labels": float(labels.detach())}
    return error + SD_ALIGN_FACTOR * align * labels, values


def train(name: str, folder: Path, pipe: FluxPipeline, resume: bool = True) -> tuple[nn.Module, Run]:
    """Train "sd" or "twin", or load it if its run is finished. Text encoders and autoencoder are those of ``pipe``."""
    torch.manual_seed(SEED)
    make_shards(SHARDS, folder, pipe.autoencoder)
    if name == SD:
        model, loss_on_batch = AlignedUNet(build_unet()), noise_loss
    else:
        model, loss_on_batch = AlignedFlow(initialise(Flux(networks.FLUX))), flow_loss
    run = train_on_latents(name, model, loss_on_batch, RECIPES[name], folder, pipe, resume)
    if name == TWIN:
        return averaged_flow(run), run
    weights = {k.removeprefix("unet."): v for k, v in run.average.items() if k.startswith("unet.")}
    return load_average(build_unet(), weights), run


def train_on_latents(
    name: str, model: nn.Module, loss_on_batch: Callable, recipe: Recipe, folder: Path, pipe: FluxPipeline,
    resume: bool, seed: int = SEED,
) -> Run:  # fmt: skip
    """The run ``name`` on the shards in ``folder``: what the baselines, and the models of flux2.py, have in common."""
    texts, data = TextEncoders(pipe.prompt_encoder.t5, pipe.prompt_encoder.clip), Latents(folder)
    run = Run(name, model, recipe, folder, resume, f"{fingerprint(pipe.autoencoder)}, {SHARDS} shards")

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        align = ALIGN_WEIGHT if step < ALIGN_SHARE * recipe.steps else 0.0
        batch = data.batch(step, recipe.batch, seed)
        return loss_on_batch(model, batch, texts, torch.Generator().manual_seed(step), align)

    run.train(loss)
    return run


def round_as_shipped(network: nn.Module) -> None:
    """Round the weights to bfloat16, in which they are written."""
    network.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in network.state_dict().items()})


def budget(network: nn.Module, run: Run) -> dict[str, int]:
    """What the figures of a trained model say of its training."""
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": run.step,
        "batch": run.recipe.batch,
        "minutes": round(run.seconds / 60),
    }


def train_baseline(name: str, folder: Path, resume: bool, ship_to: Path, prompts: int = 500, few: int = 200) -> Path:
    """Train "sd" or "twin", write it in bfloat16 into ``ship_to``, and note its exam in ``baselines.json`` there."""
    pipe = load("nano-base")
    network, run = train(name, folder, pipe, resume)
    path = Path(ship_to) / PATHS[name]
    if name == SD:
        save_file(network.state_dict(), path, dtype=torch.bfloat16, overwrite=True)
        config = {"_class_name": "UNet2DConditionModel"} | UNET
        write_text(path.with_name("config.json"), json.dumps(config, indent=2) + "\n")
    else:
        save_folder(network.state_dict(), path, network.config, dtype=torch.bfloat16, overwrite=True)
    print(f"wrote {path}")
    round_as_shipped(network)
    entry = budget(network, run) | examine(pipeline_with(network, pipe), prompts, few)
    add_entry(Path(ship_to), name, entry, "baselines.json")
    return path


def pipeline_with(network: nn.Module, pipe: FluxPipeline) -> FluxPipeline | StableDiffusion:
    """The network with the text encoders and the autoencoder of ``pipe``."""
    if not isinstance(network, Flux):
        return StableDiffusion(network, pipe.prompt_encoder, pipe.autoencoder)
    pipe.flux = network.eval()
    return pipe


def examine(pipe: FluxPipeline | StableDiffusion, prompts: int, few: int) -> dict:
    """The exam in 20 steps; and on its first ``few`` prompts, what other numbers of steps give."""
    whole = exam.run_exam(exam.batch_sampler(pipe, 20, GUIDANCE), prompts)
    by_steps = {}
    for steps in STEPS:
        sampler = exam.batch_sampler(pipe, steps, GUIDANCE)
        by_steps[steps] = exam.run_exam(sampler, few, diversity_prompts=0)["rows"]["everything"]
    return {"guidance": GUIDANCE, "exam": whole, "few": few, "by_steps": by_steps, "sides": count_sides(pipe, few)}


def count_sides(pipe: FluxPipeline | StableDiffusion, prompts: int) -> dict[str, int]:
    """In images of held-out prompts: the number of relations, how many hold, and how many hold the other way round."""
    sample, counts = exam.batch_sampler(pipe, 20, GUIDANCE), {"relations": 0, "asked": 0, "opposite": 0}
    for question in exam.questions(prompts):
        claim = question.claim
        reversed_claim = replace(claim, relations=tuple((j, name, i) for i, name, j in claim.relations))
        image = sample([question.prompt], [question.seed], question.size)[0]
        counts["relations"] += len(claim.relations)
        counts["asked"] += sum(judge(image, claim).relations)
        counts["opposite"] += sum(judge(image, reversed_claim).relations)
    return counts
