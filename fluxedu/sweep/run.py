"""A sweep's folder: drawn file by file, in this process or on the workers of a Dask cluster, and read again.

    sweep.json                  the description, and the environment that draws it; the folder accepts no other sweep
    shards/00000.safetensors    cells 0 to 7, and so on; a file appears only when it is complete
    cells.csv                   one row per cell; cells.parquet is the same table, if pyarrow is installed
    manifest.json               size and SHA-256 of every file; written last

The bytes depend on description and environment alone, so it does not matter which worker draws a file, or how often.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, lru_cache, partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import fluxedu as fe
from fluxedu.errors import CheckpointError, SweepError, check_integer, checked, first_of
from fluxedu.files import atomic_path, check_path, read_json, read_json_file, write_text
from fluxedu.instruments.lenses.run import run_lenses
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import check_names
from fluxedu.progress import progress_bar
from fluxedu.sweep.config import COLUMNS, Sweep, from_dict, make_interventions, make_recorders
from fluxedu.threads import fixed_threads

_TABLES = ("cells.csv", "cells.parquet")


class Runner:
    """Draws the cells of a sweep with a pipeline."""

    def __init__(self, sweep: Sweep, pipe: fe.FluxPipeline):
        self.sweep, self.pipe = sweep, pipe
        settings = {name: value for name, value in sweep.settings.items() if value is not None}
        self.settings = {**settings, "progress": False, "trajectory": "trajectory" in sweep.keep}
        self.record_run = lru_cache(maxsize=2)(self._record_run)

    def _record_run(self, glob: str, prompt: str, seed: int):
        with fe.record(glob) as recorder:
            self.pipe(prompt, seed=seed, **self.settings)
        return recorder.saved()

    def draw(self, cell: dict) -> dict[str, Named]:
        """What the sweep keeps of a cell, by name; raises SweepError, which names the cell."""
        try:
            changes = self.sweep.interventions[cell["intervention"]]
            interventions = make_interventions(cell["intervention"], changes, self.record_run)
            recorders = make_recorders(self.sweep.record)
            with ExitStack() as stack:  # only now: the run that a patch copies from is one without interventions
                for instrument in (*interventions, *recorders):
                    stack.enter_context(instrument)
                options = {"seed": cell["seed"], **self.settings}
                out, found = run_lenses(self.pipe, cell["prompt"], self.sweep.lens, **options)
        except ValueError as error:
            which = f"prompt {cell['prompt']!r}, seed {cell['seed']}, {cell['intervention']!r}"
            raise SweepError(f"cell {cell['number']} ({which}) cannot be drawn: {error}") from None
        axes = ("channel", "row", "column")
        image = Named(torch.from_numpy(np.array(out.images[0])), ("height", "width", "color"))
        kept = {"image": image, "latent": Named(out.latents[0], axes)}
        kept = {name: value for name, value in kept.items() if name in self.sweep.keep}
        if out.trajectory is not None:
            kept["trajectory/latents"] = Named(out.trajectory.latents[:, 0], ("step", *axes))
            kept["trajectory/velocities"] = Named(out.trajectory.velocities[:, 0], ("step", *axes))
            kept["trajectory/times"] = Named(out.trajectory.times, ("step",))
        for number, recorder in enumerate(recorders):
            prefix = f"record-{number}/" if len(recorders) > 1 else ""
            kept |= {f"{prefix}{site}": recorder[site] for site in recorder}
        return kept | {f"lens/{name}": value for name, value in found.items()}

    def write(self, file: int, folder: Path) -> None:
        """Draw the cells of a file and write them, unless it is in order. Tensors are called ``000012/latent``."""
        cells, tensors, names = self.sweep.cells(file), {}, {}
        if _is_complete(self.sweep, folder, file):
            return
        for cell in cells:
            for name, value in self.draw(cell).items():
                key = f"{cell['number']:06d}/{name}"
                tensors[key] = value.tensor.cpu().clone(memory_format=torch.contiguous_format)  # no shared memory
                names[key] = {"axes": value.axes, **({"labels": value.coords} if value.coords else {})}
        # one entry of metadata for all names: safetensors writes several entries in no fixed order
        data = save(tensors, {"fluxedu_sweep": json.dumps(names, sort_keys=True)})
        with atomic_path(folder / cells[0]["file"], overwrite=True) as part:
            part.write_bytes(data)

    @cached_property
    def environment(self) -> dict[str, str]:
        """What decides how numbers are rounded, and a hash over a few values of every weight."""
        device, weights = self.pipe.device, hashlib.sha256()
        gpu = device.type == "cuda" and torch.cuda.get_device_name(device)
        for network, module in self.pipe.networks().items():
            for name, tensor in module.state_dict().items():
                few = tensor.detach().flatten()[:: max(1, tensor.numel() // 8)].double().cpu().numpy()
                weights.update(f"{network}.{name} {list(tensor.shape)}".encode() + few.tobytes())
        return {
            "fluxedu": fe.__version__,
            "torch": torch.__version__,
            "device": f"{device.type} {gpu or torch.backends.cpu.get_cpu_capability()}",
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
            "autoencoder": type(self.pipe.autoencoder).__name__,  # memory="auto" may choose one that decodes in tiles
            "model": weights.hexdigest()[:16],
        }


@lru_cache(maxsize=1)
def _load(description: str, worker: int | str) -> Runner:
    """A runner with its model, kept in this process from file to file. A worker of a local cluster has a number."""
    sweep = from_dict(json.loads(description))
    device = sweep.device
    if isinstance(worker, int) and device in (None, "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(worker % torch.cuda.device_count())  # where a model goes that may choose its device
        device = device and f"cuda:{worker % torch.cuda.device_count()}"
    files = {"like": sweep.like, "variant": sweep.variant, "revision": sweep.revision}
    return Runner(sweep, fe.load(sweep.model, device=device, dtype=sweep.dtype, **files))


def _work(file: int | None, description: str, folder: Path, expected=None, worker=None) -> dict[str, str]:
    """Draw file number ``file``, if it is given; returns the environment, which must be the ``expected`` one."""
    worker = worker or import_module("distributed").get_worker().name  # Dask is imported on its own workers only
    runner = _load(description, worker)
    if expected not in (None, runner.environment):
        raise SweepError(f"worker {worker} is {runner.environment}, but the sweep began with {expected}.")
    torch.set_num_threads(runner.sweep.threads)
    if file is not None:
        with fixed_threads():
            runner.write(file, folder)
    return runner.environment


@checked(SweepError)
def run_sweep(
    sweep: Sweep, folder: str | Path, workers=1, scheduler: str | None = None, progress: bool = False
) -> Path:
    """Draw what is missing in the folder of a sweep, and return the folder when it is complete; raises SweepError.

    Several ``workers``, at most four per core, are a local Dask cluster; ``scheduler`` is the address of another, which
    must see the folder.
    """
    most, why = (1, "a scheduler has its own workers") if scheduler else (4 * os.cpu_count(), "four per core")
    check_integer("workers", workers, 1, most, why, SweepError)
    folder, threads = check_path(folder, SweepError).absolute(), torch.get_num_threads()
    options = {"description": json.dumps(vars(sweep)), "folder": folder}
    try:
        with _parallel_map(min(workers, len(sweep.files())), scheduler) as (count, parallel_map):
            environment = list(parallel_map(_work, [None] * count, **options))[0]
            begin(sweep, folder, environment)
            files = sweep.files()
            left = [number for number, file in enumerate(files) if not _is_complete(sweep, folder, number)]
            if damaged := [files[number] for number in left if (folder / files[number]).exists()]:
                warnings.warn(f"{folder}: damaged files are drawn again: {first_of(damaged)}.", stacklevel=2)
            done = parallel_map(_work, left, expected=environment, **options)
            list(progress_bar(done, desc="sweep", total=len(left), unit="file", show=progress))
    finally:
        _load.cache_clear()
        torch.set_num_threads(threads)
    finish(sweep, folder)
    return folder


async def _handshake(scheduler: str) -> None:
    """Raise unless a Dask server answers at the address; Dask's client would wait for ever for one that is silent."""
    from dask import config
    from dask.utils import parse_timedelta
    from distributed import Security
    from distributed.comm import connect

    seconds = parse_timedelta(config.get("distributed.comm.timeouts.connect"))
    comm = await asyncio.wait_for(connect(scheduler, **Security().get_connection_args("client")), seconds + 1)
    await comm.close()


@contextmanager
def _parallel_map(workers: int, scheduler: str | None) -> Iterator[tuple[int, Callable]]:
    """The number of workers, and a function like ``map`` that uses them and returns results in any order."""
    if not scheduler and workers == 1:
        yield 1, lambda function, items, **options: map(partial(function, worker="here", **options), items)
        return
    try:
        from distributed import Client, KilledWorker, LocalCluster, as_completed
    except ModuleNotFoundError as error:
        raise SweepError(f"several workers need {error.name}: pip install 'fluxedu[sweep]'.") from None
    local = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
    with ExitStack() as stack:
        cluster = scheduler or stack.enter_context(LocalCluster(n_workers=workers, memory_limit=0, **local))
        try:
            if scheduler:
                with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has a running event loop
                    thread.submit(asyncio.run, _handshake(scheduler)).result()
            client = stack.enter_context(Client(cluster))
        except Exception as error:  # of many kinds, for an address that makes no sense
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise SweepError(f"no Dask scheduler answers at {cluster!r} ({reason}).") from None
        threads = client.nthreads().values()
        if set(threads) != {1}:
            raise SweepError(f"a sweep needs Dask workers of one thread each; those of {cluster} have {list(threads)}.")
        stack.callback(client.run, _load.cache_clear, on_error="ignore")
        if not scheduler:  # Ctrl-C in a terminal is sent to all processes, and this one ends the workers
            client.run(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN) and None)

        def parallel_map(function: Callable, items: list, **options) -> Iterator:
            try:
                for future in as_completed(client.map(function, items, pure=False, **options)):
                    yield future.result()
            except (KilledWorker, CancelledError) as error:
                raise SweepError(f"the workers were killed ({type(error).__name__}); run the sweep again.") from None

        yield len(threads), parallel_map


def begin(sweep: Sweep, folder: Path, environment: dict[str, str]) -> None:
    """Write sweep.json; raises SweepError if the folder already belongs to something else or cannot be written to."""
    path, new = folder / "sweep.json", {"sweep": vars(sweep), "environment": environment}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        if others and not path.exists():
            raise SweepError(f"{folder} holds {others[0]!r} and no sweep; choose a new folder.")
        (folder / "shards").mkdir(exist_ok=True)
        for name in (*_TABLES, "sweep.json", "manifest.json", *sweep.files()):
            if (folder / name).exists() and not (folder / name).is_file():
                raise SweepError(f"{folder / name} is not a file; delete it, or choose a new folder.")
        if not path.exists():
            write_text(path, json.dumps(new, indent=1, ensure_ascii=False) + "\n")
        old = read_json_file(path)
        differences = [name for part in new for name in new[part] if old[part].get(name) != new[part][name]]
        if list(old["sweep"]["interventions"]) != list(sweep.interventions):
            differences.append("the order of interventions")
    except (CheckpointError, KeyError, TypeError, AttributeError):
        raise SweepError(f"{folder} holds a sweep.json that cannot be read; choose a new folder.") from None
    except OSError as error:
        raise SweepError(f"the folder {folder} cannot be written to: {error.strerror}.") from None
    if differences:
        raise SweepError(f"{folder} holds another sweep ({differences[0]} differs); choose a new folder.")


def read_names(sweep: Sweep, folder: Path, file: int) -> dict[str, dict]:
    """The keys of a file, each with axes and labels; raises SweepError unless it holds its cells. Reads the header."""
    cells = sweep.cells(file)
    path, cell_names = folder / cells[0]["file"], {cell["number"]: set() for cell in cells}
    try:
        if not path.is_file():
            raise FileNotFoundError
        with safe_open(path, "pt") as data:  # checks that the file has the length that its header promises
            names = read_json(data.metadata()["fluxedu_sweep"])
            for key in {*data.keys(), *names}:
                number, name = key.split("/", 1)
                cell_names[int(number)].add(name)
                check_names(data.get_slice(key).get_shape(), names[key]["axes"], names[key].get("labels", {}))
        if any(not {*sweep.keep} - {"trajectory"} <= found or not found for found in cell_names.values()):
            raise KeyError
    except (SafetensorError, OSError, LookupError, TypeError, AttributeError, ValueError):
        raise SweepError(f"{path} is missing or damaged; run the sweep again, which draws it again.") from None
    return names


def _is_complete(sweep: Sweep, folder: Path, file: int) -> bool:
    try:
        return bool(read_names(sweep, folder, file))
    except SweepError:
        return False


def finish(sweep: Sweep, folder: Path) -> None:
    """Write the tables and, last, the manifest; what a readable manifest says about the cells stays as it is."""
    files = sweep.files()
    if absent := [file for number, file in enumerate(files) if not _is_complete(sweep, folder, number)]:
        raise SweepError(f"{folder} lacks {absent[0]}: the workers must write into the folder that this process sees.")
    known: dict = {}
    with suppress(SweepError):
        known = read_manifest(sweep, folder)["files"]
        if all(_is_as_listed(folder / name, known[name]) for name in known if name in _TABLES):
            return
    tables, cells, text = ["cells.csv"], sweep.cells(), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *(cell.values() for cell in cells)])
    write_text(folder / "cells.csv", text.getvalue())
    with suppress(ModuleNotFoundError):
        import pyarrow.parquet

        with atomic_path(folder / "cells.parquet", overwrite=True) as part:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cells), part)
        tables.append("cells.parquet")
    entries = {name: _size_and_hash(folder / name) for name in tables}
    entries |= {name: known.get(name) or _size_and_hash(folder / name) for name in files}
    write_text(folder / "manifest.json", json.dumps({"cells": len(sweep), "files": entries}, indent=1) + "\n")


def read_manifest(sweep: Sweep, folder: Path) -> dict:
    """Size and SHA-256 of every file; raises SweepError for a manifest that is missing or not one of this sweep."""
    path = folder / "manifest.json"
    try:
        manifest = read_json_file(path)
        required = {"cells.csv", *sweep.files()}
        entries = all(isinstance(entry, dict) for entry in manifest["files"].values())
        if not entries or not required <= manifest["files"].keys() <= required | {*_TABLES}:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SweepError(f"{path} cannot be read, or does not list the files of this sweep; run it again.") from None
    return manifest


def _size_and_hash(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _is_as_listed(path: Path, entry: dict) -> bool:
    return path.is_file() and path.stat().st_size == entry.get("bytes") and _size_and_hash(path) == entry


class Results:
    """A finished sweep: ``results.cells`` is its table, ``results[number]`` what was kept of one cell, by name."""

    def __init__(self, folder: Path, sweep: Sweep, manifest: dict):
        self.folder, self.sweep, self.manifest, self.cells = folder, sweep, manifest, sweep.cells()

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[dict[str, Named]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Named]:
        check_integer("the number of a cell", number, -len(self), len(self) - 1, error=SweepError)
        cell, values = self.cells[number], {}
        names = read_names(self.sweep, self.folder, cell["number"] // self.sweep.shard)
        with safe_open(self.folder / cell["file"], "pt") as file:
            for key, entry in names.items():
                owner, name = key.split("/", 1)
                if int(owner) == cell["number"]:
                    values[name] = Named(file.get_tensor(key), tuple(entry["axes"]), entry.get("labels", {}))
        return values

    def damaged(self) -> list[str]:
        """The files that are missing, differ from the manifest or do not hold their cells."""
        bad = {
            file for number, file in enumerate(self.sweep.files()) if not _is_complete(self.sweep, self.folder, number)
        }
        files = self.manifest["files"].items()
        return [name for name, entry in files if name in bad or not _is_as_listed(self.folder / name, entry)]


@checked(SweepError)
def open_sweep(folder: str | Path) -> Results:
    """Read a finished sweep; raises SweepError where there is none, or one whose description cannot be read."""
    folder = check_path(folder, SweepError)
    if not (folder / "manifest.json").is_file():
        raise SweepError(f"{folder} holds no finished sweep (there is no manifest.json).")
    try:
        sweep = from_dict(read_json_file(folder / "sweep.json")["sweep"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SweepError(f"{folder / 'sweep.json'} does not describe a sweep: {error}") from None
    return Results(folder, sweep, read_manifest(sweep, folder))
