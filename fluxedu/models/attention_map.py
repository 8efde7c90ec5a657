"""The attention map as a promise: exact, and only the part that is asked for.

A fused kernel never writes the map down, but it knows of every query how large its row is before the
softmax divides it: the log-sum-exp. With it any entry can be had alone,

    P[i, j] = exp(q_i . k_j / sqrt(d) - lse_i),

so a few columns (what every token takes from some words) cost a few columns, not a map. Queries and keys
are taken to float32 first: in bfloat16 the score would be off by more than the map is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Index = int | slice | list[int] | Tensor
CHUNK = 512  # rows at a time where there is no log-sum-exp to be had


def wide(x: Tensor) -> Tensor:
    """Float32, or float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def _listed(index: Index) -> slice | list[int] | Tensor:
    return [index] if isinstance(index, int) else index


class AttentionMap:
    """``softmax(q k^T / sqrt(d))`` of one block, ``[B, H, N, N]``, of which any part is made when asked for.

    Attributes: ``q``, ``k``, ``v`` ``[B, H, N, d]``, turned by position · ``words``, how many of the N tokens
    are text; they come first. All parts are
    float32, or float64 if q is.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None = None, words: int = 0):
        self.q, self.k, self.v, self.words = q, k, v, words
        self.scale = q.shape[-1] ** -0.5
        self.out: Tensor | None = None  # attention's result, if the log-sum-exp was asked for and gave it as well
        self._lse: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, n, _ = self.q.shape
        return (b, h, n, self.k.shape[2])

    @property
    def lse(self) -> Tensor:
        """The log-sum-exp of every row, ``[B, H, N]``."""
        if self._lse is None:
            training = any(x is not None and x.requires_grad for x in (self.q, self.k, self.v))
            fused = None if training or self.v is None else _fused(self.q.device.type, self.q.dtype)
            if fused is not None:
                self.out, self._lse = fused(self.q, self.k, self.v)
            else:
                chunks = (slice(i, i + CHUNK) for i in range(0, self.shape[2], CHUNK))
                self._lse = torch.cat([self._scores(rows).logsumexp(-1) for rows in chunks], dim=2)
        return self._lse

    def rows(self, index: Index) -> Tensor:
        """What the queries at ``index`` look at: ``[B, H, how many, N]``."""
        return self._scores(_listed(index)).softmax(-1)

    def columns(self, index: Index, rows: Index = slice(None)) -> Tensor:
        """How much the queries (all, or those at ``rows``) take from the keys at ``index``: ``[B, H, N, how many]``."""
        rows, index = _listed(rows), _listed(index)
        scores = wide(self.q[:, :, rows]) @ wide(self.k[:, :, index]).transpose(-1, -2) * self.scale
        return (scores - self.lse[:, :, rows, None]).exp()

    def weights(self) -> Tensor:
        """The whole map."""
        return self.rows(slice(None))

    def heads(self, index: slice | list[int]) -> AttentionMap:
        """The same map of some heads."""
        some = AttentionMap(
            self.q[:, index], self.k[:, index], None if self.v is None else self.v[:, index], self.words
        )
        some._lse = None if self._lse is None else self._lse[:, index]
        return some

    def picture(self, index: int) -> AttentionMap:
        """The same map of one picture of the batch, which keeps its axis."""
        q, k, v = (None if x is None else x[index : index + 1] for x in (self.q, self.k, self.v))
        one = AttentionMap(q, k, v, self.words)
        one._lse = None if self._lse is None else self._lse[index : index + 1]
        return one

    def head_mean(self, rows: Index = slice(None), columns: Index | None = None) -> Tensor:
        """The map, or a part of it, averaged over heads, ``[B, N, N]``: a head at a time, never all at once."""
        if columns is not None:
            _ = self.lse  # of all heads at once
        total: Tensor | float = 0.0
        for h in range(self.shape[1]):
            one = self.heads(slice(h, h + 1))
            total = total + (one.rows(rows) if columns is None else one.columns(columns, rows))[:, 0]
        return total / self.shape[1]

    def entropy(self) -> Tensor:
        """How widely every query looks, in nats, ``[B, H, N]``: 0 on one token, ``log N`` on all alike.

        ``H_i = lse_i - sum_j P_ij s_ij``, and the sum is attention once more with the keys as values:
        ``q_i . sum_j P_ij k_j / sqrt(d)``.
        """
        q, k = wide(self.q), wide(self.k)
        meant = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        return (self.lse - self.scale * (q * meant).sum(-1)).clamp(min=0)

    def _scores(self, rows: slice | list[int] | Tensor) -> Tensor:
        return wide(self.q[:, :, rows]) @ wide(self.k).transpose(-1, -2) * self.scale


# ---------------------------------------------------------------- the kernels that tell their log-sum-exp

Fused = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse[:, :, : q.shape[2]]  # it pads the rows to a multiple of 32


@cache
def _fused(device: str, dtype: torch.dtype) -> Fused | None:
    """A kernel whose log-sum-exp is right here, or None. They are private, so each is tried once, not trusted."""
    for kernel in {"cpu": (_cpu,), "cuda": (_flash, _efficient)}.get(device, ()):
        try:
            if _right(kernel, device, dtype):
                return kernel
        except (RuntimeError, AttributeError, NotImplementedError, TypeError):
            continue
    return None


def _right(kernel: Fused, device: str, dtype: torch.dtype) -> bool:
    """Is it attention itself, bit for bit, and is its log-sum-exp the formula's?"""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 45, 32, generator=g).to(device, dtype) for _ in range(3))
    out, lse = kernel(q, k, v)
    exact = (wide(q) @ wide(k).transpose(-1, -2) * 32**-0.5).logsumexp(-1)
    same = torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    return same and lse.shape == exact.shape and float((lse - exact).abs().max()) <= 2e-6
