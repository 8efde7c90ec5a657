"""Prompts about two shapes for the notebooks' experiments, and what the judge says about their images."""

from __future__ import annotations

from PIL import Image

from fluxedu.nano.judge import detect

PROMPTS = (
    "a red circle left of a blue square",
    "a green star left of a yellow ring",
    "a purple triangle above a cyan circle",
    "an orange square right of a blue star",
    "a yellow circle below a red triangle",
)
#: five prompts with eight seeds each, as arguments of the pipeline
FORTY = {"prompt": [prompt for prompt in PROMPTS for _ in range(8)], "seed": list(range(8)) * 5}


def both_named(prompt: str) -> list[tuple[str, str]]:
    """Colour and form of the two shapes that a prompt of this form names."""
    words = prompt.split()
    return [(words[1], words[2]), (words[-2], words[-1])]


def shows_both(image: Image.Image, prompt: str) -> bool:
    """Whether the judge finds the two shapes of the prompt, in their colours, and nothing else."""
    return sorted((o.color, o.form) for o in detect(image).objects) == sorted(both_named(prompt))


def number_right(images: list[Image.Image], prompts: list[str]) -> int:
    """In how many of the images the judge finds the two shapes of their prompt, and nothing else."""
    return sum(map(shows_both, images, prompts))


def rounded(count: int) -> str:
    """A count of 40 as a range that stays the same if rounding on another machine changes one image."""
    ranges = ((0, "none"), (14, "fewer than 15"), (24, "15 to 24"), (36, "25 to 36"), (40, "37 to 40"))
    return next(text for most, text in ranges if count <= most) + " of 40"
