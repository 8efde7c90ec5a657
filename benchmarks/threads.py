"""An image of the miniature with one thread, all threads, and the number that the pipeline chooses by itself.

    python -m benchmarks.threads            # a table: quiet, and beside a busy process

Best of several rounds when quiet; the median beside a busy process, where single runs vary a lot.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import torch

import fluxedu as fe
from fluxedu.threads import fixed_threads

ROUNDS = 7


def seconds(pipe, threads: int, fixed: bool) -> float:
    """Wall time of one image."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    with fixed_threads() if fixed else nullcontext():
        pipe("a red circle left of a blue square", seed=1, progress=False)
    return time.perf_counter() - start


def measure(pipe, threads: int, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """The seconds of every round, interleaved: ``one``, ``all`` and ``chosen``."""
    ways = {"one": (1, True), "all": (threads, True), "chosen": (threads, False)}
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (count, fixed) in ways.items():
            found[name].append(seconds(pipe, count, fixed))
    return found


def main() -> None:
    pipe, threads = fe.load(), torch.get_num_threads()
    measure(pipe, threads, rounds=1)  # warm up
    for title, neighbours, summary in (("quiet", 0, min), ("beside a busy process", 1, statistics.median)):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
        try:
            found = measure(pipe, threads)
        finally:
            for process in busy:
                process.kill()
        print(title, {name: round(summary(times), 3) for name, times in found.items()}, f"of {threads} threads")


if __name__ == "__main__":
    main()
