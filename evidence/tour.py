"""The web page's tour: does what it shows for one seed hold for others, too?

The page's example prompt with 40 seeds, 20 steps. "Colour" is that of the pixels nearest to each palette colour; the
circle is "left" if the mean column of the red (or green) pixels is smaller than that of the blue ones.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import fluxedu as fe
from evidence.intervals import median, share
from fluxedu.instruments.interventions import positions
from fluxedu.nano.scenes import BACKGROUNDS, COLORS

PROMPT = "a red circle left of a blue square"
RIGHT, GREEN = PROMPT.replace("left", "right"), PROMPT.replace("red", "green")
BATCH = 8
STEP = 9  # of 20, counted from 0: the page's step 10

CHANGES = {  # the tokens: a, red, circle, left, of, a, blue, square
    "nothing": nullcontext,
    "'red' hidden": lambda: fe.ablate("*.attn.map", tokens=[1]),
    "'left of' hidden": lambda: fe.ablate("*.attn.map", tokens=[3, 4]),
    "'circle' hidden": lambda: fe.ablate("*.attn.map", tokens=[2]),
    "columns mirrored": lambda: _columns(lambda c: c.max() - c),
    "columns + 3": lambda: _columns(lambda c: c + 3),
    "without double.0": lambda: fe.ablate("double.0"),
}


def _columns(edit) -> fe.intervene:
    return fe.intervene(
        "*.attn.rope", positions(lambda ids: torch.stack([ids[:, 0], ids[:, 1], edit(ids[:, 2])], dim=1))
    )


def columns(image: Image.Image) -> dict[str, tuple[int, float]]:
    """For red, green and blue: the number of pixels that are nearest to this colour, and their mean column."""
    palette = {**COLORS, **{f"background {name}": rgb for name, rgb in BACKGROUNDS.items()}}
    pixels = np.asarray(image.convert("RGB"), float)
    nearest = np.linalg.norm(pixels[:, :, None] - np.array(list(palette.values()), float), axis=-1).argmin(-1)
    found = {}
    for name in ("red", "green", "blue"):
        across = np.nonzero(nearest == list(palette).index(name))[1]
        found[name] = len(across), float(across.mean()) if len(across) else float("nan")
    return found


def run(samples: int = 40) -> dict:
    """Per change: how often the circle is red, how often left; and which word the circle's patch attends to most."""
    pipe = fe.load()
    request = {"steps": 20, "progress": False, "trajectory": False}
    texts = {prompt: pipe.prompt_encoder([prompt]) for prompt in (PROMPT, RIGHT, GREEN)}
    plain = texts[PROMPT]
    inputs = {name: plain for name in CHANGES} | {
        "'right of' in place of 'left of'": texts[RIGHT],
        "T5 reads green": replace(plain, txt=texts[GREEN].txt),
        "CLIP reads green": replace(plain, pooled=texts[GREEN].pooled),
        "T5 reads right of": replace(plain, txt=texts[RIGHT].txt),
        "CLIP reads right of": replace(plain, pooled=texts[RIGHT].pooled),
    }
    table, first = {}, None
    for name, text in inputs.items():
        found, latents = [], []
        for start in range(0, samples, BATCH):
            seeds = list(range(start, min(start + BATCH, samples)))
            batch = replace(
                text,
                txt=text.txt.expand(len(seeds), -1, -1).contiguous(),
                pooled=text.pooled.expand(len(seeds), -1).contiguous(),
            )
            with CHANGES.get(name, nullcontext)():
                out = pipe(batch, seed=seeds, **request)
            found += [columns(image) for image in out.images]
            latents.append(out.latents)
        latents = torch.cat(latents)
        first = latents if first is None else first
        circle = [max(c["red"], c["green"]) for c in found]
        is_left = [a[1] < c["blue"][1] for a, c in zip(circle, found, strict=True)]
        change = (latents - first).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)
        table[name] = {
            "the circle is red": share([c["red"][0] > c["green"][0] for c in found]),
            "the circle is green": share([c["green"][0] > c["red"][0] for c in found]),
            "the circle is left of the square": share(is_left),
            "column of the circle": median([a[1] for a in circle]),
            "change of the latent": median(change.tolist()),
        }
    return table | {"attention of the circle's patch": _attention(pipe, samples)}


def _attention(pipe, samples: int) -> dict:
    """For the patch at the circle's centre at one step: how often each word receives most attention, per block."""
    pieces = [piece.strip("▁") for piece in pipe.prompt_encoder.t5_tokenizer.pieces(PROMPT)]
    most: dict[str, list[int]] = {}
    for seed in range(samples):
        with fe.record("*.attn.map", steps=STEP) as rec:
            out = pipe(PROMPT, seed=seed, steps=20, progress=False, trajectory=False)
        pixels = np.asarray(out.images[0].convert("RGB"), float)
        rows, across = np.nonzero(np.linalg.norm(pixels - np.array(COLORS["red"]), axis=-1) < 60)
        patch = int(rows.mean()) // 16 * 8 + int(across.mean()) // 16
        for site in rec:
            weights = rec[site].tensor.reshape(-1, 96, 96).mean(0)[32 + patch, : len(pieces)]
            most.setdefault(site.removesuffix(".attn.map"), []).append(int(weights.argmax()))
    return {
        block: {f"{pieces[i]} ({i})": share([token == i for token in tokens]) for i in sorted(set(tokens))}
        for block, tokens in most.items()
    }
