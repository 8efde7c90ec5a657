"""CLIP's other half: the tower that looks at pictures. FLUX.1 does not use it; the lesson on retrieval does.

Source: arXiv 2103.00020 (CLIP), 2010.11929 (vision transformer).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.clip import CLIPLayer
from fluxedu.models.config import CLIPTextConfig

PATCH = 8
SIZE = 64  # pixels a side after halving the 128 x 128 picture


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
