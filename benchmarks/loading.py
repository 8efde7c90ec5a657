"""How fast weights are read, and how much host memory that takes: ``python -m benchmarks.loading``.

A flow of the official widths with fewer blocks is written to a temporary folder; or name a network's own folder or file
(``python -m benchmarks.loading dev/text_encoder_2``). It is read as ``cat files > /dev/null`` reads it and in the ways
in which we load it. These take turns, and each runs in a process of its own. Before each reading the files are removed
from the system's page cache ("from disk"), or read once ("cached"). "Through the buffers" is the host's part of loading
onto a GPU: from the file into a buffer, then to the meta device, which stores nothing; the bus is not included.
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
WAYS = {
    # mapped files are read when they are used, so every weight is used here
    "mapped and used": "flux = load_model(path); [p.view(torch.int16).max() for p in flux.parameters()]",
    "copied to memory": "tensors = open_model(path)[1]\n"
    "buffers = reading.free_buffers(reading.CHUNK, torch.device('cpu'))\n"
    "copies = [torch.cat([x.clone() for x in reading.row_chunks(tensors, name, buffers)]) for name in tensors]",
    "through the buffers": "reading.stream(open_model(path)[1], None, lambda name: 'meta')",
}
CHILD = """
import sys, time, torch
from fluxedu.checkpoints import load_model, open_model, reading
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
torch.empty(1).to("meta")  # imports what it needs
path, before, start = sys.argv[1], peak(), time.perf_counter()
{way}
print(time.perf_counter() - start, peak() - before)
"""


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, or the file itself."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def drop_from_cache(path: Path) -> None:
    """Remove the files from the system's page cache."""
    for file_path in weight_files(path):
        with file_path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cat(path: Path) -> tuple[float, int]:
    """Seconds that ``cat`` takes; it holds no memory worth counting."""
    start = time.perf_counter()
    with open(os.devnull, "wb") as devnull:
        subprocess.run(["cat", *map(str, weight_files(path))], stdout=devnull, check=True)
    return time.perf_counter() - start, 0


def load_in_process(path: Path, way: str) -> tuple[float, int]:
    """Seconds and peak of resident memory of one of :data:`WAYS`, in a process of its own."""
    code = CHILD.replace("{way}", WAYS[way])
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    seconds, peak = out.split()
    return float(seconds), int(peak)


def loading(path: Path | None = None, rounds: int = 3, config: FluxConfig = CONFIG) -> dict:
    """Seconds, their ratio to ``cat``'s, and the peak of resident memory, for each way of loading."""
    if path is not None:
        return {"files_bytes": sum(file.stat().st_size for file in weight_files(path)), **_measure(path, rounds)}
    flux = Flux(config).to(torch.bfloat16)
    largest = 2 * sum(p.numel() for p in flux.double_blocks[0].parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = save_file(flux.state_dict(), Path(folder) / "flux.safetensors", config=config)
        del flux
        return {"largest_group_bytes": largest, **loading(path, rounds)}


def _measure(path: Path, rounds: int) -> dict:
    """From disk, then cached: all ways in every round, starting with a different one each time."""
    ways = [("cat", cat), *((way, partial(load_in_process, way=way)) for way in WAYS)]
    figures = {}
    for state, prepare in (("from disk", drop_from_cache), ("cached", cat)):
        seconds: dict[str, list[float]] = {name: [] for name, _ in ways}
        peaks = dict.fromkeys(seconds, 0)
        for turn in range(rounds):
            first = turn % len(ways)
            for name, read in ways[first:] + ways[:first]:
                prepare(path)
                took, peak = read(path)
                seconds[name].append(took)
                peaks[name] = max(peaks[name], peak)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        figures[state] = {
            name: {"seconds": median, "ratio_to_cat": median / medians["cat"], "peak_bytes": peaks[name]}
            for name, median in medians.items()
        }
    return figures


if __name__ == "__main__":
    command = " ".join(["python -m benchmarks.loading", *sys.argv[1:]])
    print(json.dumps({"command": command, "gpu": None, **loading(*map(Path, sys.argv[1:2]))}, indent=2))
