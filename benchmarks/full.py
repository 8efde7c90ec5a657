"""The large model on a GPU, one step at a time: ``python -m benchmarks.full --device cuda --out h100.json``.

A step of 1024 x 1024 beside its roofline (its arithmetic at the speed of the card's fastest matrix product) and beside
diffusers, both eager and both compiled; other sizes and batches; the cost of maps of every block; how soon the
attention explorer answers at as many tokens; and, with ``--folder`` (:mod:`benchmarks.synthetic` writes one), the time
from a cold start to the first image. Weights are random. ``--small`` runs the same code with small widths on any
device.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

import fluxedu as fe
from benchmarks.instruments import WORDS
from benchmarks.speed import (
    diffusers_inputs,
    diffusers_model,
    matmul_peak,
    random_inputs,
    synchronise,
    time_alternately,
    velocity_step,
)  # fmt: skip
from benchmarks.synthetic import SMALL
from fluxedu.errors import check_device
from fluxedu.memory.compiled import compile_blocks
from fluxedu.memory.placement import PeakBytes
from fluxedu.models import Flux, FluxConfig
from fluxedu.models.meta_init import meta_init
from fluxedu.sampling.request import checked_dtype
from fluxedu.terminal import check_writable, report_errors, write_result

#: image tokens along a side: 256, 512, 1024, 1536 and 2048 pixels
SIDES = (16, 32, 64, 96, 128)
BATCHES = (2, 4)
#: ratio -> the largest value it may have
BARS = {
    "step / roofline": 1.35,
    "step / diffusers": 0.9,
    "compiled step / diffusers": 1.0,
    "step with maps / step": 1.1,
}


def step_flop(config: FluxConfig, side: int, txt_len: int) -> float:
    """FLOP of one step: the blocks' matrix products and attention, a multiplication and an addition counting as two."""
    tokens, width, blocks = side * side + txt_len, config.hidden_size, config.depth + config.depth_single_blocks
    return 2 * blocks * (12 * tokens * width**2 + 2 * tokens**2 * width)


@torch.no_grad()
def random_flux(config: FluxConfig, device: torch.device, dtype: torch.dtype) -> Flux:
    """Random weights, drawn on the device: on a CPU, 12 billion numbers would take minutes, and twice the memory."""
    with meta_init():
        flux = Flux(config).to(dtype)
    flux = flux.to_empty(device=device).eval().requires_grad_(False)
    for p in flux.parameters():
        p.normal_(std=max(1, p[0].numel()) ** -0.5) if p.ndim > 1 else p.fill_(1.0)
    return flux


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The largest number of bytes that ``run`` holds beyond what is allocated before."""
    if device.type != "cuda":
        with PeakBytes() as memory:
            run()
        return memory.peak
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


@torch.no_grad()
def compare_step(
    flux: Flux, side: int, txt_len: int, rounds: int, device: torch.device, dtype: torch.dtype, peak: float
) -> dict:
    """A step beside its roofline and diffusers; with maps; then both compiled, and whether the maps are still the same.

    ``peak`` is the card's matrix-product speed in FLOP per second.
    """
    x = random_inputs(flux.config, side, txt_len, device=device, dtype=dtype)
    if not flux.config.guidance_embed:  # diffusers takes no guidance then
        x["guidance"] = None
    reference = diffusers_model(flux)
    ours, theirs = velocity_step(flux, x), partial(reference, **diffusers_inputs(x))
    seconds, their_seconds = time_alternately(ours, theirs, rounds, device)
    roofline = step_flop(flux.config, side, txt_len) / peak
    figures = {"step_s": seconds, "diffusers_s": their_seconds, "roofline_s": roofline}
    figures["step / roofline"] = seconds / roofline
    figures["step / diffusers"] = seconds / their_seconds
    figures |= cost_of_maps(ours, rounds, device)
    eager_map = _one_map(ours)
    compile_blocks(flux)
    for block in (*reference.transformer_blocks, *reference.single_transformer_blocks):
        block.compile()
    seconds, their_seconds = time_alternately(ours, theirs, rounds, device)
    figures |= {"compiled_step_s": seconds, "compiled_diffusers_s": their_seconds}
    figures["compiled step / diffusers"] = seconds / their_seconds
    figures["same map when compiled"] = torch.equal(eager_map, _one_map(ours))
    return figures


def _one_map(step: Callable[[], object]) -> torch.Tensor:
    with fe.record("single.0.attn.map", tokens=list(range(WORDS)), reduce="head-mean") as rec:
        step()
    return rec["single.0.attn.map"].tensor


def cost_of_maps(step: Callable[[], object], rounds: int, device: torch.device) -> dict:
    """A step with maps of 20 words in every block beside one without: ratio of times, and additional peak memory."""

    def recorded() -> None:
        with fe.record("*.attn.map", tokens=list(range(WORDS)), reduce="head-mean", dtype=torch.float16):
            step()

    seconds, plain = time_alternately(recorded, step, rounds, device)
    additional = peak_bytes(recorded, device) - peak_bytes(step, device)
    return {"step with maps / step": seconds / plain, "additional bytes for maps": additional}


@torch.no_grad()
def sizes_and_batches(
    flux: Flux, sides: tuple[int, ...], txt_len: int, rounds: int, device: torch.device, dtype: torch.dtype, peak: float
) -> dict:
    """Seconds of a step for other sizes and batches, and their ratio to the roofline."""
    cases = [(side, 1) for side in sides] + [(sides[len(sides) // 2], batch) for batch in BATCHES]
    figures = {}
    for side, batch in cases:
        step = velocity_step(flux, random_inputs(flux.config, side, txt_len, batch, device, dtype))
        seconds, _ = time_alternately(step, lambda: None, rounds, device)
        roofline = batch * step_flop(flux.config, side, txt_len) / peak
        name = f"{16 * side} x {16 * side}, batch {batch}"
        figures[name] = {"step_s": seconds, "step / roofline": seconds / roofline}
    return figures


def hover(side: int, txt_len: int, heads: int = 24, head_dim: int = 128, moves: int = 10) -> dict:
    """Milliseconds until the attention explorer shows a patch: the first one in a block, and the following ones.

    Queries and keys are kept on the host, so no GPU is involved. The first one computes the log-sum-exp of every token.
    """
    from fluxedu.widgets.attention import RunAttention, attention_view

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, side * side + txt_len, head_dim, generator=generator) for _ in range(2))
    blank = Image.fromarray(np.zeros((16 * side, 16 * side, 3), np.uint8))
    run, words = RunAttention(blank, {"single.0": q}, {"single.0": k}, txt_len, (side, side)), ["a", "red", "circle"]
    times = []
    for move in range(moves + 1):
        start = time.perf_counter()
        attention_view(run, words, "single.0", 0, None, (move % side, move % side), 1)
        times.append(1000 * (time.perf_counter() - start))
    return {"tokens": side * side + txt_len, "first_ms": times[0], "after_ms": float(np.median(times[1:]))}


def cold_start(folder: Path, device: str, dtype: str, size: int, steps: int) -> dict:
    """Seconds from starting Python, in a process of its own, to the first image."""
    code = (
        "import sys, fluxedu as fe\nfolder, device, dtype, size, steps = sys.argv[1:]\n"
        "pipe = fe.load(folder, device=device, dtype=dtype)\n"
        "out = pipe('a red circle', height=int(size), width=int(size), steps=int(steps), progress=False)\n"
        "out.images[0].save(sys.stdout.buffer, 'PNG')"
    )
    start = time.perf_counter()
    command = [sys.executable, "-c", code, str(folder), device, dtype, str(size), str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    messages = [line for line in done.stderr.decode().splitlines() if line.startswith("memory=")]
    return {"seconds": time.perf_counter() - start, "size": size, "steps": steps, "memory": messages}


def gpu_name(device: torch.device) -> str | None:
    """The card's name; None for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the code.")] = "cuda",
    dtype: str = "bfloat16",
    variant: Annotated[str, typer.Option(help="dev, schnell, …")] = "dev",
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    small: Annotated[bool, typer.Option("--small", help="Small widths and sizes.")] = False,
    folder: Annotated[Path | None, typer.Option(help="A checkpoint, for the cold start.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Measure a step of the large model, as ratios in one run."""
    check_writable(out)
    with report_errors():
        on, kind = check_device(device), checked_dtype(dtype)
        config = FluxConfig.variant(variant)
        config = config.with_(**SMALL[Flux]) if small else config
    sides, txt_len = ((2, 4, 8), 32) if small else (SIDES, 512)
    middle = sides[len(sides) // 2]
    peak = matmul_peak(kind, 512 if small else 8192, device=on)
    flux = random_flux(config, on, kind)
    figures = {
        "command": " ".join(["python -m benchmarks.full", *sys.argv[1:]]),
        "gpu": gpu_name(on), "torch": torch.__version__, "variant": variant, "dtype": dtype, "small": small,
        "matmul_peak_tflops": peak / 1e12, "step_tflop": step_flop(config, middle, txt_len) / 1e12, "bars": BARS,
        "sizes and batches": sizes_and_batches(flux, sides, txt_len, rounds, on, kind, peak),
        **compare_step(flux, middle, txt_len, rounds, on, kind, peak),
    }  # fmt: skip
    del flux
    gc.collect()  # compiled code holds on to the weights, and the cold start needs the memory for a model of its own
    torch.cuda.empty_cache()
    figures["hover"] = hover(middle, txt_len, config.num_heads, config.head_dim)
    if folder is not None:
        steps = 2 if small else 4 if variant == "schnell" else 50
        figures["cold start"] = cold_start(folder, device, dtype, 16 * middle, steps)
    typer.echo(json.dumps(figures, indent=2))
    write_result(out, figures)


if __name__ == "__main__":
    typer.run(main)
