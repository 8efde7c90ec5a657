"""Writing: tensor by tensor into a temporary name, which becomes the result when all of it is there.

    save_file(module.state_dict(), "flux.safetensors")
    save_folder(module.state_dict(), "transformer", config=module.config)     # diffusers', in shards
    convert_file("flux1-dev.safetensors", "transformer", to="diffusers")

The two layouts differ only in how rows are put together (see ``tables.py``), so a conversion is a copy
of rows from file to file. It holds a few megabytes at a time, however large the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fluxedu.checkpoints.configs import to_diffusers_config
from fluxedu.checkpoints.header import DTYPES
from fluxedu.checkpoints.layouts import converted
from fluxedu.checkpoints.load import TensorFile, config_of, read
from fluxedu.checkpoints.tables import Converted, Piece, Shape, dtypes_of, shapes_of
from fluxedu.errors import CheckpointError
from fluxedu.files import atomic_path
from fluxedu.models import CLIPTextConfig, T5Config
from fluxedu.models.config import Config

SHARD_BYTES = 10_000_000_000  # diffusers' own default
_CHUNK = 4 << 20  # bytes in memory at a time
_ALIGN = 64  # the data begins at a multiple of this, so that mapped tensors are aligned
_CODES = {dtype: code for code, dtype in DTYPES.items()}
Progress = Callable[[int, int], None]


class _Job:
    """Tensors on their way to disk: what they are, and their rows, a chunk at a time."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, progress: Progress | None):
        self.tensors, self.shapes = tensors, shapes_of(tensors)
        own = dtypes_of(tensors)
        self.dtypes = {name: dtype if dtype and own[name].is_floating_point else own[name] for name in self.shapes}
        source = tensors.source if isinstance(tensors, Converted) else tensors
        small = [n for n, t in source.items() if hasattr(t, "__tensor_flatten__")] if isinstance(source, dict) else []
        if small:
            raise CheckpointError(f"{small[0]!r} is quantised; whole weights alone are saved.")
        for name, made in self.dtypes.items():
            if made not in _CODES:
                raise CheckpointError(f"{name!r} is {made}, which a .safetensors file cannot hold.")
        self.sizes = {name: math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()}
        self.total, self.done, self.progress = sum(self.sizes.values()), 0, progress

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in order."""
        pieces, source = _pieces(self.tensors, name, self.shapes[name])
        for piece in pieces:
            for part in _in_chunks(source, piece):
                part = part.detach().to("cpu", self.dtypes[name]).contiguous()
                data = memoryview(part.reshape(-1).view(torch.uint8).numpy())
                yield data
                self.done += len(data)
                if self.progress:
                    self.progress(self.done, self.total)


def _pieces(tensors: Mapping[str, Tensor], name: str, shape: Shape) -> tuple[tuple[Piece, ...], Mapping[str, Tensor]]:
    """The rows a tensor is made of, and where they are."""
    if isinstance(tensors, Converted):
        return tensors.recipes[name].pieces, tensors.source
    return (Piece(name, 0, shape[0] if shape else 1),), tensors


def _in_chunks(source: Mapping[str, Tensor], piece: Piece) -> Iterator[Tensor]:
    """The rows of a piece, a few megabytes at a time; from a file they are read and not mapped."""
    name = piece.source
    held = None if isinstance(source, TensorFile) else torch.atleast_1d(source[name])
    shape, dtype = (source.shapes[name], source.dtypes[name]) if held is None else (held.shape, held.dtype)
    step = max(1, _CHUNK // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for start in range(piece.start, piece.stop, step):
        stop = min(start + step, piece.stop)
        yield source.rows(name, start, stop) if held is None else held[start:stop]


def _write(job: _Job, names: list[str], path: Path, metadata: dict[str, str]) -> None:
    """One safetensors file: 8 bytes of length, the header, then the tensors one after the other."""
    header, offset = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name in names:
        ends = [offset, offset + job.sizes[name]]
        header[name] = {"dtype": _CODES[job.dtypes[name]], "shape": list(job.shapes[name]), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            for chunk in job.chunks(name):
                file.write(chunk)


def save_file(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write one ``.safetensors`` file, names as they are; it appears whole or not at all.

    ``config`` is written into the file's metadata, so that the file says what it is. ``dtype`` rounds
    real numbers to another dtype; ``progress(bytes_done, bytes_in_all)`` is called along the way.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"a file of tensors is called something.safetensors, not {path.name!r}.")
    job = _Job(tensors, dtype, progress)
    told = {"fluxedu_config": json.dumps([type(config).__name__, config.to_dict()])} if config else {}
    with atomic_path(path, overwrite) as part:
        _write(job, list(job.shapes), part, told)
    return path


def save_folder(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    config: Config,
    *,
    to: str = "diffusers",
    max_shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a folder as diffusers or transformers do: ``config.json``, and the tensors in one file or in
    shards with an index. The folder appears whole or not at all.

    ``tensors`` may be in either layout; ``to="bfl"`` keeps the official names inside the folder.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"diffusers' layout is a folder, and {path.name!r} is a file's name.")
    described = json.dumps(to_diffusers_config(config), indent=2) + "\n"
    job = _Job(converted(tensors, to, config), dtype, progress)
    stem = "model" if isinstance(config, CLIPTextConfig | T5Config) else "diffusion_pytorch_model"
    shards = _shards(job.sizes, max_shard_bytes)
    files = _shard_names(stem, len(shards))
    with atomic_path(path, overwrite, folder=True) as part:
        for file, names in zip(files, shards, strict=True):
            _write(job, names, part / f"{file}.part", {})
        if len(files) > 1:
            (part / f"{stem}.safetensors.index.json").write_text(_index(files, shards, job.total), encoding="utf-8")
        (part / "config.json").write_text(described, encoding="utf-8")
        for file in files:  # only now does anything carry the name of a result
            (part / f"{file}.part").rename(part / file)
    return path


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, filled into shards of at most ``limit`` bytes (a larger tensor has its own)."""
    if limit < 1:
        raise CheckpointError(f"a shard needs at least one byte, not {limit}.")
    shards, room = [[]], limit
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _index(files: list[str], shards: list[list[str]], total: int) -> str:
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def convert_file(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a file or folder: ``to="bfl"`` writes one file, ``to="diffusers"`` a folder.

    The source may be in either layout, in shards or not, with prefixes or not. Without ``config`` the
    source's own is used: from its ``config.json``, or told by its shapes. Memory stays at a few
    megabytes. Raises CheckpointError for a source that is not in order, before anything is written.
    """
    tensors = read(source)
    config = config or config_of(tensors)
    options = {"dtype": dtype, "overwrite": overwrite, "progress": progress}
    if to == "diffusers":
        return save_folder(tensors, target, config, max_shard_bytes=shard_bytes, **options)
    return save_file(converted(tensors, to, config), target, config=config, **options)


def write_text(path: str | Path, text: str) -> Path:
    """Write a small text file, replacing what is there; it changes whole or not at all.

    What is no ordinary file (``/dev/stdout``, a pipe, a link) is written to and stays what it is.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
        path.write_text(text, encoding="utf-8")
        return path
    with atomic_path(path, overwrite=True) as part:
        part.write_text(text, encoding="utf-8")
    return path
