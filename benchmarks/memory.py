"""What each size of card holds, and how long a step takes there: ``python -m benchmarks.memory --folder /disk/dev``.

On one GPU every card is played by limiting the allocator, each in a process of its own that loads the checkpoint with
``memory="auto"`` and draws twice (:mod:`benchmarks.synthetic` writes a checkpoint of the true size). Without
``--folder`` nothing is measured: the figures are those that ``auto`` foresees, and say so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import fluxedu as fe
from benchmarks.full import named, peak_of
from benchmarks.speed import settled
from fluxedu.memory.placement import predicted
from fluxedu.memory.quantised import check_format
from fluxedu.sampling.request import checked_device
from fluxedu.terminal import can_write, sentences, write_json

STEPS = 5  # of the longer one of two runs; the shorter one has a single step


def one_card(folder: Path, device: torch.device, limit: int, size: int, quantise: str | None) -> dict:
    """Load and draw with ``limit`` bytes at the most: the peak, seconds of loading, a step, the rest."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    start = time.perf_counter()
    pipe = fe.load(folder, device=device, dtype="bfloat16", quantise=quantise)
    settled(device)
    loaded, took = time.perf_counter() - start, []

    def run(count: int) -> None:
        began = time.perf_counter()
        pipe("a red circle left of a blue square", height=size, width=size, steps=count, progress=False)
        settled(device)
        took.append(time.perf_counter() - began)

    for count in (1, 1, STEPS):  # the first warms up
        run(count)
    more = peak_of(lambda: run(2), device)
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step = (took[2] - took[1]) / (STEPS - 1)
    return {"load_s": loaded, "peak_bytes": resident + more, "step_s": step, "rest_s": took[1] - step}


def in_a_process(folder: Path, device: str, card: float, size: int, quantise: str | None) -> dict:
    """:func:`one_card` in a process of its own; what it said on the way, or why it did not come to the end."""
    given = ["--folder", str(folder), "--device", device, "--size", str(size), "--only", str(card)]
    given += ["--quantise", quantise] if quantise else []
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *given], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith(("memory=", "fluxedu:"))]
    if done.returncode:
        own = [line for line in said if line.startswith("fluxedu:")]
        return {"failed": (own or done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return {"chosen": said[0] if said else None, **json.loads(done.stdout)}


def main(
    folder: Annotated[Path | None, typer.Option(help="A checkpoint; without one, nothing is measured.")] = None,
    device: str = "cuda",
    size: Annotated[int, typer.Option(help="Of the picture.")] = 1024,
    quantise: Annotated[str | None, typer.Option(help="int8, fp8 or nf4.")] = None,
    only: Annotated[float | None, typer.Option(help="One card of so many GB, measured in this process.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """The table of cards: measured on a GPU with a checkpoint, foreseen without."""
    can_write(as_json)
    with sentences():
        place = checked_device(device if folder else "cpu")
        if only is not None and folder is not None:
            typer.echo(json.dumps(one_card(folder, place, int(only * 1e9), size, quantise)))
            return
        check_format(quantise)
        rows = predicted(size=size, quantised=quantise)
    if folder is not None:
        for row in rows:
            row["measured"] = in_a_process(folder, device, float(row["card"].split()[0]), size, quantise)
    command = " ".join(["python -m benchmarks.memory", *sys.argv[1:]])
    figures = {"command": command, "gpu": named(place), "measured": folder is not None, "size": size, "rows": rows}
    typer.echo(json.dumps(figures, indent=2))
    write_json(as_json, figures)


if __name__ == "__main__":
    typer.run(main)
