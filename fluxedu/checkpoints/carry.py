"""From a file to a device and a dtype, a few megabytes at a time.

What may stay in the file (on the CPU, in the file's own dtype, in one piece) is mapped and costs nothing until
it is used. Everything else is read into one of two buffers and copied from there while the other one is
filled: the host holds 2 x 32 MiB, however large the model. Pages of a mapped file would count as used
memory until the last tensor has been carried, so they are read and not mapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fluxedu.checkpoints.tables import Converted, Piece, dtypes_of, shapes_of

BUFFER = 32 << 20  # bytes


def carried(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    where: Callable[[str], torch.device | str | None],
) -> dict[str, Tensor]:
    """Every tensor in ``dtype`` (its own if None) at ``where(name)``; None is where it is."""
    return _Carrier(tensors).all(dtype, where)


class _Carrier:
    """Two buffers, and the tensors of a file behind them; tensors of a plain mapping are simply moved."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors, self.shapes, self.dtypes = tensors, shapes_of(tensors), dtypes_of(tensors)
        self.recipes = tensors.recipes if isinstance(tensors, Converted) else {}
        self.file = tensors.source if self.recipes else tensors
        self.buffers: list[Tensor] = []
        self.free: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0

    def all(self, dtype: torch.dtype | None, where: Callable) -> dict[str, Tensor]:
        made = {}
        for name in self.shapes:
            device = torch.device(where(name) or "cpu")
            if not hasattr(self.file, "read_into") or self._may_stay(name, dtype, device):
                made[name] = self.tensors[name].to(device=where(name), dtype=dtype)
            else:
                made[name] = self._carry(name, dtype or self.dtypes[name], device)
        if self.buffers and self.buffers[0].is_pinned():
            torch.cuda.synchronize()  # before the buffers are given back
        return made

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        """The rows of the file that a tensor is made of."""
        shape = self.shapes[name]
        return self.recipes[name].pieces if self.recipes else (Piece(name, 0, shape[0] if shape else 1),)

    def _may_stay(self, name: str, dtype: torch.dtype | None, device: torch.device) -> bool:
        same = dtype in (None, self.dtypes[name])
        whole = bool(self.shapes[name]) and math.prod(self.shapes[name]) > 0
        return not whole or (device.type == "cpu" and same and len(self._pieces(name)) == 1)

    def _carry(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One tensor, its rows in chunks that fit a buffer."""
        made = torch.empty(self.shapes[name], dtype=dtype, device=device)
        rows, at = made.flatten(1) if made.ndim > 1 else made[:, None], 0  # [rows, numbers in a row]
        own = self.dtypes[name]
        most = max(1, BUFFER // (own.itemsize * rows.shape[1]))
        for piece in self._pieces(name):
            for start in range(piece.start, piece.stop, most):
                count = min(most, piece.stop - start)
                self._send(rows[at : at + count], piece.source, start, own)
                at += count
        return made

    def _send(self, rows: Tensor, source: str, start: int, own: torch.dtype) -> None:
        """Rows of the file through the buffer whose turn it is; straight to where they are wanted, if they can."""
        if rows.device.type == "cpu" and rows.dtype == own:
            return self.file.read_into(rows, source, start)
        size = rows.numel() * own.itemsize
        buffer = self._buffer(size, rows.device)
        chunk = buffer[:size].view(own).view(rows.shape)
        self.file.read_into(chunk, source, start)
        rows.copy_(chunk.to(rows.device, non_blocking=True))  # cast where it arrives
        if rows.is_cuda:
            self.free[self.turn] = torch.cuda.current_stream(rows.device).record_event()
        self.turn = 1 - self.turn

    def _buffer(self, size: int, device: torch.device) -> Tensor:
        if not self.buffers or size > len(self.buffers[0]):  # a single row may be larger than a buffer
            if any(self.free):
                torch.cuda.synchronize()
            pinned = device.type == "cuda"
            self.buffers = [torch.empty(max(size, BUFFER), dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        elif self.free[self.turn] is not None:
            self.free[self.turn].synchronize()
        return self.buffers[self.turn]
