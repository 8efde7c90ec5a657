"""The exam: images of held-out prompts, checked by the judge, and the table that ``fluxedu judge`` prints.

The prompts are always the same. Each describes a scene with an object whose combination of colour, form and background
does not occur in training (one prompt in seven leaves the background open). The image sizes alternate, so that they can
be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluxedu.nano.judge import Verdict, diversity, judge, quality, summary
from fluxedu.nano.scenes import ASPECTS, Claim, caption, render, sample_scene
from fluxedu.sampling.images import to_images, to_tensor
from fluxedu.sampling.pipeline import FluxPipeline

SEED = 77
ROWS = ("background", "colours", "shapes", "letter", "sizes", "relations", "everything")
#: the percentages that the shipped models must reach
TARGETS = {"background": 99, "colours": 97, "shapes": 90, "relations": 95, "letter": 80, "everything": 80}

#: a function of prompts, seeds and one size (height, width) that returns one image per prompt
Sampler = Callable[[list[str], list[int], tuple[int, int]], list]


@dataclass(frozen=True)
class Question:
    """A prompt, the claim it makes, and the size (height, width) and seed to generate its image with."""

    prompt: str
    claim: Claim
    size: tuple[int, int]
    seed: int


def questions(count: int = 500) -> list[Question]:
    """The first ``count`` questions of the exam."""
    rng = np.random.default_rng(SEED)
    result = []
    for i in range(count):
        size = ASPECTS[i % len(ASPECTS)]
        prompt, claim = caption(sample_scene(rng, size=size, held_out=True), rng)
        result.append(Question(prompt, claim, size, i))
    return result


def run_exam(
    sample: Sampler, count: int = 500, batch: int = 16, diversity_prompts: int = 8, by_size_prompts: int = 0
) -> dict:
    """The scores of ``sample(prompts, seeds, (height, width)) -> images`` on the first ``count`` questions.

    ``rows``: the percentages of :func:`fluxedu.nano.judge.summary` · ``by_size``: the share of images with everything
    right, for each size · ``quality`` and ``diversity``: as in :mod:`fluxedu.nano.judge`, the latter over eight images
    of each of the first ``diversity_prompts`` prompts (0: leave it out).

    If ``by_size_prompts`` exceeds ``count``, ``more_by_size`` is ``by_size`` over that many questions. The 71 images
    that each size has among 500 determine its share to 4 points, 300 images to 2.
    """
    exam_questions = questions(max(count, by_size_prompts))
    verdicts, qualities = _judge_all(sample, exam_questions[:count], batch)
    figures = {
        "prompts": count,
        "rows": summary(verdicts.values()),
        "by_size": _by_size(exam_questions[:count], verdicts),
        "quality": float(np.mean(qualities)),
        "diversity": _mean_diversity(sample, exam_questions[:diversity_prompts]) if diversity_prompts else None,
    }
    if by_size_prompts > count:
        figures["more_by_size"] = _by_size(
            exam_questions, verdicts | _judge_all(sample, exam_questions[count:], batch)[0]
        )
    return figures


def _judge_all(sample: Sampler, exam_questions: list[Question], batch: int) -> tuple[dict[int, Verdict], list[float]]:
    """The verdict on each question by its seed, and the quality of each image."""
    verdicts: dict[int, Verdict] = {}
    qualities: list[float] = []
    for size in dict.fromkeys(question.size for question in exam_questions):
        of_size = [question for question in exam_questions if question.size == size]
        for start in range(0, len(of_size), batch):
            part = of_size[start : start + batch]
            images = sample([q.prompt for q in part], [q.seed for q in part], size)
            for question, image in zip(part, images, strict=True):
                verdict = judge(image, question.claim)
                verdicts[question.seed] = verdict
                qualities.append(quality(image, verdict.detections))
    return verdicts, qualities


def _by_size(exam_questions: list[Question], verdicts: dict[int, Verdict]) -> dict[str, dict]:
    return {
        f"{h}x{w}": summary(verdicts[q.seed] for q in exam_questions if q.size == (h, w))["everything"]
        for h, w in ASPECTS
    }


def _mean_diversity(sample: Sampler, exam_questions: list[Question], images: int = 8) -> float:
    """The diversity of several images of one prompt, averaged over prompts."""
    spreads = []
    for question in exam_questions:
        drawn = sample([question.prompt] * images, list(range(images)), question.size)
        spreads.append(diversity([judge(image, question.claim).detections for image in drawn]))
    return float(np.mean(spreads))


def ground_truth(count: int = 500) -> dict:
    """The judge's own accuracy: its :func:`summary` of rendered scenes, whose claims are all true."""
    rng = np.random.default_rng(SEED + 1)
    verdicts = []
    for _ in range(count):
        scene = sample_scene(rng, held_out=bool(rng.random() < 0.5))
        verdicts.append(judge(render(scene), caption(scene, rng)[1]))
    return summary(verdicts)


# ---------------------------------------------------------------- the exam of a pipeline


def batch_sampler(pipe: FluxPipeline, steps: int, guidance: float | None) -> Sampler:
    """The pipeline as a function ``(prompts, seeds, size) -> images``, as :func:`run_exam` needs it."""

    def sample(prompts: list[str], seeds: list[int], size: tuple[int, int]) -> list[Image.Image]:
        height, width = size
        settings = {"steps": steps, "guidance": guidance, "height": height, "width": width}
        return pipe(prompts, seed=seeds, trajectory=False, progress=False, **settings).images

    return sample


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of image batches ``[B, 3, H, W]`` in [-1, 1], rounded to 8 bits; the mean."""
    a, b = (((x.clamp(-1, 1) + 1) * 127.5).round() for x in (a, b))
    mse = (a - b).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(255**2 / mse)).mean())


def masked_psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit images ``[H, W, 3]`` where ``mask`` is true; NaN if it never is."""
    errors = np.square(a.astype(float) - b.astype(float))[... if mask is None else mask]
    return float(10 * np.log10(255**2 / max(errors.mean(), 1e-9))) if errors.size else float("nan")


@torch.no_grad()
def autoencoder_psnr(pipe: FluxPipeline, count: int = 64) -> float:
    """Mean PSNR in dB of ``count`` held-out scenes after encoding and decoding."""
    rng = np.random.default_rng(12)
    values = []
    for _ in range(count):
        scene = render(sample_scene(rng, size=(128, 128), held_out=True))
        latents = pipe.autoencoder.encode(to_tensor(scene).to(pipe.device, pipe.dtype))
        values.append(masked_psnr(np.asarray(to_images(pipe.autoencoder.decode(latents))[0]), scene))
    return float(np.mean(values))


def evaluate(
    pipe: FluxPipeline,
    name: str,
    prompts: int = 500,
    steps: int = 20,
    guidance: float | None = None,
    by_size_prompts: int = 0,
) -> dict:
    """Everything that :func:`format_table` shows, as plain values; ``by_size_prompts`` as for :func:`run_exam`."""
    started = time.monotonic()
    figures = run_exam(batch_sampler(pipe, steps, guidance), prompts, by_size_prompts=by_size_prompts)
    return {
        "model": name,
        "steps": steps,
        "guidance": pipe.defaults.guidance if guidance is None else guidance,
        **figures,
        "autoencoder_psnr": autoencoder_psnr(pipe),
        "ground_truth": ground_truth(prompts),
        "seconds": round(time.monotonic() - started, 1),
    }


def format_table(figures: dict) -> str:
    """The figures of :func:`evaluate` as text."""

    def percent(cell: dict) -> str:
        return "-" if cell["percent"] is None else f"{cell['percent']:.1f}"

    lines = [
        "{model}: {prompts} held-out prompts, {steps} steps, guidance {guidance:g}".format(**figures),
        f"{'':<12} {'model':>7} {'truth':>7} {'target':>6} {'n':>6}",
    ]
    for row in ROWS:
        model, truth = figures["rows"][row], figures["ground_truth"][row]
        lines.append(f"{row:<12} {percent(model):>7} {percent(truth):>7} {TARGETS.get(row, ''):>6} {model['n']:>6}")
    for cells in (figures["by_size"], figures.get("more_by_size")):
        if cells:
            shares = [f"{size} {c['percent']:.0f}" for size, c in cells.items() if c["percent"] is not None]
            count = next(iter(cells.values()))["n"]
            lines.append(
                f"percent with everything right by size (height x width), about {count} each: {' · '.join(shares)}"
            )
    lines.append(
        f"quality {figures['quality']:.3f} · diversity {figures['diversity']:.3f} · "
        f"autoencoder {figures['autoencoder_psnr']:.1f} dB · {figures['seconds']:.0f} s"
    )
    return "\n".join(lines)
