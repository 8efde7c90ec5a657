"""What a safetensors file says of itself, believed only as far as it can be checked.

8 bytes of length, that much JSON, then the data: https://huggingface.co/docs/safetensors/index#format. The tensors
lie one after the other without a gap, so that no byte belongs to two of them or to none.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxedu.checkpoints.tables import Shape
from fluxedu.errors import CheckpointError, describe

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``offset`` bytes into ``path``."""

    path: Path
    dtype: torch.dtype
    shape: Shape
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def read_json(text: str | bytes):
    """JSON in which no key comes twice; raises ValueError for anything else, however deep."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; raises CheckpointError where it is not in order."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(9)
        if len(first) < 9 or first[8:] != b"{":
            raise _not_safetensors(path, first)
        length = int.from_bytes(first[:8], "little")
        text = b"{" + file.read(min(length, size) - 1) if length else b""
    if size < 8 + length:
        raise CheckpointError(f"{path.name} is cut short: it has {size:,} bytes, its header alone {8 + length:,}.")
    try:
        header = read_json(text)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(path, name, values, 8 + length) for name, values in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{path.name} has a damaged header and is no safetensors file.") from None
    _check_places(path, entries, 8 + length, size)
    return entries, metadata


def _entry(path: Path, name: str, values: dict, data: int) -> Entry:
    if (code := values["dtype"]) not in DTYPES:
        code = code if isinstance(code, str) and code.isalnum() and len(code) < 20 else describe(code)
        raise CheckpointError(f"{path.name} has {describe(name)} in dtype {code}, not one of {', '.join(DTYPES)}.")
    (begin, end), shape = values["data_offsets"], values["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in (begin, end, *shape)):
        raise ValueError
    entry = Entry(path, DTYPES[values["dtype"]], tuple(shape), data + begin)
    if end - begin != entry.nbytes:
        raise CheckpointError(
            f"{path.name} has {describe(name)} in {end - begin:,} bytes, which is not {describe(shape)}."
        )
    return entry


def _check_places(path: Path, entries: dict[str, Entry], begin: int, size: int) -> None:
    """One tensor after the other, from the header's end to the file's."""
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=begin)
    if size != end:
        fault = "is cut short" if size < end else "is too long"
        raise CheckpointError(f"{path.name} {fault}: it has {size:,} bytes, its header promises {end:,}.")
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != begin:
            raise CheckpointError(f"{path.name} has {describe(name)} where another tensor or none should be.")
        begin += entry.nbytes


def _not_safetensors(path: Path, first: bytes) -> CheckpointError:
    if path.suffix in PICKLES or first[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return pickle_error(path)
    if len(first) < 9:
        return CheckpointError(f"{path.name} is cut short: it has only {len(first)} bytes.")
    return CheckpointError(f"{path.name} is no safetensors file (it begins with {first[:8]!r}).")


def pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(f"{path.name} is a pickle, which can run code when opened; fluxedu reads .safetensors only.")
