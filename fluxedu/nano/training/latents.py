"""Scenes as the flow sees them, made once: latents, captions as tokens, and what lies in each patch.

Shards of 2,560 scenes, each of one shape (height, width), are written as they are made, so that
making them can stop and go on, and a later stage can ask for more. The last ones are of fuller scenes and
of no square: two or three things, and long pictures, are what the flow gets wrong longest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from fluxedu.files import atomic_path
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.nano import networks
from fluxedu.nano.scenes import ASPECTS, COLORS, FORMS, Scene, caption, render, sample_scene, thing_map
from fluxedu.nano.tokenizers import clip_tokenizer, t5_tokenizer
from fluxedu.nano.training.autoencoder import to_tensor
from fluxedu.nano.training.loop import fingerprint, mixed_precision, told_by

SEED = 44
SHARD = 2560
CAPTIONS = 4  # ways each scene is described
#: every second shard is square
ORDER = tuple(a for other in ASPECTS[1:] for a in (ASPECTS[0], other))
FULLER_FROM = 27  # this shard
FULLER = (0.15, 0.4, 0.45)  # how often a fuller scene has one, two, three things


def draw_scene(rng: np.random.Generator, index: int) -> Scene:
    """A scene for shard ``index``, in the shape that all of the shard have."""
    if index < FULLER_FROM:
        return sample_scene(rng, size=ORDER[index % len(ORDER)])
    return sample_scene(rng, size=ASPECTS[1:][index % 6], count=int(rng.choice([1, 2, 3], p=FULLER)))


def patch_labels(scene: Scene, cells: tuple[int, int] | None = None) -> np.ndarray:
    """What lies in each patch: uint8 ``[2, rows, columns]``, colour and form, 0 for the ground.

    Patches of 16 x 16 pixels; or as many as ``cells`` says, of the picture drawn at 16 pixels for each.
    """
    owner = thing_map(scene)
    rows, cols = cells or (scene.height // 16, scene.width // 16)
    y, x = (np.arange(16 * n) * (length / (16 * n)) for n, length in ((rows, scene.height), (cols, scene.width)))
    owner = owner[y.astype(int)][:, x.astype(int)]
    blocks = owner.reshape(rows, 16, cols, 16)
    shares = np.stack([(blocks == i).mean(axis=(1, 3)) for i in range(len(scene.things))])
    most, covered = shares.argmax(0), shares.max(0) > 0.06
    looks = np.array([(list(COLORS).index(t.color) + 1, FORMS.index(t.form) + 1) for t in scene.things], np.uint8)
    return (looks[most] * covered[..., None]).transpose(2, 0, 1)


class Tokens:
    """Captions to the ids both encoders want, padded to the length they are always given."""

    def __init__(self):
        self.t5, self.clip = t5_tokenizer(), clip_tokenizer()

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        pad = dict(padding="max_length", max_length=networks.TEXT_LENGTH, truncation=True, return_tensors="pt")
        return self.t5(texts, **pad).input_ids, self.clip(texts, **pad).input_ids


@torch.no_grad()
def make_shard(index: int, autoencoder: AutoEncoder, tokens: Tokens, size: int = SHARD) -> dict[str, Tensor]:
    """Shard ``index``: latents f16 ``[S, 16, h, w]``, ids ``[S, CAPTIONS, L]``, labels ``[S, 2, h/2, w/2]``."""
    rng = np.random.default_rng([SEED, index])
    latents, labels, texts = [], [], []
    for _ in range(size // 32):
        scenes = [draw_scene(rng, index) for _ in range(32)]
        images = to_tensor(np.stack([render(s) for s in scenes]))
        with mixed_precision():
            latents.append(autoencoder.encode(images).half())
        labels += [patch_labels(s) for s in scenes]
        texts += [caption(s, rng)[0] for s in scenes for _ in range(CAPTIONS)]
    t5, clip = tokens(texts)
    return {
        "latents": torch.cat(latents).contiguous(),
        "labels": torch.from_numpy(np.ascontiguousarray(np.stack(labels))),
        "t5": t5.to(torch.int16).unflatten(0, (-1, CAPTIONS)),
        "clip": clip.to(torch.int16).unflatten(0, (-1, CAPTIONS)),
    }


def shard_path(folder: Path, index: int) -> Path:
    return Path(folder) / "latents" / f"{index:04d}.safetensors"


def make_shards(count: int, folder: Path, autoencoder: AutoEncoder, resume: bool = True) -> None:
    """Make what is missing of the first ``count`` shards, or was made by another autoencoder."""
    made_from = fingerprint(autoencoder)
    there = lambda path: resume and path.exists() and told_by(path).get("made_from") == made_from  # noqa: E731
    missing = [i for i in range(count) if not there(shard_path(folder, i))]
    if not missing:
        return
    tokens = Tokens()
    for index in tqdm(missing, desc="latents"):
        with atomic_path(shard_path(folder, index), overwrite=True) as part:
            save_file(make_shard(index, autoencoder, tokens), part, {"made_from": made_from})


class Latents:
    """Every shard that is there, in memory; ``batch(step)`` takes one shape at a time."""

    def __init__(self, folder: Path):
        paths = sorted((Path(folder) / "latents").glob("*.safetensors"))
        self.shards = [load_file(p) for p in paths]

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        """Random scenes of one shard with a random caption each, told by (seed, step) and how many shards there are."""
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        shard = self.shards[int(torch.randint(len(self.shards), (1,), generator=g))]
        rows = torch.randint(len(shard["latents"]), (size,), generator=g)
        which = torch.randint(CAPTIONS, (size,), generator=g)
        return {
            "latents": shard["latents"][rows].float(),
            "labels": shard["labels"][rows].long(),
            "t5": shard["t5"][rows, which].long(),
            "clip": shard["clip"][rows, which].long(),
        }
