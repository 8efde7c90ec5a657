"""Writing safetensors files and diffusers' folders, a few megabytes at a time.

    save_file(module.state_dict(), "flux.safetensors")
    save_folder(module.state_dict(), "transformer", config=module.config)     # diffusers' layout, in shards
    convert_file("flux1-dev.safetensors", "transformer", to="diffusers")

The two layouts differ only in how rows are stacked (see ``layouts.py``), so a conversion copies rows from file to file.
safetensors' own writer needs all tensors in memory; this one holds one chunk of one tensor, however large the model is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fluxedu.checkpoints.configs import shapes_of, to_diffusers_config
from fluxedu.checkpoints.headers import DTYPES
from fluxedu.checkpoints.layouts import ConvertedTensors, convert_lazily, dtypes_of, part_of
from fluxedu.checkpoints.reading import config_of, free_buffers, read, row_chunks
from fluxedu.errors import CheckpointError, checked
from fluxedu.files import atomic_path
from fluxedu.models import CLIPTextConfig, T5Config
from fluxedu.models.config import Config

SHARD_BYTES = 10_000_000_000  # diffusers' default
_CHUNK = 4 << 20  # bytes in memory at a time
_ALIGNMENT = 64  # the data begins at a multiple of this, so that mapped tensors are aligned
_CODES = {dtype: code for code, dtype in DTYPES.items()}
Progress = Callable[[int, int], None]


class _Writer:
    """Writes tensors to one or several files, and reports the progress over all of them."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, progress: Progress | None):
        if dtype is not None and not dtype.is_floating_point:
            raise CheckpointError(f"dtype must be one of floating-point numbers, such as torch.bfloat16, not {dtype}.")
        self.tensors, self.shapes, self.dtypes = tensors, shapes_of(tensors), dict(dtypes_of(tensors))
        source = tensors.source if isinstance(tensors, ConvertedTensors) else tensors
        for name, tensor in source.items() if isinstance(source, dict) else ():
            if hasattr(tensor, "__tensor_flatten__"):  # a subclass of Tensor with several tensors inside
                raise CheckpointError(f"{name!r} is quantised; only weights that are not can be saved.")
        for name, own in self.dtypes.items():
            if dtype is not None and own.is_floating_point:
                self.dtypes[name] = dtype
            if self.dtypes[name] not in _CODES:
                raise CheckpointError(f"{name!r} is {self.dtypes[name]}, which a .safetensors file cannot hold.")
        self.sizes = {name: math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()}
        self.total, self.done, self.progress = sum(self.sizes.values()), 0, progress
        self.buffers = free_buffers(_CHUNK, torch.device("cpu"))

    def write(self, path: Path, names: list[str], metadata: dict[str, str]) -> None:
        """One safetensors file: the length of the header in 8 bytes, the header, then one tensor after the other."""
        header: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
        end = 0
        for name in names:
            start, end = end, end + self.sizes[name]
            shape = list(self.shapes[name])
            header[name] = {"dtype": _CODES[self.dtypes[name]], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in names:
                for rows in row_chunks(self.tensors, name, self.buffers):
                    rows = rows.detach().to("cpu", self.dtypes[name]).contiguous()
                    data = memoryview(rows.reshape(-1).view(torch.uint8).numpy())
                    file.write(data)
                    self.done += len(data)
                    if self.progress:
                        self.progress(self.done, self.total)


@checked(CheckpointError)
def save_file(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write one ``.safetensors`` file, names as they are; it is written atomically.

    ``config`` is stored in the file's metadata, so that :func:`load_model` needs no other source for it. ``dtype``
    rounds floating-point tensors to another dtype; ``progress(bytes_done, bytes_total)`` is called along the way.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"a file of tensors must be called something.safetensors, not {path.name!r}.")
    writer = _Writer(tensors, dtype, progress)
    metadata = {"fluxedu_config": json.dumps([type(config).__name__, config.to_dict()])} if config else {}
    with atomic_path(path, overwrite) as part:
        writer.write(part, list(writer.shapes), metadata)
    return path


@checked(CheckpointError)
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
    """Write a folder as diffusers or transformers do: ``config.json``, and one file or shards with an index.

    The folder is written atomically. ``tensors`` may be in either layout; ``to="bfl"`` keeps the official names
    inside the folder.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # slow to import

    path = Path(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"diffusers' layout is a folder, and {path.name!r} is the name of a file.")
    if max_shard_bytes < 1:
        raise CheckpointError(f"a shard needs at least one byte, not {max_shard_bytes}.")
    config_json = json.dumps(to_diffusers_config(config), indent=2) + "\n"
    writer = _Writer(convert_lazily(tensors, to, config), dtype, progress)
    stem = "model" if isinstance(config, CLIPTextConfig | T5Config) else "diffusion_pytorch_model"
    shards = split_state_dict_into_shards_factory(
        writer.sizes,
        get_storage_size=lambda size: size,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    with atomic_path(path, overwrite, folder=True) as part:
        for file, names in shards.filename_to_tensors.items():
            writer.write(part / f"{file}.part", names, {})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (part / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
        (part / "config.json").write_text(config_json, encoding="utf-8")
        for file in shards.filename_to_tensors:  # only now does a file have the name of a result
            (part / f"{file}.part").rename(part / file)
    return path


@checked(CheckpointError)
def convert_file(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    config: Config | None = None,
    part: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a file or folder: ``to="bfl"`` writes one file, ``to="diffusers"`` a folder.

    The source may be in either layout, with or without shards and prefixes; scaled fp8 weights are dequantised, and
    ``part`` chooses one of several networks, see :func:`read`. Without ``config`` the source's own is
    used (see :func:`config_of`). Memory stays at a few megabytes. Raises CheckpointError for a source that is not in
    order, before anything is written.
    """
    tensors = read(source, part or part_of(config))
    config = config or config_of(tensors)
    options = {"dtype": dtype, "overwrite": overwrite, "progress": progress}
    if to == "diffusers":
        return save_folder(tensors, target, config, max_shard_bytes=shard_bytes, **options)
    return save_file(convert_lazily(tensors, to, config), target, config=config, **options)
