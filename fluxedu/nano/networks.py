"""The sizes of the miniature: the official networks with smaller numbers, nothing else."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.clip import CLIPLayer
from fluxedu.models.config import AutoEncoderConfig, CLIPTextConfig, FluxConfig, T5Config

AUTOENCODER = AutoEncoderConfig(
    ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=8, scale_factor=1.0, shift_factor=0.0
)
TEXT_LENGTH = 32  # T5 tokens of a prompt, padding included

T5 = T5Config(vocab_size=192, d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4)
CLIP = CLIPTextConfig(
    vocab_size=741,
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=TEXT_LENGTH,
    eos_token_id=740,
)
FLUX = FluxConfig(
    in_channels=64,
    out_channels=64,
    vec_in_dim=CLIP.hidden_size,
    context_in_dim=T5.d_model,
    hidden_size=160,
    num_heads=5,
    depth=2,
    depth_single_blocks=6,
    axes_dim=(4, 14, 14),
    guidance_embed=False,
)


# ------------------------------------------------------------ nano/networks.py
# The miniature's eye, in the place of SigLIP in front of the Redux head.
#
# It is ours in size, not FLUX.1's: the official Redux looks through google/siglip-so400m-patch14-384.
# Source: arXiv 2010.11929 (vision transformer).
#


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


# ------------------------------------------------------------ nano/networks.py
# CLIP's other half: the tower that looks at pictures. FLUX.1 does not use it; the lesson on retrieval does.
#
# Source: arXiv 2103.00020 (CLIP), 2010.11929 (vision transformer).
#

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
