"""``fluxedu sweep``: one process, one of many under a launcher, or several started here.

A process started here is the same command with RANK and WORLD_SIZE set, as torchrun and accelerate launch start it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm.auto import tqdm

from fluxedu.sweep.config import Sweep, read_config
from fluxedu.sweep.errors import SweepError
from fluxedu.sweep.folder import missing
from fluxedu.sweep.run import place_in_the_world, work


def sweep(config: Path, out: Path | None = None, workers: int = 1, on: str | None = None) -> tuple[Sweep, Path]:
    """Run the sweep that ``config`` describes into ``out``; returns both. Raises SweepError."""
    asked = read_config(config)
    folder = out or config.with_suffix("")
    if folder == config or folder.is_file():
        raise SweepError(f"{folder} is a file; say --out with a folder for the results.")
    rank, world = place_in_the_world()
    if workers < 1 or (workers > 1 and world > 1):
        raise SweepError(f"workers is 1 or more, and 1 under a launcher (here {world} processes), not {workers}.")
    if on is not None:
        if on not in ENGINES:
            raise SweepError(
                f"a sweep runs on {' or '.join(ENGINES)}, or if it is left out on this machine, not {on!r}."
            )
        ENGINES[on](asked, folder.absolute(), workers)
    elif workers > 1:
        _processes(asked, config, folder, workers)
    else:
        with tqdm(total=len(asked.shards), desc="sweep", unit="file", delay=1, disable=rank > 0 or _is_worker()) as bar:
            work(asked, folder, rank, world, lambda files: bar.update(files - bar.n))
    return asked, folder


def _is_worker() -> bool:
    return "FLUXEDU_SWEEP_WORKER" in os.environ


def _processes(asked: Sweep, config: Path, folder: Path, workers: int) -> None:
    """Start workers and wait; what a killed one has not done, the others do."""
    command = [sys.executable, "-m", "fluxedu.cli", "sweep", str(config), "--out", str(folder)]
    said = [tempfile.TemporaryFile() for _ in range(workers)]
    started = []
    try:
        for rank, errors in enumerate(said):
            place = {"RANK": str(rank), "WORLD_SIZE": str(workers), "FLUXEDU_SWEEP_WORKER": "1"}
            env = {**os.environ, **place, "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors))
        with tqdm(total=len(asked.shards), desc=f"sweep, {workers} processes", unit="file", delay=1) as bar:
            while any(process.poll() is None for process in started):
                time.sleep(0.2)
                bar.update(len(asked.shards) - len(missing(asked, folder)) - bar.n)
    finally:
        for process in started:
            process.terminate()
            process.wait()
    if all(process.returncode for process in started):
        raise SweepError(_why(said[0], started[0].returncode))


def _why(errors, code: int) -> str:
    """A worker's own sentence, or that it was killed."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    own = [line.removeprefix("fluxedu: ") for line in lines if line.startswith("fluxedu: ")]
    if own:
        return own[-1]
    end = f"signal {-code}" if code < 0 else lines[-1] if lines else f"exit status {code}"
    return f"no worker came to the end, the first because of {end}; the same command goes on from what is there."


def _ray(asked: Sweep, folder: Path, workers: int) -> None:
    import ray

    task = ray.remote(work)
    ray.get([task.remote(asked, folder, rank, workers) for rank in range(workers)])


def _dask(asked: Sweep, folder: Path, workers: int) -> None:
    from distributed import Client

    # DASK_SCHEDULER_ADDRESS names a cluster; without it, processes here, of one thread as instruments want it
    with Client(threads_per_worker=1) as client:
        client.gather([client.submit(work, asked, folder, rank, workers, pure=False) for rank in range(workers)])


#: other engines, where they are installed; their processes must reach the same folder
ENGINES = {"ray": _ray, "dask": _dask}
