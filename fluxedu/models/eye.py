"""The miniature's eye, in the place of SigLIP in front of the Redux head.

It is ours in size, not FLUX.1's: the official Redux looks through google/siglip-so400m-patch14-384.
Source: arXiv 2010.11929 (vision transformer).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.clip import CLIPLayer
from fluxedu.models.config import CLIPTextConfig


class Eye(nn.Module):
    """Redux's eye: a picture of any size ``[B, 3, H, W]`` -> what is seen in each of 8 x 8 places, ``[B, 64, D]``.

    It sees finer than CLIP's image tower, which knows colours but hardly forms: all 128 pixels a side, through a few
    small convolutions in place of one coarse cut into patches (arXiv 2106.14881).
    """

    SIZE, TOKENS = 128, 64

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        dim = config.hidden_size
        widths = (3, dim // 4, dim // 2, dim, dim)
        self.stem = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.SiLU()) for i, o in pairwise(widths))
        )
        self.place_embed = nn.Parameter(0.02 * torch.randn(self.TOKENS, dim))
        self.layers = nn.ModuleList(CLIPLayer(config, causal=False) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, picture: Tensor) -> Tensor:
        small = F.interpolate(picture, (self.SIZE, self.SIZE), mode="area")
        x = self.stem(small).flatten(2).transpose(1, 2) + self.place_embed
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
