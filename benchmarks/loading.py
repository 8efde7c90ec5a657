"""How fast weights come from files, and what the host holds meanwhile: ``python -m benchmarks.loading``.

A flow of the official widths with fewer blocks is written to a temporary folder, or a network's folder is named
(``python -m benchmarks.loading dev/text_encoder_2``). It is read as ``cat files > /dev/null`` reads it and as we
load it, in turns, another one first in each round, each in a process of its own. The files are put out of the system's
cache before each reading, or read once before ("cached"). "Through the buffers" is the host's part of the way to a
GPU: file to buffer, then to the meta device, which holds nothing; the bus is not in the figure.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from fluxedu.checkpoints import save_file
from fluxedu.models import Flux, FluxConfig

CONFIG = FluxConfig(depth=3, depth_single_blocks=4)  # 3.3 GB in bfloat16
_HOW = {
    # what is mapped is read when it is used: here, all of it is looked at
    "mapped and used": "flux = load_model(path); [p.view(torch.int16).max() for p in flux.parameters()]",
    "copied to memory": "module, tensors = open_model(path); reading._Streamer.can_stay = lambda *_: False\n"
    "flux = load_into(module, tensors)",
    "through the buffers": "module, tensors = open_model(path); reading.stream(tensors, None, lambda name: 'meta')",
}
_CHILD = """
import sys, time, torch
from fluxedu.checkpoints import load_into, load_model, open_model, reading
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
torch.empty(1).to("meta")  # imports what it needs
path, before, start = sys.argv[1], peak(), time.perf_counter()
{how}
print(time.perf_counter() - start, peak() - before)
"""


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _forget(path: Path) -> None:
    """Put the files' pages out of the system's cache."""
    for one in _files(path):
        with one.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cat(path: Path) -> tuple[float, int]:
    start = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, _files(path))], stdout=nowhere, check=True)
    return time.perf_counter() - start, 0


def _ours(path: Path, how: str) -> tuple[float, int]:
    code = _CHILD.replace("{how}", _HOW[how])
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    seconds, held = out.split()
    return float(seconds), int(held)


def loading(path: Path | None = None, rounds: int = 3, config: FluxConfig = CONFIG) -> dict:
    """Seconds, their ratio to ``cat``'s, and the peak of resident memory, by way of loading."""
    if path is not None:
        return {"files_bytes": sum(file.stat().st_size for file in _files(path)), **_measured(path, rounds)}
    flux = Flux(config).to(torch.bfloat16)
    largest = 2 * sum(p.numel() for p in flux.double_blocks[0].parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = save_file(flux.state_dict(), Path(folder) / "flux.safetensors", config=config)
        del flux
        return {"largest_group_bytes": largest, **loading(path, rounds)}


def _measured(path: Path, rounds: int) -> dict:
    """From disk, then cached: every way in every round, beginning with another one each time."""
    ways = {"cat": _cat, **{how: partial(_ours, how=how) for how in _HOW}}
    figures = {}
    for name, ready in (("from disk", _forget), ("cached", _cat)):
        times: dict[str, list] = {way: [] for way in ways}
        for turn in range(rounds):
            for way in (*list(ways)[turn % len(ways) :], *list(ways)[: turn % len(ways)]):
                ready(path)
                times[way].append(ways[way](path))
        figures[name] = _medians(times)
    return figures


def _medians(times: dict[str, list[tuple[float, int]]]) -> dict:
    seconds = {how: statistics.median(t for t, _ in runs) for how, runs in times.items()}
    return {
        how: {"seconds": s, "ratio_to_cat": s / seconds["cat"], "peak_bytes": max(b for _, b in times[how])}
        for how, s in seconds.items()
    }


if __name__ == "__main__":
    told = {"command": " ".join(["python -m benchmarks.loading", *sys.argv[1:]]), "gpu": None}
    print(json.dumps({**told, **loading(*map(Path, sys.argv[1:2]))}, indent=2))
