"""Edits of a scene in words, for kontext: a scene, what is to be done to it, and the scene when it is done.

make the circle red · make the background black · make the circle a star
move the square to the top · remove the cross
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fluxedu.nano.scenes import BACKGROUNDS, FORMS, GAP, LETTERS, Scene, Thing, sample_scene, visible_colors

SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


@dataclass(frozen=True)
class Edit:
    """``before`` becomes ``after`` by ``words``; ``index`` is the thing that is changed, None for the background."""

    before: Scene
    after: Scene
    words: str
    kind: str
    index: int | None


def named(thing: Thing) -> str:
    """What an instruction calls a thing: things of a scene differ in form, so the form is enough."""
    return f"the letter {thing.form}" if thing.form in LETTERS else f"the {thing.form}"


def _with(scene: Scene, index: int, **changes) -> Scene:
    things = list(scene.things)
    things[index] = replace(things[index], **changes)
    return replace(scene, things=tuple(things))


def recolor(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    used = {thing.color for thing in scene.things}
    free = [color for color in visible_colors(scene.background) if color not in used]
    if not free:
        return None
    color = str(rng.choice(free))
    return _with(scene, index, color=color), f"make {named(scene.things[index])} {color}"


def reform(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    used = {thing.form for thing in scene.things}
    form = str(rng.choice([form for form in FORMS if form not in used]))
    new = _with(scene, index, form=form)
    return new, f"make {named(scene.things[index])} a {named(new.things[index])[len('the ') :]}"


def reground(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    used = {thing.color for thing in scene.things}
    free = [b for b in BACKGROUNDS if b != scene.background and used <= set(visible_colors(b))]
    if not free:
        return None
    background = str(rng.choice(free))
    return replace(scene, background=background), f"make the background {background}"


def move(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    """To one side: against it but for a few pixels, the other coordinate as it was."""
    thing, side = scene.things[index], str(rng.choice(list(SIDES)))
    dx, dy = SIDES[side]
    margin = thing.radius + 4
    x = thing.x if not dx else margin if dx < 0 else scene.width - margin
    y = thing.y if not dy else margin if dy < 0 else scene.height - margin
    if np.hypot(x - thing.x, y - thing.y) < 12:
        return None
    others = [other for i, other in enumerate(scene.things) if i != index]
    if any(np.hypot(o.x - x, o.y - y) < o.radius + thing.radius + GAP for o in others):
        return None
    return _with(scene, index, x=round(x, 1), y=round(y, 1)), f"move {named(thing)} to the {side}"


def remove(scene: Scene, index: int, rng: np.random.Generator) -> tuple[Scene, str] | None:
    if len(scene.things) < 2:
        return None
    kept = tuple(thing for i, thing in enumerate(scene.things) if i != index)
    return replace(scene, things=kept), f"remove {named(scene.things[index])}"


EDITS: dict[str, Callable] = {"color": recolor, "form": reform, "ground": reground, "move": move, "remove": remove}


#: how often each kind is practised: a new form and a new place take longest to learn
PRACTISED = {"color": 1, "form": 3, "ground": 1, "move": 3, "remove": 1}


def sample_edit(
    rng: np.random.Generator,
    *,
    size: tuple[int, int] | None = None,
    held_out: bool = False,
    weights: dict[str, float] | None = None,
) -> Edit:
    """Draw something to do, each kind as likely as another or by ``weights``, and a scene that it can be done to.

    The scene afterwards is held out exactly when asked for.
    """
    kinds = weights or dict.fromkeys(EDITS, 1)
    kind = str(rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values())))
    while True:
        before = sample_scene(rng, size=size, held_out=held_out and kind in ("move", "remove"))
        index = int(rng.integers(len(before.things)))
        found = EDITS[kind](before, index, rng)
        if found and found[0].held_out == held_out:
            return Edit(before, *found, kind, None if kind == "ground" else index)
