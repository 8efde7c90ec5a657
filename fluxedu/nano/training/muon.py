"""Muon: momentum whose every matrix is made orthogonal, so that no direction is learned faster than another.

    m <- mu m + (1 - mu) g;    u = mu m + (1 - mu) g;    W <- W - lr * 0.2 sqrt(max(rows, columns)) * UV^T of u

Torch's own (``torch.optim.Muon``) computes in bfloat16 whatever the machine; a processor without it then
spends more time here than on the network. This one takes the dtype, and is otherwise the same.
Source: Jordan et al. 2024; the factor that gives AdamW's step size: arXiv 2502.16982.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
#: of the odd polynomial that drives all singular values towards 1; steep at 0, so five rounds are enough
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """About ``U V^T`` of ``matrix = U S V^T``: singular values between 0.5 and 1.5, by Newton and Schulz."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ROUNDS):  # x <- A x + B (x x^T) x + C (x x^T)^2 x
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only; ``lr`` and ``weight_decay`` as for AdamW."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._move(w, group["lr"], group["weight_decay"])

    def _move(self, w: nn.Parameter, lr: float, weight_decay: float) -> None:
        momentum = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
        momentum.lerp_(w.grad, 1 - MOMENTUM)
        update = orthogonal(w.grad.lerp(momentum, MOMENTUM), self.dtype)
        w.mul_(1 - lr * weight_decay)
        w.add_(update, alpha=-lr * 0.2 * max(w.shape) ** 0.5)
