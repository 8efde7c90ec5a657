"""Notebooks 06b and 13b: what is drawn differently if no token may attend to a word, or to the padding?

40 scenes, each with its own seed. Controls: nothing hidden; every sixth image token hidden (11 of 64, where a prompt
has 8 or 9 tokens); CLIP's pooled vector exchanged for the empty prompt's, which no mask reaches.
"""

from __future__ import annotations

from contextlib import nullcontext

import fluxedu as fe
from evidence.intervals import difference, median, share
from evidence.prompts import correct
from evidence.scenes import roles, two_shapes

HIDDEN = ("first colour", "first noun", "relation", "second colour", "second noun", "articles", "end token", "padding")


def run(samples: int = 40) -> dict:
    """Per hidden part: the share of right colours, shapes and relations, and the change of the latent."""
    pipe, scenes = fe.load(), two_shapes(samples)
    tokenizer = pipe.prompt_encoder.t5_tokenizer
    empty = pipe.prompt_encoder([""]).pooled
    plain, with_all, table = [], [], {}
    for name in ("nothing", *HIDDEN, "all words", "some image tokens", "CLIP's pooled vector"):
        verdicts, changes = [], []
        for seed, scene in enumerate(scenes):
            tokens = roles(tokenizer, scene)
            words = sorted(set(range(tokenizer.length)) - set(tokens["padding"]))
            if name == "nothing":
                change = nullcontext()
            elif name == "CLIP's pooled vector":
                change = fe.intervene("sample.pooled", lambda pooled, ctx: empty.to(pooled))
            elif name == "some image tokens":
                # every sixth image token: about as many as a prompt has words
                hidden = list(range(tokenizer.length, tokenizer.length + 64, 6))
                change = fe.ablate("*.attn.map", tokens=hidden)
            else:
                change = fe.ablate("*.attn.map", tokens=words if name == "all words" else tokens[name])
            with change:
                out = pipe(scene.prompt, seed=seed, trajectory=False, progress=False)
            verdicts.append(scene.judged(out.images[0]))
            if name == "nothing":
                plain.append(out.latents)
            changes.append(float((out.latents - plain[seed]).norm() / plain[seed].norm()))
        claims = correct(verdicts)
        with_all = claims if name == "nothing" else with_all
        table[name] = {
            "first colour right": share([v.colors[0] for v in verdicts]),
            "second colour right": share([v.colors[1] for v in verdicts]),
            "first shape right": share([v.forms[0] for v in verdicts]),
            "relation right": share([v.relations[0] for v in verdicts]),
            "everything right": share([v.everything for v in verdicts]),
            "claims, compared with nothing hidden": difference(claims, with_all),
            "change of the latent": median(changes),
        }
        print(name, {k: round(v["value"], 2) for k, v in table[name].items()}, flush=True)
    return table
