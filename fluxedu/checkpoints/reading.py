"""Reading safetensors files, and folders of them, as mappings from names to tensors.

tensors = read("flux1-dev.safetensors")      # opens and checks, loads nothing
tensors.shapes["img_in.weight"]              # (3072, 64)
tensors["img_in.weight"]                     # a tensor whose memory is the file's pages
flux = load_model("flux1-dev.safetensors")   # the network with these weights
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxedu.checkpoints.configs import from_diffusers_config, infer_config, label_of, shapes_of
from fluxedu.checkpoints.contents import (
    StoredNetwork,
    check_stored,
    dequantised,
    the_network,
    without_prefixes,
)
from fluxedu.checkpoints.headers import WEIGHTS, Entry, read_entries
from fluxedu.checkpoints.layouts import (
    MODELS,
    ConvertedTensors,
    Piece,
    check_names_and_shapes,
    check_network,
    convert_lazily,
    dtypes_of,
    part_of,
)
from fluxedu.errors import CheckpointError, check_device, checked
from fluxedu.files import read_json
from fluxedu.models.config import Config
from fluxedu.models.meta_init import meta_init

_WINDOW = 1 << 30  # bytes of a file that are mapped at once
_SAMPLED, _SAMPLE = 1 << 20, 1 << 12  # of weights with more numbers, three samples of so many are searched for NaN
CHUNK = 32 << 20  # bytes of a file that are read at once, on their way to another device or dtype


class TensorFile(Mapping):
    """The tensors of a file or folder, each opened when it is looked up; see :func:`read`.

    Scaled fp8 weights are dequantised then; ``dtypes`` has their dtype after it, ``entries`` the stored one.
    """

    def __init__(
        self, path: Path, entries: dict[str, Entry], metadata: dict[str, str], network: StoredNetwork | None = None
    ):
        self.path, self.metadata, self.label = path, metadata, path.name or str(path)
        self.dtypes = {name: entry.dtype for name, entry in entries.items()}
        self.scales: dict[str, Entry] = {}
        if network is not None:
            shapes = {name: entry.shape for name, entry in entries.items()}
            self.dtypes = check_stored(network, self.dtypes, shapes, self.label)
            self.scales = {name: entries[stored] for name, stored in network.scales.items()}
            entries = {name: entries[stored] for name, stored in network.names.items()}
        self.entries = entries
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self._windows: dict[tuple[Path, int], mmap.mmap] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; its memory is the mapped pages of the file, unless it is dequantised."""
        tensor = self._mapped(self.entries[name])
        return self.dequantised(tensor, name).to(self.dtypes[name])

    def dequantised(self, rows: Tensor, name: str, start: int = 0) -> Tensor:
        """``rows``, which begin with row ``start`` of the tensor, times their scale if there is one, in float32."""
        return dequantised(rows, self._mapped(self.scales[name]), start) if name in self.scales else rows

    def _mapped(self, entry: Entry) -> Tensor:
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
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
            entries = (*self.entries.values(), *self.scales.values())
            inside = [e for e in entries if e.path == path and start <= e.offset < start + _WINDOW]
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


@checked(CheckpointError)
def read(path: str | Path, part: str | None = None) -> TensorFile:
    """Open ``path`` without loading it: a ``.safetensors`` file, an index of shards, or a folder with one of them.

    Prefixes such as ``model.diffusion_model.`` are removed from the names, tensors that FLUX does not use are left out
    (CLIP's image half and projections, T5's decoder), and scaled fp8 weights are dequantised. ``part`` chooses one
    network of a file with several: transformer, vae, text_encoder or text_encoder_2. A folder's plain files are read if
    it has any, otherwise those of its only variant, such as fp16.

    Raises CheckpointError if ``path`` does not exist or holds no tensors, if a file is cut short, damaged, a pickle,
    or ambiguous, and for formats that cannot be read (GGUF, nf4, Chroma, …).
    """
    path = Path(path)
    entries, metadata = read_entries(path)
    return TensorFile(path, entries, metadata, the_network(entries, path.name or str(path), part))


# ---------------------------------------------------------------- networks


@checked(CheckpointError)
def config_of(tensors: TensorFile) -> Config:
    """The configuration of a file or folder: from its metadata, from its config.json, or inferred from the shapes.

    A file with the usual name in a folder (``diffusion_pytorch_model.safetensors``) belongs to the config.json beside
    it.
    """
    stored, path = tensors.metadata.get("fluxedu_config"), tensors.path
    config_json = (path.parent if WEIGHTS.fullmatch(path.name) else path) / "config.json"
    try:
        if stored:
            class_name, fields = read_json(stored)
            return {kind.__name__: kind for kind in MODELS}[class_name].from_dict(fields)
        if config_json.is_file():
            return from_diffusers_config(read_json(config_json.read_bytes()))
    except CheckpointError as error:
        raise CheckpointError(f"{tensors.label}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{tensors.label} has a configuration that cannot be read.") from None
    return infer_config(tensors)


@checked(CheckpointError)
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

    Raises CheckpointError, before anything is changed, for a missing or unexpected key, a wrong shape, weights that are
    no floating-point numbers, and NaN or infinity. On the CPU, only samples of tensors above a million numbers are
    searched for NaN, since reading all of a mapped file would take longer than loading it.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise CheckpointError(f"dtype must be one of floating-point numbers, such as torch.bfloat16, not {dtype}.")
    config = getattr(module, "config", None)
    tensors = without_prefixes(tensors, part_of(config))
    found, label = shapes_of(tensors), label_of(tensors)
    if type(config) in MODELS:
        check_network(found, config, "bfl", label)
    else:
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        check_names_and_shapes(found, expected, label)
    dtypes = dtypes_of(tensors)
    for name, _ in module.named_parameters():
        if not dtypes[name].is_floating_point:
            raise CheckpointError(f"{label} has {name!r} in {dtypes[name]}; weights must be floating-point numbers.")
    if isinstance(device, (str, torch.device)) and str(device) != "meta":
        check_device(device, CheckpointError)
    device_of = device if callable(device) else lambda name: device
    weights = stream(tensors, dtype, device_of)
    _check_finite(weights, tensors, label)
    module.load_state_dict(weights, strict=True, assign=True)
    return module


@torch.no_grad()
def _check_finite(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], label: str) -> None:
    """Raises CheckpointError with the first of ``tensors`` from which a weight got a NaN or an infinity."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights.values():
        if not weight.dtype.is_floating_point:  # a batch norm's counter
            continue
        if weight.numel() > _SAMPLED and weight.device.type == "cpu":
            starts = (0, weight.numel() // 2, weight.numel() - _SAMPLE)
            weight = torch.cat([weight.reshape(-1)[start : start + _SAMPLE] for start in starts])
        weight = weight if weight.dtype.itemsize > 1 else weight.float().norm()
        if not weight.is_meta:
            groups.setdefault((weight.device, torch.promote_types(weight.dtype, torch.float32)), []).append(weight)
    # a norm is finite only if all of its numbers are; should it overflow, they are searched
    norms = [torch.stack(torch._foreach_norm(group, dtype=dtype)) for (_, dtype), group in groups.items()]
    if all(norm.isfinite().all() for norm in norms):
        return
    for name, weight in weights.items():
        if not weight.float().isfinite().all():
            pieces, source = _pieces(tensors, name)
            stored = next((piece.name for piece in pieces if not source[piece.name].float().isfinite().all()), name)
            raise CheckpointError(f"{label} has NaN or infinity in {stored!r} (loaded as {weight.dtype}).")


@checked(CheckpointError)
def open_model(
    path: str | Path, config: Config | None = None, part: str | None = None
) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The network stored at ``path``, on the meta device, and the tensors to load with :func:`load_into`.

    ``part`` chooses one of several networks, see :func:`read`.
    """
    tensors = read(path, part or part_of(config))
    config = config or config_of(tensors)
    with meta_init():
        module = MODELS[type(config)](config)
    return module.eval(), convert_lazily(tensors, "bfl", config)


@checked(CheckpointError)
def load_model(
    path: str | Path,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    part: str | None = None,
) -> nn.Module:
    """The network stored at ``path``, in either layout: a Flux, AutoEncoder, CLIPTextEncoder or T5Encoder.

    ``part`` chooses one of several networks, see :func:`read`.
    """
    module, tensors = open_model(path, config, part)
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
        to_dtype = dtype if dtypes[name].is_floating_point else None  # a batch norm's counter stays a whole number
        pieces, source = _pieces(tensors, name)
        is_mapped = device.type == "cpu" and to_dtype in (None, dtypes[name]) and len(pieces) == 1
        if is_mapped or not isinstance(source, TensorFile) or math.prod(shape) == 0 or not shape:
            streamed[name] = tensors[name].to(device=device_of(name), dtype=to_dtype)
            continue
        streamed[name] = torch.empty(shape, dtype=to_dtype or dtypes[name], device=device)
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
                    buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
                rows = buffer[:nbytes].view(tensor.dtype).view(stop - start, *tensor.shape[1:])
                source.read_into(rows, piece.name, start)
                yield source.dequantised(rows, piece.name, start)
            start = stop


def free_buffers(nbytes: int, device: torch.device) -> Iterator[Tensor]:
    """Alternate between two buffers; one is yielded once its previous copy to ``device`` has finished."""
    is_cuda = device.type == "cuda"
    buffers = [torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=is_cuda) for _ in range(2)]
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
