"""Random edits of a scene, for kontext, and random masks, for fill.

An edit is the scene before, an instruction, and the scene after:

    make the circle red · make the background black · make the circle a star
    move the square to the top · remove the cross
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fluxedu.nano.scenes import BACKGROUNDS, FORMS, GAP, LETTERS, Scene, SceneObject, sample_scene, visible_colors

SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


@dataclass(frozen=True)
class Edit:
    """``instruction`` turns ``before`` into ``after``; ``index`` is the object it changes, None for the background."""

    before: Scene
    after: Scene
    instruction: str
    kind: str
    index: int | None


def noun(obj: SceneObject) -> str:
    """How an instruction refers to an object. No two objects of a scene have the same form, so the form is enough."""
    return f"the letter {obj.form}" if obj.form in LETTERS else f"the {obj.form}"


def _with(scene: Scene, index: int, **changes) -> Scene:
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **changes)
    return replace(scene, objects=tuple(objects))


# Each of these returns the scene after the edit and the instruction, or None where the edit is not possible.


def change_color(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    used = {obj.color for obj in scene.objects}
    free = [color for color in visible_colors(scene.background) if color not in used]
    if not free:
        return None
    color = str(rng.choice(free))
    return _with(scene, index, color=color), f"make {noun(scene.objects[index])} {color}"


def change_form(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    used = {obj.form for obj in scene.objects}
    form = str(rng.choice([form for form in FORMS if form not in used]))
    after = _with(scene, index, form=form)
    return after, f"make {noun(scene.objects[index])} a {noun(after.objects[index])[len('the ') :]}"


def change_background(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    used = {obj.color for obj in scene.objects}
    free = [b for b in BACKGROUNDS if b != scene.background and used <= set(visible_colors(b))]
    if not free:
        return None
    background = str(rng.choice(free))
    return replace(scene, background=background), f"make the background {background}"


def move(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    """To a few pixels from one edge of the image; the other coordinate stays as it was."""
    obj, side = scene.objects[index], str(rng.choice(list(SIDES)))
    dx, dy = SIDES[side]
    margin = obj.radius + 4
    x = obj.x if not dx else margin if dx < 0 else scene.width - margin
    y = obj.y if not dy else margin if dy < 0 else scene.height - margin
    if np.hypot(x - obj.x, y - obj.y) < 12:
        return None
    others = [other for i, other in enumerate(scene.objects) if i != index]
    if any(np.hypot(o.x - x, o.y - y) < o.radius + obj.radius + GAP for o in others):
        return None
    return _with(scene, index, x=round(x, 1), y=round(y, 1)), f"move {noun(obj)} to the {side}"


def remove(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    if len(scene.objects) < 2:
        return None
    remaining = tuple(obj for i, obj in enumerate(scene.objects) if i != index)
    return replace(scene, objects=remaining), f"remove {noun(scene.objects[index])}"


EDITS: dict[str, Callable] = {
    "color": change_color, "form": change_form, "ground": change_background, "move": move, "remove": remove,
}  # fmt: skip
#: relative frequency of each kind in training: a new form and a new position take longest to learn
EDIT_WEIGHTS = {"color": 1, "form": 3, "ground": 1, "move": 3, "remove": 1}


def sample_edit(
    rng: np.random.Generator,
    *,
    size: tuple[int, int] | None = None,
    held_out: bool = False,
    weights: dict[str, float] | None = None,
) -> Edit:
    """A random edit and a scene in which it is possible; all kinds are equally likely unless ``weights`` are given.

    The scene after the edit is a held-out one exactly if ``held_out``.
    """
    kinds = weights or dict.fromkeys(EDITS, 1)
    kind = str(rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values())))
    while True:
        before = sample_scene(rng, size=size, held_out=held_out and kind in ("move", "remove"))
        index = int(rng.integers(len(before.objects)))
        edited = EDITS[kind](before, index, rng)
        if edited and edited[0].held_out == held_out:
            return Edit(before, *edited, kind, None if kind == "ground" else index)


def random_mask(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A mask, float32 ``[1, H, W]``, 1 where to paint: a box around an object or anywhere; one in five is inverted."""
    h, w = scene.height, scene.width
    mask = np.zeros((1, h, w), np.float32)
    if rng.random() < 0.5:
        obj = scene.objects[rng.integers(len(scene.objects))]
        x0, y0 = (c - obj.radius - rng.uniform(3, 14) for c in (obj.x, obj.y))
        x1, y1 = (c + obj.radius + rng.uniform(3, 14) for c in (obj.x, obj.y))
    else:
        x0, x1 = sorted(rng.uniform(0, w, 2))
        y0, y1 = sorted(rng.uniform(0, h, 2))
    mask[:, max(round(y0), 0) : max(round(y1), 0), max(round(x0), 0) : max(round(x1), 0)] = 1
    return 1 - mask if rng.random() < 0.2 else mask
