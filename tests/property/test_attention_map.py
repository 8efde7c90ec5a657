"""Any part of an attention map equals that part of the full softmax, computed by the formula in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxedu import attention_map
from fluxedu.attention_map import AttentionMap

drawn = settings(max_examples=30, deadline=None, derandomize=True)
EXACT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-5}
dtypes = st.sampled_from(list(EXACT))


def qkv(seed, dtype, batch=2, heads=3, tokens=37, dim=16, size=1.0):
    """Queries and keys of root mean square ``size``: 1 is what the QKNorm leaves, before its learned scale.

    Twice that makes scores of 16, of which float32 keeps 1e-6: the map is then as exact as the scores are.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dim)
    return [(size * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype) for _ in range(3)]


def softmax(q, k):
    return (q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


def off(a, b):
    assert a.shape == b.shape
    return float((a.double() - b).abs().max())


@drawn
@given(st.integers(0, 999), dtypes, st.sampled_from([(1, 4), (2, 1)]), st.integers(1, 70), st.sampled_from([4, 8, 32]))
def test_every_part_is_part_of_the_whole(seed, dtype, sizes, tokens, dim):
    batch, heads = sizes
    q, k, v = qkv(seed, dtype, batch, heads, tokens, dim)
    full, within = softmax(q, k), EXACT[dtype]
    lazy = AttentionMap(q, k, v)
    few = [0, tokens - 1, tokens // 2]
    assert lazy.shape == full.shape
    assert off(lazy.weights(), full) <= within
    assert off(lazy.rows(few), full[:, :, few]) <= within
    assert off(lazy.columns(few), full[..., few]) <= within
    assert off(lazy.columns(few, few), full[:, :, few][..., few]) <= within
    assert off(lazy.columns(0), full[..., :1]) <= within
    assert off(lazy.head_mean(), full.mean(1)) <= within
    assert off(lazy.entropy(), torch.special.entr(full).sum(-1)) <= 10 * within  # nats, up to log N


def test_columns_without_a_kernel_that_returns_its_log_sum_exp(monkeypatch):
    """The fallback: chunks of rows. More tokens than a chunk, so that chunks are put together."""
    q, k, v = qkv(0, torch.float32, 1, 2, attention_map.ROWS_AT_ONCE + 50, 8)
    with_it = AttentionMap(q, k, v).columns([3, 70])
    monkeypatch.setattr(attention_map, "_kernel_with_lse", lambda *_: None)
    without = AttentionMap(q, k, v)
    assert off(without.columns([3, 70]), softmax(q, k)[..., [3, 70]]) <= 1e-6
    assert without._output is None
    assert off(with_it, without.columns([3, 70]).double()) <= 1e-6


def test_a_wrong_kernel_is_not_used(monkeypatch):
    """Private kernels may change with any release: a wrong result is detected at first use."""
    wrong_kernel = lambda q, k, v: (torch.nn.functional.scaled_dot_product_attention(q, k, v), torch.zeros(q.shape[:3]))  # noqa: E731
    monkeypatch.setattr(attention_map, "_cpu_flash", wrong_kernel)
    attention_map._kernel_with_lse.cache_clear()
    try:
        assert attention_map._kernel_with_lse("cpu", torch.float32) is None
    finally:
        monkeypatch.undo()
        attention_map._kernel_with_lse.cache_clear()
    assert attention_map._kernel_with_lse("cpu", torch.float32) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # in bfloat16 not every processor's is exact enough
def test_the_kernel_with_log_sum_exp_computes_the_same_attention(dtype):
    q, k, v = qkv(1, dtype)
    lazy = AttentionMap(q, k, v)
    assert lazy.lse.shape == q.shape[:3]
    assert lazy._output is not None
    assert torch.equal(lazy.output(), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_entropy_of_known_maps():
    """All keys alike: log N. One key that stands out: nothing."""
    n, d = 24, 8
    q, k, v = qkv(2, torch.float32, 1, 1, n, d)
    assert off(AttentionMap(q, torch.zeros_like(k), v).entropy(), torch.full((1, 1, n), math.log(n)).double()) <= 1e-5
    one = torch.zeros_like(k)
    one[:, :, 5] = 200.0
    assert off(AttentionMap(torch.ones_like(q), one, v).entropy(), torch.zeros(1, 1, n).double()) <= 1e-4


def test_entropy_is_never_negative():
    """Rounding may take log-sum-exp minus the mean score below zero where a row is all on one key."""
    q, k, v = qkv(3, torch.float32, 1, 2, 40, 16)
    lazy = AttentionMap(200 * q, k, v)
    lazy._lse = lazy.lse - 1e-4 * lazy.lse.abs().amax()  # an error as rounding makes it, larger and of known sign
    assert (lazy.entropy() == 0).any() and (lazy.entropy() >= 0).all()
