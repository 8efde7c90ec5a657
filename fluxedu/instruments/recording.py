"""A recording, in memory or in a folder, and how its single values become one tensor with named axes.

On disk a recording is a folder with one safetensors file per completed step, written atomically: whatever happens to
the process, every file that exists is complete. :func:`open_recording` reads the headers of the files; a tensor is read
when it is used.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from fluxedu.errors import InstrumentError, check_integer, check_keys, check_number, checked, describe
from fluxedu.files import atomic_path, check_path, read_json
from fluxedu.instruments.named import Named
from fluxedu.sampling.step_context import StepContext

SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance", "true_cfg_scale", "solver")
IN_USE = "recording"  # an empty file in a folder that is being recorded into


@dataclass(frozen=True)
class StepKey:
    """When a value was recorded: see :class:`fluxedu.sampling.step_context.StepContext`. Numbers count from 0."""

    run: int
    picture: int
    step: int | None
    stage: int
    time: float | None

    @property
    def step_id(self) -> tuple[int, int, int]:
        """(run, picture, step); -1 for what happens before the first step."""
        return self.run, self.picture, -1 if self.step is None else self.step


class Recorded:
    """Reading values by the name of their site, for a recorder and for the recording that its ``saved()`` returns."""

    def __getitem__(self, name: str) -> Named:
        """All values of a site: axes ``run`` and ``picture`` (if several), ``step`` (if there are steps), its own.

        Raises InstrumentError when they differ in shape (images of several sizes, guidance that starts midway) or in
        number (runs of several lengths).
        """
        entries = self.entries(name)
        shapes = {tuple(value.shape) for _, value in entries}
        values_per_picture = Counter(key.step_id[:2] for key, _ in entries)
        pictures_per_run = Counter(run for run, _ in values_per_picture)
        if len(shapes) > 1 or len(set(values_per_picture.values())) > 1 or len(set(pictures_per_run.values())) > 1:
            raise InstrumentError(
                f"the values of {name!r} differ in shape or number, {sorted(shapes)}; "
                f"take them one by one from rec.entries(...)."
            )
        runs, pictures = len(pictures_per_run), len(values_per_picture) // len(pictures_per_run)
        return _stack(entries, runs, pictures, self.saved().pictures)

    def entries(self, name: str) -> list[tuple[StepKey, Named]]:
        """The single values of a site, image by image, and in the order of the run for each."""
        # images that are computed at once alternate
        return sorted(self.saved().in_order(name), key=lambda entry: entry[0].step_id[:2])

    def __iter__(self) -> Iterator[str]:
        return iter(self.saved().values)

    def __len__(self) -> int:
        return len(self.saved().values)

    def __contains__(self, name: str) -> bool:
        return isinstance(name, str) and name in self.saved().values

    def keys(self) -> list[str]:
        return list(self.saved().values)

    @checked(InstrumentError)
    def dataset(self, name: str, flatten: str | None = None) -> ValueDataset:
        """The values of a site as a ``torch.utils.data.Dataset``, for probes or sparse autoencoders.

        flatten: an axis along which each value is divided into items, such as ``"token"``; by default an item is the
        whole value of one model evaluation. Tensors of a folder are read when they are used, also by several workers.
        """
        return ValueDataset([value for _, value in self.entries(name)], flatten)

    def to_dataset(self):
        """An xarray.Dataset with one variable per site. Axes of the same name and length are one dimension; another
        length has its own, such as ``channel_640``. Raises InstrumentError when xarray is not installed.
        """
        try:
            import xarray
        except ModuleNotFoundError:
            raise InstrumentError("to_dataset needs xarray: pip install xarray.") from None
        sizes: dict[str, int] = {}  # dimension -> length
        variables = {}
        for name in self:
            value = self[name]
            dims = []
            for axis, size in value.sizes.items():
                dims.append(axis if sizes.setdefault(axis, size) == size else f"{axis}_{size}")
                sizes[dims[-1]] = size
            coords = {
                dim: value.coords[axis] for dim, axis in zip(dims, value.axes, strict=True) if axis in value.coords
            }
            variables[name] = xarray.DataArray(value.__array__(), coords, dims)
        return xarray.Dataset(variables)


@dataclass
class Recording(Recorded):
    """Everything recorded: ``rec["double.2.attn.map"]`` is a :class:`Named` over all images and steps."""

    holds_one_step = False  # whether the values of one step only are in memory

    pictures: int = 1
    values: dict[str, list[tuple[StepKey, Named]]] = field(default_factory=dict)
    #: run -> (picture, step) that were completed
    completed: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    #: (run, picture) -> prompt, seed and settings
    requests: dict[tuple[int, int], dict] = field(default_factory=dict)

    def add(self, name: str, key: StepKey, value: Named, context: StepContext | None = None) -> None:
        """Append a value to those of its site; ``context``: where the pipeline was, None without one."""
        self.note_run(context)
        self.values.setdefault(name, []).append((key, value))

    def replace(self, name: str, key: StepKey, value: Named, context: StepContext | None = None) -> None:
        """Keep this value in place of the earlier one of its site and image; it belongs to no step."""
        others = [entry for entry in self.values.get(name, []) if entry[0].step_id[:2] != key.step_id[:2]]
        self.values[name] = others
        self.add(name, StepKey(key.run, key.picture, None, 0, None), value, context)

    def note_run(self, context: StepContext | None) -> None:
        """Keep what belongs to the values of a run: the number of images, the completed steps, prompt and settings."""
        if context is None:
            return
        self.pictures, self.completed[context.run] = context.pictures, context.ended
        if (context.run, context.picture) not in self.requests:
            request = context.request
            shown = {name: getattr(request, name) for name in SETTINGS}
            self.requests[context.run, context.picture] = shown | {"latent shape": list(request.shape)}

    @checked(InstrumentError)
    def in_order(self, name: str) -> list[tuple[StepKey, Named]]:
        """The single values of a site, in the order in which they were recorded."""
        if name not in self.values:
            recorded = ", ".join(list(self.values)[:4]) + (", ..." if len(self.values) > 4 else "")
            raise InstrumentError(
                f"nothing was recorded at {describe(name)}; recorded are: {recorded or 'no sites at all'}."
            )
        return self.values[name]

    def close(self, failed: bool = False) -> None:
        """The recorder has ended, or ``failed`` within a step."""

    def saved(self) -> Recording:
        """The recording to read from."""
        return self

    @property
    def nbytes(self) -> int:
        return sum(value.tensor.nbytes for entries in self.values.values() for _, value in entries)


def _stack(entries: list[tuple[StepKey, Named]], runs: int, pictures: int, requested: int) -> Named:
    """Values in the order of runs, images and steps as one tensor; axes of length 1 that mean nothing are dropped."""
    first_key, first = entries[0]
    per_picture = len(entries) // (runs * pictures)
    tensor = torch.stack([value.tensor for _, value in entries]).unflatten(0, (runs, pictures, per_picture))
    in_steps = first_key.step is not None  # text encoders are called before the first step
    axes, coords = ["run", "picture", "step" if in_steps else "call", *first.axes], dict(first.coords)
    if in_steps:
        coords["step"] = [key.time for key, _ in entries[:per_picture]]
    keeps = [runs > 1, pictures > 1 or (requested > 1 and in_steps), in_steps or per_picture > 1]
    for axis in (2, 1, 0):
        if not keeps[axis]:
            tensor = tensor.squeeze(axis)
            del axes[axis]
    return Named(tensor, tuple(axes), coords)


class StoredNamed(Named):
    """A :class:`Named` in a file of a recording; its tensor is read whenever it is used."""

    def __init__(self, path: Path, key: str, shape: tuple[int, ...], axes: tuple[str, ...], coords: dict[str, list]):
        vars(self).update(path=path, key=key, stored_shape=torch.Size(shape), axes=axes, coords=coords)

    @property
    def tensor(self) -> Tensor:
        try:
            with safe_open(self.path, "pt") as file:
                return file.get_tensor(self.key)
        except (SafetensorError, OSError):
            raise InstrumentError(f"{self.path} was damaged or deleted after the recording was opened.") from None

    @property
    def shape(self) -> torch.Size:
        return self.stored_shape


class ValueDataset(Dataset):
    """Recorded values as items of a dataset: see :meth:`Recording.dataset`."""

    def __init__(self, values: list[Named], flatten: str | None):
        self.values = values
        self.axes = [None if flatten is None else value.axis(flatten) for value in values]
        items = [1 if axis is None else value.shape[axis] for axis, value in zip(self.axes, values, strict=True)]
        self.ends = list(accumulate(items))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self.ends, index)
        tensor, axis = self.values[number].tensor, self.axes[number]
        return tensor if axis is None else tensor.select(axis, index - self.ends[number])  # counted from the end


class FolderRecording(Recording):
    """A recording that is written to a folder at the end of every step, and then leaves memory."""

    holds_one_step = True

    def __init__(self, folder: str | Path):
        super().__init__()
        self.opened: tuple[int, Recording] = (0, Recording())  # number of files when it was opened, what they hold
        self.folder = check_path(Path(folder).expanduser(), InstrumentError)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InstrumentError(f"to= must be a new folder, and {self.folder} exists already.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / IN_USE).touch(exist_ok=False)  # so that no second recorder writes into it
        except OSError as error:
            raise InstrumentError(f"the folder {self.folder} cannot be created: {error.strerror}.") from None
        self.first_picture = 0  # of the images that are computed at once
        self.step_id: tuple[int, int, int | None] | None = None  # run, first image and step of the values in memory
        self.files_written = 0
        self.last_values: dict[tuple[str, int, int], tuple[StepKey, Named]] = {}

    def add(self, name: str, key: StepKey, value: Named, context: StepContext | None = None) -> None:
        self.note_run(context)
        if context is not None:
            self.first_picture = context.picture - (context.row or 0)
        step_id = key.run, self.first_picture, key.step
        if step_id != self.step_id:
            self._write_step()
        self.step_id = step_id
        super().add(name, key, value, context)

    def replace(self, name: str, key: StepKey, value: Named, context: StepContext | None = None) -> None:
        """Which value is the last is known only at the end, so it is written by :meth:`close`."""
        self.note_run(context)
        self.last_values[name, key.run, key.picture] = (StepKey(key.run, key.picture, None, 0, None), value)

    def close(self, failed: bool = False) -> None:
        """Write what is left and release the folder; if the run ``failed``, only a completed step is written."""
        try:
            self._write_step(failed)
            if self.last_values and not failed:
                values: dict[str, list[tuple[StepKey, Named]]] = {}
                for (name, *_), entry in self.last_values.items():
                    values.setdefault(name, []).append(entry)
                self._write(values, "picture-all-step-none")
        finally:
            (self.folder / IN_USE).unlink(missing_ok=True)

    def saved(self) -> Recording:
        if self.opened[0] != self.files_written:
            self.opened = self.files_written, open_recording(self.folder)
        return self.opened[1]

    def _write_step(self, failed: bool = False) -> None:
        """Write the step in memory if it was completed, drop it if not.

        A run notes its completed steps. Values outside of steps, and of a network that is called without a pipeline,
        count as complete unless something ``failed`` now.
        """
        for picture in sorted({key.picture for entries in self.values.values() for key, _ in entries}):
            run, _, step = self.step_id
            completed = self.completed.get(run)
            is_complete = not failed if step is None or completed is None else (picture, step) in completed
            if is_complete:
                number = "none" if step is None else f"{step:04d}"
                of_picture = {n: [e for e in found if e[0].picture == picture] for n, found in self.values.items()}
                self._write(of_picture, f"picture-{picture:04d}-step-{number}")
        self.values.clear()
        self.step_id = None

    def _write(self, values: dict[str, list[tuple[StepKey, Named]]], label: str) -> None:
        tensors, entries = {}, {}
        for name, recorded in values.items():
            for i, (key, value) in enumerate(recorded):
                tensors[f"{name}#{i}"] = value.tensor.contiguous()
                entries[f"{name}#{i}"] = [key.run, key.picture, key.step, key.stage, key.time, value.axes, value.coords]
        with atomic_path(self.folder / f"{self.files_written:06d}-{label}.safetensors", overwrite=True) as path:
            pictures = {(key.run, key.picture) for recorded in values.values() for key, _ in recorded}
            requests = [[*picture, self.requests[picture]] for picture in sorted(pictures & self.requests.keys())]
            metadata = {"entries": entries, "pictures": self.pictures, "requests": requests}
            path.write_bytes(save(tensors, {name: json.dumps(value) for name, value in metadata.items()}))
        self.files_written += 1


@checked(InstrumentError)
def open_recording(folder: str | Path) -> Recording:
    """Read a recording from its folder; if the run was killed, its completed steps. Raises InstrumentError.

    The headers of all files are checked, and so is that no file is missing between the first and the last.
    """
    files = sorted(check_path(folder, InstrumentError).glob("[0-9]*-picture-*.safetensors"))
    if not files:
        raise InstrumentError(f"{folder} contains no recording.")
    recording = Recording()
    for number, path in enumerate(files):
        if not path.name.startswith(f"{number:06d}-"):
            raise InstrumentError(f"{folder} lacks the file {number:06d}-picture-*, so the recording is not complete.")
        try:
            if not path.is_file():
                raise FileNotFoundError
            with safe_open(path, "pt") as file:
                metadata = {name: read_json(text) for name, text in file.metadata().items()}
                recording.pictures = check_integer("pictures", metadata["pictures"], 1, 2**31)
                for run, picture, request in metadata["requests"]:
                    recording.requests[run, picture] = check_keys("a request", request, required=SETTINGS)
                if set(file.keys()) != set(metadata["entries"]):
                    raise KeyError
                for key, (run, picture, step, stage, time, axes, coords) in metadata["entries"].items():
                    shape = check_names(file.get_slice(key).get_shape(), axes, coords)
                    for value in (run, picture, step or 0):
                        check_integer("a number", value, 0, 2**31)
                    check_integer("a stage", stage, -1, 2**31)
                    check_number("a time", time or 0, -1e9, 1e9)
                    label = f"picture-{picture:04d}-step-{'none' if step is None else f'{step:04d}'}"
                    if path.stem[7:] not in (label, "picture-all-step-none"):
                        raise ValueError("the values of another step")
                    value = StoredNamed(path, key, shape, tuple(axes), coords)
                    recording.add(key.rpartition("#")[0], StepKey(run, picture, step, stage, time), value)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError):
            raise InstrumentError(f"{path} is damaged, or not part of a recording.") from None
    return recording


def check_names(shape: list[int], axes: list[str], coords: dict[str, list]) -> tuple[int, ...]:
    """The shape, if ``axes`` and ``coords``, which come from a file, fit it; raises ValueError or TypeError if not."""
    if not all(isinstance(axis, str) for axis in axes) or len({*axes}) < len(axes) or not isinstance(axes, list):
        raise ValueError(f"the axes {axes} have no names of their own")
    sizes = dict(zip(axes, shape, strict=True))
    if any(not isinstance(labels, list) or sizes.get(axis) != len(labels) for axis, labels in dict(coords).items()):
        raise ValueError(f"the labels do not fit the shape {shape}")
    return tuple(shape)
