"""Every stage in order, and what ships in the end: ``fluxedu train --all``.

    autoencoder -> t5 -> clip -> latents -> flow -> dev -> ship -> card

A stage whose result is there is not run again; a stage that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch

from fluxedu.checkpoints.save import save_file, save_folder, write_text
from fluxedu.loading import NANO_SHIFT
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.flux import Flux
from fluxedu.models.t5 import T5Encoder
from fluxedu.nano.tokenizers import save_tokenizers
from fluxedu.nano.training import autoencoder, clip, flow, latents, t5
from fluxedu.nano.training.card import hours, judged, write_card
from fluxedu.nano.training.loop import fingerprint
from fluxedu.nano.training.samples import reporter

SHARDS = 35  # of 2,560 scenes each
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
    """The results of the stages, each made (or found finished) when first asked for.

    A stage in ``anew`` begins anew, whatever is there; every other goes on from what is.
    """

    def __init__(self, folder: Path, anew: list[str], ship_to: Path):
        self.folder, self.anew, self.ship_to = folder, anew, ship_to

    @cached_property
    def autoencoder(self) -> AutoEncoder:
        return autoencoder.train(self.folder, "autoencoder" not in self.anew)

    @cached_property
    def t5(self) -> T5Encoder:
        return t5.train(self.folder, "t5" not in self.anew)

    @cached_property
    def clip(self) -> clip.CLIP:
        return clip.train(self.folder, "clip" not in self.anew)

    @cached_property
    def latents(self) -> bool:
        latents.make_shards(SHARDS, self.folder, self.autoencoder, "latents" not in self.anew)
        return True

    @cached_property
    def flow(self) -> Flux:
        assert self.latents
        made_from = fingerprint(self.autoencoder, self.t5, self.clip.text)
        report = self._reporter("flow")
        return flow.train(self.folder, self.t5, self.clip.text, report, made_from, "flow" not in self.anew)

    @cached_property
    def dev(self) -> Flux:
        teacher, report = self.flow, self._reporter("flow-dev")
        return flow.distill(self.folder, teacher, self.t5, self.clip.text, report, "dev" not in self.anew)

    def _reporter(self, name: str) -> flow.Report:
        return reporter(self.folder / name, self.autoencoder, self.t5, self.clip.text)

    @cached_property
    def ship(self) -> Path:
        """Write the finished weights, bfloat16, in the official repositories' layout."""
        write_weights(
            self.ship_to, self.autoencoder, self.t5, self.clip, {"transformer": self.dev, "transformer_base": self.flow}
        )
        print(f"wrote {self.ship_to}")
        return self.ship_to

    @cached_property
    def card(self) -> bool:
        scenes = latents.SHARD * len(list((self.folder / "latents").glob("*.safetensors")))
        write_card(self.ship, judged(self.ship), hours(self.folder), scenes, clip.retrieval(self.clip))
        return True


STAGES = ("autoencoder", "t5", "clip", "latents", "flow", "dev", "ship", "card")


def run_stages(names: list[str], folder: Path, resume: bool, ship_to: Path) -> None:
    """Run the named stages; what they need of earlier ones is made on the way.

    Without ``resume`` the named stages begin anew; what they need is still taken as it is.
    """
    torch.manual_seed(0)
    stages = Stages(Path(folder), [] if resume else names, Path(ship_to))
    for name in names:
        getattr(stages, name)


def _json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_weights(
    target: Path, vae: AutoEncoder, t5_encoder: T5Encoder, towers: clip.CLIP, flows: dict[str, Flux]
) -> None:
    """The folder that ``fluxedu.load`` and diffusers' ``FluxPipeline.from_pretrained`` both open."""
    parts = {"vae": vae, "text_encoder": towers.text, "text_encoder_2": t5_encoder, **flows}
    for name, network in parts.items():
        save_folder(network.state_dict(), target / name, network.config, dtype=torch.bfloat16, overwrite=True)
    towers_only = {k: v for k, v in towers.state_dict().items() if not k.startswith("text.")}
    save_file(towers_only, target / "image_tower" / "model.safetensors", dtype=torch.bfloat16, overwrite=True)
    _json(target / "scheduler" / "scheduler_config.json", SCHEDULER)
    _json(target / "model_index.json", INDEX)
    save_tokenizers(target)
