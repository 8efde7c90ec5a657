"""Notebook 12: at which guidance scale do pictures follow the prompt best, and what does it cost in diversity?

200 prompts, each with its own seed, at every scale; the control is scale 1, which is no guidance. The embedded scale of
`nano` and classifier-free guidance of `nano-base`, both in 20 steps. Diversity: four pictures of each of 40 prompts.
"""

from __future__ import annotations

import fluxedu as fe
from evidence.intervals import difference, mean, median, share
from evidence.prompts import correct, questions, verdicts
from fluxedu.nano.judge import detect, diversity

SCALES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


def run(samples: int = 200) -> dict:
    """Per model and scale: everything right, the share of claims that hold, and its difference from scale 1."""
    asked, table = questions(samples), {}
    for model in ("nano", "nano-base"):
        pipe, rows, baseline = fe.load(model), {}, None
        for scale in SCALES:
            found = verdicts(pipe, asked, guidance=scale)
            claims = correct(found)
            baseline = claims if baseline is None else baseline
            rows[f"{scale:g}"] = {
                "everything right": share([verdict.everything for verdict in found]),
                "claims that hold": mean(claims),
                "more than at scale 1": difference(claims, baseline),
                "diversity": median(spreads(pipe, asked[: samples // 5], scale)),
            }
            print(model, scale, rows[f"{scale:g}"], flush=True)
        table[model] = rows
    return table


def spreads(pipe, asked: list, scale: float) -> list[float]:
    """How far four pictures of one prompt differ, for each prompt: the spread of positions and sizes."""
    found = []
    for question in asked:
        images = pipe(question.prompt, seed=list(range(4)), guidance=scale, trajectory=False, progress=False).images
        found.append(diversity([detect(image) for image in images]))
    return found
