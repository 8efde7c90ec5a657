"""Speed, memory and the cost of recording, as ratios measured in one run: ``fluxedu bench``, ``python -m benchmarks``.

Absolute times mean little on a shared machine. So the two sides of a comparison run alternately, with equal weights,
equal input and float32, and a figure is the ratio of their medians; below 1, fluxedu is faster. Not part of the
installed package: it needs a checkout. The other modules are commands of their own:

    python -m benchmarks.full        the large model on a GPU, one step at a time
    python -m benchmarks.memory      what fits on each size of card
    python -m benchmarks.loading     reading weights beside ``cat``
    python -m benchmarks.quantised   the error that fewer bits make
    python -m benchmarks.synthetic   a checkpoint of the true names and shapes with random values
"""

from __future__ import annotations

import torch

from benchmarks import instruments, speed
from benchmarks.speed import WIDE

#: figure -> what it is compared with, and the ratio it must not exceed (None: no bar)
BARS = {
    "miniature step": ("diffusers", 0.85),
    "wide step": ("diffusers", 1.0),
    "prompt to image": ("diffusers", 0.7),
    "16 prompts in one call": ("diffusers", 1.0),
    "peak memory, wide step": ("diffusers", 1.0),
    "idle sites, miniature step": ("no sites", 1.02),
    "idle sites, wide step": ("no sites", 1.005),
    "word maps of every block, wide step": ("not recording", 1.15),
    "whole map of one block": ("by hand", 1.3),
    "word maps, wide forward": ("diffusers' maps", None),
    "40 head ablations at once": ("one by one", None),
}


def run(rounds: int = 15) -> dict:
    """All figures as plain values."""
    from fluxedu.nano import networks

    nano, txt_len, fewer = networks.FLUX.with_(guidance_embed=True), networks.TEXT_LENGTH, max(3, rounds // 3)
    return {
        "threads": torch.get_num_threads(),
        "miniature step": speed.step_ratio(nano, 8, txt_len, 4 * rounds),
        "wide step": speed.step_ratio(WIDE, 32, 128, rounds),
        "prompt to image": speed.image_ratio(rounds),
        "16 prompts in one call": speed.image_ratio(fewer, images=16),
        "peak memory, wide step": speed.memory_ratio(WIDE, 32, 128),
        "training": speed.training_speed(rounds),
        "idle sites, miniature step": instruments.idle_sites(nano, 8, txt_len, 10 * rounds),
        "idle sites, wide step": instruments.idle_sites(WIDE, 32, 128, rounds),
        "word maps of every block, wide step": instruments.word_maps(WIDE, 32, 128, fewer),
        "whole map of one block": instruments.whole_map(WIDE, 32, 128, fewer),
        "word maps, wide forward": instruments.word_maps_beside_diffusers(WIDE, 32, 128, fewer),
        "40 head ablations at once": instruments.head_ablations(fewer),
    }


def table(figures: dict) -> str:
    """The ratios and their bars as text."""
    lines = [f"{'figure':<37} {'compared with':<16} {'ratio':>6} {'bar':>6}"]
    for name, (other, bar) in BARS.items():
        lines.append(f"{name:<37} {other:<16} {figures[name]['ratio']:>6.3f} {bar or '':>6}")
    training, maps = figures["training"], figures["word maps of every block, wide step"]
    memory = figures["word maps, wide forward"]["memory_ratio"]
    lines += [
        f"{'word maps, wide forward, peak memory':<37} {'diffusers maps':<16} {memory:>6.3f}",
        f"word maps take {maps['bytes']:,} bytes per step; their values alone are {maps['least_bytes']:,}",
        f"training the miniature: {training['samples_per_second']:.0f} samples/s, "
        f"{training['steps_per_second']:.2f} steps/s, {100 * training['share_of_matmul_peak']:.0f} % of the "
        f"{training['dtype']} matmul peak, {figures['threads']} threads",
    ]
    return "\n".join(lines)
