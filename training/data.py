"""Training data of the flows: scenes as latents, captions as token ids, and a label for every patch.

Latents      shards of 2,560 scenes on disk, for the flow itself and the baselines
Examples     scenes in memory with what a model of the family reads besides the prompt (see edits.py):

    fill     the image with a hole, and the mask       canny    the outlines of the objects
    kontext  the image before an edit                  depth    the objects in grey, larger is nearer
    redux    the image, for its vision encoder         hollow   nothing: the target image is drawn in another style
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from fluxedu.files import atomic_path
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.nano import networks
from fluxedu.nano.scenes import (
    ASPECTS,
    COLORS,
    FORMS,
    Scene,
    caption,
    depth_map,
    edge_map,
    object_map,
    render,
    sample_scene,
    to_tensor,
)  # fmt: skip
from fluxedu.nano.tokenizers import clip_tokenizer, t5_tokenizer
from fluxedu.sampling.conditions import fill_channels
from fluxedu.sampling.latents import pack
from training.edits import EDIT_WEIGHTS, random_mask, sample_edit
from training.files import fingerprint, is_made_from, read_file
from training.loop import mixed_precision

SEED = 44
SHARD = 2560  # scenes per shard
CAPTIONS = 4  # captions per scene
#: image sizes by shard; every second shard is square
SHARD_SIZES = tuple(size for other in ASPECTS[1:] for size in (ASPECTS[0], other))
#: from this shard on, more objects and no squares: several objects, and elongated images, take longest to learn
CROWDED_FROM = 27
CROWDED_COUNTS = (0.15, 0.4, 0.45)  # how often a scene of these shards has one, two, three objects
FAMILY_COUNTS = (0.2, 0.45, 0.35)  # the same for the examples of the family
OUTLINE = 4.0  # pixels; line width of the style "hollow"


class Tokens:
    """Captions to padded ids for T5 and for CLIP, each ``[B, TEXT_LENGTH]``."""

    def __init__(self):
        self.t5, self.clip = t5_tokenizer(), clip_tokenizer()

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        padding = {"padding": "max_length", "max_length": networks.TEXT_LENGTH, "truncation": True}
        t5, clip = (encode(texts, **padding, return_tensors="pt") for encode in (self.t5, self.clip))
        return t5.input_ids, clip.input_ids


def patch_labels(scene: Scene, grid: tuple[int, int] | None = None) -> np.ndarray:
    """The object in each patch as uint8 ``[2, rows, columns]``: colour and form, both from 1; 0 is background.

    A patch is 16 x 16 pixels. With ``grid`` (rows, columns), the image is first resampled to that many patches.
    """
    owner = object_map(scene)
    rows, cols = grid or (scene.height // 16, scene.width // 16)
    y, x = (np.arange(16 * n) * (length / (16 * n)) for n, length in ((rows, scene.height), (cols, scene.width)))
    owner = owner[y.astype(int)][:, x.astype(int)]
    patches = owner.reshape(rows, 16, cols, 16)
    shares = np.stack([(patches == i).mean(axis=(1, 3)) for i in range(len(scene.objects))])
    largest, covered = shares.argmax(0), shares.max(0) > 0.06
    labels = np.array([(list(COLORS).index(t.color) + 1, FORMS.index(t.form) + 1) for t in scene.objects], np.uint8)
    return (labels[largest] * covered[..., None]).transpose(2, 0, 1)


# ---------------------------------------------------------------- shards on disk


def shard_scene(rng: np.random.Generator, index: int) -> Scene:
    """A random scene for shard ``index``, in the size that all scenes of the shard have."""
    if index < CROWDED_FROM:
        return sample_scene(rng, size=SHARD_SIZES[index % len(SHARD_SIZES)])
    return sample_scene(rng, size=ASPECTS[1:][index % 6], count=int(rng.choice([1, 2, 3], p=CROWDED_COUNTS)))


@torch.no_grad()
def make_shard(index: int, autoencoder: AutoEncoder, tokens: Tokens, size: int = SHARD) -> dict[str, Tensor]:
    """Shard ``index``: latents f16 ``[S, 16, h, w]``, ids ``[S, CAPTIONS, L]``, labels ``[S, 2, h/2, w/2]``."""
    rng = np.random.default_rng([SEED, index])
    latents, labels, texts = [], [], []
    for _ in range(size // 32):
        scenes = [shard_scene(rng, index) for _ in range(32)]
        images = to_tensor(np.stack([render(scene) for scene in scenes]))
        with mixed_precision():
            latents.append(autoencoder.encode(images).half())
        labels += [patch_labels(scene) for scene in scenes]
        texts += [caption(scene, rng)[0] for scene in scenes for _ in range(CAPTIONS)]
    t5, clip = tokens(texts)
    return {
        "latents": torch.cat(latents).contiguous(),
        "labels": torch.from_numpy(np.ascontiguousarray(np.stack(labels))),
        "t5": t5.to(torch.int16).unflatten(0, (-1, CAPTIONS)),
        "clip": clip.to(torch.int16).unflatten(0, (-1, CAPTIONS)),
    }


def make_shards(count: int, folder: Path, autoencoder: AutoEncoder, resume: bool = True) -> None:
    """Write those of the first ``count`` shards that are missing or were made with another autoencoder."""
    made_from = fingerprint(autoencoder)
    paths = [Path(folder) / "latents" / f"{index:04d}.safetensors" for index in range(count)]

    def is_current(path: Path) -> bool:
        return is_made_from(path, made_from, ("latents", "labels", "t5", "clip")) and resume

    missing = [index for index, path in enumerate(paths) if not is_current(path)]
    if not missing:
        return
    tokens = Tokens()
    for index in tqdm(missing, desc="latents"):
        with atomic_path(paths[index], overwrite=True) as part:
            save_file(make_shard(index, autoencoder, tokens), part, {"made_from": made_from})


class Latents:
    """All shards of a folder, in memory."""

    def __init__(self, folder: Path):
        paths = sorted((Path(folder) / "latents").glob("*.safetensors"))
        self.shards = [read_file(path)[1] for path in paths]

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        """Random scenes of one shard, each with one of its captions; depends on seed, step and the number of shards."""
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


# ---------------------------------------------------------------- examples for the family


@dataclass
class Examples:
    """Examples of one image size: packed latents f16 ``[S, N, 64]``, caption ids ``[S, L]``, condition and labels."""

    size: tuple[int, int]
    latents: Tensor
    t5: Tensor
    clip: Tensor
    condition: Tensor | None = None  # fill, canny, depth: [S, N, C]; kontext: [S, N, 64]; redux: [S, 3, 128, 128]
    labels: Tensor | None = None  # patch labels (kontext: of the edited image), uint8 [S, 2, N]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return self.size[0] // 8, self.size[1] // 8

    def take(self, rows: Tensor) -> Examples:
        """The examples at these indices, in float32."""
        condition = None if self.condition is None else self.condition[rows].float()
        labels = None if self.labels is None else self.labels[rows].long()
        return Examples(self.size, self.latents[rows].float(), self.t5[rows], self.clip[rows], condition, labels)


@torch.no_grad()
def make_examples(name: str, seed: int, size: tuple[int, int], count: int, autoencoder: AutoEncoder) -> Examples:
    """``count`` examples for the model ``name`` of the family; they depend on (seed, size) only."""
    rng, tokens = np.random.default_rng([seed, *size]), Tokens()
    batches: list[Examples] = []
    while sum(len(batch.latents) for batch in batches) < count:
        batches.append(_example_batch(name, rng, size, min(count, 32), autoencoder, tokens))

    def join(field: str) -> Tensor | None:
        parts = [getattr(batch, field) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)[:count]

    return Examples(size, *(join(field) for field in ("latents", "t5", "clip", "condition", "labels")))


def _example_batch(
    name: str, rng: np.random.Generator, size: tuple[int, int], count: int, autoencoder: AutoEncoder, tokens: Tokens
) -> Examples:
    def encode(images: Tensor) -> Tensor:
        with mixed_precision():
            return pack(autoencoder.encode(images)).half()

    if name == "kontext":
        edits = [sample_edit(rng, size=size, weights=EDIT_WEIGHTS) for _ in range(count)]
        after = to_tensor(np.stack([render(edit.after) for edit in edits]))
        before = to_tensor(np.stack([render(edit.before) for edit in edits]))
        labels = torch.from_numpy(np.stack([patch_labels(edit.after) for edit in edits])).flatten(2)
        ids = tokens([edit.instruction for edit in edits])
        return Examples(size, encode(after), *ids, encode(before), labels)

    counts = [int(rng.choice([1, 2, 3], p=FAMILY_COUNTS)) for _ in range(count)]
    scenes = [sample_scene(rng, size=size, count=objects) for objects in counts]
    images = to_tensor(np.stack([render(scene, OUTLINE if name == "hollow" else None) for scene in scenes]))
    t5, clip = tokens([caption(scene, rng)[0] for scene in scenes])
    condition = labels = None
    if name == "fill":
        masks = torch.from_numpy(np.stack([random_mask(scene, rng) for scene in scenes]))
        condition = fill_channels(images, masks, autoencoder.encode).half()
    elif name in ("canny", "depth"):
        control = edge_map if name == "canny" else depth_map
        condition = encode(to_tensor(np.stack([control(scene) for scene in scenes])))
    elif name == "redux":
        condition = F.interpolate(images, (128, 128), mode="area").half()
        labels = torch.from_numpy(np.stack([patch_labels(scene, (8, 8)) for scene in scenes])).flatten(2)
    return Examples(size, encode(images), t5, clip, condition, labels)


class ExampleSet:
    """Examples of every image size, made once."""

    def __init__(self, name: str, seed: int, per_size: int, autoencoder: AutoEncoder):
        self.by_size = [make_examples(name, seed, size, per_size, autoencoder) for size in tqdm(ASPECTS, desc="scenes")]
        self.seed = seed

    def batch(self, step: int, size: int) -> Examples:
        """Random examples of one image size; depends on (seed, step) only."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        examples = self.by_size[int(torch.randint(len(self.by_size), (1,), generator=g))]
        return examples.take(torch.randint(len(examples.latents), (size,), generator=g))
