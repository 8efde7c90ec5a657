"""Two rivals from nothing, on one budget: a small Stable Diffusion and a FLUX. ``fluxedu train --variant sd``.

              sd                                     twin
    network   diffusers' UNet2DConditionModel        fluxedu's Flux, of the miniature's size
    reads     CLIP's tokens, by cross-attention      T5's tokens in joint attention, CLIP's pooled vector
    learns    the noise: DDPM (arXiv 2006.11239)     the velocity of a straight path (arXiv 2403.03206)

All else is the same: scenes, captions, text encoders, autoencoder, optimizer, batch, how often the caption is left
out, the head that must name what lies in each patch, and the minutes of one core. The steps are as many as fit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.checkpoints.save import save_file, save_folder, write_text
from fluxedu.loading import load
from fluxedu.models.flux import Flux
from fluxedu.nano import exam, networks
from fluxedu.nano.judge import judge
from fluxedu.nano.report import drawer
from fluxedu.nano.rivals import FILE, GUIDANCE, SD, UNET, StableDiffusion, schedule, unet
from fluxedu.nano.scenes import COLORS, FORMS
from fluxedu.nano.training.card import write_member
from fluxedu.nano.training.flow import (
    ALIGN,
    ALIGNED,
    DROPOUT,
    Texts,
    WithAlignment,
    flow_loss,
    flow_of,
    initialise,
    misnamed,
)
from fluxedu.nano.training.latents import Latents, make_shards
from fluxedu.nano.training.loop import Recipe, Run, fingerprint, mixed_precision, use_average
from fluxedu.sampling.pipeline import FluxPipeline

TWIN = "twin"
RECIPES = {
    SD: Recipe(steps=9500, lr=2e-3, batch=32, warmup=100, decay=0.4, ema=0.998, muon=True),
    TWIN: Recipe(steps=7260, lr=2e-3, batch=32, warmup=100, decay=0.4, ema=0.998, muon=True),
}
SHIPS_AS = {SD: FILE, TWIN: Path("transformer_twin")}
SHARDS = 14  # of 2,560 scenes each
OF_ALIGN = 1 / 3  # of the alignment's weight: the noise is easier to tell, its loss about a third
SEED = 88
STEPS = (4, 8, 20, 50)  # judged in, over the first prompts of the exam


class Aligned(nn.Module):
    """The U-Net, and a head that reads its middle, which has a cell where FLUX has a patch."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.unet = network
        self.read_head = nn.Linear(network.config.block_out_channels[-1], len(COLORS) + 1 + len(FORMS) + 1)
        network.mid_block.register_forward_hook(lambda module, given, out: setattr(self, "middle", out))

    def forward(self, *args) -> tuple[Tensor, Tensor]:
        noise = self.unet(*args).sample
        return noise, self.read_head(self.middle.flatten(2).transpose(1, 2))


def noise_loss(model: Aligned, batch: dict[str, Tensor], texts: Texts, g: torch.Generator, align: float):
    """What the U-Net says of the noise against the noise, and the alignment, as :func:`flow_loss` for FLUX."""
    x0 = batch["latents"]
    noise, drop = torch.randn(x0.shape, generator=g), torch.rand(len(x0), 1, generator=g) < DROPOUT
    t = torch.randint(1000, (len(x0),), generator=g)
    with mixed_precision():
        with torch.no_grad():
            words = texts.clip(torch.where(drop, texts.empty_clip, batch["clip"]))[0].float()
        predicted, read = model(schedule().add_noise(x0, noise, t), t, words)
    plain = F.mse_loss(predicted.float(), noise)
    named = misnamed(read, batch["labels"].flatten(2))
    return plain + OF_ALIGN * align * named, {"noise": float(plain.detach()), "named": float(named.detach())}


def train(name: str, folder: Path, pipe: FluxPipeline, resume: bool = True) -> tuple[nn.Module, Run]:
    """Train (or take the finished) rival ``name``, "sd" or "twin"; ``pipe`` gives the encoders and the autoencoder."""
    torch.manual_seed(SEED)
    recipe, texts = RECIPES[name], Texts(pipe.prompt_encoder.t5, pipe.prompt_encoder.clip)
    make_shards(SHARDS, folder, pipe.autoencoder)
    data = Latents(folder)
    model = Aligned(unet()) if name == SD else WithAlignment(initialise(Flux(networks.FLUX)))
    of_batch = noise_loss if name == SD else flow_loss
    run = Run(name, model, recipe, folder, resume, f"{fingerprint(pipe.autoencoder)}, {SHARDS} shards")

    def loss(step: int):
        align = ALIGN if step < ALIGNED * recipe.steps else 0.0
        return of_batch(model, data.batch(step, recipe.batch, SEED), texts, torch.Generator().manual_seed(step), align)

    run.train(loss)
    return (unet_of(run) if name == SD else flow_of(run)), run


def unet_of(run: Run) -> nn.Module:
    """The averaged U-Net of a run, without its head."""
    return use_average(unet(), {k[len("unet.") :]: v for k, v in run.average.items() if k.startswith("unet.")})


# ---------------------------------------------------------------- from the run to the card


def train_rival(name: str, folder: Path, resume: bool, ship_to: Path, prompts: int = 500, few: int = 200) -> Path:
    """Train a rival, write it in bfloat16 into ``ship_to``, let it sit the exam, and note that in ``rivals.json``."""
    pipe = load("nano-base")
    network, run = train(name, folder, pipe, resume)
    path = Path(ship_to) / SHIPS_AS[name]
    if name == SD:
        save_file(network.state_dict(), path, dtype=torch.bfloat16, overwrite=True)
        write_text(
            path.with_name("config.json"), json.dumps({"_class_name": "UNet2DConditionModel"} | UNET, indent=2) + "\n"
        )
    else:
        save_folder(network.state_dict(), path, network.config, dtype=torch.bfloat16, overwrite=True)
    print(f"wrote {path}")
    entry = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": run.step,
        "batch": run.recipe.batch,
        "minutes": round(run.seconds / 60),
        **examined(seated(rounded(network), pipe), prompts, few),
    }
    write_member(Path(ship_to), name, entry, "rivals.json")
    return path


def rounded(network: nn.Module) -> nn.Module:
    """The network with its weights as they ship, in float32."""
    network.load_state_dict({name: value.to(torch.bfloat16).float() for name, value in network.state_dict().items()})
    return network


def seated(network: nn.Module, pipe: FluxPipeline) -> FluxPipeline | StableDiffusion:
    """A rival with the encoders and the autoencoder of the miniature, ready to draw."""
    if not isinstance(network, Flux):
        return StableDiffusion(network, pipe.prompt_encoder, pipe.autoencoder)
    pipe.flux = network.eval()
    return pipe


def examined(pipe: FluxPipeline | StableDiffusion, prompts: int, few: int) -> dict:
    """The exam in 20 steps, and the share wholly right in fewer and more, of the first ``few`` prompts."""
    whole = exam.sit(drawer(pipe, 20, GUIDANCE), prompts)
    sits = {steps: exam.sit(drawer(pipe, steps, GUIDANCE), few, varied=0)["rows"] for steps in STEPS}
    by_steps = {n: r["everything"] for n, r in sits.items()}
    return {"guidance": GUIDANCE, "exam": whole, "few": few, "by_steps": by_steps, "sides": sides(pipe, few)}


def sides(pipe: FluxPipeline | StableDiffusion, prompts: int) -> dict[str, int]:
    """Of so many held-out prompts: how many relations hold, and how many hold the other way round."""
    draw, found = drawer(pipe, 20, GUIDANCE), {"relations": 0, "asked": 0, "opposite": 0}
    for question in exam.questions(prompts):
        claim = question.claim
        turned = replace(claim, relations=tuple((j, name, i) for i, name, j in claim.relations))
        image = draw([question.prompt], [question.seed], question.size)[0]
        found["relations"] += len(claim.relations)
        for side, of in (("asked", claim), ("opposite", turned)):
            found[side] += sum(judge(image, of).relations)
    return found
