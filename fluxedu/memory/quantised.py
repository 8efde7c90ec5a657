"""The blocks' weights in fewer bits, by kept libraries: a half or a quarter of the memory, and not exact.

    fe.load("dev", quantise="nf4")      each block is made small on its way from the host to the device
    quantise(pipe.flux, "int8")         of a network that is there

int8, fp8
    a row of a weight is 8-bit numbers and one scale: torchao
nf4
    64 weights of a row (32 where 64 do not go into it) are 4-bit numbers, spaced as a normal distribution is, and one
    scale: bitsandbytes (Dettmers et al., 2023, arXiv:2305.14314)

Both come with ``pip install "fluxedu[quantised]"``. What it costs a block is measured by
``python -m fluxedu.bench.quantised``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn

from fluxedu.errors import QuantiseError, describe
from fluxedu.models import Flux


@dataclass(frozen=True)
class Format:
    """library: what is installed for it · held: the bytes of a weight of ``rows x columns`` · apply: to a block."""

    library: str
    held: Callable[[int, int], int]
    apply: Callable[[nn.Module, Collection[nn.Module]], None]


def quantise(flux: Flux, to: str = "int8", device: torch.device | str | None = None) -> Flux:
    """Make the linear layers of every block small, in place, each block on ``device`` (where it is, if None).

    Layers that visit, as those of the modulation do with ``memory="no-modulations"``, are left alone. Raises
    QuantiseError for another word, no library, blocks that visit, or weights that are small already.
    """
    check(to)
    if getattr(flux, "quantised", None):
        raise QuantiseError(f"these weights are {flux.quantised} already; load again for others.")
    away = set(getattr(flux, "visitors", ()))
    blocks = [*flux.double_blocks, *flux.single_blocks]
    dtype = flux.img_in.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise QuantiseError(f"weights are quantised from float32 or bfloat16, not from {dtype}.".replace("torch.", ""))
    if away.intersection(blocks):
        raise QuantiseError('blocks that visit cannot be quantised; load with memory="full" or "no-modulations".')
    for block in blocks:
        small = linears(block, away)
        for module in small:
            module.to(device)
        FORMATS[to].apply(block, small)
    flux.quantised = to
    return flux


def linears(block: nn.Module, away: Collection[nn.Module] = ()) -> list[nn.Linear]:
    """The layers of a block that are made small: all that stay."""
    return [module for module in block.modules() if isinstance(module, nn.Linear) and module not in away]


def known(to: str | None) -> None:
    """Raises QuantiseError for a word that is none of ``FORMATS``; None is no word."""
    if to is not None and (not isinstance(to, str) or to not in FORMATS):
        raise QuantiseError(f"weights are quantised to one of {', '.join(FORMATS)}, not {describe(to)}.")


def check(to: str) -> None:
    """The same, and for a library that is not there."""
    known(to)
    try:
        with quietly():
            import_module(FORMATS[to].library)
    except ImportError:
        library = FORMATS[to].library
        raise QuantiseError(f'{to} needs {library}: pip install {library}, or "fluxedu[quantised]".') from None


@contextmanager
def quietly() -> Iterator[None]:
    """While a library is imported that says on stderr which of its kernels are not for this machine."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _torchao(config: str) -> Callable:
    def apply(block: nn.Module, small: Collection[nn.Module]) -> None:
        from torchao import quantization

        chosen = set(small)
        quantization.quantize_(block, getattr(quantization, config)(), filter_fn=lambda module, _: module in chosen)

    return apply


def _together(columns: int) -> int:
    """How many weights share a scale. On a CPU, where a row is no whole number of groups, the library is wrong."""
    if columns % 32:
        raise QuantiseError(f"nf4 needs rows of a multiple of 32 weights, not of {columns}.")
    return 32 if columns % 64 else 64


def _bitsandbytes(block: nn.Module, small: Collection[nn.Module]) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    names = {module: name for name, module in block.named_modules()}
    for old in small:
        with torch.device("meta"):
            new = Linear4bit(old.in_features, old.out_features, old.bias is not None, old.weight.dtype, False, "nf4")
        whole = old.weight.detach().contiguous()
        how = {"blocksize": _together(old.in_features), "compress_statistics": False, "quant_type": "nf4"}
        new.weight = Params4bit(whole, requires_grad=False, module=new, **how)
        new.bias = old.bias
        new.support_avx512bf16_for_cpu = False  # that kernel takes widths in 64s only, and rounds the scales
        block.set_submodule(names[old], new.train(old.training).to(whole.device))  # here the 4 bits are made


FORMATS = {
    "int8": Format("torchao", lambda rows, columns: rows * columns + 5 * rows, _torchao("Int8WeightOnlyConfig")),
    "fp8": Format("torchao", lambda rows, columns: rows * columns + 4 * rows, _torchao("Float8WeightOnlyConfig")),
    "nf4": Format("bitsandbytes", lambda rows, columns: rows * columns // 2 + 4 * rows * columns // _together(columns),
                  _bitsandbytes),
}  # fmt: skip
