"""What is on disk: the headers of safetensors files, indices of shards, and which files of a folder are its weights.

Only safetensors is read: a pickle can run code when it is opened.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fluxedu.checkpoints.configs import Shape
from fluxedu.errors import CheckpointError, describe, first_of
from fluxedu.files import check_path, read_json, read_json_file

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
#: what diffusers and transformers call weights in a folder: plain, of a variant such as fp16, in shards, their index
WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(\.(?P<variant>\w+))?(-\d{5}-of-\d{5})?(\.(?P<older>\w+))?\.safetensors"
    r"(\.index(\.(?P<index>\w+))?\.json)?"
)


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored: ``offset`` bytes into ``path``."""

    path: Path
    dtype: torch.dtype
    shape: Shape
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata; raises CheckpointError if the file is damaged.

    The safetensors library checks the file. This function adds the offsets, which the library does not give, and
    refuses a key that occurs twice, which the library accepts.
    Format: https://huggingface.co/docs/safetensors/index#format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)  # the length of the header, and its first character
        length = int.from_bytes(start[:8], "little")
        text = start[8:] + file.read(min(length, size) - 1) if length else b""
    if start.startswith(b"GGUF"):
        raise gguf_error(path)
    if start[8:] != b"{":
        if path.suffix in PICKLES or re.match(rb"PK|\x80[\x02-\x05]", start):
            raise pickle_error(path)
        if size < 9:
            raise CheckpointError(f"{path.name} is cut short: it has only {size} bytes.")
        raise CheckpointError(f"{path.name} is not a safetensors file (it begins with {start[:8]!r}).")
    if size < 8 + length:
        raise CheckpointError(f"{path.name} is cut short: it has {size:,} bytes, its header alone {8 + length:,}.")
    try:
        header = read_json(text)
        metadata = header.pop("__metadata__", None) or {}
        end = 8 + length + max((max(values["data_offsets"]) for values in header.values()), default=0)
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        if size != end:
            fault = "cut short" if size < end else "too long"
            raise CheckpointError(
                f"{path.name} is {fault}: it has {size:,} bytes, its header promises {end:,}."
            ) from None
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"{path.name} has a damaged header ({' '.join(reason.split())[:150]}).") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{path.name} has a damaged header and is not a safetensors file.") from None
    entries = {}
    for name, values in header.items():
        dtype = values["dtype"]
        if dtype not in DTYPES:
            raise CheckpointError(f"{path.name} has {describe(name)} in dtype {dtype}, not one of {', '.join(DTYPES)}.")
        offset = 8 + length + values["data_offsets"][0]
        entries[name] = Entry(path, DTYPES[dtype], tuple(values["shape"]), offset)
    return entries, metadata


def pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(f"{path.name} is a pickle, which can run code when opened; fluxedu reads .safetensors only.")


def gguf_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is a GGUF file, which cannot be read; use the bfloat16 or fp8 .safetensors, with quantise=."
    )


def read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The stored tensors of a file, an index or a folder, and the metadata."""
    if not check_path(path).exists():
        raise CheckpointError(f"there is no file or folder {path}.")
    source = weights_in(path) if path.is_dir() else path
    files = _read_index(source) if source.suffix == ".json" else {source: None}
    entries, metadata = {}, {}
    for file, indexed in files.items():
        try:
            found, metadata = read_header(check_path(file))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
        if indexed is not None:
            if missing := sorted(indexed - found.keys()):
                raise CheckpointError(f"{file.name} lacks the key {first_of(missing)} that the index promises.")
            if extra := sorted(found.keys() - indexed):
                raise CheckpointError(f"{file.name} has the key {first_of(extra)}, which the index does not name.")
        entries |= found
    if not entries:
        raise CheckpointError(f"{path.name} holds no tensors.")
    return entries, metadata


def variant_of_file(path: Path) -> str | None:
    """``fp16`` for diffusion_pytorch_model.fp16.safetensors; None for a plain file, or one with another name."""
    match = WEIGHTS.fullmatch(path.name)
    return match and (match["variant"] or match["older"] or match["index"])


def weights_in(folder: Path, variant: str | None = None) -> Path:
    """The index of shards or the file with a folder's weights: the plain one if there is one, or that of ``variant``.

    Raises CheckpointError if there is none, or several to choose from.
    """
    found: dict[str | None, list[Path]] = {}
    for path in sorted((*folder.glob("*.safetensors.index*.json"), *folder.glob("*.safetensors"))):
        found.setdefault(variant_of_file(path), []).append(path)
    if variant is not None and variant not in found:
        raise CheckpointError(f"{folder.name} has no files of the variant {describe(variant)}.")
    if variant is None and None not in found and len(found) > 1:
        raise CheckpointError(f"{folder.name} has the variants {', '.join(found)}; choose one with variant=.")
    paths = found[variant] if variant in found else next(iter(found.values()), [])
    indices = [path for path in paths if path.suffix == ".json"]
    if len(indices) > 1:
        raise CheckpointError(f"{folder.name} has several indices, among them {first_of(i.name for i in indices)}.")
    files = indices or paths
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder.name} has no index but {len(files)} .safetensors files; name one of {names}.")
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise pickle_error(pickles[0])
    if gguf := sorted(folder.glob("*.gguf")):
        raise gguf_error(gguf[0])
    parts = sorted(d.name for d in folder.iterdir() if d.is_dir() and any(d.glob("*.safetensors")))
    hint = f", but its subfolders {', '.join(parts)} do; pass one of them" if parts else ""
    raise CheckpointError(f"{folder} contains no .safetensors file{hint}.")


def _read_index(index: Path) -> dict[Path, set[str]]:
    """Shard -> the names of its tensors."""
    try:
        weight_map = dict(read_json_file(index)["weight_map"])
    except (ValueError, LookupError, TypeError):
        raise CheckpointError(f"{index.name} is not an index of shards (JSON with a weight_map).") from None
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index.name} names the shard {describe(shard)}, which is not a file beside it.")
        shards.setdefault(index.parent / shard, set()).add(name)
    missing = [shard.name for shard in shards if not check_path(shard).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent.name} lacks the shard {first_of(missing)} that its index names.")
    return shards
