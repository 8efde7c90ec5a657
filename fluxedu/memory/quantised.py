"""The blocks' weights in 8 bits, by torchao (``pip install torchao``): half the memory, and not exact.

    quantise(pipe.flux, "int8")

A row of a weight is kept as 8-bit numbers and one scale. What it costs a block is measured by
``python -m fluxedu.bench.quantised``. Only for networks all of whose weights stay (``memory="full"``).
"""

from __future__ import annotations

from torch import nn

from fluxedu.memory.placement import PlacementError
from fluxedu.models import Flux

CONFIGS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def quantise(flux: Flux, to: str = "int8") -> Flux:
    """Make the linear layers of every block 8-bit, in place; raises PlacementError for another word or no torchao."""
    if not isinstance(to, str) or to not in CONFIGS:
        raise PlacementError(f"weights are quantised to one of {', '.join(CONFIGS)}, not {to!r}.")
    if getattr(flux, "visited", False):
        raise PlacementError('weights that visit cannot be quantised; load with memory="full".')
    try:
        from torchao import quantization
    except ImportError:
        raise PlacementError("quantising needs torchao: pip install torchao.") from None
    config = getattr(quantization, CONFIGS[to])()
    for blocks in (flux.double_blocks, flux.single_blocks):
        quantization.quantize_(blocks, config, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    return flux
