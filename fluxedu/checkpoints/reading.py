"""Reading safetensors files, and folders of them, as mappings from names to tensors.

    tensors = read("flux1-dev.safetensors")      # opens and checks, loads nothing
    tensors.shapes["img_in.weight"]              # (3072, 64)
    tensors["img_in.weight"]                     # a tensor whose memory is the file's pages
    flux = load_model("flux1-dev.safetensors")   # the network with these weights

Only safetensors is read: a pickle can run code when it is opened.
"""

from __future__ import annotations

import math
import mmap
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fluxedu.checkpoints.configs import Shape, from_diffusers_config, infer_config, label_of, shapes_of
from fluxedu.checkpoints.layouts import (
    MODELS,
    ConvertedTensors,
    Piece,
    check_names_and_shapes,
    check_network,
    convert_lazily,
    dtypes_of,
    plain_names,
    without_prefixes,
)
from fluxedu.errors import CheckpointError, describe, first_of
from fluxedu.files import WEIGHTS, read_json
from fluxedu.models.config import Config
from fluxedu.models.meta_init import meta_init

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
_WINDOW = 1 << 30  # bytes of a file that are mapped at once
CHUNK = 32 << 20  # bytes of a file that are read at once, on their way to another device or dtype


# ---------------------------------------------------------------- files


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


class TensorFile(Mapping):
    """The tensors of a file or folder, each opened when it is looked up; see :func:`read`."""

    def __init__(self, path: Path, entries: dict[str, Entry], metadata: dict[str, str]):
        self.path, self.metadata, self.label = path, metadata, path.name or str(path)
        self.entries = {name: entries[stored] for name, stored in plain_names(entries).items()}
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self.entries.items()}
        self._windows: dict[tuple[Path, int], mmap.mmap] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; its memory is the mapped pages of the file."""
        entry = self.entries[name]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        start = entry.offset // _WINDOW * _WINDOW
        window, count = self._window(entry.path, start), math.prod(entry.shape)
        flat = torch.frombuffer(window, dtype=entry.dtype, count=count, offset=entry.offset - start)
        return flat.reshape(entry.shape)

    def _window(self, path: Path, start: int) -> mmap.mmap:
        """The mapped part of a file with all tensors that begin within ``_WINDOW`` bytes of ``start``.

        Writing to this memory never changes the file. safetensors maps a whole file at once, which operating systems
        refuse when the file is larger than the machine's memory; they do allow mapping it in parts.
        """
        if (path, start) not in self._windows:
            inside = [e for e in self.entries.values() if e.path == path and start <= e.offset < start + _WINDOW]
            length = max(entry.offset + entry.nbytes for entry in inside) - start
            with path.open("rb") as file:
                window = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
            self._windows[path, start] = window
        return self._windows[path, start]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read_into(self, rows: Tensor, name: str, start: int) -> None:
        """Fill ``rows`` (on the CPU, contiguous) from the file, beginning with the tensor's row ``start``.

        Mapped pages would count as memory of this process; these bytes are read and not mapped.
        """
        entry = self.entries[name]
        memory = rows.reshape(-1).view(torch.uint8).numpy()
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + start * entry.dtype.itemsize * math.prod(entry.shape[1:]))
            while len(memory):  # a system reads at most 2 GiB at once
                count = file.readinto(memory)
                if not count:
                    raise CheckpointError(f"{entry.path.name} was truncated while being read.")
                memory = memory[count:]


def read(path: str | Path) -> TensorFile:
    """Open ``path`` without loading it: a ``.safetensors`` file, or a folder with one file or an index of shards.

    Prefixes such as ``model.diffusion_model.`` are removed from the names. Raises CheckpointError if ``path``
    does not exist or holds no tensors, and if a file is cut short, damaged, a pickle, or ambiguous.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}.")
    files = _files_of_folder(path) if path.is_dir() else {path: None}
    entries, metadata = {}, {}
    for file, indexed in files.items():
        found, metadata = read_header(file)
        if indexed is not None:
            if missing := sorted(indexed - found.keys()):
                raise CheckpointError(f"{file.name} lacks the key {first_of(missing)} that the index promises.")
            if extra := sorted(found.keys() - indexed):
                raise CheckpointError(f"{file.name} has the key {first_of(extra)}, which the index does not name.")
        entries |= found
    if not entries:
        raise CheckpointError(f"{path.name} holds no tensors.")
    return TensorFile(path, entries, metadata)


def _files_of_folder(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a folder, each with the names that the index gives it (None: there is no index)."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder.name} has several indices, among them {first_of(i.name for i in indices)}.")
    if indices:
        return _read_index(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return {files[0]: None}
    if files:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder.name} has no index but {len(files)} .safetensors files; name one of {names}.")
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise pickle_error(pickles[0])
    parts = sorted(d.name for d in folder.iterdir() if d.is_dir() and any(d.glob("*.safetensors")))
    hint = f", but its subfolders {', '.join(parts)} do; pass one of them" if parts else ""
    raise CheckpointError(f"{folder} contains no .safetensors file{hint}.")


def _read_index(index: Path) -> dict[Path, set[str]]:
    """Shard -> the names of its tensors."""
    try:
        weight_map = dict(read_json(index.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index.name} is not an index of shards (JSON with a weight_map).") from None
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index.name} names the shard {describe(shard)}, which is not a file beside it.")
        shards.setdefault(index.parent / shard, set()).add(name)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{index.parent.name} lacks the shard {first_of(missing)} that its index names.")
    return shards


# ---------------------------------------------------------------- networks


def config_of(tensors: TensorFile) -> Config:
    """The configuration of a file or folder: from its metadata, from its config.json, or inferred from the shapes.

    A file with the usual name in a folder (``diffusion_pytorch_model.safetensors``) belongs to the config.json beside
    it.
    """
    stored, path = tensors.metadata.get("fluxedu_config"), tensors.path
    config_json = (path.parent if re.fullmatch(WEIGHTS, path.name) else path) / "config.json"
    try:
        if stored:
            class_name, fields = read_json(stored)
            return {kind.__name__: kind for kind in MODELS}[class_name].from_dict(fields)
        if config_json.is_file():
            return from_diffusers_config(read_json(config_json.read_bytes()))
    except CheckpointError as error:
        raise CheckpointError(f"{tensors.label}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{tensors.label} has a configuration that cannot be read.") from None
    return infer_config(tensors)


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | Callable[[str], torch.device | str] | None = None,
) -> nn.Module:
    """Load ``tensors`` into ``module`` (strict), and return it.

    The tensors become the weights, without a second copy: ``module`` may have been built on the meta device, and the
    weights of a file stay in the file until they are used. ``dtype=None`` keeps the file's dtype; ``device`` may also
    be a function of the name. Weights that go to another device or dtype pass through a few megabytes of memory.

    Raises CheckpointError, before anything is changed, for a missing or unexpected key or a wrong shape.
    """
    tensors = without_prefixes(tensors)
    found, label = shapes_of(tensors), label_of(tensors)
    config = getattr(module, "config", None)
    if type(config) in MODELS:
        check_network(found, config, "bfl", label)
    else:
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        check_names_and_shapes(found, expected, label)
    device_of = device if callable(device) else lambda name: device
    module.load_state_dict(stream(tensors, dtype, device_of), strict=True, assign=True)
    return module


def open_model(path: str | Path, config: Config | None = None) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The network stored at ``path``, on the meta device, and the tensors to load with :func:`load_into`."""
    tensors = read(path)
    config = config or config_of(tensors)
    with meta_init():
        module = MODELS[type(config)](config)
    return module.eval(), convert_lazily(tensors, "bfl", config)


def load_model(
    path: str | Path,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The network stored at ``path``, in either layout: a Flux, AutoEncoder, CLIPTextEncoder or T5Encoder."""
    module, tensors = open_model(path, config)
    return load_into(module, tensors, dtype, device)


# ---------------------------------------------------------------- a few megabytes at a time


def stream(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, device_of: Callable[[str], torch.device | str | None]
) -> dict[str, Tensor]:
    """Every tensor in ``dtype`` (None: its own) on the device ``device_of(name)`` (None: where it is).

    Tensors that can stay in a file (for the CPU, in the file's dtype and in one piece) are mapped, which takes no
    memory until they are used. All others are copied in chunks through two buffers: while one is copied to a GPU, the
    other is filled. So the host holds 2 x 32 MiB, however large the model is.
    """
    dtypes, streamed, buffers = dtypes_of(tensors), {}, {}
    for name, shape in shapes_of(tensors).items():
        device = torch.device(device_of(name) or "cpu")
        pieces, source = _pieces(tensors, name)
        is_mapped = device.type == "cpu" and dtype in (None, dtypes[name]) and len(pieces) == 1
        if is_mapped or not isinstance(source, TensorFile) or math.prod(shape) == 0 or not shape:
            streamed[name] = tensors[name].to(device=device_of(name), dtype=dtype)
            continue
        streamed[name] = torch.empty(shape, dtype=dtype or dtypes[name], device=device)
        row = 0
        for chunk in row_chunks(tensors, name, buffers.setdefault(device, free_buffers(CHUNK, device))):
            rows = streamed[name][row : row + len(chunk)]
            rows.copy_(chunk.to(device, non_blocking=True).view(rows.shape))  # cast on the device
            row += len(chunk)
    return streamed


def row_chunks(tensors: Mapping[str, Tensor], name: str, buffers: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield a tensor's rows in order, as many as fit in a buffer; those of a file are read into the next buffer."""
    pieces, source = _pieces(tensors, name)
    for piece in pieces:
        tensor = source.entries[piece.name] if isinstance(source, TensorFile) else torch.atleast_1d(source[piece.name])
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        start, end = piece.start, min(piece.stop, tensor.shape[0] if tensor.shape else 1)
        while start < end:
            buffer = next(buffers)
            stop = min(start + max(1, len(buffer) // max(1, row_bytes)), end)
            if isinstance(tensor, Tensor):
                yield tensor[start:stop]
            else:
                nbytes = (stop - start) * row_bytes
                if nbytes > len(buffer):  # a single row that is larger
                    buffer = torch.empty(nbytes, dtype=torch.uint8)
                rows = buffer[:nbytes].view(tensor.dtype).view(stop - start, *tensor.shape[1:])
                source.read_into(rows, piece.name, start)
                yield rows
            start = stop


def free_buffers(nbytes: int, device: torch.device) -> Iterator[Tensor]:
    """Alternate between two buffers; one is yielded once its previous copy to ``device`` has finished."""
    is_cuda = device.type == "cuda"
    buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
    copied: list[torch.cuda.Event | None] = [None, None]
    for i in cycle((0, 1)):
        if copied[i] is not None:
            copied[i].synchronize()
        yield buffers[i]
        if is_cuda:  # the next buffer is requested, so the copy of this one is under way
            copied[i] = torch.cuda.current_stream(device).record_event()


def _pieces(tensors: Mapping[str, Tensor], name: str) -> tuple[list[Piece], Mapping[str, Tensor]]:
    """The pieces that a tensor is made of (often one, with all its rows), and the mapping that they are in."""
    if isinstance(tensors, ConvertedTensors):
        return tensors.recipes[name], tensors.source
    return [Piece(name, 0, sys.maxsize)], tensors
