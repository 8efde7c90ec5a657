"""Notebooks 07, 08b and 13b: how large are the tokens, what does each block add, and what happens without it?

40 scenes, each with its own seed, in 20 steps. Sizes are root mean squares over channels, means over the tokens of a
stream (padding is text). Control for the removed block: the latent of another seed, as far as an unrelated picture.
"""

from __future__ import annotations

from contextlib import nullcontext

import fluxedu as fe
from evidence.intervals import difference, median, share
from evidence.prompts import correct
from evidence.scenes import two_shapes
from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.widgets.contributions import measure_contributions


def run(samples: int = 40) -> dict:
    """``sizes``: per block, stream and third of the run; ``removed``: per block, what the judge still finds."""
    pipe, scenes = fe.load(), two_shapes(samples)
    blocks, text = blocks_of(pipe), pipe.prompt_encoder.t5_tokenizer.length
    streams = {"text": slice(0, text), "image": slice(text, None)}
    thirds = {"first third": slice(0, 7), "second third": slice(7, 14), "last third": slice(14, None)}
    sizes = {b: {t: {s: {} for s in streams} for t in thirds} for b in blocks}
    for seed, scene in enumerate(scenes):
        entering, added, _ = measure_contributions(pipe, scene.prompt, seed=seed, progress=False)
        for i, block in enumerate(blocks):
            for third, steps in thirds.items():
                for stream, tokens in streams.items():
                    cell = sizes[block][third][stream]
                    size = float(entering.tensor[i, steps, tokens].mean())
                    cell.setdefault("size", []).append(size)
                    for j, source in enumerate(added.coords["source"]):
                        value = float(added.tensor[i, j, steps, tokens].mean())
                        cell.setdefault(f"{source} adds", []).append(value)
                        cell.setdefault(f"{source} adds, relative to the size", []).append(value / size)
    plain, with_all, removed = [], [], {}
    for name in ("nothing", "another seed", *blocks):
        verdicts, changes = [], []
        for seed, scene in enumerate(scenes):
            with nullcontext() if name in ("nothing", "another seed") else fe.ablate(name):
                drawn = seed + 1000 * (name == "another seed")
                out = pipe(scene.prompt, seed=drawn, trajectory=False, progress=False)
            verdicts.append(scene.judged(out.images[0]))
            if name == "nothing":
                plain.append(out.latents)
            changes.append(float((out.latents - plain[seed]).norm() / plain[seed].norm()))
        claims = correct(verdicts)
        with_all = claims if name == "nothing" else with_all
        removed[name] = {
            "everything right": share([v.everything for v in verdicts]),
            "claims, compared with all blocks": difference(claims, with_all),
            "change of the latent": median(changes),
        }
        print(name, {k: round(v["value"], 2) for k, v in removed[name].items()}, flush=True)
    table = {
        b: {t: {s: {k: median(v) for k, v in c.items()} for s, c in rows.items()} for t, rows in by_third.items()}
        for b, by_third in sizes.items()
    }
    return {"sizes": table, "removed": removed}
