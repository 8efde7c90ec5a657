"""One file of a sweep: its cells drawn one after the other, as one safetensors file."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from fluxedu.errors import SweepError
from fluxedu.files import atomic_path
from fluxedu.instruments.lenses.run import together
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.recording import Recording
from fluxedu.sampling.pipeline import FluxPipeline, Output
from fluxedu.sweep.changes import made, recorders
from fluxedu.sweep.config import Cell, Sweep
from fluxedu.sweep.lens import looks


class Draughtsman:
    """A pipeline, and how a sweep wants its cells drawn."""

    def __init__(self, sweep: Sweep, pipe: FluxPipeline):
        self.sweep, self.pipe = sweep, pipe
        settings = {name: value for name, value in sweep.settings.items() if value is not None}
        self.settings = {**settings, "progress": False, "trajectory": "trajectory" in sweep.keep}
        self.recorded = lru_cache(maxsize=2)(self._recorded)

    def shard(self, number: int, path: Path) -> None:
        """Draw the cells of a file and write it: it is there at the end, whole, or not at all.

        Tensors are called ``000012/latent``; the metadata ``fluxedu_sweep`` has each one's axes and labels.
        """
        tensors, told = {}, {}
        for cell in self.sweep.cells(number):
            for name, (tensor, axes, labels) in self.cell(cell).items():
                key = f"{cell.number:06d}/{name}"
                tensors[key], told[key] = tensor.contiguous(), {"axes": axes, **({"labels": labels} if labels else {})}
        # one entry of metadata: safetensors writes several in no fixed order
        data = save(tensors, {"fluxedu_sweep": json.dumps(told, sort_keys=True)})
        with atomic_path(path, overwrite=True) as part:
            part.write_bytes(data)

    def cell(self, cell: Cell) -> dict[str, tuple[Tensor, list[str], dict]]:
        """What is kept of a cell: name -> tensor, axes, labels. Raises SweepError, which names the cell."""
        try:
            return self._cell(cell)
        except ValueError as error:
            which = f"prompt {cell.prompt!r}, seed {cell.seed}, {cell.intervention!r}"
            raise SweepError(f"cell {cell.number} ({which}) cannot be drawn: {error}") from None

    def _cell(self, cell: Cell) -> dict[str, tuple[Tensor, list[str], dict]]:
        # all made before any is entered: the run that a patch comes from is an undisturbed one
        changes = [made(change, self.recorded) for change in self.sweep.interventions[cell.intervention]]
        seen = recorders(self.sweep.record)
        with ExitStack() as stack:
            for instrument in (*changes, *seen):
                stack.enter_context(instrument)
            ours, asked = looks(self.sweep.lens, self.pipe, cell.prompt), {"seed": cell.seed, **self.settings}
            out, found = together(self.pipe, cell.prompt, ours, asked)
        kept = {name: value for name, value in _output(out).items() if name.split("/")[0] in self.sweep.keep}
        for i, recorder in enumerate(seen):
            named = {site: recorder[site] for site in recorder}
            prefix = f"record-{i}/" if len(seen) > 1 else ""
            kept |= {f"{prefix}{site}": _plain(value) for site, value in named.items()}
        kept |= {f"lens/{name}": _plain(value) for name, value in zip(self.sweep.lens, found, strict=True)}
        return kept

    def _recorded(self, globs: tuple[str, ...], prompt: str, seed: int) -> Recording:
        """The run that a patch takes its values from."""
        with record(*globs) as recorder:
            self.pipe(prompt, seed=seed, **self.settings)
        return recorder.recording


def _plain(value: Named) -> tuple[Tensor, list[str], dict]:
    return value.tensor.cpu(), list(value.axes), value.coords


def _output(out: Output) -> dict[str, tuple[Tensor, list[str], dict]]:
    kept = {
        "image": (torch.from_numpy(np.asarray(out.images[0]).copy()), ["height", "width", "color"], {}),
        "latent": (out.latents[0].cpu(), ["channel", "row", "column"], {}),
    }
    if out.trajectory is not None:
        for name in ("latents", "velocities"):
            tensor = getattr(out.trajectory, name)[:, 0].cpu()
            kept[f"trajectory/{name}"] = (tensor, ["step", "channel", "row", "column"], {})
        kept["trajectory/times"] = (out.trajectory.times.cpu(), ["step"], {})
    return kept
