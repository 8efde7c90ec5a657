"""Draws baselines.png, a small Stable Diffusion and two FLUXes: ``python docs/images/make_baselines.py WEIGHTS``.

WEIGHTS is the folder written by ``fluxedu train --variant twin``, since the twin does not ship with the package.
"""

import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fluxedu as fe
from fluxedu.arena.stable_diffusion import GUIDANCE, load_sd
from fluxedu.nano.exam import questions
from fluxedu.nano.judge import judge

COLUMNS = 7

if __name__ == "__main__":
    base, twin = fe.load("nano-base"), fe.load("nano-base")
    twin.flux = fe.checkpoints.load_model(Path(sys.argv[1]) / "transformer_twin", dtype=torch.float32)
    models = {"Stable Diffusion": load_sd(), "FLUX, the same cost": twin, "FLUX, long trained": base}
    exam = [question for question in questions(200) if question.size == (128, 128)][:COLUMNS]
    fig, axes = plt.subplots(len(models), COLUMNS, figsize=(13, 7), layout="constrained")
    for row, (name, model) in zip(axes, models.items(), strict=True):
        options = {"steps": 20, "guidance": GUIDANCE, "trajectory": False, "progress": False}
        images = model(
            [question.prompt for question in exam], seed=[question.seed for question in exam], **options
        ).images
        for ax, image, question in zip(row, images, exam, strict=True):
            correct = judge(image, question.claim).everything
            ax.imshow(image)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(color="#0072B2" if correct else "#D55E00", linewidth=2.5)
        row[0].set_ylabel(name, fontsize=10.5, color="#222")
    for ax, question in zip(axes[-1], exam, strict=True):
        ax.set_xlabel(textwrap.fill(question.prompt, 26), fontsize=9, color="#444", labelpad=6)
    fig.suptitle("Blue: all that the prompt says is there. Orange: not all.", fontsize=10.5, color="#222")
    fig.savefig(Path(__file__).parent / "baselines.png", dpi=85, facecolor="white")
