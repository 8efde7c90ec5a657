"""Notebook 03b: can a colour be written into T5's vector of a shape, along the difference of two means?

40 prompts about two shapes, each with its own seed, in eight steps. A target colour that the prompt does not name is
drawn for the first shape. The vector of its token is changed by the difference of two means over 36 other prompts: the
vectors of shapes in the target colour minus those of shapes in the prompt's colour. Everything else stays. The judge
says which colours the two shapes have. Controls: no change, and a random direction of the same length.
"""

from __future__ import annotations

import numpy as np
import torch

import fluxedu as fe
from evidence.intervals import share
from evidence.scenes import TwoShapes, roles, two_shapes
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import COLORS

STEPS, FITTED = 8, 36


@torch.no_grad()
def run(samples: int = 40) -> dict:
    """Per change of the vector: the shares of pictures in which the shapes have these colours."""
    pipe, rng = fe.load(), np.random.default_rng(11)
    tokenizer = pipe.prompt_encoder.t5_tokenizer
    scenes = two_shapes(samples + FITTED)
    results: dict[str, dict[str, list[bool]]] = {}
    for seed, scene in enumerate(scenes[:samples]):
        target = str(rng.choice([c for c in COLORS if c not in scene.colors]))
        fitted = [s for s in scenes[-FITTED:] if s.prompt != scene.prompt]
        direction = _mean_vector(pipe, fitted, target) - _mean_vector(pipe, fitted, scene.colors[0])
        noise = torch.from_numpy(rng.standard_normal(direction.shape)).to(direction)
        token = roles(tokenizer, scene)["first noun"][-1]
        for name, change in {
            "difference of the two means": direction,
            "random direction of the same length": noise * direction.norm() / noise.norm(),
            "no change": 0 * direction,
        }.items():

            def change_one(txt, ctx, token=token, change=change):
                txt = txt.clone()
                txt[:, token] += change.to(txt)
                return txt

            with fe.intervene("sample.txt", change_one):
                image = pipe(scene.prompt, seed=seed, steps=STEPS, trajectory=False, progress=False).images[0]
            found = {(o.color, o.form) for o in detect(image).objects}
            row = results.setdefault(name, {})
            for what, color, form in (
                ("the first shape has the new colour", target, scene.forms[0]),
                ("the first shape has its own colour", scene.colors[0], scene.forms[0]),
                ("the second shape has its own colour", scene.colors[1], scene.forms[1]),
            ):
                row.setdefault(what, []).append((color, form) in found)
        if seed % 10 == 9:
            print(seed + 1, {k: {w: np.mean(v) for w, v in row.items()} for k, row in results.items()}, flush=True)
    return {name: {what: share(hits) for what, hits in row.items()} for name, row in results.items()}


def _mean_vector(pipe: fe.FluxPipeline, scenes: list[TwoShapes], color: str) -> torch.Tensor:
    """The mean of T5's vectors of the first nouns, with the first shapes in this colour."""
    encoder = pipe.prompt_encoder
    scenes = [scene.recoloured(color) for scene in scenes if color != scene.colors[1]]
    nouns = [roles(encoder.t5_tokenizer, scene)["first noun"][-1] for scene in scenes]
    txt = encoder([scene.prompt for scene in scenes]).txt
    return txt[torch.arange(len(scenes)), nouns].mean(0)
