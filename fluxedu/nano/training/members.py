"""What the members of the family learn from: scenes, and the picture each of them is given beside the words.

fill     the picture with a hole, and the hole's mask     canny    the outlines of the things
kontext  the picture before an edit                       depth    the things as grey shapes, larger is nearer
redux    the picture itself, for its eye             hollow   nothing: the picture is drawn in another style
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.nano.scenes import ASPECTS, SIZES, Scene, caption, coverage, render, sample_scene, thing_map
from fluxedu.nano.training.autoencoder import to_tensor
from fluxedu.nano.training.edits import PRACTISED, sample_edit
from fluxedu.nano.training.latents import Tokens, patch_labels
from fluxedu.nano.training.loop import mixed_precision
from fluxedu.sampling.conditions import fill_channels
from fluxedu.sampling.latents import pack

OUTLINE = 4.0  # pixels of line, in the style that a LoRA learns
THINGS = (0.2, 0.45, 0.35)  # how often a scene has one, two, three things


def outlines(scene: Scene) -> np.ndarray:
    """White lines on black where one thing ends: uint8 ``[H, W, 3]``, as an edge detector would give."""
    owner = thing_map(scene)
    edge = np.zeros(owner.shape, bool)
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge[1:] |= owner[1:] != owner[:-1]
    return np.repeat((255 * edge).astype(np.uint8)[..., None], 3, axis=-1)


def depths(scene: Scene) -> np.ndarray:
    """Things as plain grey shapes on black, the larger the brighter (nearer): uint8 ``[H, W, 3]``."""
    near, far = SIZES["large"][1], SIZES["small"][0]
    grey = np.zeros((scene.height, scene.width))
    for thing in scene.things:
        rows, cols, share = coverage(thing, scene.height, scene.width)
        level = 110 + 145 * (thing.radius - far) / (near - far)
        grey[rows, cols] = np.maximum(grey[rows, cols], level * share)
    return np.repeat(np.round(grey).astype(np.uint8)[..., None], 3, axis=-1)


def hole(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A mask, float32 ``[1, H, W]``, 1 where to paint: around a thing, any rectangle, or all but a rectangle."""
    h, w = scene.height, scene.width
    mask = np.zeros((1, h, w), np.float32)
    if rng.random() < 0.5:
        thing = scene.things[rng.integers(len(scene.things))]
        x0, y0 = (c - thing.radius - rng.uniform(3, 14) for c in (thing.x, thing.y))
        x1, y1 = (c + thing.radius + rng.uniform(3, 14) for c in (thing.x, thing.y))
    else:
        x0, x1 = sorted(rng.uniform(0, w, 2))
        y0, y1 = sorted(rng.uniform(0, h, 2))
    mask[:, max(round(y0), 0) : max(round(y1), 0), max(round(x0), 0) : max(round(x1), 0)] = 1
    return 1 - mask if rng.random() < 0.2 else mask


@dataclass
class Examples:
    """Scenes of one shape: packed latents f16 ``[S, N, 64]``, ids of the words, and what is given beside them."""

    size: tuple[int, int]
    latents: Tensor
    t5: Tensor
    clip: Tensor
    given: Tensor | None = None  # fill, canny, depth: [S, N, C]; kontext: [S, N, 64]; redux: [S, 3, 128, 128]
    labels: Tensor | None = None  # what lies in each patch (kontext: of the picture to draw), u8 [S, 2, N]

    @property
    def cells(self) -> tuple[int, int]:
        """The latent's rows and columns."""
        return self.size[0] // 8, self.size[1] // 8

    def take(self, rows: Tensor) -> Examples:
        given = None if self.given is None else self.given[rows].float()
        labels = None if self.labels is None else self.labels[rows].long()
        return Examples(self.size, self.latents[rows].float(), self.t5[rows], self.clip[rows], given, labels)


@torch.no_grad()
def examples(name: str, seed: int, size: tuple[int, int], count: int, vae: AutoEncoder, held_out=False) -> Examples:
    """``count`` examples for the member ``name``, told by (seed, size)."""
    rng = np.random.default_rng([seed, *size])
    tokens, made = Tokens(), []
    while sum(len(part.latents) for part in made) < count:
        made.append(_batch(name, rng, size, min(count, 32), vae, tokens, held_out))
    join = lambda key: torch.cat([getattr(part, key) for part in made])[:count]  # noqa: E731
    given, labels = (None if getattr(made[0], key) is None else join(key) for key in ("given", "labels"))
    return Examples(size, join("latents"), join("t5"), join("clip"), given, labels)


def _batch(name, rng, size, count: int, vae: AutoEncoder, tokens: Tokens, held_out: bool) -> Examples:
    def encode(pictures: Tensor) -> Tensor:
        with mixed_precision():
            return pack(vae.encode(pictures)).half()

    painted = lambda of: to_tensor(np.stack(of))  # noqa: E731
    if name == "kontext":
        edits = [sample_edit(rng, size=size, held_out=held_out, weights=PRACTISED) for _ in range(count)]
        after, before = (painted([render(getattr(e, which)) for e in edits]) for which in ("after", "before"))
        labels = torch.from_numpy(np.stack([patch_labels(e.after) for e in edits])).flatten(2)
        return Examples(size, encode(after), *tokens([e.words for e in edits]), encode(before), labels)
    counts = [int(rng.choice([1, 2, 3], p=THINGS)) for _ in range(count)]
    scenes = [sample_scene(rng, size=size, count=things, held_out=held_out) for things in counts]
    pictures = painted([render(s, OUTLINE if name == "hollow" else None) for s in scenes])
    t5, clip = tokens([caption(s, rng)[0] for s in scenes])
    given = labels = None
    if name == "fill":
        masks = torch.from_numpy(np.stack([hole(s, rng) for s in scenes]))
        given = fill_channels(pictures, masks, vae.encode).half()
    elif name in ("canny", "depth"):
        control = outlines if name == "canny" else depths
        given = encode(painted([control(s) for s in scenes]))
    elif name == "redux":
        given = torch.nn.functional.interpolate(pictures, (128, 128), mode="area").half()
        labels = torch.from_numpy(np.stack([patch_labels(s, (8, 8)) for s in scenes])).flatten(2)
    return Examples(size, encode(pictures), t5, clip, given, labels)


class Shelf:
    """Examples of every shape, made once; ``batch(step, size)`` takes one shape at a time."""

    def __init__(self, name: str, seed: int, each: int, vae: AutoEncoder):
        self.of = [examples(name, seed, size, each, vae) for size in tqdm(ASPECTS, desc="scenes")]
        self.seed = seed

    def batch(self, step: int, size: int) -> Examples:
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        shelf = self.of[int(torch.randint(len(self.of), (1,), generator=g))]
        return shelf.take(torch.randint(len(shelf.latents), (size,), generator=g))
