"""Draws the figure on the README's first screen: ``python docs/images/make_miniature.py``."""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt

import fluxedu as fe

PROMPTS = [
    "a red circle left of a blue square",
    "a large yellow star above a small purple ring on a navy background",
    "a green triangle right of an orange cross on a white background",
    "a pink letter A on a black background",
    "a small cyan square below a large red letter L on a beige background",
    "a yellow ring left of a blue cross and a red square above the yellow ring on a white background",
    "an orange letter T left of a green circle on a brown background",
    "a purple star on a gray background",
]

if __name__ == "__main__":
    images = fe.load()(PROMPTS, seed=4, progress=False).images
    fig, axes = plt.subplots(2, 4, figsize=(10, 6.2), layout="constrained")
    for ax, prompt, image in zip(axes.flat, PROMPTS, images, strict=True):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_xlabel(textwrap.fill(prompt, 34), fontsize=9, color="#444", labelpad=6)
    fig.savefig(Path(__file__).parent / "miniature.png", dpi=100, facecolor="white")
