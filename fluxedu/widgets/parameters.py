"""Where the weights are: a treemap of any variant, and the tensors of each part under both their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from fluxedu.checkpoints.tables import recipes, shapes
from fluxedu.models.config import VARIANTS, FluxConfig
from fluxedu.plots.parameters import cut_up
from fluxedu.widgets.controls import Choice
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.panels import COLOURS, Boxes

SIZE = (454.0, 250.0)
SMALL = 0.004  # a part with a smaller share is not drawn for itself
REST = "the rest"
GREY = "#888888"


@dataclass(frozen=True)
class Kind:
    """All tensors that differ by the number of their block only: ``name`` with ``#`` for it, how ``many``, their
    ``shape``, and diffusers' names of what each of them becomes.
    """

    name: str
    many: int
    shape: tuple[int, ...]
    theirs: tuple[str, ...]

    @property
    def numbers(self) -> int:
        return self.many * prod(self.shape)


def numberless(name: str) -> str:
    """A tensor's name with ``#`` for the number of its block."""
    return re.sub(r"(blocks)\.\d+\.", r"\1.#.", name)


@lru_cache(maxsize=32)
def kinds(config: FluxConfig) -> tuple[Kind, ...]:
    """The tensors of a network, in the order of the official file; nothing is made but names and shapes."""
    found = shapes(config)
    theirs: dict[str, dict[str, None]] = {}
    for step in recipes(config, "bfl", "diffusers"):
        for piece in step.pieces:
            theirs.setdefault(numberless(piece.source), {})[numberless(step.target)] = None
    many: dict[str, int] = {}
    for name in found:
        many[numberless(name)] = many.get(numberless(name), 0) + 1
    first = {numberless(name): shape for name, shape in reversed(found.items())}
    return tuple(Kind(name, count, first[name], tuple(theirs[name])) for name, count in many.items())


def parts(those: tuple[Kind, ...]) -> dict[str, list[Kind]]:
    """Tensors by the first two words of their names, the largest part first; all small ones together at the end."""
    found: dict[str, list[Kind]] = {}
    for kind in those:
        words = [word for word in kind.name.split(".")[:-1] if word != "#"]
        found.setdefault(".".join(words[:2]), []).append(kind)
    total = sum(kind.numbers for kind in those)
    size = {name: sum(kind.numbers for kind in group) for name, group in found.items()}
    large = sorted((name for name in found if size[name] >= SMALL * total), key=lambda name: -size[name])
    rest = [kind for name, group in found.items() if name not in large for kind in group]
    return {name: found[name] for name in large} | ({REST: rest} if rest else {})


def colour(part: str) -> str:
    """By what the weights serve: modulation, the image, the text, or both."""
    if "mod" in part.split(".")[-1]:
        return COLOURS[2]
    if part.startswith("double_blocks"):
        return COLOURS[0] if ".img" in part else COLOURS[1]
    return COLOURS[3] if part.startswith("single_blocks") else GREY


def rectangles(sizes: Mapping[str, int], size: tuple[float, float] = SIZE) -> list[tuple]:
    """A box a part, as large as its share."""
    total, boxes = sum(sizes.values()), []
    for name, x, y, w, h in cut_up(list(sizes.items()), 0, 0, *size):
        said = f"{name.split('.')[-1]} {sizes[name] / total:.0%}"
        said = said if 4.6 * len(said) < w else name.split(".")[-1]
        boxes.append((said if 4.6 * len(said) < w else "", x + 1, y + 1, w - 2, h - 2, colour(name)))
    return boxes


def parameters_view(config: FluxConfig, variant: str, part: int, tensor: int) -> View:
    """The treemap, the tensors of one part, and a sentence on one of them."""
    groups = parts(kinds(config))
    sizes = {name: sum(kind.numbers for kind in group) for name, group in groups.items()}
    name = list(groups)[min(part, len(groups) - 1)]
    group, total = groups[name], sum(sizes.values())
    at = min(tensor, len(group) - 1)
    one, high = group[at], min(20.0, 250.0 / len(group))
    rows = [
        (f"{kind.name.split('#.')[-1]}  [{', '.join(map(str, kind.shape))}]  × {kind.many}",
         2, 2 + i * high, 320, high - 2, colour(name) if name != REST else GREY)
        for i, kind in enumerate(group)
    ]  # fmt: skip
    panels = [
        Boxes("weights for the image blue, the text orange, both pink, modulation green", rectangles(sizes), [], SIZE,
              list(groups).index(name), pointer="part"),
        Boxes(f"{name}: {sizes[name] / 1e6:,.0f} M, {sizes[name] / total:.1%}", rows, [],
              (324, 4 + max(high * len(group), 120)), at, pointer="tensor"),
    ]  # fmt: skip
    place, inside, _ = one.theirs[0].rpartition("#.")
    becomes = place + inside + ", ".join(name.removeprefix(place + inside) for name in one.theirs)
    text = (
        f"{variant}: {total:,} parameters in {sum(kind.many for kind in kinds(config))} tensors. {one.name} "
        f"(× {one.many}) holds {one.numbers:,}; at diffusers' it is {becomes}."
    )
    return View(panels, text)


def parameters(own: Mapping[str, FluxConfig] | None = None) -> Explorer:
    """The parameters of every published variant, and of ``own`` configurations (name -> config).

    Point at a part for its tensors, at a tensor for its names in both layouts; no weights are read or made.
    """
    configs = {name: variant.flux for name, variant in VARIANTS.items()} | dict(own or {})
    for config in configs.values():
        kinds(config)  # now, so that a move need not wait

    def draw(variant: int, part: int, tensor: int) -> View:
        name = list(configs)[variant]
        return parameters_view(configs[name], name, part, tensor)

    control = Choice("variant", "variant", list(configs), list(configs).index("dev"))
    return Explorer("Parameters", [control], draw, {"part": 0, "tensor": 0}, widths=[5.4, 4.0])
