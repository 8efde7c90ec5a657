"""Notebook 00: from pure noise, does the network predict an average of all pictures of the prompt?

16 prompts. For each, 64 pictures are drawn and averaged; this average is compared with the picture that the first
velocity predicts from the first eight noises (x0 = x1 - v), at the guidance scale of the drawn pictures. Controls: the
averages of the other prompts, and the same comparison at another scale.
"""

from __future__ import annotations

import numpy as np
import torch

import fluxedu as fe
from evidence.intervals import median, share
from evidence.scenes import two_shapes

SCALES = (1.0, 3.0, 6.0)


@torch.no_grad()
def run(samples: int = 16) -> dict:
    """Per guidance scale: the relative distance of the predicted latent from the average latent of its own prompt, from
    other prompts' averages and from single pictures, and how often the own average is the nearest.
    """
    pipe, scenes, averages, table = fe.load(), two_shapes(samples), {}, {}
    for scale in SCALES:
        options = {"guidance": scale, "progress": False}
        predicted, singles = [], []
        for i, scene in enumerate(scenes):
            seeds = list(range(64))
            out = pipe(scene.prompt, seed=seeds, trajectory=False, decode=False, **options)
            averages[scale, i] = out.latents.mean(0)
            singles.append(out.latents[:8])
            first = pipe(scene.prompt, seed=list(range(100, 108)), steps=1, trajectory=False, decode=False, **options)
            predicted.append(first.latents)  # one Euler step from t = 1 to 0 is the predicted x0
        table[f"{scale:g}"] = compare(scale, averages, predicted, singles)
        print(scale, {k: round(v["value"], 3) for k, v in table[f"{scale:g}"].items()}, flush=True)
    return table


def compare(scale: float, averages: dict, predicted: list, singles: list) -> dict:
    count = len(predicted)

    def distance(a, b) -> float:
        return float((a - b).norm() / b.norm())

    own, other, single, nearest = [], [], [], []
    for i in range(count):
        for j, x0 in enumerate(predicted[i]):
            distances = [float((x0 - averages[scale, k]).norm()) for k in range(count)]
            own.append(distance(x0, averages[scale, i]))
            other.append(np.mean([distance(x0, averages[scale, k]) for k in range(count) if k != i]))
            single.append(distance(x0, singles[i][j]))
            nearest.append(int(np.argmin(distances)) == i)
    table = {
        "distance from the prompt's own average": median(own),
        "distance from other prompts' averages": median(other),
        "distance from one picture of the prompt": median(single),
        "the own average is the nearest": share(nearest),
    }
    if scale != 1.0:
        at_one = [distance(x0, averages[1.0, i]) for i in range(count) for x0 in predicted[i]]
        table["distance from the average at scale 1"] = median(at_one)
    return table
