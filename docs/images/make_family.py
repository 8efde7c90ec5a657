"""Draws the README's picture of the family, what each was given and drew: ``python docs/images/make_family.py``."""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import fluxedu as fe
from fluxedu.nano.scenes import Scene, Thing, render
from fluxedu.nano.training.members import depths, outlines

THINGS = Thing("star", "yellow", "large", 38, 42, 24), Thing("ring", "red", "small", 92, 88, 15)
SCENE = Scene("gray", THINGS, 128, 128)
WORDS = "a large yellow star above a small red ring on a gray background"
OTHER = "a large cyan star above a small orange ring on a navy background"


def drawn(name, words, **given):
    return fe.load(name)(words, seed=3, progress=False, **given).images[0]


if __name__ == "__main__":
    picture, mask = render(SCENE), np.zeros((128, 128), np.uint8)
    mask[66:112, 68:116] = 255
    holed = np.where(mask[..., None] > 0, 255, picture)
    filled = "a large yellow star above a small green square on a gray background"
    shown = [
        ("canny: edges", outlines(SCENE)),
        (WORDS, drawn("nano-canny", WORDS, control=outlines(SCENE))),
        ("depth: grey, brighter is nearer", depths(SCENE)),
        (OTHER, drawn("nano-depth", OTHER, control=depths(SCENE))),
        ("fill: a picture and a hole", holed),
        (filled, drawn("nano-fill", filled, image=picture, mask=mask)),
    ]
    fig, axes = plt.subplots(1, 6, figsize=(12, 2.55), layout="constrained")
    for ax, (said, image) in zip(axes, shown, strict=True):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_xlabel(textwrap.fill(said, 26), fontsize=9, color="#444", labelpad=6)
    fig.savefig(Path(__file__).parent / "family.png", dpi=90, facecolor="white")
