"""Networks without numbers: shapes and names only, on the meta device, of any size and at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class _SkipInit(TorchFunctionMode):
    """Leave out the random filling: there is nothing to fill, and on the meta device it imports the compiler, 2 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_init() -> Iterator[None]:
    """``with meta_init(): flux = Flux(config)`` makes the network without its numbers."""
    with torch.device("meta"), _SkipInit():
        yield
