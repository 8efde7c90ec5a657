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
    """An eye and the head behind it: a picture ``[1, 3, H, W]`` in [-1, 1] to ``tokens`` text-like tokens.

    ``eye`` takes the picture to features ``[1, tokens, redux_dim]``: the miniature's ``Eye``, or SigLIP.
    """

    def __init__(self, eye: nn.Module, head: ReduxHead, tokens: int):
        super().__init__()
        self.eye, self.head, self.tokens = eye, head, tokens

    def forward(self, picture: Tensor) -> Tensor:
        return self.head(self.eye(picture))
