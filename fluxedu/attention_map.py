"""The attention map as a lazy object: exact, and only the part that is requested is computed.

A fused attention kernel never writes the map to memory, but it does compute the log-sum-exp of every row of scores.
With it, any entry can be recovered on its own,

    P[i, j] = exp(q_i . k_j / sqrt(d) - lse_i),

so a few columns (how much every token attends to some words) cost a few columns, not a whole map. Queries and keys are
converted to float32 first: in bfloat16 the error of a score would exceed the differences that the map shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.errors import InstrumentError, checked, describe

Index = int | slice | list[int] | Tensor
#: entries of a map: the product of three masks, of passes and heads [B, H, 1, 1], queries [1, 1, N, 1] and keys
#: [1, 1, 1, N]; a mask that selects everything has one entry
Hidden = tuple[Tensor, Tensor, Tensor]
ROWS_AT_ONCE = 512  # rows per chunk if no kernel returns the log-sum-exp


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _as_index(index: Index, size: int) -> slice | list[int] | Tensor:
    """An index of several entries along an axis of ``size`` entries; raises InstrumentError for what is outside."""
    index = [index] if isinstance(index, Integral) else index
    try:
        torch.empty(size, device="cpu")[index]
    except (IndexError, TypeError, ValueError, RuntimeError):
        raise InstrumentError(f"an index into {size} entries must be within them, not {describe(index)}.") from None
    return index


def _check_shape(name: str, x: Tensor, *shape: int) -> None:
    if x.shape != shape or not x.is_floating_point():
        found = f"{list(x.shape)} of {x.dtype}"
        raise InstrumentError(f"{name} must be {list(shape)} of floating-point numbers, not {found}.")


class AttentionMap:
    """``softmax(q k^T * scale + bias)`` of one block, ``[B, H, N, N]``; any part of it is computed on request.

    Attributes: ``q``, ``k``, ``v`` ``[B, H, N, d]``, after RoPE · ``txt_len``, the number of text tokens, which come
    first · ``bias``, broadcastable to the map, added to the scores (T5's distances) · ``causal``: later tokens are
    masked (CLIP) · ``scale`` of the scores, ``1 / sqrt(d)`` by default · ``scores`` in place of all of these, if they
    were changed · ``hidden``: what :meth:`hide` has hidden. Parts are float32, or float64 if q is.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        txt_len: int = 0,
        bias: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        scores: Tensor | None = None,
        hidden: tuple[Hidden, ...] = (),
    ):
        self.q, self.k, self.v, self.txt_len = q, k, v, txt_len
        self.bias, self.causal, self.scale = bias, causal, scale
        self.scores, self.hidden = scores, hidden
        self._output: Tensor | None = None  # the attention output, once it has been computed
        self._lse: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, n, _ = self.q.shape
        return (b, h, n, self.k.shape[2])

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow through the map, or through its output."""
        return any(x is not None and x.requires_grad for x in (self.q, self.k, self.v, self.scores))

    def output(self) -> Tensor:
        """The attention output ``[B, H, N, d]``, to the last bit what an unwatched block computes."""
        if self._output is None:
            self._output = self._attend(self.q, self.k, self.v)
        return self._output

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``map @ v`` by the fused kernel, whose mask is at most of the size of one head's map."""
        if self.scores is not None:
            return self.weights().to(v.dtype) @ v
        if self.shape[1] > 1 and any(where.shape[1] > 1 and queries.numel() > 1 for where, queries, _ in self.hidden):
            heads = [slice(h, h + 1) for h in range(self.shape[1])]
            return torch.cat([self.heads(h)._attend(q[:, h], k[:, h], v[:, h]) for h in heads], dim=1)
        mask = None if self.bias is None else self.bias.to(q.dtype)
        causal = self.causal and not self.hidden  # the kernels take one or the other
        if self.hidden:
            mask = torch.where(self._visible(), q.new_zeros(()) if mask is None else mask, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)

    @checked(InstrumentError)
    def __matmul__(self, v: Tensor) -> Tensor:
        """``map @ v``, the weighted sum of the values: ``[B, H, N, d]``."""
        _check_shape("v", v, *self.shape[:2], *self.k.shape[2:])
        return self.output() if v is self.v else self.weights().to(v.dtype) @ v

    @property
    def lse(self) -> Tensor:
        """The log-sum-exp of every row of scores, ``[B, H, N]``."""
        if self._lse is None:
            is_plain = (
                not (self.causal or self.hidden) and self.bias is None and self.scale is None and self.scores is None
            )
            kernel = _kernel_with_lse(self.q.device.type, self.q.dtype) if is_plain and self.v is not None else None
            if kernel is not None and not self.requires_grad:
                self._output, self._lse = kernel(self.q, self.k, self.v)
            else:
                chunks = (slice(i, i + ROWS_AT_ONCE) for i in range(0, self.shape[2], ROWS_AT_ONCE))
                self._lse = torch.cat([self._scores(rows).logsumexp(-1) for rows in chunks], dim=2)
        return self._lse

    @checked(InstrumentError)
    def rows(self, index: Index) -> Tensor:
        """What the queries at ``index`` attend to: ``[B, H, len(index), N]``."""
        return self._scores(_as_index(index, self.shape[2])).softmax(-1)

    @checked(InstrumentError)
    def columns(self, index: Index, rows: Index = slice(None)) -> Tensor:
        """How much all queries (or those at ``rows``) attend to the keys at ``index``: ``[B, H, N, len(index)]``."""
        rows, index = _as_index(rows, self.shape[2]), _as_index(index, self.shape[3])
        return (self._scores(rows, index) - self.lse[:, :, rows, None]).exp()

    def weights(self) -> Tensor:
        """The whole map."""
        return self.rows(slice(None))

    def all_scores(self) -> Tensor:
        """The scores of the whole map, before the softmax."""
        return self._scores(slice(None))

    @checked(InstrumentError)
    def with_scores(self, scores: Tensor) -> AttentionMap:
        """The softmax of other scores ``[B, H, N, N]``."""
        _check_shape("scores", scores, *self.shape)
        return AttentionMap(self.q, self.k, self.v, self.txt_len, scores=scores)

    def hide(self, where: Tensor, queries: Tensor, keys: Tensor) -> AttentionMap:
        """The same map with the scores of some entries at minus infinity, so that no attention goes there.

        The entries are those at which all three masks of :data:`Hidden` are True.
        """
        hidden = (*self.hidden, (where, queries, keys))
        return AttentionMap(
            self.q, self.k, self.v, self.txt_len, self.bias, self.causal, self.scale, self.scores, hidden
        )

    def has_empty_rows(self) -> bool:
        """Whether every key is hidden from some query, whose attention is then undefined."""
        keys = [mask[2].expand(1, 1, 1, self.shape[3]) for mask in self.hidden]
        if not keys or not torch.stack(keys).any(0).all():
            return False  # some key is hidden from none
        heads = range(self.shape[1]) if any(mask[0].shape[1] > 1 for mask in self.hidden) else [0]
        return not all(self.heads([h])._visible().any(-1).all() for h in heads)

    def _visible(self, rows: slice | list[int] | Tensor = slice(None), columns=slice(None)) -> Tensor:
        """False at the entries that are hidden, or later than the query in a causal map; of the smallest shape."""
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.q.device)
        for where, queries, keys in self.hidden:
            queries = queries if queries.numel() == 1 else queries[:, :, rows]
            visible = visible & ~(where & queries & (keys if keys.numel() == 1 else keys[..., columns]))
        if self.causal:
            earlier = torch.ones(self.shape[2:], dtype=torch.bool, device=self.q.device).tril()
            visible = visible & earlier[rows][:, columns]
        return visible

    @checked(InstrumentError)
    def heads(self, index: slice | list[int]) -> AttentionMap:
        """The same map of some heads."""
        index = _as_index(index, self.shape[1])
        return self._slice(lambda x: x[:, index])

    @checked(InstrumentError)
    def picture(self, index: int | slice) -> AttentionMap:
        """The same map of one entry of the batch (an image, or a pass of guidance), or some; the batch axis stays."""
        rows = index if isinstance(index, slice) else slice(index, index + 1)
        rows = _as_index(rows, self.shape[0])
        return self._slice(lambda x: x[rows])

    def _slice(self, take: Callable[[Tensor], Tensor]) -> AttentionMap:
        q, k, v, scores = (None if x is None else take(x) for x in (self.q, self.k, self.v, self.scores))
        bias = None if self.bias is None else take(self.bias.expand(self.shape))
        hidden = [(take(where.expand(*self.shape[:2], 1, 1)), *rest) for where, *rest in self.hidden]
        hidden = tuple(masks for masks in hidden if masks[0].any())
        part = AttentionMap(q, k, v, self.txt_len, bias, self.causal, self.scale, scores, hidden)
        part._lse = None if self._lse is None else take(self._lse)
        return part

    @checked(InstrumentError)
    def head_mean(self, rows: Index = slice(None), columns: Index | None = None) -> Tensor:
        """The map, or a part of it, averaged over heads, ``[B, N, N]``; computed one head at a time."""
        if columns is not None:
            _ = self.lse  # of all heads in one kernel call
        total: Tensor | float = 0.0
        for h in range(self.shape[1]):
            head = self.heads(slice(h, h + 1))
            total = total + (head.rows(rows) if columns is None else head.columns(columns, rows))[:, 0]
        return total / self.shape[1]

    def entropy(self) -> Tensor:
        """The entropy of every query's attention in nats, ``[B, H, N]``: 0 on one token, ``log N`` if uniform.

        ``H_i = lse_i - sum_j P_ij s_ij``, and the sum is one more attention call with the keys as values:
        ``q_i . sum_j P_ij k_j / sqrt(d)``.
        """
        if self.bias is not None or self.causal or self.scores is not None:
            return torch.special.entr(self.weights()).sum(-1)
        q, k = at_least_float32(self.q), at_least_float32(self.k)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        mean_key = self._attend(q, k, k)
        return (self.lse - scale * (q * mean_key).sum(-1)).clamp(min=0)  # rounding may give -1e-7

    def _scores(self, rows: slice | list[int] | Tensor, columns: slice | list[int] | Tensor = slice(None)) -> Tensor:
        if self.scores is not None:
            scores = at_least_float32(self.scores[:, :, rows][..., columns])
        else:
            scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
            q, k = at_least_float32(self.q[:, :, rows]), at_least_float32(self.k[:, :, columns])
            scores = q @ k.transpose(-1, -2) * scale
        if self.bias is not None:
            scores = scores + at_least_float32(self.bias.expand(self.shape)[:, :, rows][..., columns])
        if self.hidden or self.causal:
            scores = scores.masked_fill(~self._visible(rows, columns), -torch.inf)
        return scores


# ---------------------------------------------------------------- kernels that return their log-sum-exp

Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _cuda_efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse[:, :, : q.shape[2]]  # the kernel pads the rows to a multiple of 32


@cache
def _kernel_with_lse(device: str, dtype: torch.dtype) -> Kernel | None:
    """A kernel whose log-sum-exp is correct here, or None. These are private functions of torch, so each is tested."""
    for kernel in {"cpu": (_cpu_flash,), "cuda": (_cuda_flash, _cuda_efficient)}.get(device, ()):
        try:
            if _is_correct(kernel, device, dtype):
                return kernel
        except (RuntimeError, AttributeError, NotImplementedError, TypeError):
            continue
    return None


def _is_correct(kernel: Kernel, device: str, dtype: torch.dtype) -> bool:
    """Whether the output is that of F.scaled_dot_product_attention to the bit, and the log-sum-exp within 2e-6."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 2, 45, 32, generator=g, dtype=torch.float32, device="cpu").to(device, dtype) for _ in range(3)
    )
    out, lse = kernel(q, k, v)
    expected = (at_least_float32(q) @ at_least_float32(k).transpose(-1, -2) * 32**-0.5).logsumexp(-1)
    same_output = torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    return same_output and lse.shape == expected.shape and float((lse - expected).abs().max()) <= 2e-6
