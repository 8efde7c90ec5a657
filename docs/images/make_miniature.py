"""Draws the figure on the README's first screen: ``python docs/images/make_miniature.py``.

It shows the first eight prompts of the exam whose image is right, all drawn with seed 0, and prints how many were not.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt

import fluxedu as fe
from fluxedu.nano.exam import questions
from fluxedu.nano.judge import judge


def first_right(count: int) -> tuple[list, int]:
    """The first ``count`` prompts of the exam drawn right, each with its image, and the number of those passed over."""
    pipe, right, wrong = fe.load(), [], 0
    for question in questions():
        image = pipe(question.prompt, seed=0, progress=False).images[0]
        if judge(image, question.claim).everything:
            right.append((question.prompt, image))
        else:
            wrong += 1
        if len(right) == count:
            return right, wrong
    return right, wrong


if __name__ == "__main__":
    shown, wrong = first_right(8)
    fig, axes = plt.subplots(2, 4, figsize=(10, 6.2), layout="constrained")
    for ax, (prompt, image) in zip(axes.flat, shown, strict=True):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_xlabel(textwrap.fill(prompt, 34), fontsize=9, color="#444", labelpad=6)
    fig.savefig(Path(__file__).parent / "miniature.png", dpi=100, facecolor="white")
    print(f"{len(shown)} right, {wrong} passed over")
