"""Networks of any size without memory for their weights: shapes and names only, on PyTorch's meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class _SkipRandomInit(TorchFunctionMode):
    """Skip torch.nn.init: meta tensors have no values, and running it on them imports the compiler (2 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_init() -> Iterator[None]:
    """``with meta_init(): flux = Flux(config)`` builds the network without its weights."""
    with torch.device("meta"), _SkipRandomInit():
        yield
