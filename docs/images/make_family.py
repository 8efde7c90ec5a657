"""Draws the README's figure of the variants, inputs above and images below: ``python docs/images/make_family.py``."""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import fluxedu as fe
from fluxedu.nano.scenes import Scene, SceneObject, depth_map, edge_map, render

STAR, RING = SceneObject("star", "yellow", "large", 38, 42, 24), SceneObject("ring", "red", "small", 92, 88, 15)
SCENE = Scene("gray", (STAR, RING), 128, 128)
SAME_COLOURS = "a large yellow star above a small red ring on a gray background"
OTHER_COLOURS = "a large cyan star above a small orange ring on a navy background"
FILLED = "a large yellow star above a small green square on a gray background"
EDIT = "make the ring green"
STYLED = "a large red square above a blue circle"


def draw(name, prompt, lora=None, seed=5, **options):
    return fe.load(name, lora=lora)(prompt, seed=seed, progress=False, **options).images[0]


if __name__ == "__main__":
    picture, mask = render(SCENE), np.zeros((128, 128), np.uint8)
    mask[66:112, 68:116] = 255
    with_hole = np.where(mask[..., None] > 0, 255, picture)
    nano, schnell = (draw(name, OTHER_COLOURS, seed=2, steps=4) for name in ("nano", "nano-schnell"))
    edges, depth = edge_map(SCENE), depth_map(SCENE)
    columns = [  # title, image above, prompt, image below
        ("4 steps: nano, schnell", nano, OTHER_COLOURS, schnell),
        ("canny", edges, SAME_COLOURS, draw("nano-canny", SAME_COLOURS, control=edges)),
        ("depth", depth, OTHER_COLOURS, draw("nano-depth", OTHER_COLOURS, control=depth)),
        ("fill", with_hole, FILLED, draw("nano-fill", FILLED, image=picture, mask=mask)),
        ("kontext", picture, EDIT, draw("nano-kontext", EDIT, reference=picture)),
        ("redux", picture, "(empty prompt)", draw("nano-redux", "", image_prompt=picture)),
        ("without and with a LoRA", draw("nano", STYLED, seed=3), STYLED, draw("nano", STYLED, "hollow", seed=3)),
    ]
    fig, axes = plt.subplots(2, 7, figsize=(14, 4.9), layout="constrained")
    for (above, below), (title, top_image, prompt, bottom_image) in zip(axes.T, columns, strict=True):
        for ax, pixels in ((above, top_image), (below, bottom_image)):
            ax.imshow(pixels)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        above.set_title(title, fontsize=10.5, color="#222")
        below.set_xlabel(textwrap.fill(prompt, 26), fontsize=9, color="#444", labelpad=6)
    fig.savefig(Path(__file__).parent / "family.png", dpi=90, facecolor="white")
