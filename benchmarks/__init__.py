"""Speed, memory and the cost of looking, as ratios measured in one run: ``fluxedu bench``.

Absolute times mean little on a shared machine, so both sides run in turns, equal weights, equal
input, float32, and the figure is the ratio of their medians; below 1 fluxedu is faster.
"""

from __future__ import annotations

import torch

from benchmarks import instruments, speed
from benchmarks.speed import WIDE

#: figure -> what it is a ratio of, and the ratio it must not pass (None: there is no bar)
BARS = {
    "miniature step": ("diffusers", 0.85),
    "wide step": ("diffusers", 1.0),
    "prompt to image": ("diffusers", 0.7),
    "peak memory, wide step": ("diffusers", 1.0),
    "idle sites, miniature step": ("no sites", 1.02),
    "idle sites, wide step": ("no sites", 1.005),
    "word maps of every block, wide step": ("not recording", 1.15),
    "whole map of one block": ("by hand", 1.3),
    "word maps, wide forward": ("diffusers' maps", None),
}


def run(rounds: int = 15) -> dict:
    """Every figure, as plain values."""
    from fluxedu.nano import networks

    nano, text, few = networks.FLUX.with_(guidance_embed=True), networks.TEXT_LENGTH, max(3, rounds // 3)
    return {
        "threads": torch.get_num_threads(),
        "miniature step": speed.step_ratio(nano, 8, text, 4 * rounds),
        "wide step": speed.step_ratio(WIDE, 32, 128, rounds),
        "prompt to image": speed.picture_ratio(rounds),
        "peak memory, wide step": speed.memory_ratio(WIDE, 32, 128),
        "training": speed.training_speed(rounds),
        "idle sites, miniature step": instruments.idle(nano, 8, text, 10 * rounds),
        "idle sites, wide step": instruments.idle(WIDE, 32, 128, rounds),
        "word maps of every block, wide step": instruments.word_maps(WIDE, 32, 128, few),
        "whole map of one block": instruments.whole_map(WIDE, 32, 128, few),
        "word maps, wide forward": instruments.beside_diffusers(WIDE, 32, 128, few),
    }


def table(figures: dict) -> str:
    """The ratios and their bars as text."""
    lines = [f"{'ratio of':<37} {'to':<16} {'is':>6} {'bar':>6}"]
    for name, (beside, bar) in BARS.items():
        lines.append(f"{name:<37} {beside:<16} {figures[name]['ratio']:>6.3f} {bar or '':>6}")
    t, maps = figures["training"], figures["word maps of every block, wide step"]
    memory = figures["word maps, wide forward"]["memory_ratio"]
    lines.append(f"{'word maps, wide forward, peak memory':<37} {'diffusers maps':<16} {memory:>6.3f}")
    lines.append(f"word maps take {maps['bytes']:,} bytes a step; the values alone are {maps['least_bytes']:,}")
    lines.append(
        f"training the miniature: {t['samples_per_second']:.0f} samples/s, {t['steps_per_second']:.2f} steps/s, "
        f"{100 * t['share_of_matmul_peak']:.0f} % of the {t['dtype']} matmul peak, {figures['threads']} threads"
    )
    return "\n".join(lines)
