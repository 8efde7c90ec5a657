"""Reading: a safetensors file, or a folder of them, as a mapping from names to tensors.

    tensors = read("flux1-dev.safetensors")      # opens, checks, loads nothing
    tensors.shapes["img_in.weight"]              # (3072, 64)
    tensors["img_in.weight"]                     # a tensor whose memory is the file
    flux = load_model("flux1-dev.safetensors")   # the network with these weights

Only safetensors: a pickle can run code when opened and is refused.
Format: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxedu.checkpoints.carry import carried
from fluxedu.checkpoints.configs import from_diffusers_config
from fluxedu.checkpoints.header import PICKLES, Entry, pickle_error, read_header, read_json
from fluxedu.checkpoints.layouts import check, converted, infer_config, plain, plain_names, require
from fluxedu.checkpoints.tables import MODELS, Shape, label_of, shapes_of
from fluxedu.errors import CheckpointError, first_of
from fluxedu.files import WEIGHTS
from fluxedu.models import AutoEncoderConfig, CLIPTextConfig, FluxConfig, T5Config
from fluxedu.models.config import Config
from fluxedu.models.meta_init import meta_init

_WINDOW = 1 << 30  # bytes of a file mapped at once
_KINDS = {kind.__name__: kind for kind in (FluxConfig, AutoEncoderConfig, CLIPTextConfig, T5Config)}


class TensorFile(Mapping):
    """The tensors of a file or folder, opened when asked for; see :func:`read`."""

    def __init__(self, path: Path, entries: dict[str, Entry], metadata: dict[str, str]):
        self.path, self.metadata, self.label = path, metadata, path.name or str(path)
        self.entries = {name: entries[stored] for name, stored in plain_names(entries).items()}
        self._windows: dict[tuple[Path, int], mmap.mmap] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, its memory being the file's pages."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=entry.dtype)
        start = entry.offset // _WINDOW * _WINDOW
        mapped = self._mapped(entry.path, start)
        return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.offset - start).reshape(
            entry.shape
        )

    def _mapped(self, path: Path, start: int) -> mmap.mmap:
        """The part of a file in which the tensors lie that begin within ``_WINDOW`` bytes of ``start``.

        Writing changes the memory and never the file. In parts, because a system refuses to map at once,
        in this way, more than it has memory.
        """
        if (path, start) not in self._windows:
            here = [e for e in self.entries.values() if e.path == path and start <= e.offset < start + _WINDOW]
            length = max(e.offset + e.dtype.itemsize * math.prod(e.shape) for e in here) - start
            with path.open("rb") as file:
                window = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
            self._windows[path, start] = window
        return self._windows[path, start]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: entry.dtype for name, entry in self.entries.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows ``start:stop``, read into fresh memory (what is mapped would count as used)."""
        entry = self.entries[name]
        rows = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        self.read_into(rows, name, start)
        return rows

    def read_into(self, rows: Tensor, name: str, start: int) -> None:
        """Fill ``rows`` (on the CPU, contiguous) from the file, beginning with the tensor's row ``start``."""
        entry = self.entries[name]
        memory = rows.reshape(-1).view(torch.uint8).numpy()
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + start * entry.dtype.itemsize * math.prod(entry.shape[1:]))
            while len(memory):  # a system reads at most 2 GiB at once
                count = file.readinto(memory)
                if not count:
                    raise CheckpointError(f"{entry.path.name} has become shorter while it was read.")
                memory = memory[count:]


def read(path: str | Path) -> TensorFile:
    """Open ``path`` without loading it: a ``.safetensors`` file, or a folder with one file or an index of shards.

    Prefixes such as ``model.diffusion_model.`` are taken off the names. Raises CheckpointError for what is
    not there, cut short, a pickle, or ambiguous.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}.")
    files = _files_of(path) if path.is_dir() else {path: None}
    entries, metadata = {}, {}
    for file, promised in files.items():
        found, metadata = read_header(file)
        _compare_with_index(file.name, found, promised)
        entries |= found
    if not entries:
        raise CheckpointError(f"{path.name} holds no tensors.")
    return TensorFile(path, entries, metadata)


def _files_of(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a folder, each with the names its index promises (None: no index)."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder.name} has several indices, among them {first_of(i.name for i in indices)}.")
    if indices:
        return _read_index(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return {files[0]: None}
    if files:
        raise CheckpointError(
            f"{folder.name} has no index but {len(files)} .safetensors files; "
            f"name one of {', '.join(f.name for f in files)}."
        )
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise pickle_error(pickles[0])
    parts = sorted(d.name for d in folder.iterdir() if d.is_dir() and any(d.glob("*.safetensors")))
    hint = f"; its parts {', '.join(parts)} do" if parts else ""
    raise CheckpointError(f"{folder} holds no .safetensors file{hint}.")


def _read_index(index: Path) -> dict[Path, set[str]]:
    try:
        weight_map = dict(read_json(index.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index.name} is not an index of shards (JSON with a weight_map).") from None
    files: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index.name} names the shard {shard!r}, which is not a file beside it.")
        files.setdefault(index.parent / shard, set()).add(name)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{index.parent.name} lacks the shard {first_of(absent)} that its index names.")
    return files


def _compare_with_index(label: str, found: dict[str, Entry], promised: set[str] | None) -> None:
    if promised is None:
        return
    if absent := sorted(promised - found.keys()):
        raise CheckpointError(f"{label} lacks the key {first_of(absent)} that the index promises.")
    if extra := sorted(found.keys() - promised):
        raise CheckpointError(f"{label} has the key {first_of(extra)}, which the index does not name.")


def config_of(tensors: TensorFile) -> Config:
    """The configuration of a file or folder: as written in it, in its config.json, or told by its shapes.

    A file that carries a folder's own name (``diffusion_pytorch_model.safetensors``) belongs to the
    config.json beside it.
    """
    told, path = tensors.metadata.get("fluxedu_config"), tensors.path
    beside = (path.parent if re.fullmatch(WEIGHTS, path.name) else path) / "config.json"
    try:
        if told:
            kind, fields = read_json(told)
            return _KINDS[kind].from_dict(fields)
        if beside.is_file():
            return from_diffusers_config(read_json(beside.read_bytes()))
    except CheckpointError as error:
        raise CheckpointError(f"{tensors.label}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{tensors.label} carries a configuration that cannot be read.") from None
    return infer_config(tensors)


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | Callable[[str], torch.device | str] | None = None,
) -> nn.Module:
    """Give ``module`` these weights, strictly, and return it.

    The tensors become the weights, without a second copy: ``module`` may have been built on the meta
    device, and the weights of a file stay in the file until they are used. ``dtype=None`` keeps the file's;
    ``device`` may also be a function of the name. What goes elsewhere or is cast passes through a few
    megabytes of memory (:mod:`fluxedu.checkpoints.carry`).
    Raises CheckpointError, before anything is changed, for a missing or unexpected key or a wrong shape.
    """
    tensors = plain(tensors)
    found, label = shapes_of(tensors), label_of(tensors)
    config = getattr(module, "config", None)
    if type(config) in MODELS:
        require(found, config, "bfl", label)
    else:
        check(found, {name: tuple(t.shape) for name, t in module.state_dict().items()}, label)
    where = device if callable(device) else lambda name: device
    weights = carried(tensors, dtype, where)
    module.load_state_dict(weights, strict=True, assign=True)
    return module


def outline(path: str | Path, config: Config | None = None) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The network stored at ``path`` without its numbers, and the tensors that :func:`load_into` gives it."""
    tensors = read(path)
    config = config or config_of(tensors)
    with meta_init():
        module = MODELS[type(config)](config)
    return module.eval(), converted(tensors, "bfl", config)


def load_model(
    path: str | Path,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The network stored at ``path``, in either layout: a Flux, AutoEncoder, CLIPTextEncoder or T5Encoder."""
    module, tensors = outline(path, config)
    return load_into(module, tensors, dtype, device)
