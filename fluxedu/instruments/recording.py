"""What was recorded, in memory or in a folder, and how single values become one tensor with named axes.

On disk a recording is a folder with one safetensors file for each whole step, written aside and renamed: whatever
happens to the process, every file that is there is whole. :func:`open_recording` reads it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fluxedu.errors import InstrumentError
from fluxedu.files import atomic_path
from fluxedu.instruments.named import Named

MARK = "recording"  # an empty file in a folder that is being recorded into


@dataclass(frozen=True)
class When:
    """When in a run a value passed: see :class:`fluxedu.sampling.step_context.StepContext`. Numbers count from 0."""

    run: int
    picture: int
    step: int | None
    stage: int
    time: float | None

    @property
    def place(self) -> tuple[int, int, int]:
        """The step it belongs to; what comes before the first step is -1."""
        return self.run, self.picture, -1 if self.step is None else self.step


@dataclass
class Recording:
    """Everything recorded: ``rec["double.2.attn.map"]`` is a :class:`Named` over all pictures and steps."""

    pictures: int = 1
    kept: dict[str, list[tuple[When, Named]]] = field(default_factory=dict)
    ended: dict[int, set[tuple[int, int]]] = field(default_factory=dict)  # run -> (picture, step) that came to an end

    def add(self, name: str, when: When, value: Named, last_only: bool = False) -> None:
        """Keep a value; ``last_only``: in place of the picture's earlier one, not of one step."""
        entries = self.kept.setdefault(name, [])
        if last_only:
            entries[:] = [e for e in entries if e[0].place[:2] != when.place[:2]]
            when = When(when.run, when.picture, None, 0, None)
        entries.append((when, value))

    def entries(self, name: str) -> list[tuple[When, Named]]:
        """The single values of a site as they passed."""
        if name not in self.kept:
            have = ", ".join(list(self.kept)[:4]) + (", ..." if len(self.kept) > 4 else "")
            raise InstrumentError(f"nothing was recorded at {name!r}; recorded are: {have or 'no sites at all'}.")
        return self.kept[name]

    def __getitem__(self, name: str) -> Named:
        """All values of a site: axes ``run`` and ``picture`` (if there are several), ``step`` (if it has any), its own.

        Raises InstrumentError when they differ in shape (pictures of several sizes, guidance switched on midway) or
        in number (runs of several lengths).
        """
        entries = sorted(self.entries(name), key=lambda entry: (entry[0].run, entry[0].picture))  # stable
        shapes = {tuple(v.shape) for _, v in entries}
        drawn = Counter(when.place[:2] for when, _ in entries)  # values a picture
        runs = Counter(run for run, _ in drawn)  # pictures a run
        if len(shapes) > 1 or len(set(drawn.values())) > 1 or len(set(runs.values())) > 1:
            raise InstrumentError(
                f"the values of {name!r} differ in shape or number, {sorted(shapes)}; "
                f"take them one by one from rec.entries(...)."
            )
        return _stacked(entries, len(runs), len(drawn) // len(runs), self.pictures)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __contains__(self, name: str) -> bool:
        return name in self.kept

    def keys(self) -> list[str]:
        return list(self.kept)

    @property
    def nbytes(self) -> int:
        return sum(v.tensor.nbytes for entries in self.kept.values() for _, v in entries)

    def to_dataset(self):
        """An xarray.Dataset, a variable a site; raises InstrumentError when xarray is not installed."""
        try:
            import xarray
        except ModuleNotFoundError:
            raise InstrumentError("to_dataset needs xarray: pip install xarray.") from None
        values = {name: self[name] for name in self}
        steps = {len(v.coords["step"]) for v in values.values() if "step" in v.coords}
        shared = {"run", "picture", *({"step"} if len(steps) == 1 else set())}  # other axes are a site's own
        variables, coords = {}, {}
        for name, value in values.items():
            axes = {a: a if a in shared else f"{name}.{a}" for a in value.axes}
            variables[name] = (list(axes.values()), value.__array__())
            coords |= {axes[a]: labels for a, labels in value.coords.items() if a in axes}
        return xarray.Dataset(variables, coords)


def _stacked(entries: list[tuple[When, Named]], runs: int, pictures: int, asked: int) -> Named:
    """Values in the order of runs, pictures and steps as one tensor."""
    values = [v for _, v in entries]
    axes, coords, per = values[0].axes, dict(values[0].coords), len(values) // (runs * pictures)
    tensor = torch.stack([v.tensor for v in values]).unflatten(0, (runs, pictures, per))
    steps = "step" if entries[0][0].step is not None else "call"  # the text encoders are called before the first step
    if steps == "step":
        coords["step"] = [when.time for when, _ in entries[:per]]
    several = pictures > 1 or (asked > 1 and steps == "step")
    kept = {"run": runs > 1, "picture": several, steps: steps == "step" or per > 1}
    for axis, (name, there) in reversed(list(enumerate(kept.items()))):
        tensor, axes = (tensor, (name, *axes)) if there else (tensor.squeeze(axis), axes)
    return Named(tensor, axes, coords)


class FolderRecording(Recording):
    """A recording that leaves memory at the end of every step."""

    def __init__(self, folder: str | Path):
        super().__init__()
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InstrumentError(f"{self.folder} is there already; record into a new folder.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MARK).touch(exist_ok=False)  # so that a second recorder does not write into it too
        except OSError as error:
            raise InstrumentError(f"{self.folder} cannot be made: {error.strerror}.") from None
        self.place: tuple[int, int, int] | None = None
        self.written = 0
        self.last: dict[tuple[str, int, int], tuple[When, Named]] = {}

    def add(self, name: str, when: When, value: Named, last_only: bool = False) -> None:
        if last_only:  # its last value is known at the end only
            self.last[name, when.run, when.picture] = (When(when.run, when.picture, None, 0, None), value)
            return
        if when.place != self.place:
            self.settle()
        self.place = when.place
        super().add(name, when, value)

    def settle(self, failed: bool = False) -> None:
        """Write the step at hand if it came to its end, drop it if not.

        A run's steps say themselves whether they did. What stands outside of them, or is of a network that was called
        by hand, counts as whole unless something ``failed`` now.
        """
        if self.place is not None:
            run, picture, step = self.place
            ended = self.ended.get(run)
            if not failed if step < 0 or ended is None else (picture, step) in ended:
                self._write(self.kept, f"picture-{picture:04d}-step-{'none' if step < 0 else f'{step:04d}'}")
        self.kept.clear()
        self.place = None

    def let_go(self) -> None:
        """Nothing more will be written."""
        (self.folder / MARK).unlink(missing_ok=True)

    def close(self) -> None:
        """Write what is left; the run is over."""
        self.settle()
        if self.last:
            whole: dict[str, list[tuple[When, Named]]] = {}
            for (name, *_), entry in self.last.items():
                whole.setdefault(name, []).append(entry)
            self._write(whole, "picture-all-step-none")

    def _write(self, kept: dict[str, list[tuple[When, Named]]], called: str) -> None:
        tensors, told = {}, {}
        for name, entries in kept.items():
            for i, (when, value) in enumerate(entries):
                tensors[f"{name}#{i}"] = value.tensor.contiguous()
                told[f"{name}#{i}"] = [*vars(when).values(), value.axes, value.coords]
        with atomic_path(self.folder / f"{self.written:06d}-{called}.safetensors", overwrite=True) as part:
            part.write_bytes(save(tensors, {"told": json.dumps(told), "pictures": str(self.pictures)}))
        self.written += 1


def open_recording(folder: str | Path) -> Recording:
    """Read a recording that was streamed to a folder, also one whose run was killed: its whole steps.

    Raises InstrumentError when there is none.
    """
    files = sorted(Path(folder).glob("[0-9]*-picture-*.safetensors"))
    if not files:
        raise InstrumentError(f"{folder} holds no recording.")
    recording = Recording()
    for path in files:
        try:
            _read_step(path, recording)
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise InstrumentError(f"{path} is damaged, or no step of a recording.") from None
    return recording


def _read_step(path: Path, recording: Recording) -> None:
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        recording.pictures = int(meta["pictures"])
        for key, (run, picture, step, part, time, axes, coords) in json.loads(meta["told"]).items():
            value = Named(file.get_tensor(key), tuple(axes), coords)
            recording.add(key.rpartition("#")[0], When(run, picture, step, part, time), value)
