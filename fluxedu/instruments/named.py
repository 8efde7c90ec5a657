"""A tensor whose axes have names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fluxedu.errors import InstrumentError, checked, describe


@dataclass(frozen=True, eq=False)
class Named:
    """A tensor with named ``axes``; ``coords`` labels some of them (the times of steps, the words of keys).

    ``named.at(step=3, head=0)`` selects by name, ``named.mean("head")`` reduces, and ``a - b`` matches the axes of two
    values by name. ``named.tensor``, ``numpy.asarray(named)``, ``named.to_pandas()`` and ``float(named)`` convert it.
    """

    tensor: Tensor
    axes: tuple[str, ...]
    coords: dict[str, list] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.tensor, Tensor) or not isinstance(self.coords, dict):
            both = f"{describe(self.tensor)} and {describe(self.coords)}"
            raise InstrumentError(f"a Named is made of a tensor, its axes and a dictionary of labels, not of {both}.")
        is_list = isinstance(self.axes, (tuple, list)) and all(isinstance(name, str) for name in self.axes)
        if not is_list or not self.tensor.ndim == len(self.axes) == len(set(self.axes)):
            raise InstrumentError(
                f"axes must name each dimension of the tensor {list(self.tensor.shape)}, not {describe(self.axes)}."
            )
        object.__setattr__(self, "axes", tuple(self.axes))

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.tensor.shape, strict=True))

    @checked(InstrumentError)
    def axis(self, name: str) -> int:
        """The index of an axis; raises InstrumentError for one that does not exist."""
        if name not in self.axes:
            raise InstrumentError(f"there is no axis {describe(name)}; the axes are {', '.join(self.axes)}.")
        return self.axes.index(name)

    @checked(InstrumentError)
    def at(self, **where: int) -> Named:
        """Select one index of each named axis and drop the axis."""
        tensor, axes = self.tensor, list(self.axes)
        for name, index in where.items():
            if not -self.shape[self.axis(name)] <= index < self.sizes[name]:
                raise InstrumentError(f"axis {name!r} has length {self.sizes[name]}, so there is no index {index}.")
            tensor = tensor.select(axes.index(name), index)
            axes.remove(name)
        return Named(tensor, tuple(axes), {k: v for k, v in self.coords.items() if k in axes})

    @checked(InstrumentError)
    def take(self, name: str, index: list[int]) -> Named:
        """Select several indices of an axis."""
        axis = self.axis(name)
        wrong = [i for i in index if not -self.shape[axis] <= i < self.shape[axis]]
        if wrong:
            raise InstrumentError(f"axis {name!r} has length {self.shape[axis]}, so there is no index {wrong[0]}.")
        indices = torch.as_tensor([i % self.shape[axis] for i in index], dtype=torch.long, device=self.tensor.device)
        coords = self.coords | ({name: [self.coords[name][i] for i in index]} if name in self.coords else {})
        return Named(self.tensor.index_select(axis, indices), self.axes, coords)

    @checked(InstrumentError)
    def mean(self, *names: str) -> Named:
        """The mean over one or several axes, which are dropped; over all of them if none is named."""
        kept = tuple(axis for axis in self.axes if names and axis not in names)
        tensor = self.tensor.mean([self.axis(name) for name in names or self.axes])
        return Named(tensor, kept, {axis: labels for axis, labels in self.coords.items() if axis in kept})

    # ---------------------------------------------------------------- arithmetic: axes of the same name meet

    @checked(InstrumentError)
    def _combine(self, other: Named | Tensor | float, operation: Callable[[Tensor, Tensor], Tensor]) -> Named:
        """``operation`` of two values; an axis that only one of them has is repeated for the other."""
        if (isinstance(other, Tensor) and other.is_meta) or (isinstance(other, int) and abs(other) >= 2**63):
            raise InstrumentError(f"{describe(other)} cannot be added to or multiplied with {self!r}.")
        if not isinstance(other, Named):
            shape = tuple(other.shape) if isinstance(other, Tensor) else ()
            own = tuple(self.shape)[len(self.shape) - len(shape) :]
            if len(shape) > len(own) or any(n not in (1, size) for n, size in zip(shape, own, strict=True)):
                raise InstrumentError(f"a tensor {list(shape)} does not fit {self!r}.")
            return Named(operation(self.tensor, other), self.axes, self.coords)
        for axis in set(self.axes) & set(other.axes):
            if self.sizes[axis] != other.sizes[axis]:
                raise InstrumentError(
                    f"axis {axis!r} has length {self.sizes[axis]} here and {other.sizes[axis]} there."
                )
        axes = (*self.axes, *(axis for axis in other.axes if axis not in self.axes))
        order = [other.axes.index(axis) for axis in axes if axis in other.axes]
        shape = [other.sizes.get(axis, 1) for axis in axes]
        left = self.tensor.reshape([*self.shape, *[1] * (len(axes) - len(self.axes))])
        right = other.tensor.permute(order).reshape(shape)
        return Named(operation(left, right), axes, other.coords | self.coords)

    def __add__(self, other: Named | Tensor | float) -> Named:
        return self._combine(other, torch.add)

    def __sub__(self, other: Named | Tensor | float) -> Named:
        return self._combine(other, torch.sub)

    def __mul__(self, other: Named | Tensor | float) -> Named:
        return self._combine(other, torch.mul)

    def __truediv__(self, other: Named | Tensor | float) -> Named:
        return self._combine(other, torch.div)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Tensor | float) -> Named:
        return self._combine(other, lambda a, b: b - a)

    def __neg__(self) -> Named:
        return Named(-self.tensor, self.axes, self.coords)

    def abs(self) -> Named:
        return Named(self.tensor.abs(), self.axes, self.coords)

    def __float__(self) -> float:
        """The number that it holds; raises InstrumentError if there are several."""
        if self.tensor.numel() != 1:
            raise InstrumentError(f"only one number can become a float, not {self!r}; select with .at() or .mean().")
        return float(self.tensor.detach())

    def to_pandas(self):
        """A pandas.Series with one row per number, indexed by the axes; raises InstrumentError without pandas."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise InstrumentError("to_pandas needs pandas: pip install pandas.") from None
        labels = [self.coords.get(axis, range(size)) for axis, size in self.sizes.items()]
        return pandas.Series(self.__array__().ravel(), pandas.MultiIndex.from_product(labels, names=self.axes))

    @checked(InstrumentError)
    def dropped(self, name: str, tensor: Tensor) -> Named:
        """``tensor`` with the same axes except ``name``."""
        axes = tuple(a for a in self.axes if a != name)
        return Named(tensor, axes, {k: v for k, v in self.coords.items() if k in axes})

    @checked(InstrumentError)
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
