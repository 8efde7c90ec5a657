"""Notebooks 02, 02b and 05b: what does CLIP's pooled vector know, and what does the picture take from it?

A linear probe (ridge regression onto the classes, trained on half of the prompts and tested on the other half) reads
each property from the pooled vector, and from T5's token of the first noun; control: shuffled labels. Then 40
pictures get the pooled vector of one prompt and T5's tokens of another; the judge says which of the two they follow.
"""

from __future__ import annotations

import numpy as np
import torch

import fluxedu as fe
from evidence.intervals import share
from evidence.scenes import TwoShapes, roles, two_shapes

READ = {
    "colour that is named first": lambda s: s.colors[0],
    "colour that is named second": lambda s: s.colors[1],
    "first shape": lambda s: s.forms[0],
    "relation": lambda s: s.relation,
}
PROMPTS = 2000


def probe(vectors: np.ndarray, labels: list[str]) -> dict:
    """The share of right answers of a ridge regression on the second half of the samples; chance is one per class."""
    classes = sorted(set(labels))
    target = np.eye(len(classes))[[classes.index(label) for label in labels]]
    x = np.c_[(vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6), np.ones(len(vectors))]
    half = len(x) // 2
    weights = np.linalg.solve(x[:half].T @ x[:half] + 10 * np.eye(x.shape[1]), x[:half].T @ target[:half])
    return share((x[half:] @ weights).argmax(1) == target[half:].argmax(1)) | {"chance": 1 / len(classes)}


@torch.no_grad()
def run(samples: int = 40) -> dict:
    """``probes``: per property, from which vector it can be read; ``pictures``: whom the mixed pictures follow."""
    pipe, rng = fe.load(), np.random.default_rng(0)
    encoder, scenes = pipe.prompt_encoder, two_shapes(PROMPTS)
    encoded = [encoder([scene.prompt]) for scene in scenes]
    nouns = [roles(encoder.t5_tokenizer, scene)["first noun"][-1] for scene in scenes]
    vectors = {
        "CLIP's pooled vector": np.stack([e.pooled[0].numpy() for e in encoded]),
        "T5's token of the first noun": np.stack([e.txt[0, n].numpy() for e, n in zip(encoded, nouns, strict=True)]),
    }
    probes = {}
    for name, read in READ.items():
        labels = [read(scene) for scene in scenes]
        probes[name] = {source: probe(x, labels) for source, x in vectors.items()}
        probes[name]["shuffled labels"] = probe(vectors["CLIP's pooled vector"], list(rng.permutation(labels)))
        print(name, {k: round(v["value"], 2) for k, v in probes[name].items()}, flush=True)

    names = (
        "claims of A (T5's prompt)",
        "claims of B (CLIP's prompt)",
        "claims of A when CLIP gets A, too",
        "claims of B when CLIP gets A, too (chance)",
    )
    follows = {name: [] for name in names}  # the last two are controls
    for seed, scene in enumerate(scenes[:samples]):
        other = scenes[samples + seed]
        vector = encoder([other.prompt]).pooled
        options = {"seed": seed, "trajectory": False, "progress": False}
        with fe.intervene("sample.pooled", lambda pooled, ctx, vector=vector: vector.to(pooled)):
            image = pipe(scene.prompt, **options).images[0]
        follows["claims of A (T5's prompt)"] += holds(scene, image)
        follows["claims of B (CLIP's prompt)"] += holds(other, image)
        plain = pipe(scene.prompt, **options).images[0]
        follows["claims of A when CLIP gets A, too"] += holds(scene, plain)
        follows["claims of B when CLIP gets A, too (chance)"] += holds(other, plain)
    return {"probes": probes, "claims that hold": {name: share(results) for name, results in follows.items()}}


def holds(scene: TwoShapes, image) -> list[bool]:
    return scene.judged(image).results
