"""What fits on each size of card, and how long a step takes there: ``python -m benchmarks.memory --folder /disk/dev``.

On one GPU every card is simulated by limiting the allocator, each in a process of its own that loads the checkpoint
with ``memory="auto"`` and samples (:mod:`benchmarks.synthetic` writes a checkpoint of the true size). Without
``--folder`` nothing is measured: the figures are what ``auto`` predicts, and say so.
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
from benchmarks.full import gpu_name, peak_bytes
from benchmarks.speed import synchronise
from fluxedu.errors import check_device
from fluxedu.memory.placement import predicted
from fluxedu.memory.quantised import check_format
from fluxedu.terminal import check_writable, report_errors, write_result

STEPS = 5  # of the longer of two runs; the shorter one has a single step


def measure_card(folder: Path, device: torch.device, limit: int, size: int, quantise: str | None) -> dict:
    """Load and sample with at most ``limit`` bytes: peak memory, and seconds of loading, of a step and of the rest."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    start = time.perf_counter()
    pipe = fe.load(folder, device=device, dtype="bfloat16", quantise=quantise)
    synchronise(device)
    load_seconds = time.perf_counter() - start

    def sample(steps: int) -> float:
        start = time.perf_counter()
        pipe("a red circle left of a blue square", height=size, width=size, steps=steps, progress=False)
        synchronise(device)
        return time.perf_counter() - start

    sample(1)  # warm up
    one, several = sample(1), sample(STEPS)
    step = (several - one) / (STEPS - 1)
    additional = peak_bytes(lambda: sample(2), device)
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return {"load_s": load_seconds, "peak_bytes": resident + additional, "step_s": step, "rest_s": one - step}


def measure_in_process(folder: Path, device: str, card: float, size: int, quantise: str | None) -> dict:
    """:func:`measure_card` in a process of its own: its figures and the placement it chose, or why it failed."""
    arguments = ["--folder", str(folder.resolve()), "--device", device, "--size", str(size), "--only", str(card)]
    arguments += ["--quantise", quantise] if quantise else []
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    messages = [line for line in done.stderr.splitlines() if line.startswith(("memory=", "fluxedu:"))]
    if done.returncode:
        own = [line for line in messages if line.startswith("fluxedu:")]
        return {"failed": (own or done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return {"chosen": messages[0] if messages else None, **json.loads(done.stdout)}


def main(
    folder: Annotated[Path | None, typer.Option(help="A checkpoint; without one, nothing is measured.")] = None,
    device: str = "cuda",
    size: Annotated[int, typer.Option(help="Height and width of the image in pixels.")] = 1024,
    quantise: Annotated[str | None, typer.Option(help="int8, fp8 or nf4.")] = None,
    only: Annotated[float | None, typer.Option(help="A single card of this many GB, measured in this process.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the figures to this JSON file.")] = None,
) -> None:
    """The table of cards: measured on a GPU if a checkpoint is given, otherwise predicted."""
    check_writable(out)
    with report_errors():
        on = check_device(device if folder else "cpu")
        if only is not None and folder is not None:
            typer.echo(json.dumps(measure_card(folder, on, int(only * 1e9), size, quantise)))
            return
        check_format(quantise)
        rows = predicted(size=size, quantised=quantise)
    if folder is not None:
        for row in rows:
            row["measured"] = measure_in_process(folder, device, float(row["card"].split()[0]), size, quantise)
    command = " ".join(["python -m benchmarks.memory", *sys.argv[1:]])
    figures = {"command": command, "gpu": gpu_name(on), "measured": folder is not None, "size": size, "rows": rows}
    typer.echo(json.dumps(figures, indent=2))
    write_result(out, figures)


if __name__ == "__main__":
    typer.run(main)
