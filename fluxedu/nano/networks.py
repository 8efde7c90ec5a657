"""The miniature's networks: the official ones with smaller sizes, and two small image encoders.

The official Redux uses the vision encoder google/siglip-so400m-patch14-384; the miniature has its own. CLIP's image
tower is no part of FLUX.1; the lesson on retrieval uses it. Sources: arXiv 2010.11929 (vision transformer), 2103.00020
(CLIP).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.clip import CLIPLayer, CLIPTextEncoder
from fluxedu.models.config import CLIPTextConfig
from fluxedu.nano.sizes import AUTOENCODER, CLIP, FLUX, T5, TEXT_LENGTH  # noqa: F401 (names of this module too)


class VisionEncoder(nn.Module):
    """Redux's vision encoder: images ``[B, 3, H, W]`` -> one vector for each cell of an 8 x 8 grid, ``[B, 64, D]``.

    It keeps finer detail than CLIP's image tower, which recognises colours but hardly forms: it works at 128 x 128
    pixels, and a few small convolutions take the place of one coarse patch embedding (arXiv 2106.14881).
    """

    SIZE, TOKENS = 128, 64

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        dim = config.hidden_size
        widths = (3, dim // 4, dim // 2, dim, dim)
        self.stem = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.SiLU()) for i, o in pairwise(widths))
        )
        # learned position embeddings, under the name that the shipped weights have
        self.place_embed = nn.Parameter(0.02 * torch.randn(self.TOKENS, dim))
        self.layers = nn.ModuleList(CLIPLayer(config, causal=False) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, image: Tensor) -> Tensor:
        small = F.interpolate(image, (self.SIZE, self.SIZE), mode="area")
        x = self.stem(small).flatten(2).transpose(1, 2) + self.place_embed
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


PATCH = 8
SIZE = 64  # pixels along each side, after the 128 x 128 image is halved


class ImageTower(nn.Module):
    """A small vision transformer: ``[B, 3, 128, 128]`` in [-1, 1] -> ``[B, D]``."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        dim = config.hidden_size
        self.patch_embed = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.place_embed = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, dim))
        self.layers = nn.ModuleList(CLIPLayer(config, causal=False) for _ in range(3))
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(F.avg_pool2d(image, 2)).flatten(2).transpose(1, 2) + self.place_embed
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.projection(torch.cat([x.mean(1), x.amax(1)], dim=-1))


class CLIPModel(nn.Module):
    """Both CLIP towers, the projection of the text vector, and the learned (log) inverse temperature."""

    def __init__(self):
        super().__init__()
        self.text = CLIPTextEncoder(CLIP)
        self.image = ImageTower(CLIP)
        self.text_projection_head = nn.Linear(CLIP.hidden_size, CLIP.hidden_size, bias=False)
        self.temperature_head = nn.Parameter(torch.tensor(2.3))

    def similarity(self, images: Tensor, ids: Tensor) -> Tensor:
        """Cosine similarity of every image with every caption: ``[B, B]``."""
        image_vectors = F.normalize(self.image(images), dim=-1)
        text_vectors = F.normalize(self.text_projection_head(self.text(ids)[1]), dim=-1)
        return image_vectors @ text_vectors.T


def contrastive_loss(model: CLIPModel, images: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
    """CLIP's loss on a batch of matching pairs, and the share of images whose own caption scores highest."""
    scores = model.similarity(images, ids) * model.temperature_head.exp().clamp(max=100)
    target = torch.arange(len(ids), device=scores.device)
    loss = 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))
    return loss, {"accuracy": float((scores.argmax(1) == target).float().mean())}
