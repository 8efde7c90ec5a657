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
    are text; they come first · ``bias``, broadcastable to the map, added to the scores: T5's distances, or minus
    infinity where CLIP must not look · ``scale`` of the scores, ``1 / sqrt(d)`` if not said. All parts are
    float32, or float64 if q is.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        words: int = 0,
        bias: Tensor | None = None,
        scale: float | None = None,
    ):
        self.q, self.k, self.v, self.txt_len, self.bias = q, k, v, words, bias
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
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
            plain = self.v is not None and self.bias is None and self.scale == self.q.shape[-1] ** -0.5
            fused = _fused(self.q.device.type, self.q.dtype) if plain and not training else None
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
        return (self._scores(rows, index) - self.lse[:, :, rows, None]).exp()

    def weights(self) -> Tensor:
        """The whole map."""
        return self.rows(slice(None))

    def heads(self, index: slice | list[int]) -> AttentionMap:
        """The same map of some heads."""
        return self._part(lambda x: x[:, index])

    def picture(self, index: int) -> AttentionMap:
        """The same map of one picture of the batch, which keeps its axis."""
        return self._part(lambda x: x[index : index + 1])

    def _part(self, of: Callable[[Tensor], Tensor]) -> AttentionMap:
        """The same map of some pictures or heads."""
        q, k, v = (None if x is None else of(x) for x in (self.q, self.k, self.v))
        bias = None if self.bias is None else of(self.bias.expand(self.shape))
        part = AttentionMap(q, k, v, self.txt_len, bias, self.scale)
        part._lse = None if self._lse is None else of(self._lse)
        return part

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
        if self.bias is not None:
            return torch.special.entr(self.weights()).sum(-1)
        q, k = wide(self.q), wide(self.k)
        meant = torch.nn.functional.scaled_dot_product_attention(q, k, k, scale=self.scale)
        return (self.lse - self.scale * (q * meant).sum(-1)).clamp(min=0)

    def _scores(self, rows: slice | list[int] | Tensor, columns: slice | list[int] | Tensor = slice(None)) -> Tensor:
        scores = wide(self.q[:, :, rows]) @ wide(self.k[:, :, columns]).transpose(-1, -2) * self.scale
        return scores if self.bias is None else scores + wide(self.bias.expand(self.shape)[:, :, rows][..., columns])


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
