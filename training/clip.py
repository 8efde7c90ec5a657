"""Stage 3: CLIP, a text tower and a small image tower trained to agree (arXiv 2103.00020).

    loss = cross-entropy of picking each image's caption among the batch's, plus the same for each caption's image

FLUX uses only the text tower's pooled vector. The image tower is kept for the course's notebook on retrieval.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fluxedu.nano import networks
from fluxedu.nano.networks import CLIPModel, contrastive_loss
from fluxedu.nano.scenes import caption, render, sample_scene, to_tensor
from fluxedu.nano.tokenizers import clip_tokenizer
from training.loop import Prefetch, Recipe, Run, load_average

RECIPE = Recipe(steps=800, lr=1.5e-3, batch=64, warmup=100, decay=0.5, ema=0.995)
SEED = 33


def initialised_clip() -> CLIPModel:
    """New towers, with the text embeddings scaled down."""
    model = CLIPModel()
    for name, p in model.text.named_parameters():
        if "embedding" in name:
            nn.init.normal_(p, std=0.02)
    return model


class Pairs:
    """Batches of images ``[B, 3, 128, 128]`` and caption ids ``[B, L]``; a batch depends only on its step."""

    def __init__(self, held_out: bool = False):
        self.tokenizer, self.held_out = clip_tokenizer(), held_out

    def __call__(self, step: int, batch: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([SEED, int(self.held_out), step])
        scenes = [sample_scene(rng, size=(128, 128), held_out=self.held_out) for _ in range(batch)]
        images = to_tensor(np.stack([render(scene) for scene in scenes]))
        captions = [caption(scene, rng)[0] for scene in scenes]
        padding = {"padding": "max_length", "max_length": networks.TEXT_LENGTH, "truncation": True}
        return images, self.tokenizer(captions, **padding, return_tensors="pt").input_ids


@torch.no_grad()
def retrieval_accuracy(model: CLIPModel, batches: int = 8, candidates: int = 64) -> float:
    """The share of held-out images whose own caption scores highest among ``candidates`` captions."""
    pairs = Pairs(held_out=True)
    shares = [contrastive_loss(model, *pairs(step, candidates))[1]["accuracy"] for step in range(batches)]
    return float(np.mean(shares))


def train(folder: Path, resume: bool = True) -> CLIPModel:
    """Train both towers, or load them if their run is finished."""
    torch.manual_seed(SEED)
    model = initialised_clip()
    run = Run("clip", model, RECIPE, folder, resume)

    def report(run: Run) -> None:
        accuracy = retrieval_accuracy(load_average(CLIPModel(), run.average))
        print(f"\nclip step {run.step}: {100 * accuracy:.1f} % of held-out captions found among 64", flush=True)

    with Prefetch(Pairs(), RECIPE.batch) as batches:
        run.train(lambda step: contrastive_loss(model, *batches(step)), report, every=500)
    return load_average(CLIPModel(), run.average)
