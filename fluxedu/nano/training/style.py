"""A style, learned in minutes: a LoRA of the miniature that draws shapes as outlines (arXiv 2106.09685).

Every linear layer of the blocks keeps its weight W and learns a thin product beside it, W + B A; B begins at zero. It
is trained as LoRAs of FLUX.1 [dev] are, at guidance 1, and used at the model's own. The captions do not speak of the
style. The file has the official names: ``double_blocks.0.img_attn.qkv.lora_A.weight``.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fluxedu.models.flux import Flux

RANK = 16


class Beside(nn.Module):
    """``W -> W + B A``: A is ``[rank, in]``, B ``[out, rank]`` and zero at first."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def adapted(flux: Flux, rank: int = RANK) -> Flux:
    """A copy in which only the products beside the blocks' linear layers learn."""
    flux = deepcopy(flux).requires_grad_(False)
    for name, layer in list(flux.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith(("double_blocks", "single_blocks")):
            parametrize.register_parametrization(layer, "weight", Beside(layer.weight, rank))
    return flux


def lora_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapted transformer's tensors the LoRA, under the official names."""
    inside = ".parametrizations.weight.0."
    found = {}
    for name, value in tensors.items():
        layer, _, factor = name.partition(inside)
        if factor:
            found[f"{layer}.lora_{factor}.weight"] = value.contiguous()
    return found
