"""Running a sweep: any number of processes on one folder, none of which needs to know of the others.

Each takes the files in turn, its own first (number modulo how many processes there are), then what others have
left, and passes over what is there or is being drawn by one that is alive. So a process may be killed at any time: one
that still runs, or the next run, draws what is missing, and the finished folder is the same to the last byte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fluxedu.errors import SweepError
from fluxedu.sweep.claims import claimed
from fluxedu.sweep.config import Sweep
from fluxedu.sweep.draw import Draughtsman
from fluxedu.sweep.folder import begin, finish, missing, shard_path

_PAUSE = 0.2  # seconds between two looks at what others are drawing


def place_in_the_world() -> tuple[int, int]:
    """Which process of how many: RANK and WORLD_SIZE, as torchrun and accelerate launch set them."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise SweepError("RANK and WORLD_SIZE in the environment are no whole numbers with RANK below WORLD_SIZE.")
    return rank, world


def _local_rank(rank: int) -> int:
    """The number of this process on its machine; ``rank`` where nobody says, as with Dask."""
    said = os.environ.get("LOCAL_RANK", str(rank))
    if not said.isdecimal():
        raise SweepError(f"LOCAL_RANK in the environment is a whole number, not {said!r}.")
    return int(said)


def work(
    sweep: Sweep, folder: str | Path, rank: int = 0, world: int = 1, progress: Callable[[int], None] | None = None
) -> Path:
    """Draw what is missing, as process ``rank`` of ``world``; returns the folder when all of it is there.

    ``progress(files)`` is called with how many files are done, by whomever. Raises SweepError.
    """
    folder = Path(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(sweep.threads)
    try:
        _work(sweep, folder, rank, world, progress or (lambda files: None))
    finally:
        torch.set_num_threads(threads)
    return folder


def _work(sweep: Sweep, folder: Path, rank: int, world: int, progress: Callable[[int], None]) -> None:
    import fluxedu as fe

    device = sweep.device
    if device in (None, "cuda") and torch.cuda.is_available():  # each process on a GPU of its own
        mine = _local_rank(rank) % torch.cuda.device_count()
        torch.cuda.set_device(mine)  # for a model that takes a GPU where there is one
        device = device and f"cuda:{mine}"
    drawn = Draughtsman(sweep, fe.load(sweep.model, device=device, dtype=sweep.dtype))
    begin(sweep, folder, drawn.pipe)
    while left := missing(sweep, folder):
        done = len(sweep.shards) - len(left)
        for number in sorted(left, key=lambda n: n % world != rank):
            done += _one(drawn, number, folder)
            progress(done)
        if done < len(sweep.shards):  # others are drawing the rest
            time.sleep(_PAUSE)
    finish(sweep, folder)


def _one(drawn: Draughtsman, number: int, folder: Path) -> bool:
    """Draw a file if nobody has or does."""
    path = shard_path(folder, number)
    if path.is_file():
        return True
    with claimed(folder, f"{number:05d}") as ours:
        if ours and not path.is_file():
            drawn.shard(number, path)
        return ours
