"""Notebooks 14b and 14c: the edits of ``evidence/inversion.py`` with nano-kontext, and with low-rank parts of it.

nano-kontext is the miniature after further training, so the change of each weight is known. Per rank: the change of
every linear layer of the blocks is replaced by the best matrix of this rank (from its singular value decomposition);
all other parameters are those of nano-kontext. The rows are as in ``inversion``: how often the judge finds exactly the
two shapes in the colours asked for, and the PSNR outside the first shape. Control: rank 0, which leaves the linear
layers of the blocks as they were in the miniature.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

import fluxedu as fe
from evidence.intervals import median, share
from evidence.inversion import edits
from fluxedu.nano.exam import masked_psnr
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import object_map, render

RANKS = (0, 1, 4, 16, 64)
BLOCKS = ("double_blocks", "single_blocks")


@torch.no_grad()
def run(samples: int = 40) -> dict:
    """Per rank, and for the whole change: ``edited`` (share) and ``PSNR`` (median)."""
    nano, kontext, cases, table = fe.load("nano"), fe.load("nano-kontext"), edits(samples), {}
    trained = copy.deepcopy(kontext.flux.state_dict())
    layers = [
        f"{name}.weight"
        for name, module in nano.flux.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(BLOCKS)
    ]
    before = nano.flux.state_dict()
    parts = {name: torch.linalg.svd(trained[name] - before[name], full_matrices=False) for name in layers}

    def add(name: str) -> None:
        correct, kept = [], []
        for k, (scene, _, _, wanted) in enumerate(cases):
            first, _ = scene.objects
            color = next(c for c, form in wanted if form == first.form)
            photo, instruction = render(scene), f"make the {first.form} {color}"
            image = kontext(instruction, reference=photo, seed=k, trajectory=False, progress=False).images[0]
            correct.append(sorted((thing.color, thing.form) for thing in detect(image).objects) == wanted)
            kept.append(masked_psnr(np.asarray(image), photo, object_map(scene) != 0))
        table[name] = {"edited": share(correct), "PSNR": median(kept)}
        print(name, {key: round(entry["value"], 2) for key, entry in table[name].items()}, flush=True)

    add("nano-kontext")
    for rank in RANKS:
        for name, (u, s, v) in parts.items():
            part = (u[:, :rank] * s[:rank]) @ v[:rank]
            kontext.flux.get_parameter(name).copy_(before[name] + part)
        add(f"rank {rank}")
    return table
