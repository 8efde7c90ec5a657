"""The Redux head: image features of SigLIP become text-like tokens that FLUX reads after T5's.

Source: black-forest-labs/flux, modules/image_embedders.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ReduxHead(nn.Module):
    """``[B, 729, redux_dim] -> [B, 729, txt_dim]``: ``down(silu(up(x)))``. 64.5 M at the official size."""

    def __init__(self, redux_dim: int = 1152, txt_dim: int = 4096):
        super().__init__()
        self.redux_up = nn.Linear(redux_dim, 3 * txt_dim)
        self.redux_down = nn.Linear(3 * txt_dim, txt_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.redux_down(F.silu(self.redux_up(features)))


class Redux(nn.Module):
    """A vision encoder and the Redux head: a picture ``[1, 3, H, W]`` in [-1, 1] to ``tokens`` text-like tokens.

    ``vision_encoder`` maps the picture to features ``[1, tokens, redux_dim]``: SigLIP, or the miniature's own.
    """

    def __init__(self, vision_encoder: nn.Module, head: ReduxHead, tokens: int):
        super().__init__()
        self.vision_encoder, self.head, self.tokens = vision_encoder, head, tokens

    def forward(self, picture: Tensor) -> Tensor:
        return self.head(self.vision_encoder(picture))
