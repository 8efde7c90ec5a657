"""Notebook 07b: does it help that text and image have their own weights in a double-stream block?

Tiny flow transformers of four double-stream blocks and nothing else, trained from nothing on the same scenes (one or
two objects at 96 x 96 pixels), in the same order, for the same number of steps:

    separate   each stream has its own weights, as in FLUX
    shared     both streams use one set, so the blocks have half the parameters (the whole network 1/1.9)

Both need the same computation per step. Each is trained from several seeds.
They are compared by the training loss on 512 scenes that training never shows, at the same times and noises, and by the
judge, on one picture for each of 128 held-out prompts with guidance scale 3.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from evidence.intervals import difference, mean, share
from fluxedu.models.blocks import DoubleStreamBlock
from fluxedu.nano import networks
from fluxedu.nano.judge import judge
from fluxedu.nano.scenes import caption, render, sample_scene, to_tensor
from fluxedu.sampling.images import to_images
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack
from fluxedu.sampling.solvers import schedule
from training.data import Tokens
from training.flow import TextEncoders, add_noise, initialise
from training.loop import Recipe, Run, load_average

SIZE, GRID = (96, 96), (12, 12)  # pixels; cells of the latent
KINDS = ("separate", "shared")
RECIPE = Recipe(steps=1500, lr=2e-3, batch=24, warmup=100, decay=0.4, ema=0.995, muon=True)
POOL, HELD_OUT = 12288, 512
FOLDER = Path(gettempdir()) / "fluxedu-twins"


class SharedBlock(DoubleStreamBlock):
    """A double-stream block in which the text stream uses the image stream's weights."""

    txt_mod = property(lambda self: self.img_mod)
    txt_attn = property(lambda self: self.img_attn)
    txt_mlp = property(lambda self: self.img_mlp)

    def __init__(self, config: fe.models.FluxConfig):
        super().__init__(config)
        for name in ("txt_mod", "txt_attn", "txt_mlp"):
            del self._modules[name]


def make_flux(kind: str) -> fe.models.Flux:
    shape = {"hidden_size": 96, "num_heads": 3, "axes_dim": (4, 14, 14)}
    flux = fe.models.Flux(networks.FLUX.with_(depth=4, depth_single_blocks=0, **shape))
    if kind == "shared":
        flux.double_blocks = torch.nn.ModuleList(SharedBlock(flux.config) for _ in range(4))
    return initialise(flux)


@torch.no_grad()
def make_scenes(pipe, count: int, seed: int, held_out: bool) -> tuple[dict[str, Tensor], list]:
    """Latents and token ids of scenes, and each scene's sentence with its claim."""
    rng, tokens, texts, latents = np.random.default_rng(seed), Tokens(), [], []
    for start in range(0, count, 64):
        made = [sample_scene(rng, size=SIZE, count=int(rng.integers(1, 3)), held_out=held_out) for _ in range(64)]
        texts += [caption(scene, rng) for scene in made[: count - start]]
        latents.append(pipe.autoencoder.encode(to_tensor(np.stack([render(scene) for scene in made]))))
    t5_ids, clip_ids = tokens([text for text, _ in texts])
    return {"latents": pack(torch.cat(latents)[:count]), "t5": t5_ids, "clip": clip_ids}, texts


def velocity(flux, x: Tensor, t: Tensor, txt: Tensor, pooled: Tensor) -> Tensor:
    return flux(x, image_ids(*GRID), txt, text_ids(networks.TEXT_LENGTH), t, pooled)


def train(kind: str, seed: int, data: dict[str, Tensor], texts: TextEncoders) -> tuple[fe.models.Flux, float]:
    """The averaged network and the minutes of its training; an interrupted run goes on where it was."""
    torch.manual_seed(seed)
    run = Run(f"{kind}-{seed}", make_flux(kind), RECIPE, FOLDER)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        g = torch.Generator().manual_seed(1_000_000 * seed + step)  # the same batch, times and noise for every kind
        rows = torch.randint(len(data["latents"]), (RECIPE.batch,), generator=g)
        batch = {name: values[rows] for name, values in data.items()}
        x, t, target = add_noise(batch["latents"], g)
        value = (velocity(run.model, x, t, *texts.with_dropout(batch, 0.1, g)) - target).square().mean()
        return value, {}

    average = run.train(loss)
    return load_average(make_flux(kind), average), run.seconds / 60


@torch.no_grad()
def held_out_losses(flux, data: dict[str, Tensor], texts: TextEncoders) -> list[float]:
    """The loss of each scene, a mean over eight times with the same noises for every network."""
    g, losses = torch.Generator().manual_seed(0), torch.zeros(len(data["latents"]))
    txt, pooled = texts(data["t5"], data["clip"])
    for _ in range(8):
        x, t, target = add_noise(data["latents"], g)
        for rows in torch.arange(len(x)).split(128):
            error = velocity(flux, x[rows], t[rows], txt[rows], pooled[rows]) - target[rows]
            losses[rows] += error.square().mean((1, 2)) / 8
    return losses.tolist()


@torch.no_grad()
def verdicts(flux, pipe, data: dict[str, Tensor], claims: list, texts: TextEncoders, scale: float = 3.0) -> list:
    """The judge's verdict on one picture per prompt: 20 Euler steps with classifier-free guidance."""
    found = []
    empty_txt, empty_pooled = texts(texts.empty_t5, texts.empty_clip)
    for rows in torch.arange(len(claims)).split(32):
        txt, pooled = texts(data["t5"][rows], data["clip"][rows])
        x = torch.randn(len(rows), 36, 64, generator=torch.Generator().manual_seed(int(rows[0])))
        times = schedule(20, 36, ends=(np.log(3), np.log(3))).tolist()
        for t, t_next in zip(times, times[1:], strict=False):
            time_of_all = torch.full((len(rows),), t)
            v = velocity(flux, x, time_of_all, txt, pooled)
            shape = (len(rows), *empty_txt.shape[1:]), (len(rows), empty_pooled.shape[1])
            v_empty = velocity(flux, x, time_of_all, empty_txt.expand(shape[0]), empty_pooled.expand(shape[1]))
            x = x + (t_next - t) * (v_empty + scale * (v - v_empty))
        images = to_images(pipe.autoencoder.decode(unpack(x, *GRID)))
        found += [judge(image, claims[row]) for image, row in zip(images, rows.tolist(), strict=True)]
    return found


def run(samples: int = 2) -> dict:
    """``samples`` trainings of each kind; losses are compared scene by scene, with the seeds' losses averaged."""
    pipe = fe.load("nano-base")
    texts = TextEncoders(pipe.prompt_encoder.t5, pipe.prompt_encoder.clip)
    data, _ = make_scenes(pipe, POOL, 1, False)
    unseen, captions = make_scenes(pipe, HELD_OUT, 2, True)
    losses, found, minutes = {}, {}, {}
    for seed in range(samples):
        for kind in KINDS:
            began = time.monotonic()
            flux, spent = train(kind, seed, data, texts)
            minutes.setdefault(kind, []).append(spent)
            losses.setdefault(kind, []).append(held_out_losses(flux, unseen, texts))
            found.setdefault(kind, []).extend(verdicts(flux, pipe, unseen, [c for _, c in captions[:128]], texts))
            print(kind, seed, np.mean(losses[kind][-1]), f"{(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    means = {kind: np.mean(rows, 0) for kind, rows in losses.items()}
    return {
        kind: {
            "parameters": sum(p.numel() for p in make_flux(kind).parameters()),
            "parameters of the blocks": sum(p.numel() for p in make_flux(kind).double_blocks.parameters()),
            "minutes": [round(spent, 1) for spent in minutes[kind]],
            "loss on unseen scenes": mean(means[kind]),
            "loss of each seed": [float(np.mean(row)) for row in losses[kind]],
            "loss, compared with separate weights": difference(means[kind], means["separate"]),
            "colours right": share([ok for verdict in found[kind] for ok in verdict.colors]),
            "shapes right": share([ok for verdict in found[kind] for ok in verdict.forms]),
            "everything right": share([verdict.everything for verdict in found[kind]]),
        }
        for kind in KINDS
    }
