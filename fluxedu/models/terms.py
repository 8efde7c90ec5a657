"""The terms that attention, the MLP and each head add to a layer's output; computed only if an instrument needs them.

``linear2([a, b]) = W_a a + W_b b + bias``: every group of input channels contributes a term of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.attention import to_heads
from fluxedu.probe import Probed


def share(
    total: Tensor | float, term: Callable[[], Tensor], block: Probed, site: str
) -> tuple[Tensor | float, Callable[[], Tensor]]:
    """Send one term of a sum through ``block``'s ``site``, and add its change (new - old) to ``total``.

    The term, ``[B, N, D]`` or of each head ``[B, H, N, D]``, is computed only if it is watched. Returns the total and a
    function that returns the term.
    """
    if not block.is_watched(site):
        return total, term
    old = term()
    new = block.probe(site, old.clone() if old.requires_grad else old)
    if new is old:
        return total, term
    change = new - old
    return total + (change.sum(1) if change.ndim == 4 else change), lambda: new


def linear_share(linear: nn.Linear, x: Tensor, first: int = 0) -> Tensor:
    """The term of a layer's output that comes from ``x [..., n]``, its input channels from ``first`` on; no bias."""
    n = x.shape[-1]
    if type(linear.weight) is nn.Parameter:
        return F.linear(x, linear.weight[:, first : first + n])
    whole = F.pad(x, (first, linear.in_features - first - n))  # quantised weights have no columns
    return linear(whole) - linear(torch.zeros_like(whole[..., :1, :]))


def head_changes(linear: nn.Linear, attn: Tensor, gate: Tensor, block: Probed, site: str) -> Tensor | float:
    """Send what each head adds to the residual stream through ``block``'s ``site``; returns the sum of all changes.

    It is the gate ``[B, 1, D]`` times the head's part of the projection ``linear``: ``attn [B, N, D] -> [B, H, N, D]``;
    the sum over heads is ``gate * linear(attn)`` without the bias.
    """

    def terms() -> Tensor:
        heads = to_heads(attn, block.num_heads).unbind(1)  # H x [B, N, d]
        return torch.stack([gate * linear_share(linear, x, i * x.shape[-1]) for i, x in enumerate(heads)], dim=1)

    return share(0.0, terms, block, site)[0]
