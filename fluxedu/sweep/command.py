"""``fluxedu sweep``: one process, one of many under a launcher, or several started here.

A process started here is the same command with RANK and WORLD_SIZE set, as torchrun and accelerate launch start it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm.auto import tqdm

from fluxedu.errors import SweepError
from fluxedu.sweep.config import Sweep, read_config
from fluxedu.sweep.folder import missing
from fluxedu.sweep.run import place_in_the_world, work

MOST_WORKERS = 1024


def sweep(config: Path, out: Path | None = None, workers: int = 1, on: str | None = None) -> tuple[Sweep, Path]:
    """Run the sweep that ``config`` describes into ``out``; returns both. Raises SweepError."""
    asked = read_config(config)
    folder = out or config.with_suffix("")
    if folder == config or folder.is_file():
        raise SweepError(f"{folder} is a file; say --out with a folder for the results.")
    rank, world = place_in_the_world()
    if not 1 <= workers <= MOST_WORKERS or (workers > 1 and world > 1):
        raise SweepError(
            f"workers is from 1 to {MOST_WORKERS}, and 1 under a launcher (here {world} processes), not {workers}."
        )
    if on is not None:
        if on not in ENGINES:
            raise SweepError(
                f"a sweep runs on {' or '.join(ENGINES)}, or if it is left out on this machine, not {on!r}."
            )
        try:
            ENGINES[on](asked, folder.absolute(), workers)
        except ModuleNotFoundError as error:
            raise SweepError(f"a sweep on {on} needs {error.name}, which is not installed here.") from None
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
    return _nobody(f"the first because of {end}")


def _nobody(why: str) -> str:
    return f"no worker came to the end, {why}; the same command goes on from what is there."


def _ray(asked: Sweep, folder: Path, workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here reports to nobody
    import ray

    # RAY_ADDRESS names a cluster; without it, processes here. A task on one that is killed is started again
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    gpus = 1 if asked.device != "cpu" and "GPU" in ray.cluster_resources() else 0
    task = ray.remote(num_gpus=gpus)(work)
    try:
        ray.get([task.remote(asked, folder, rank, workers) for rank in range(workers)])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise SweepError(_nobody(f"as Ray says: {type(error).__name__}")) from None


def _dask(asked: Sweep, folder: Path, workers: int) -> None:
    import dask
    from distributed import Client, KilledWorker

    # DASK_SCHEDULER_ADDRESS names a cluster; without it, processes here, of one thread as instruments want it
    here = {"n_workers": workers, "threads_per_worker": 1, "silence_logs": logging.CRITICAL}
    with Client(**({} if dask.config.get("scheduler-address", None) else here)) as client:
        try:
            client.gather([client.submit(work, asked, folder, rank, workers, pure=False) for rank in range(workers)])
        except KilledWorker:
            raise SweepError(_nobody("as Dask says: KilledWorker")) from None


#: other engines, where they are installed; their processes must reach the same folder
ENGINES = {"ray": _ray, "dask": _dask}
