"""The exam of the models of flux2.py: percentages of 500 held-out prompts, their intervals, and those of differences.

Every model draws the same prompts from the same noise, so a difference from the twin is compared prompt by prompt. Of
the twin that was trained for ``baselines.json`` only the sums are stored; as long as it is not trained again, it is
compared as a sample of its own, which gives a wider interval.

What the intervals include is the choice of prompts and of their noise. They do not include the training run: each model
is trained once, and the same recipe with another seed gives other figures. ``NAME@SEED`` measures by how much.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from fluxedu.arena.stable_diffusion import GUIDANCE
from fluxedu.errors import CheckpointError, check_keys
from fluxedu.files import read_json_file
from fluxedu.loading import WEIGHTS
from fluxedu.models.flux import Flux
from fluxedu.models.flux2 import Flux2
from fluxedu.nano import exam
from fluxedu.nano.judge import judge, summary
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import T5Prompts
from training import baselines

BATCH = 16  # images that are drawn at once
RESAMPLES = 4000  # of the prompts, for an interval
Z = 1.96  # standard deviations of a 95 % interval


def pipeline_with(flux: Flux, pipe: FluxPipeline) -> FluxPipeline:
    """The transformer with the encoders, the schedule and the sampler of ``pipe``."""
    encoder = pipe.prompt_encoder
    if isinstance(flux, Flux2):
        encoder = T5Prompts(encoder.t5_tokenizer, encoder.t5)
    return FluxPipeline(encoder, flux.eval(), pipe.autoencoder, pipe.defaults, pipe.size)


def examine(pipe: FluxPipeline, prompts: int) -> dict[str, list[tuple[int, int]]]:
    """The exam in 20 steps: for each row and each prompt, how many claims are right, and how many there are."""
    sample, verdicts = exam.batch_sampler(pipe, 20, GUIDANCE), {}
    questions = exam.questions(prompts)
    for size in dict.fromkeys(question.size for question in questions):
        of_size = [question for question in questions if question.size == size]
        for start in range(0, len(of_size), BATCH):
            part = of_size[start : start + BATCH]
            images = sample([q.prompt for q in part], [q.seed for q in part], size)
            verdicts |= {q.seed: judge(image, q.claim) for q, image in zip(part, images, strict=True)}
    claims: dict[str, list[tuple[int, int]]] = {row: [] for row in exam.ROWS}
    for question in questions:
        for row, cell in summary([verdicts[question.seed]]).items():
            claims[row].append((round((cell["percent"] or 0) * cell["n"] / 100), cell["n"]))
    return claims


# ---------------------------------------------------------------- figures of the runs


def finished(folder: Path) -> dict[str, dict]:
    """The figures of the control, and of all runs in ``folder`` that are judged, by name.

    ``rows``: for each row of the exam, right and claimed for each prompt; of the stored twin, one sum for all prompts.
    Raises CheckpointError for a file that cannot be read.
    """
    runs = {}
    for path in sorted(Path(folder).glob("*/exam.json")):
        runs[path.parent.name] = check_keys(str(path), read_json_file(path), error=CheckpointError)
    return {baselines.TWIN: runs.pop(baselines.TWIN, None) or stored_twin()} | runs


def stored_twin() -> dict:
    """The twin's figures in ``baselines.json``; only the sums over all prompts are stored."""
    entry = read_json_file(WEIGHTS / "baselines.json")[baselines.TWIN]
    cells = entry["exam"]["rows"]
    rows = {row: [(round(cell["percent"] * cell["n"] / 100), cell["n"])] for row, cell in cells.items() if cell["n"]}
    return entry | {"prompts": entry["exam"]["prompts"], "rows": rows}


def prompts_of(entry: dict) -> int:
    """The number of prompts that a model was judged on."""
    return entry.get("prompts") or len(entry["rows"]["everything"])


def wilson(percent: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a percentage of n claims (Wilson, 1927)."""
    p = percent / 100
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return 100 * (centre - half) / (1 + Z * Z / n), 100 * (centre + half) / (1 + Z * Z / n)


def percentage(cells: np.ndarray) -> np.ndarray:
    """``[..., prompts, 2]``, right and claimed, to percentages ``[...]``."""
    right, claimed = np.moveaxis(np.asarray(cells, float).sum(-2), -1, 0)
    return 100 * right / claimed


def is_paired(row: list, twin: list) -> bool:
    """Whether both models have a cell for each of the same prompts."""
    return len(row) == len(twin) > 1


def difference(row: list, twin: list) -> tuple[float, float, float]:
    """Percentage minus the twin's, and its 95 % interval.

    Paired: a bootstrap over prompts, the same ones for both models. Otherwise that of two independent samples, from
    their Wilson intervals (Newcombe 1998, method 10).
    """
    a, b = np.array(row, float), np.array(twin, float)
    gap = percentage(a) - percentage(b)
    if is_paired(row, twin):
        draws = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
        low, high = np.percentile(percentage(a[draws]) - percentage(b[draws]), (2.5, 97.5))
        return float(gap), float(low), float(high)
    (p, p_low, p_high), (q, q_low, q_high) = (
        (percentage(cells), *wilson(percentage(cells), cells[:, 1].sum())) for cells in (a, b)
    )
    return float(gap), float(gap - math.hypot(p - p_low, q_high - q)), float(gap + math.hypot(p_high - p, q - q_low))


def figures_table(folder: Path) -> str:
    """The figures of all judged runs in ``folder`` and of the control, and the differences from it."""
    runs = finished(folder)
    twin = runs[baselines.TWIN]
    lines = [
        "percent right on held-out prompts, with 95 % intervals; each model is one training run, and how much another",
        "seed would change it is not in the intervals",
        "",
    ]
    for name, entry in runs.items():
        about = "{parameters:,} parameters, {steps} steps of {batch}".format(**entry)
        lines.append(f"{name}: {about}, {prompts_of(entry)} prompts")
        for row, cells in entry["rows"].items():
            claimed = sum(cell[1] for cell in cells)
            if not claimed:
                continue
            percent = float(percentage(cells))
            low, high = wilson(percent, claimed)
            line = f"  {row:<12}{percent:>6.1f} ({low:.1f} to {high:.1f})"
            if entry is not twin:
                gap, low, high = difference(cells, twin["rows"][row])
                line = f"{line:<40} twin {gap:+.1f} ({low:+.1f} to {high:+.1f})"
                line += "" if is_paired(cells, twin["rows"][row]) else " as two samples"
            lines.append(line)
    return "\n".join(lines)
