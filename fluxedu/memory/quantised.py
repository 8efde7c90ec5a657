"""The blocks' weights in fewer bits, by established libraries: half or a quarter of the memory, and not exact.

    fe.load("dev", quantise="nf4")      each block is quantised on its way from the host to the device
    quantise(pipe.flux, "int8")         a network that is loaded already

int8, fp8
    each row of a weight is stored as 8-bit numbers and one scale: torchao
nf4
    64 weights of a row (32 where the row is no multiple of 64) are stored as 4-bit numbers, spaced as the quantiles of
    a normal distribution, and one scale: bitsandbytes (Dettmers et al., 2023, arXiv:2305.14314)

Both are installed with ``pip install "fluxedu[quantised]"``. ``python -m benchmarks.quantised`` measures the error of
each block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import nn

from fluxedu.errors import QuantiseError, check_choice
from fluxedu.models import Flux


@dataclass(frozen=True)
class Format:
    """library: the library that quantises · nbytes: the bytes of a weight of ``rows x columns`` · apply: quantises
    some linear layers of a block in place
    """

    library: str
    nbytes: Callable[[int, int], int]
    apply: Callable[[nn.Module, Collection[nn.Module]], None]


def quantise(flux: Flux, to: str = "int8", device: torch.device | str | None = None) -> Flux:
    """Quantise the linear layers of every block in place, one block after the other, on ``device`` (None: where it is).

    Streamed layers (with ``memory="no-modulations"``, those of the modulation) are not quantised. Raises QuantiseError
    for an unknown format, a missing library, streamed blocks, and weights that are quantised already.
    """
    from fluxedu.memory.placement import Placement  # which counts the bytes of each format

    check_installed(to)
    placement = flux.placement or Placement()
    if placement.quantised:
        raise QuantiseError(f"these weights are {placement.quantised} already; load again for another format.")
    if placement.streamed:
        raise QuantiseError('streamed blocks cannot be quantised; load with memory="full" or "no-modulations".')
    dtype = flux.img_in.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise QuantiseError(f"weights are quantised from float32 or bfloat16, not from {dtype}.".replace("torch.", ""))
    streamed = {module for group in placement.streamed_modules(flux) for module in group}
    for block in [*flux.double_blocks, *flux.single_blocks]:
        layers = linear_layers(block, streamed)
        for layer in layers:
            layer.to(device)
        FORMATS[to].apply(block, layers)
    flux.placement = replace(placement, quantised=to)
    return flux


def linear_layers(block: nn.Module, streamed: Collection[nn.Module] = ()) -> list[nn.Linear]:
    """The layers of a block that are quantised: all linear ones that are not streamed."""
    return [module for module in block.modules() if isinstance(module, nn.Linear) and module not in streamed]


def check_format(quantised: str | None) -> None:
    """Raises QuantiseError unless ``quantised`` is one of ``FORMATS`` or None."""
    if quantised is not None:
        check_choice("quantise", quantised, FORMATS, error=QuantiseError)


def check_installed(quantised: str) -> None:
    """Raises QuantiseError for an unknown format, or if its library is not installed."""
    check_format(quantised)
    library = FORMATS[quantised].library
    try:
        with quiet_imports():
            import_module(library)
    except ImportError:
        raise QuantiseError(f'{quantised} needs {library}: pip install {library}, or "fluxedu[quantised]".') from None


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Suppresses warnings of libraries that report on import which of their kernels this machine cannot use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _torchao(config: str) -> Callable:
    def apply(block: nn.Module, layers: Collection[nn.Module]) -> None:
        from torchao import quantization

        chosen = set(layers)
        quantization.quantize_(block, getattr(quantization, config)(), filter_fn=lambda module, _: module in chosen)

    return apply


def _group_size(columns: int) -> int:
    """How many weights share a scale. Groups must not cross rows: on a CPU the library then computes wrong results."""
    if columns % 32:
        raise QuantiseError(f"nf4 needs rows of a multiple of 32 weights, not of {columns}.")
    return 32 if columns % 64 else 64


def _bitsandbytes(block: nn.Module, layers: Collection[nn.Module]) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    names = {module: name for name, module in block.named_modules()}
    for old in layers:
        with torch.device("meta"):
            new = Linear4bit(old.in_features, old.out_features, old.bias is not None, old.weight.dtype, False, "nf4")
        weight = old.weight.detach().contiguous()
        options = {"blocksize": _group_size(old.in_features), "compress_statistics": False, "quant_type": "nf4"}
        new.weight = Params4bit(weight, requires_grad=False, module=new, **options)
        new.bias = old.bias
        new.support_avx512bf16_for_cpu = False  # that kernel takes only multiples of 64, and rounds the scales
        block.set_submodule(names[old], new.train(old.training).to(weight.device))  # the move to a device quantises


FORMATS = {
    "int8": Format("torchao", lambda rows, columns: rows * columns + 5 * rows, _torchao("Int8WeightOnlyConfig")),
    "fp8": Format("torchao", lambda rows, columns: rows * columns + 4 * rows, _torchao("Float8WeightOnlyConfig")),
    "nf4": Format(
        "bitsandbytes",
        lambda rows, columns: rows * columns // 2 + 4 * rows * columns // _group_size(columns),
        _bitsandbytes,
    ),
}
