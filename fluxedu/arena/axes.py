"""What is asked of two pictures: the six axes of the published comparison, and what is drawn for each.

One ballot is about one prompt and one axis. Each side shows one picture, or several drawn by the same model where the
axis is about several: three shapes of picture for size and aspect, four seeds for diversity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from fluxedu.errors import ArenaError
from fluxedu.nano.exam import Question, questions
from fluxedu.nano.scenes import LETTERS

SHAPES = ((128, 128), (96, 192), (192, 96))  # height, width
SEEDS = 4  # pictures of one prompt, for diversity
STRIDE = 100_000  # between their seeds, so that no two ballots share a picture by accident
GAP = 4  # pixels between pictures on a sheet


@dataclass(frozen=True)
class Axis:
    """``ask``: the question under the pictures."""

    title: str
    ask: str


AXES = {
    "overall": Axis("Overall", "Which picture is better, all in all?"),
    "prompt": Axis("Prompt following", "Which picture shows more exactly what the prompt says?"),
    "size": Axis("Size/aspect variability", "Which three shapes of picture keep better to the prompt?"),
    "typography": Axis("Typography", "Which picture has the better letters?"),
    "diversity": Axis("Output diversity", "Which four pictures of the prompt differ more from each other?"),
    "quality": Axis("Visual quality", "Which picture is drawn more cleanly, whatever the prompt says?"),
}


def checked_axis(axis: str) -> str:
    """The axis; raises ArenaError for one that is not there."""
    if axis not in AXES:
        raise ArenaError(f"an axis is one of {', '.join(AXES)}, not {axis!r}.")
    return axis


def asked(axis: str, count: int) -> list[Question]:
    """``count`` held-out prompts on which the axis can be judged: for typography, those that ask for a letter."""
    if axis != "typography":
        return questions(count)
    lettered = lambda q: any(form in LETTERS for _, form, _ in q.claim.things)  # noqa: E731
    return [q for q in questions(6 * count + 20) if lettered(q)][:count]


def shots(axis: str, seed: int, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """What one side shows: a (seed, height, width) for each picture."""
    if axis == "size":
        return [(seed, *shape) for shape in SHAPES]
    return [(seed + STRIDE * k, *size) for k in range(SEEDS if axis == "diversity" else 1)]


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures of one side as one: in a row, of four two above two."""
    across = 2 if len(pictures) == 4 else len(pictures)
    rows = [pictures[i : i + across] for i in range(0, len(pictures), across)]
    wide = max(sum(p.width + GAP for p in row) for row in rows) - GAP
    high = sum(max(p.height for p in row) + GAP for row in rows) - GAP
    whole, y = Image.new("RGB", (wide, high), "white"), 0
    for row in rows:
        x = 0
        for picture in row:
            whole.paste(picture.convert("RGB"), (x, y))
            x += picture.width + GAP
        y += max(p.height for p in row) + GAP
    return whole
