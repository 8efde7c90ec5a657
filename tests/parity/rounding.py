"""How far apart two correct results may be, derived from the network and its input.

Libraries and processors add the terms of a sum in different orders, so the last digits of a float32 result differ from
machine to machine. A fixed bound, taken from one machine, is too tight for another or too loose to reveal a mistake.
Therefore these tests do not compare two rounded results:

1. The *exact result* is the reference implementation's in float64, including the parts that the reference itself
   would compute in float32.
2. The *rounding noise* is how far this result moves when every operand of every operation is changed at random by
   about half a unit in its last place (Monte Carlo arithmetic; Parker, 1997). It is small for most networks and inputs
   and large for an ill-conditioned one. It, too, is computed in float64, so it is the same on every machine.
3. A result is correct if its error, against the exact result, is at most ``MARGIN`` times the noise.

The noise leaves out the rounding inside a sum: a kernel adds n numbers in an order of its own and rounds up to n - 1
times. This is what the margin is for. Over hundreds of random cases, and with the kernels that ATEN_CPU_CAPABILITY,
ONEDNN_MAX_CPU_ISA and MKL_CBWR select, the error was about as large as the noise, and never more than 3.2 times.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

MARGIN = 6
HALF_ULP = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-9}  # of a number just above 1


def relative_error(result: Tensor, expected: Tensor) -> float:
    """``|result - expected| / |expected|``. It is NaN, which no bound admits, if there is a NaN in either."""
    assert result.shape == expected.shape, f"{list(result.shape)} against {list(expected.shape)}"
    result, expected = result.detach().double(), expected.detach().double()
    return float((result - expected).norm() / expected.norm())


def worst_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of several tensors."""
    return max(relative_error(a, b) for a, b in zip(results, expected, strict=True))


class Float64(TorchDispatchMode):
    """A float64 computation stays in float64 where its code casts to float32. Optionally adds rounding noise.

    ``noise`` is the standard deviation of the relative change of every operand. One-dimensional tensors (times, biases,
    norm weights) are not changed themselves, only what is computed from them.
    """

    def __init__(self, noise: float = 0.0, seed: int = 0):
        super().__init__()
        self.noise = noise
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        is_cast = func is torch.ops.aten._to_copy.default
        if is_cast and args[0].dtype == torch.float64 and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.ops.aten.randn.generator and kwargs.get("dtype") == torch.float64:
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()  # the same noise as a run in float32
        is_arithmetic = not (is_cast or func.is_view or func._schema.is_mutable)
        if self.noise and is_arithmetic:
            args = tree_map(self.change, args)
        return func(*args, **kwargs)

    def change(self, operand: Any) -> Any:
        if not isinstance(operand, Tensor) or operand.dtype != torch.float64 or operand.ndim < 2:
            return operand
        # Uniform with mean 1 and standard deviation ``noise``: several times cheaper to draw than normal numbers.
        factor = torch.rand(operand.shape, generator=self.generator, dtype=torch.float64)
        half_width = 3**0.5 * self.noise
        return factor.mul_(2 * half_width).add_(1 - half_width).mul_(operand)


class WithoutNoise(nn.Module):
    """Runs ``module`` outside the current :class:`Float64`: in another mode, or as it is written."""

    def __init__(self, module: nn.Module, mode: Callable[[], Any] = nullcontext):
        super().__init__()
        self.module, self.mode = module, mode

    def forward(self, x: Tensor) -> Any:
        with _disable_current_modes(), self.mode():
            return self.module(x)


def exact_value(compute: Callable[[], Any]) -> Any:
    """Run ``compute``, the reference in float64, without its casts to float32."""
    with Float64():
        return compute()


class Exact:
    """The exact value of ``compute``, the reference in float64, and its rounding noise.

    The noise is the largest of two random tries. By chance these may both be small, above all if only a few numbers
    matter. Therefore, before a result is rejected, the noise is measured by ten more tries.
    """

    def __init__(self, compute: Callable[[], Any], error: Callable[[Any, Any], float] = relative_error):
        self.compute, self.error = compute, error
        self.value = exact_value(compute)
        self.noise, self.tries = 0.0, 0  # the noise for rounding errors of relative size 1
        self.measure(tries=2)

    def measure(self, tries: int) -> None:
        half_ulp = HALF_ULP[torch.float32]  # the noise is proportional to the size of the rounding errors
        while self.tries < tries:
            with Float64(half_ulp, seed=self.tries):
                self.noise = max(self.noise, self.error(self.compute(), self.value) / half_ulp)
            self.tries += 1

    def bound(self, dtype: torch.dtype) -> float:
        """The largest error of a correct result that was computed in ``dtype``."""
        return MARGIN * HALF_ULP[dtype] * self.noise

    def error_of(self, result: Any) -> float:
        return self.error(result, self.value)

    def check(self, result: Any, dtype: torch.dtype) -> None:
        """Raise AssertionError if ``result``, computed in ``dtype``, is not this value up to rounding."""
        error = self.error_of(result)
        if not error <= self.bound(dtype):
            self.measure(tries=12)
        assert error <= self.bound(dtype), f"the error is {error:.1e}, the bound {self.bound(dtype):.1e}"
