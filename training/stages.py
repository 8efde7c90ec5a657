"""Every stage in order, and what ships in the end: ``fluxedu train --all``.

    autoencoder -> t5 -> clip -> latents -> flow -> dev -> ship -> card

A finished stage is not run again; an interrupted one continues.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from fluxedu.checkpoints import save_file, save_folder
from fluxedu.files import write_text
from fluxedu.loading import NANO_SHIFT
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.config import Sampling
from fluxedu.models.flux import Flux
from fluxedu.models.t5 import T5Encoder
from fluxedu.nano import networks
from fluxedu.nano.exam import run_exam
from fluxedu.nano.networks import CLIPModel
from fluxedu.nano.tokenizers import save_tokenizers
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import PromptEncoder, Tokenizer
from training import autoencoder, clip, data, flow, t5
from training.card import evaluate_all, runs_table, write_card
from training.files import fingerprint

SHARDS = 35  # of 2,560 scenes each
SAMPLE_PROMPTS = 42  # drawn while the flow trains
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": NANO_SHIFT[0],
    "max_image_seq_len": 4096,
    "max_shift": NANO_SHIFT[1],
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


class Stages:
    """The results of the stages, each computed (or loaded, if it is finished) when it is first needed.

    A stage in ``restart`` starts from scratch; every other one continues from its saved state.
    """

    def __init__(self, folder: Path, restart: list[str], ship_to: Path):
        self.folder, self.restart, self.ship_to = folder, restart, ship_to

    @cached_property
    def autoencoder(self) -> AutoEncoder:
        return autoencoder.train(self.folder, "autoencoder" not in self.restart)

    @cached_property
    def t5(self) -> T5Encoder:
        return t5.train(self.folder, "t5" not in self.restart)

    @cached_property
    def clip(self) -> CLIPModel:
        return clip.train(self.folder, "clip" not in self.restart)

    @cached_property
    def latents(self) -> bool:
        data.make_shards(SHARDS, self.folder, self.autoencoder, "latents" not in self.restart)
        return True

    @cached_property
    def flow(self) -> Flux:
        assert self.latents
        made_from = fingerprint(self.autoencoder, self.t5, self.clip.text)
        report = sample_report(self.folder / "flow", self.autoencoder, self.t5, self.clip.text)
        return flow.train(self.folder, self.t5, self.clip.text, report, made_from, "flow" not in self.restart)

    @cached_property
    def dev(self) -> Flux:
        teacher = self.flow
        report = sample_report(self.folder / "flow-dev", self.autoencoder, self.t5, self.clip.text)
        return flow.distill(self.folder, teacher, self.t5, self.clip.text, report, "dev" not in self.restart)

    @cached_property
    def ship(self) -> Path:
        """Write the finished weights in bfloat16, in the layout of the official repositories."""
        flows = {"transformer": self.dev, "transformer_base": self.flow}
        write_weights(self.ship_to, self.autoencoder, self.t5, self.clip, flows)
        print(f"wrote {self.ship_to}")
        return self.ship_to

    @cached_property
    def card(self) -> bool:
        scenes = data.SHARD * len(list((self.folder / "latents").glob("*.safetensors")))
        accuracy = clip.retrieval_accuracy(self.clip)
        write_card(self.ship, evaluate_all(self.ship), runs_table(self.folder), scenes, accuracy)
        return True


STAGES = ("autoencoder", "t5", "clip", "latents", "flow", "dev", "ship", "card")


def run_stages(names: list[str], folder: Path, resume: bool, ship_to: Path) -> None:
    """Run the named stages, and the earlier ones they need.

    Without ``resume`` the named stages start from scratch; the ones they need are still loaded or continued.
    """
    torch.manual_seed(0)
    stages = Stages(Path(folder), [] if resume else names, Path(ship_to))
    for name in names:
        getattr(stages, name)


def sample_report(
    folder: Path, autoencoder: AutoEncoder, t5: T5Encoder, clip: CLIPTextEncoder, steps: int = 20
) -> flow.Report:
    """``report(flux, step)``: sample held-out prompts with ``flux``, save the contact sheet, print the judge's rows."""
    folder = Path(folder)
    save_tokenizers(folder)
    prompt_encoder = PromptEncoder(
        Tokenizer(folder / "tokenizer", "<|endoftext|>", "<|endoftext|>", networks.TEXT_LENGTH, truncate=True),
        clip,
        Tokenizer(folder / "tokenizer_2", "<pad>", "</s>", networks.TEXT_LENGTH, truncate=False),
        t5,
    )
    settings = Sampling(steps, 3.5, networks.TEXT_LENGTH, True, NANO_SHIFT)

    def report(flux: Flux, step: int) -> dict:
        pipe = FluxPipeline(prompt_encoder, flux, autoencoder, settings, 128)
        drawn: list[Image.Image] = []

        def sample(prompts: list[str], seeds: list[int], size: tuple[int, int]) -> list[Image.Image]:
            height, width = size
            images = pipe(prompts, seed=seeds, height=height, width=width, trajectory=False, progress=False).images
            drawn.extend(images)
            return images

        figures = run_exam(sample, SAMPLE_PROMPTS, diversity_prompts=0)
        contact_sheet(drawn).save(folder / f"samples-{step:06d}.png")
        rows = " · ".join(f"{k} {v['percent']:.0f}" for k, v in figures["rows"].items() if v["percent"] is not None)
        print(f"\nstep {step}: {rows} · quality {figures['quality']:.3f}", flush=True)
        return figures

    return report


def contact_sheet(images: list[Image.Image], columns: int = 10, cell: int = 196) -> Image.Image:
    """The images side by side on grey."""
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * cell, rows * cell), (160, 160, 160))
    for i, image in enumerate(images):
        page.paste(image, ((i % columns) * cell + 2, (i // columns) * cell + 2))
    return page


def write_weights(
    target: Path, vae: AutoEncoder, t5_encoder: T5Encoder, clip_model: CLIPModel, flows: dict[str, Flux]
) -> None:
    """Write the folder that ``fluxedu.load`` and diffusers' ``FluxPipeline.from_pretrained`` both open."""
    parts = {"vae": vae, "text_encoder": clip_model.text, "text_encoder_2": t5_encoder, **flows}
    for name, network in parts.items():
        save_folder(network.state_dict(), target / name, network.config, dtype=torch.bfloat16, overwrite=True)
    image_tower = {k: v for k, v in clip_model.state_dict().items() if not k.startswith("text.")}
    save_file(image_tower, target / "image_tower" / "model.safetensors", dtype=torch.bfloat16, overwrite=True)
    for path, values in (("scheduler/scheduler_config.json", SCHEDULER), ("model_index.json", INDEX)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        write_text(target / path, json.dumps(values, indent=2) + "\n")
    save_tokenizers(target)
