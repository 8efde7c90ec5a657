"""Notebook 05: what is drawn if the network receives another time than that of its input?

40 scenes, each with its own seed, in 20 steps. Only the time's term of ``vec`` is changed; the noise in the latents
follows the right schedule. Controls: the right time, and the right time with another seed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

import fluxedu as fe
from evidence.intervals import difference, median, share
from evidence.prompts import correct
from evidence.scenes import two_shapes
from fluxedu.models.modulation import timestep_embedding

TIMES: dict[str, Callable[[float], float]] = {
    "0.05 too high": lambda t: min(1.0, t + 0.05),
    "0.05 too low": lambda t: max(0.0, t - 0.05),
    "0.1 too high": lambda t: min(1.0, t + 0.1),
    "0.1 too low": lambda t: max(0.0, t - 0.1),
    "0.3 too high": lambda t: min(1.0, t + 0.3),
    "0.3 too low": lambda t: max(0.0, t - 0.3),
    "always 1": lambda t: 1.0,
    "always 0.5": lambda t: 0.5,
    "always 0": lambda t: 0.0,
}
BATCH = 8


def run(samples: int = 40) -> dict:
    """Per received time: the share of right pictures, and the change of the latent."""
    pipe, scenes = fe.load(), two_shapes(samples)

    def receive(function: Callable[[float], float]) -> Callable:
        def change(embedding, ctx):
            embedded = pipe.flux.time_in(timestep_embedding(torch.tensor([function(ctx.time)])))
            return embedded.expand_as(embedding)

        return change

    plain, with_right_time, table = [], [], {}
    for name in ("right time", "right time, another seed", *TIMES):
        verdicts, changes = [], []
        with fe.intervene("vec.time", receive(TIMES[name])) if name in TIMES else nullcontext():
            for start in range(0, samples, BATCH):
                part = range(start, min(start + BATCH, samples))
                seeds = [i + samples * (name == "right time, another seed") for i in part]
                prompts = [scenes[i].prompt for i in part]
                out = pipe(prompts, seed=seeds, trajectory=False, progress=False)
                verdicts += [scenes[i].judged(image) for i, image in zip(part, out.images, strict=True)]
                if name == "right time":
                    plain += list(out.latents)
                changes += [
                    float((x - plain[i]).norm() / plain[i].norm()) for i, x in zip(part, out.latents, strict=True)
                ]
        claims = correct(verdicts)
        with_right_time = with_right_time or claims
        table[name] = {
            "everything right": share([v.everything for v in verdicts]),
            "claims, compared with the right time": difference(claims, with_right_time),
            "change of the latent": median(changes),
        }
        print(name, {k: round(v["value"], 2) for k, v in table[name].items()}, flush=True)
    return table
