"""Notebook 14b: changing the colour of one object, by image-to-image and by inverting Euler's method.

Scenes of two shapes are drawn by a program, and each is edited with a prompt that gives its first shape another colour.
Per way of editing: how often the judge finds exactly the two shapes in the colours asked for, and the peak
signal-to-noise ratio (PSNR) outside the first shape, which should stay as it is. All runs have eight steps. Control:
encoding and decoding alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from evidence.intervals import median, share
from fluxedu.course.exercise import all_exercises
from fluxedu.nano.exam import masked_psnr
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import SHAPES, object_map, render, sample_scene, visible_colors
from fluxedu.sampling.images import to_images, to_tensor
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack
from fluxedu.sampling.solvers import schedule

STRENGTHS = (0.25, 0.5, 0.75)
INVERSIONS = ((1.0, 1), (1.0, 3), (6.0, 1))  # guidance scale, rounds of the fixed-point iteration


def edits(count: int, seed: int = 14) -> list[tuple]:
    """Scenes of two shapes, each with the prompt that describes it, the one for the edit, and the colours after it."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        scene = sample_scene(rng, size=(128, 128), count=2)
        a, b = scene.objects
        if not {a.form, b.form} <= set(SHAPES):
            continue
        free = [c for c in visible_colors(scene.background) if c not in (a.color, b.color)]
        color, right, below = str(rng.choice(free)), b.x - a.x, b.y - a.y
        relation = ("left of", "right of")[right < 0] if abs(right) > abs(below) else ("above", "below")[below < 0]
        rest = f"{a.form} {relation} a {b.color} {b.form} on a {scene.background} background"
        wanted = sorted([(color, a.form), (b.color, b.form)])
        found.append((scene, f"a {a.color} {rest}", f"a {color} {rest}", wanted))
    return found


@torch.no_grad()
def run(samples: int = 40) -> dict:
    """Per way of editing: ``edited`` (share), ``PSNR`` and, after inversion, ``round-trip error`` (medians)."""
    pipe, invert = fe.load("nano"), all_exercises()["family.invert"].solution
    cases = edits(samples)
    photos, table = [render(scene) for scene, *_ in cases], {}
    clean = pack(torch.cat([pipe.autoencoder.encode(to_tensor(photo)) for photo in photos]))  # [B, 64, 64]
    times = schedule(8, 64, True, pipe.defaults.shift_ends)

    def decoded(tokens: Tensor) -> list:
        return to_images(pipe.autoencoder.decode(unpack(tokens, 16, 16)))

    def add(name: str, images: list, **more) -> None:
        correct, kept = [], []
        for image, photo, (scene, _, _, wanted) in zip(images, photos, cases, strict=True):
            correct.append(sorted((thing.color, thing.form) for thing in detect(image).objects) == wanted)
            kept.append(masked_psnr(np.asarray(image), photo, object_map(scene) != 0))
        table[name] = {"edited": share(correct), "PSNR": median(kept)} | more
        print(name, {key: round(entry["value"], 2) for key, entry in table[name].items()}, flush=True)

    add("encoded and decoded", decoded(clean))
    for strength in STRENGTHS:
        options = {"strength": strength, "steps": 8, "trajectory": False, "progress": False}
        images = [pipe(case[2], image=photos[k], seed=k, **options).images[0] for k, case in enumerate(cases)]
        add(f"image-to-image, strength {strength:g}", images)

    def velocity_for(prompts: list[str], guidance: float):
        text, scale = pipe.prompt_encoder(prompts), torch.full((samples,), guidance)
        ids, txt_ids = image_ids(16, 16), text_ids(text.txt.shape[1])
        return lambda x, t: pipe.flux(x, ids, text.txt, txt_ids, torch.full((samples,), float(t)), text.pooled, scale)

    def sample(x: Tensor, velocity) -> Tensor:
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            x = x + (t_next - t) * velocity(x, t)
        return x

    for guidance, rounds in INVERSIONS:
        before, after = (velocity_for([case[i] for case in cases], guidance) for i in (1, 2))
        noise = invert(clean, times, before, rounds)
        errors = (sample(noise, before) - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
        name = f"inverted, guidance {guidance:g}, rounds {rounds}"
        add(name, decoded(sample(noise, after)), **{"round-trip error": median(errors.tolist())})
    return table
