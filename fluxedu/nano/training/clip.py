"""Stage 3: CLIP, a text tower and a small image tower that learn to agree.

    loss = cross-entropy of finding each picture's caption among the batch's, and the other way round

Source: arXiv 2103.00020. The image tower is kept for the lesson on retrieval; FLUX uses only the text
tower's pooled vector.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.nano import networks
from fluxedu.nano.networks import ImageTower
from fluxedu.nano.scenes import caption, render, sample_scene
from fluxedu.nano.tokenizers import clip_tokenizer
from fluxedu.nano.training.autoencoder import to_tensor
from fluxedu.nano.training.loop import Prefetch, Recipe, Run, use_average

RECIPE = Recipe(steps=800, lr=1.5e-3, batch=64, warmup=100, decay=0.5, ema=0.995)
SEED = 33


class CLIP(nn.Module):
    """Both towers and the temperature."""

    def __init__(self):
        super().__init__()
        self.text = CLIPTextEncoder(networks.CLIP)
        self.image = ImageTower(networks.CLIP)
        self.text_projection_head = nn.Linear(networks.CLIP.hidden_size, networks.CLIP.hidden_size, bias=False)
        self.temperature_head = nn.Parameter(torch.tensor(2.3))
        for name, p in self.text.named_parameters():
            if "embedding" in name:
                nn.init.normal_(p, std=0.02)

    def similarity(self, image: Tensor, ids: Tensor) -> Tensor:
        """Cosine of every picture with every caption: ``[B, B]``."""
        seen = F.normalize(self.image(image), dim=-1)
        said = F.normalize(self.text_projection_head(self.text(ids)[1]), dim=-1)
        return seen @ said.T


class Pairs:
    """Batches of pictures (128 x 128) and captions; a step's batch depends on the step only."""

    def __init__(self, held_out: bool = False):
        self.tokenizer, self.held_out = clip_tokenizer(), held_out

    def __call__(self, step: int, batch: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([SEED, int(self.held_out), step])
        made = [sample_scene(rng, size=(128, 128), held_out=self.held_out) for _ in range(batch)]
        images = to_tensor(np.stack([render(s) for s in made]))
        ids = self.tokenizer(
            [caption(s, rng)[0] for s in made],
            padding="max_length",
            max_length=networks.TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return images, ids


def loss_of(model: CLIP, images: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
    scores = model.similarity(images, ids) * model.temperature_head.exp().clamp(max=100)
    target = torch.arange(len(ids), device=scores.device)
    value = 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))
    return value, {"found": float((scores.argmax(1) == target).float().mean())}


@torch.no_grad()
def retrieval(model: CLIP, batches: int = 8, among: int = 64) -> float:
    """The share of held-out pictures whose own caption is nearest among ``among``."""
    held = Pairs(held_out=True)
    return float(np.mean([loss_of(model, *held(step, among))[1]["found"] for step in range(batches)]))


def train(folder: Path, resume: bool = True) -> CLIP:
    """Train (or take the finished) pair of towers."""
    torch.manual_seed(SEED)
    model = CLIP()
    run = Run("clip", model, RECIPE, folder, resume)

    def report(run: Run) -> None:
        found = retrieval(use_average(CLIP(), run.average))
        print(f"\nclip step {run.step}: {100 * found:.1f} % of held-out captions found among 64", flush=True)

    with Prefetch(Pairs(), RECIPE.batch) as batches:
        run.train(lambda step: loss_of(model, *batches(step)), report, every=500)
    return use_average(CLIP(), run.average)
