"""How fast weights come from a file, and what the host holds meanwhile: ``python -m fluxedu.bench.loading``.

A flow of the official widths with fewer blocks is written to a temporary folder, then read as ``cat file >
/dev/null`` reads it and as we load it, in turns, each in a process of its own. The file is put out of the system's
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
from pathlib import Path

import torch

from fluxedu.checkpoints import save_file
from fluxedu.models import Flux, FluxConfig

CONFIG = FluxConfig(depth=3, depth_single_blocks=4)  # 3.3 GB in bfloat16
_HOW = {
    # what is mapped is read when it is used: here, all of it is looked at
    "mapped and used": "flux = load_model(path); [p.view(torch.int16).max() for p in flux.parameters()]",
    "copied to memory": "module, tensors = outline(path); carry._Carrier._may_stay = lambda *_: False\n"
    "flux = load_into(module, tensors)",
    "through the buffers": "module, tensors = outline(path); carry.carried(tensors, None, lambda name: 'meta')",
}
_CHILD = """
import sys, time, torch
from fluxedu.checkpoints import carry, load_into, load_model, outline
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
torch.empty(1).to("meta")  # imports what it needs
path, before, start = sys.argv[1], peak(), time.perf_counter()
{how}
print(time.perf_counter() - start, peak() - before)
"""


def _forget(path: Path) -> None:
    """Put a file's pages out of the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cat(path: Path) -> float:
    start = time.perf_counter()
    subprocess.run(f'cat "{path}" > /dev/null', shell=True, check=True)
    return time.perf_counter() - start


def _ours(path: Path, how: str) -> tuple[float, int]:
    code = _CHILD.replace("{how}", _HOW[how])
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    seconds, held = out.split()
    return float(seconds), int(held)


def loading(rounds: int = 3, config: FluxConfig = CONFIG) -> dict:
    """Seconds, their ratio to ``cat``'s, and the peak of resident memory, by way of loading."""
    flux = Flux(config).to(torch.bfloat16)
    largest = 2 * sum(p.numel() for p in flux.double_blocks[0].parameters())
    figures: dict = {"command": "python -m fluxedu.bench.loading", "gpu": None, "largest_group_bytes": largest}
    with tempfile.TemporaryDirectory() as folder:
        path = save_file(flux.state_dict(), Path(folder) / "flux.safetensors", config=config)
        del flux
        figures["file_bytes"] = path.stat().st_size
        for cached in (False, True):
            ready = _cat if cached else _forget
            times: dict[str, list] = {"cat": [], **{how: [] for how in _HOW}}
            for _ in range(rounds):
                ready(path)
                times["cat"].append((_cat(path), 0))
                for how in _HOW:
                    ready(path)
                    times[how].append(_ours(path, how))
            figures["cached" if cached else "from disk"] = _medians(times)
    return figures


def _medians(times: dict[str, list[tuple[float, int]]]) -> dict:
    seconds = {how: statistics.median(t for t, _ in runs) for how, runs in times.items()}
    return {
        how: {"seconds": s, "ratio_to_cat": s / seconds["cat"], "peak_bytes": max(b for _, b in times[how])}
        for how, s in seconds.items()
    }


if __name__ == "__main__":
    print(json.dumps(loading(), indent=2))
