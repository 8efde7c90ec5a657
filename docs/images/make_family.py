"""Draws the README's picture of the family, what each was given and drew: ``python docs/images/make_family.py``."""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import fluxedu as fe
from fluxedu.nano.scenes import Scene, SceneObject, depth_map, edge_map, render

THINGS = SceneObject("star", "yellow", "large", 38, 42, 24), SceneObject("ring", "red", "small", 92, 88, 15)
SCENE = Scene("gray", THINGS, 128, 128)
WORDS = "a large yellow star above a small red ring on a gray background"
OTHER = "a large cyan star above a small orange ring on a navy background"


EDIT = "make the ring green"
STYLE = "a large red square above a blue circle"


def drawn(name, words, lora=None, seed=5, **given):
    return fe.load(name, lora=lora)(words, seed=seed, progress=False, **given).images[0]


if __name__ == "__main__":
    picture, mask = render(SCENE), np.zeros((128, 128), np.uint8)
    mask[66:112, 68:116] = 255
    holed = np.where(mask[..., None] > 0, 255, picture)
    filled = "a large yellow star above a small green square on a gray background"
    four = {name: drawn(name, OTHER, seed=2, steps=4) for name in ("nano", "nano-schnell")}
    shown = {  # member: what it was given (of schnell, the miniature's own four steps), the words, what it drew
        "4 steps: nano, schnell": (four["nano"], OTHER, four["nano-schnell"]),
        "canny": (edge_map(SCENE), WORDS, drawn("nano-canny", WORDS, control=edge_map(SCENE))),
        "depth": (depth_map(SCENE), OTHER, drawn("nano-depth", OTHER, control=depth_map(SCENE))),
        "fill": (holed, filled, drawn("nano-fill", filled, image=picture, mask=mask)),
        "kontext": (picture, EDIT, drawn("nano-kontext", EDIT, reference=picture)),
        "redux": (picture, "(no words)", drawn("nano-redux", "", image_prompt=picture)),
        "a LoRA: off and on": (drawn("nano", STYLE, seed=3), STYLE, drawn("nano", STYLE, "hollow", seed=3)),
    }
    fig, axes = plt.subplots(2, 7, figsize=(14, 4.9), layout="constrained")
    for (above, below), (name, (given, words, image)) in zip(axes.T, shown.items(), strict=True):
        for ax, pixels in ((above, given), (below, image)):
            ax.imshow(pixels)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        above.set_title(name, fontsize=10.5, color="#222")
        below.set_xlabel(textwrap.fill(words, 26), fontsize=9, color="#444", labelpad=6)
    fig.savefig(Path(__file__).parent / "family.png", dpi=90, facecolor="white")
