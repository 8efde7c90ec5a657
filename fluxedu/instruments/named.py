"""A tensor whose axes have names."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fluxedu.errors import InstrumentError


@dataclass(frozen=True, eq=False)
class Named:
    """A tensor with named ``axes``; ``coords`` labels some of them (the times of steps, the words of keys).

    ``torch.as_tensor(named.tensor)``, ``numpy.asarray(named)``; ``named.at(step=3, head=0)`` picks by name.
    """

    tensor: Tensor
    axes: tuple[str, ...]
    coords: dict[str, list] = field(default_factory=dict)

    def __post_init__(self):
        if self.tensor.ndim != len(self.axes):
            raise InstrumentError(
                f"axes must name each dimension of the tensor {list(self.tensor.shape)}, not {', '.join(self.axes)}."
            )

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.tensor.shape, strict=True))

    def axis(self, name: str) -> int:
        """The index of an axis; raises InstrumentError for one that does not exist."""
        if name not in self.axes:
            raise InstrumentError(f"there is no axis {name!r}; the axes are {', '.join(self.axes)}.")
        return self.axes.index(name)

    def at(self, **where: int) -> Named:
        """Select one index of each named axis and drop the axis."""
        tensor, axes = self.tensor, list(self.axes)
        for name, index in where.items():
            if not -self.shape[self.axis(name)] <= index < self.sizes[name]:
                raise InstrumentError(f"axis {name!r} has length {self.sizes[name]}, so there is no index {index}.")
            tensor = tensor.select(axes.index(name), index)
            axes.remove(name)
        return Named(tensor, tuple(axes), {k: v for k, v in self.coords.items() if k in axes})

    def take(self, name: str, index: list[int]) -> Named:
        """Select several indices of an axis."""
        axis = self.axis(name)
        wrong = [i for i in index if not -self.shape[axis] <= i < self.shape[axis]]
        if wrong:
            raise InstrumentError(f"axis {name!r} has length {self.shape[axis]}, so there is no index {wrong[0]}.")
        indices = torch.as_tensor([i % self.shape[axis] for i in index], dtype=torch.long, device=self.tensor.device)
        coords = self.coords | ({name: [self.coords[name][i] for i in index]} if name in self.coords else {})
        return Named(self.tensor.index_select(axis, indices), self.axes, coords)

    def mean(self, name: str) -> Named:
        """The mean over an axis, which is dropped."""
        axis = self.axis(name)
        return self.dropped(name, self.tensor.mean(axis))

    def dropped(self, name: str, tensor: Tensor) -> Named:
        """``tensor`` with the same axes except ``name``."""
        axes = tuple(a for a in self.axes if a != name)
        return Named(tensor, axes, {k: v for k, v in self.coords.items() if k in axes})

    def to(self, dtype: torch.dtype) -> Named:
        """The same values in another dtype."""
        return Named(self.tensor.to(dtype), self.axes, self.coords)

    def copy_to(self, device: str, dtype: torch.dtype) -> Named:
        """A contiguous copy on a device."""
        tensor = self.tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        return Named(tensor, self.axes, self.coords)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        tensor = self.tensor.float() if self.tensor.dtype == torch.bfloat16 else self.tensor
        return np.asarray(tensor.detach().cpu().numpy(), dtype)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{a}: {n}" for a, n in self.sizes.items())
        return f"Named({sizes}; {str(self.tensor.dtype).removeprefix('torch.')})"
