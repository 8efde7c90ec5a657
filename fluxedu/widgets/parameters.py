"""Parameters: a treemap of any published variant, and the tensors of each part under the names of both layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from fluxedu.checkpoints.layouts import recipes, shapes
from fluxedu.models.config import VARIANTS, FluxConfig
from fluxedu.plots import COLOURS, treemap_rectangles
from fluxedu.widgets.explorer import Choice, Explorer, Try, View, explorer
from fluxedu.widgets.panels import Boxes

SIZE = (454.0, 250.0)
MIN_SHARE = 0.004  # smaller parts are drawn together
REST = "everything else"
GREY = "#888888"


@dataclass(frozen=True)
class TensorGroup:
    """Tensors whose names differ only by the number of their block: the ``name`` with ``#`` for the number, their
    ``count``, their ``shape``, and the names that diffusers gives to the tensors made from each.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    diffusers_names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of parameters in all of them."""
        return self.count * prod(self.shape)


def without_number(name: str) -> str:
    """A tensor's name with ``#`` for the number of its block."""
    return re.sub(r"(blocks)\.\d+\.", r"\1.#.", name)


@lru_cache(maxsize=32)
def tensor_groups(config: FluxConfig) -> tuple[TensorGroup, ...]:
    """The tensors of a network in the order of the official file, from names and shapes alone."""
    diffusers_names: dict[str, dict[str, None]] = {}
    for target, pieces in recipes(config, "bfl", "diffusers").items():
        for piece in pieces:
            diffusers_names.setdefault(without_number(piece.name), {})[without_number(target)] = None
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes(config).items():
        groups.setdefault(without_number(name), []).append(shape)
    return tuple(TensorGroup(name, len(g), g[0], tuple(diffusers_names[name])) for name, g in groups.items())


def for_page(configs: Mapping[str, FluxConfig]) -> dict:
    """What a web page needs to show these networks: names, and for each network its groups as (name, count, shape)."""
    found = {name: tensor_groups(config) for name, config in configs.items()}
    names = {(group.name, group.diffusers_names): None for groups in found.values() for group in groups}
    index = {key: i for i, key in enumerate(names)}
    networks = {
        name: [[index[group.name, group.diffusers_names], group.count, group.shape] for group in groups]
        for name, groups in found.items()
    }
    return {"names": list(names), "networks": networks}


def network_parts(groups: tuple[TensorGroup, ...]) -> dict[str, list[TensorGroup]]:
    """Tensors by the first two parts of their names, the largest part first and all small ones together at the end."""
    found: dict[str, list[TensorGroup]] = {}
    for group in groups:
        words = [word for word in group.name.split(".")[:-1] if word != "#"]
        found.setdefault(".".join(words[:2]), []).append(group)
    sizes = {name: sum(group.size for group in members) for name, members in found.items()}
    limit = MIN_SHARE * sum(sizes.values())
    large = sorted((name for name in found if sizes[name] >= limit), key=lambda name: -sizes[name])
    rest = [group for name, members in found.items() if name not in large for group in members]
    return {name: found[name] for name in large} | ({REST: rest} if rest else {})


def colour(part: str) -> str:
    """Colour by what the weights are for: modulation, the image, the text, or both."""
    if "mod" in part.split(".")[-1]:
        return COLOURS[2]
    if part.startswith("double_blocks"):
        return COLOURS[0] if ".img" in part else COLOURS[1]
    return COLOURS[3] if part.startswith("single_blocks") else GREY


def rectangles(sizes: Mapping[str, int], size: tuple[float, float] = SIZE) -> list[tuple]:
    """One box per part, its area in proportion to its size."""
    total, boxes = sum(sizes.values()), []
    for name, x, y, w, h in treemap_rectangles(list(sizes.items()), 0, 0, *size):
        short = name.split(".")[-1]
        labels = [f"{short} {sizes[name] / total:.0%}", short]
        label = next((text for text in labels if 4.6 * len(text) < w), short)
        boxes.append((label, x + 1, y + 1, w - 2, h - 2, colour(name)))
    return boxes


def parameters_view(config: FluxConfig, variant: str, part: int, tensor: int) -> View:
    """The treemap, the tensors of one part, and a sentence on one of them."""
    groups = tensor_groups(config)
    by_part = network_parts(groups)
    sizes = {name: sum(group.size for group in members) for name, members in by_part.items()}
    name, total = list(by_part)[min(part, len(by_part) - 1)], sum(sizes.values())
    members = by_part[name]
    index = min(tensor, len(members) - 1)
    chosen, height = members[index], 20
    rows = []
    for i, group in enumerate(members):
        label = f"{group.name.split('#.')[-1]}  [{', '.join(map(str, group.shape))}]  × {group.count}"
        rows.append((label, 2, 2 + i * height, 320, height - 2, colour(name)))
    title = "Area: number of parameters (blue: image, orange: text, pink: both, green: modulation)"
    panels = [
        Boxes(title, rectangles(sizes), [], SIZE, list(by_part).index(name), pointer="part"),
        Boxes(f"{name}: {sizes[name] / 1e6:,.0f} million parameters, {sizes[name] / total:.1%}", rows, [],
              (324, 4 + max(height * len(members), 120)), index, pointer="tensor"),
    ]  # fmt: skip
    folder, block, _ = chosen.diffusers_names[0].rpartition("#.")
    names = folder + block + ", ".join(name.removeprefix(folder + block) for name in chosen.diffusers_names)
    return View(
        panels,
        f"{variant}: {total:,} parameters in {sum(group.count for group in groups)} tensors. {chosen.name} "
        f"(× {chosen.count}) has {chosen.size:,}; diffusers calls it {names}.",
    )


@explorer(example=lambda pipe: parameters())
def parameters(own: Mapping[str, FluxConfig] | None = None) -> Explorer:
    """The parameters of every published variant, and of your ``own`` configurations (name -> config).

    Point at a part to see its tensors, and at a tensor to see its names in both layouts. No weights and no run are
    needed.
    """
    configs = {name: variant.flux for name, variant in VARIANTS.items()} | dict(own or {})
    for config in configs.values():
        tensor_groups(config)  # computed now so that moves are quick

    def draw(variant: int, part: int, tensor: int) -> View:
        name = list(configs)[variant]
        return parameters_view(configs[name], name, part, tensor)

    parts = list(network_parts(tensor_groups(configs["dev"])))
    modulation = next(i for i, part in enumerate(parts) if colour(part) == COLOURS[2])
    made = Explorer(
        "Where are the parameters of a FLUX model?",
        [Choice("variant", "variant", list(configs), list(configs).index("dev"))],
        draw,
        {"part": 0, "tensor": 0},
        widths=[5.4, 4.0],
        instruction="Point at a part to list its tensors, and at a tensor to see its name in diffusers.",
        tries=[
            Try("How many parameters only set shifts, scales and gates?", part=modulation),
            Try("What is in the small parts?", part=len(parts) - 1),
            Try("Which of the small parts does schnell lack?", variant="schnell", part=len(parts) - 1),
        ],
    )
    made.call = {"name": "parameters", "args": for_page(configs)}
    return made
