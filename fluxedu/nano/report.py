"""The exam's table for a loaded pipeline: what ``fluxedu judge`` prints and writes."""

from __future__ import annotations

import time

import numpy as np
import torch

from fluxedu.nano.exam import sit, truth
from fluxedu.nano.scenes import render, sample_scene
from fluxedu.sampling.images import to_images, to_tensor
from fluxedu.sampling.pipeline import FluxPipeline

ROWS = ("background", "colours", "shapes", "letter", "sizes", "relations", "everything")
BARS = {"background": 99, "colours": 97, "shapes": 90, "relations": 95, "letter": 80, "everything": 80}


def drawer(pipe: FluxPipeline, steps: int, guidance: float | None):
    """The pipeline as the exam wants it: (prompts, seeds, size) -> pictures."""

    def draw(prompts: list[str], seeds: list[int], size: tuple[int, int]) -> list:
        drawn = pipe(
            prompts,
            seed=seeds,
            steps=steps,
            guidance=guidance,
            height=size[0],
            width=size[1],
            trajectory=False,
            progress=False,
        )
        return drawn.images

    return draw


def decibels(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal to noise, in dB, of 8-bit pictures ``[H, W, 3]``, of the pixels ``where``; NaN of none."""
    wrong = np.square(a.astype(float) - b.astype(float))[... if where is None else where]
    return float(10 * np.log10(255**2 / max(wrong.mean(), 1e-9))) if wrong.size else float("nan")


@torch.no_grad()
def reconstruction(pipe: FluxPipeline, count: int = 64) -> float:
    """PSNR in dB of held-out scenes through the autoencoder and back, mean over pictures, 8 bits."""
    rng = np.random.default_rng(12)
    scenes = [render(sample_scene(rng, size=(128, 128), held_out=True)) for _ in range(count)]
    again = lambda image: pipe.autoencoder.decode(pipe.autoencoder.encode(image))  # noqa: E731
    seen = [to_images(again(to_tensor(scene).to(pipe.device, pipe.dtype)))[0] for scene in scenes]
    return float(np.mean([decibels(np.asarray(image), scene) for image, scene in zip(seen, scenes, strict=True)]))


def examine(
    pipe: FluxPipeline,
    name: str,
    prompts: int = 500,
    steps: int = 20,
    guidance: float | None = None,
    for_shapes: int = 0,
) -> dict:
    """Sit the exam; everything as plain values. ``for_shapes``: see :func:`fluxedu.nano.exam.sit`."""
    started = time.monotonic()
    figures = sit(drawer(pipe, steps, guidance), prompts, for_shapes=for_shapes)
    return {
        "model": name,
        "steps": steps,
        "guidance": pipe.defaults.guidance if guidance is None else guidance,
        **figures,
        "autoencoder_psnr": reconstruction(pipe),
        "ground_truth": truth(prompts),
        "seconds": round(time.monotonic() - started, 1),
    }


def table(figures: dict) -> str:
    """The figures as text."""
    lines = [
        "{model}: {prompts} held-out prompts, {steps} steps, guidance {guidance:g}".format(**figures),
        f"{'':<12} {'model':>7} {'truth':>7} {'bar':>5} {'n':>6}",
    ]
    for row in ROWS:
        own, true = figures["rows"][row], figures["ground_truth"][row]
        percent = lambda cell: "-" if cell["percent"] is None else f"{cell['percent']:.1f}"  # noqa: E731
        lines.append(f"{row:<12} {percent(own):>7} {percent(true):>7} {BARS.get(row, ''):>5} {own['n']:>6}")
    lines += [
        f"everything right by size (height x width), about {next(iter(cells.values()))['n']} each: {_sizes(cells)}"
        for cells in (figures["by_size"], figures.get("more_by_size"))
        if cells
    ]
    lines += [
        f"quality {figures['quality']:.3f} · diversity {figures['diversity']:.3f} · "
        f"autoencoder {figures['autoencoder_psnr']:.1f} dB · {figures['seconds']:.0f} s",
    ]
    return "\n".join(lines)


def _sizes(cells: dict[str, dict]) -> str:
    return " · ".join(f"{s} {c['percent']:.0f}" for s, c in cells.items() if c["percent"] is not None)
