"""Notebook 15b: why does the small Stable Diffusion draw the wrong background?

At the last of DDPM's times the state still contains a trace of the image, so in training the U-Net can read the
background from it. Here sampling starts from noise alone, from noise with such a trace of the background in the prompt,
and (the control) with a trace of another background. Per start: how often the judge finds the background of the prompt,
and that of the other one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from evidence.intervals import share
from fluxedu.arena.stable_diffusion import load_sd
from fluxedu.nano.exam import questions
from fluxedu.nano.judge import judge
from fluxedu.nano.scenes import BACKGROUNDS
from fluxedu.sampling.images import to_tensor
from fluxedu.sampling.latents import draw_noise

BATCH = 8


@torch.no_grad()
def run(samples: int = 80) -> dict:
    """Per start of the sampling: the shares of images with the prompt's background and with the other one."""
    sd, colors, found = load_sd(), list(BACKGROUNDS), {}
    a_last = sd.scheduler.alphas_cumprod[-1]  # the squared weight of the image at the last time
    prompts = [q for q in questions(20 * samples) if q.size == (128, 128) and q.claim.background][:samples]
    plain = {
        name: sd.autoencoder.encode(to_tensor(np.full((128, 128, 3), color, np.uint8)))
        for name, color in BACKGROUNDS.items()
    }
    for first in range(0, samples, BATCH):
        some = prompts[first : first + BATCH]
        asked = [q.claim.background for q in some]
        other = [colors[(colors.index(name) + 3) % len(colors)] for name in asked]
        noise = torch.cat([draw_noise(q.seed, 16, 16, 16) for q in some])
        for start, names in {
            "noise only": None,
            "trace of the right one": asked,
            "trace of a wrong one": other,
        }.items():
            begin = noise
            if names is not None:
                begin = a_last.sqrt() * torch.cat([plain[name] for name in names]) + (1 - a_last).sqrt() * noise
            images = sd([q.prompt for q in some], seed=0, begin=begin, progress=False).images
            for kind, wanted in {"as in the prompt": asked, "as in the wrong trace": other}.items():
                claims = [replace(q.claim, background=name) for q, name in zip(some, wanted, strict=True)]
                hits = [bool(judge(image, claim).background) for image, claim in zip(images, claims, strict=True)]
                found.setdefault(start, {}).setdefault(kind, []).extend(hits)
    return {start: {kind: share(hits) for kind, hits in kinds.items()} for start, kinds in found.items()}
