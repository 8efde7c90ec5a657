"""Notebook 13b: from which token, and until which block, does the image take the colour of its first shape?

40 pairs of prompts that differ in the first colour, each with its own seed, in eight steps. The second prompt is drawn,
with some tokens replaced by those of the first prompt's run from the same noise; the measure is the colour that the
judge reads. Both directions are among the pairs, since colours are drawn at random. Control: the second colour's token.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import numpy as np

import fluxedu as fe
from evidence.intervals import share
from evidence.scenes import TwoShapes, roles, two_shapes
from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import COLORS

PARTS = ("first colour", "first noun", "relation", "second colour", "second noun", "padding", "first colour and noun")
STEPS = 8


def run(samples: int = 40) -> dict:
    """``tokens``: per part of the prompt, replaced where T5 hands it over; ``blocks``: per block and stream, all tokens
    replaced as they enter it. Each is the share of pictures in which the first shape has the first prompt's colour.
    """
    pipe = fe.load()
    tokenizer, blocks = pipe.prompt_encoder.t5_tokenizer, blocks_of(pipe)
    rng, tokens, by_block, plain = np.random.default_rng(7), {}, {}, []
    text = tokenizer.length
    for seed, target in enumerate(two_shapes(samples)):
        source = target.recoloured(str(rng.choice([c for c in COLORS if c not in target.colors])))
        settings = {"seed": seed, "steps": STEPS, "trajectory": False, "progress": False}
        with fe.record("sample.txt", "double.*.txt", "double.*.img", "single.*.x") as recording:
            pipe(source.prompt, **settings)

        taken = partial(is_recoloured, pipe, target, source, settings)
        plain.append(taken())
        places = roles(tokenizer, target)
        places["first colour and noun"] = places["first colour"] + places["first noun"]
        for part in PARTS:
            patched = fe.patch("sample.txt", recording, tokens=places[part])
            tokens.setdefault(part, []).append(taken(patched))
        tokens.setdefault("all tokens", []).append(taken(fe.patch("sample.txt", recording)))
        for block in blocks:
            double = block.startswith("double")
            for stream, short, chosen in (("text", "txt", range(text)), ("image", "img", range(text, text + 64))):
                site = f"{block}.{short}" if double else f"{block}.x"
                patched = fe.patch(site, recording, **({} if double else {"tokens": list(chosen)}))
                by_block.setdefault(block, {}).setdefault(stream, []).append(taken(patched))
        if seed % 10 == 9:
            print(seed + 1, {part: np.mean(hits).round(2) for part, hits in tokens.items()}, flush=True)
    return {
        "nothing replaced": share(plain),
        "tokens": {part: share(hits) for part, hits in tokens.items()},
        "blocks": {b: {stream: share(hits) for stream, hits in rows.items()} for b, rows in by_block.items()},
    }


def is_recoloured(pipe, target: TwoShapes, source: TwoShapes, settings: dict, *changes) -> bool:
    """Whether the picture of the target, under these changes, has its first shape in the source's colour."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        image = pipe(target.prompt, **settings).images[0]
    return any((o.form, o.color) == (target.forms[0], source.colors[0]) for o in detect(image).objects)
