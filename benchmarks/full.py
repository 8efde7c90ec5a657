"""The large model on a GPU, a step at a time: ``python -m benchmarks.full --device cuda --json h100.json``.

A step of 1024 x 1024 beside the floor (its arithmetic at the speed of the card's best matrix product) and beside
diffusers, both eager and both compiled; other sizes and batches; what maps of every block cost; how soon the attention
explorer answers at as many tokens; and, with ``--folder`` (:mod:`benchmarks.synthetic` writes one), how long from a
cold start to the first picture. Weights are random. ``--small`` tries the same lines with small widths on any device.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

import fluxedu as fe
from benchmarks.instruments import WORDS, a_step
from benchmarks.speed import asked_of, in_turns, inputs_of, matmul_peak, reference_of, settled
from benchmarks.synthetic import SMALL
from fluxedu.loading import compile_blocks
from fluxedu.memory.placement import PeakBytes
from fluxedu.models import Flux, FluxConfig
from fluxedu.models.meta_init import meta_init
from fluxedu.sampling.request import checked_device, checked_dtype
from fluxedu.terminal import can_write, sentences, write_json

#: 256, 512, 1024, 1536 and 2048 pixels: image tokens along a side
SIDES = (16, 32, 64, 96, 128)
BATCHES = (2, 4)
#: figure -> what it must not pass
BARS = {"to the floor": 1.35, "to diffusers": 0.9, "to diffusers, both compiled": 1.0, "maps, time": 1.1}


def flop(config: FluxConfig, side: int, text: int) -> float:
    """Of one step, a multiplication and an addition being two: the blocks' matrix products and attention."""
    tokens, width, blocks = side * side + text, config.hidden_size, config.depth + config.depth_single_blocks
    return 2 * blocks * (12 * tokens * width**2 + 2 * tokens**2 * width)


@torch.no_grad()
def random_flux(config: FluxConfig, device: torch.device, dtype: torch.dtype) -> Flux:
    """Made where it is used: 12 billion numbers take minutes on a CPU, and twice the memory in float32."""
    with meta_init():
        flux = Flux(config).to(dtype)
    flux = flux.to_empty(device=device).eval().requires_grad_(False)
    for p in flux.parameters():
        p.normal_(std=max(1, p[0].numel()) ** -0.5) if p.ndim > 1 else p.fill_(1.0)
    return flux


def peak_of(work, device: torch.device) -> int:
    """The most bytes that ``work`` holds beyond what is there before."""
    if device.type != "cuda":
        with PeakBytes() as held:
            work()
        return held.peak
    settled(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


@torch.no_grad()
def steps(flux: Flux, side: int, text: int, rounds: int, device: torch.device, dtype: torch.dtype, peak: float) -> dict:
    """A step beside the floor and beside diffusers, eager; then maps; then both compiled, and maps once more."""
    x = inputs_of(flux.config, side, text, device=device, dtype=dtype)
    if not flux.config.guidance_embed:  # diffusers takes none then
        x["guidance"] = None
    reference = reference_of(flux)
    ours, theirs = a_step(flux, x), partial(reference, **asked_of(x))
    seconds, their_seconds = in_turns(ours, theirs, rounds, device)
    floor = flop(flux.config, side, text) / peak
    figures = {"step_s": seconds, "diffusers_s": their_seconds, "floor_s": floor, "to the floor": seconds / floor}
    figures["to diffusers"] = seconds / their_seconds
    figures |= maps(ours, rounds, device)
    seen = _watched(ours)
    compile_blocks(flux)
    for block in (*reference.transformer_blocks, *reference.single_transformer_blocks):
        block.compile()
    seconds, their_seconds = in_turns(ours, theirs, rounds, device)
    figures |= {"compiled_step_s": seconds, "compiled_diffusers_s": their_seconds}
    figures["to diffusers, both compiled"] = seconds / their_seconds
    figures["recorded the same when compiled"] = torch.equal(seen, _watched(ours))
    return figures


def _watched(step) -> torch.Tensor:
    with fe.record("single.0.attn.map", tokens=list(range(WORDS)), reduce="head-mean") as rec:
        step()
    return rec["single.0.attn.map"].tensor


def maps(step, rounds: int, device: torch.device) -> dict:
    """Maps of the words in every block beside a step without: time, and memory at the most."""

    def looking() -> None:
        with fe.record("*.attn.map", tokens=list(range(WORDS)), reduce="head-mean", dtype=torch.float16):
            step()

    seconds, plain = in_turns(looking, step, rounds, device)
    more = peak_of(looking, device) - peak_of(step, device)
    return {"maps, time": seconds / plain, "maps, more bytes": more}


@torch.no_grad()
def sizes(flux: Flux, sides, text: int, rounds: int, device: torch.device, dtype: torch.dtype, peak: float) -> dict:
    """Seconds of a step for other sizes and batches, and their share of the floor. Nothing else runs in turns."""
    cases = [(side, 1) for side in sides] + [(sides[len(sides) // 2], batch) for batch in BATCHES]
    found = {}
    for side, batch in cases:
        step = a_step(flux, inputs_of(flux.config, side, text, batch, device, dtype))
        seconds, _ = in_turns(step, lambda: None, rounds, device)
        floor = batch * flop(flux.config, side, text) / peak
        found[f"{16 * side} x {16 * side}, {batch}"] = {"step_s": seconds, "to the floor": seconds / floor}
    return found


def hover(side: int, text: int, heads: int = 24, head_dim: int = 128, moves: int = 10) -> dict:
    """The attention explorer's picture for a patch, milliseconds: the first in a block, and the ones after it.

    Queries and keys are kept on the host, so this asks no GPU. The first makes the log-sum-exp of every token.
    """
    from fluxedu.widgets.attention import Attended, attention_view

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, side * side + text, head_dim, generator=generator) for _ in range(2))
    blank = Image.fromarray(np.zeros((16 * side, 16 * side, 3), np.uint8))
    run, pieces = Attended(blank, {"single.0": q}, {"single.0": k}, text, (side, side)), ["a", "red", "circle"]
    took = []
    for move in range(moves + 1):
        start = time.perf_counter()
        attention_view(run, pieces, "single.0", 0, None, (move % side, move % side), 1)
        took.append(1000 * (time.perf_counter() - start))
    return {"tokens": side * side + text, "first_ms": took[0], "after_ms": float(np.median(took[1:]))}


def cold_start(folder: Path, device: str, dtype: str, size: int, count: int) -> dict:
    """Seconds from starting Python to the first picture on disk, in a process of its own."""
    code = (
        "import sys, fluxedu as fe\nfolder, device, dtype, size, count = sys.argv[1:]\n"
        "pipe = fe.load(folder, device=device, dtype=dtype)\n"
        "out = pipe('a red circle', height=int(size), width=int(size), steps=int(count), progress=False)\n"
        "out.images[0].save(sys.stdout.buffer, 'PNG')"
    )
    start = time.perf_counter()
    given = [str(folder), device, dtype, str(size), str(count)]
    done = subprocess.run(
        [sys.executable, "-c", code, *given], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    chosen = [line for line in done.stderr.decode().splitlines() if line.startswith("memory=")]
    return {"seconds": time.perf_counter() - start, "size": size, "steps": count, "chosen": chosen}


def named(device: torch.device) -> str | None:
    """The card's name; None where there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the lines.")] = "cuda",
    dtype: str = "bfloat16",
    variant: Annotated[str, typer.Option(help="dev, schnell, …")] = "dev",
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    small: Annotated[bool, typer.Option("--small", help="Small widths and sizes.")] = False,
    folder: Annotated[Path | None, typer.Option(help="A checkpoint, for the cold start.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure a step of the large model, as ratios in one run."""
    can_write(as_json)
    with sentences():
        place, kind = checked_device(device), checked_dtype(dtype)
        config = FluxConfig.variant(variant)
        config = config.with_(**SMALL[Flux]) if small else config
    sides, text = ((2, 4, 8), 32) if small else (SIDES, 512)
    middle = sides[len(sides) // 2]
    peak = matmul_peak(kind, 512 if small else 8192, device=place)
    flux = random_flux(config, place, kind)
    figures = {
        "command": " ".join(["python -m benchmarks.full", *sys.argv[1:]]),
        "gpu": named(place), "torch": torch.__version__, "variant": variant, "dtype": dtype, "small": small,
        "matmul_peak_tflops": peak / 1e12, "step_tflop": flop(config, middle, text) / 1e12, "bars": BARS,
        "sizes and batches": sizes(flux, sides, text, rounds, place, kind, peak),
        **steps(flux, middle, text, rounds, place, kind, peak),
    }  # fmt: skip
    del flux
    gc.collect()  # what is compiled holds on to the weights; a child with a model of its own needs the room
    torch.cuda.empty_cache()
    figures["hover"] = hover(middle, text, config.num_heads, config.head_dim)
    if folder is not None:
        count = 4 if variant == "schnell" else 50
        figures["cold start"] = cold_start(folder, device, dtype, 16 * middle, 2 if small else count)
    typer.echo(json.dumps(figures, indent=2))
    write_json(as_json, figures)


if __name__ == "__main__":
    typer.run(main)
