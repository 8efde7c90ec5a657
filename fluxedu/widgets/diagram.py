"""Where every part of the model stands in its diagram, and the ways between them."""

from __future__ import annotations

from collections.abc import Sequence

from fluxedu.instruments.parts import Part
from fluxedu.plots.canvas import SHADES

Box = tuple[str, float, float, float, float, str]  # label, x, y, width, height, colour
Way = tuple[float, ...]  # x, y, x, y, ...: an arrow with corners, its head at the last place

WIDE, HIGH, GAP, WIDTH, MARGIN = 104.0, 24.0, 22.0, 476.0, 14.0
A_ROW = 19  # blocks


def diagram(those: Sequence[Part]) -> tuple[list[Box], list[Way], tuple[float, float]]:
    """Boxes, ways and size of the model's diagram; blocks in rows of at most nineteen.

    On the right what ``vec`` modulates: every row of blocks and the last layer. On the left the loop: what the solver
    makes of a velocity goes in again.
    """
    places = _places(those)
    boxes = [_box(part, *places[part.name]) for part in those]
    order = [part.name for part in those if "." in part.name]
    after = [("t5", "in"), ("noise", "in"), ("encoder", "noise"), ("clip", "vec"), ("in", order[0]),
             *zip(order, order[1:], strict=False), (order[-1], "final"), ("final", "solver"),
             ("solver", "image")]  # fmt: skip
    ways = [_way(places, a, b) for a, b in after] + _modulations(places, order) + [_loop(places)]
    bottom = max(y for _, y, _ in places.values()) + HIGH
    return boxes, ways, (WIDTH + 2 + 2 * MARGIN, bottom + 12)


def _places(those: Sequence[Part]) -> dict[str, tuple[float, float, float]]:
    """x, y and width of each part."""
    places: dict[str, tuple[float, float, float]] = {}
    for i, name in enumerate(("t5", "noise", "encoder", "clip")):
        places[name] = (MARGIN + i * (WIDE + 20), 4, WIDE)
    places["in"] = (MARGIN, 4 + HIGH + GAP, 2 * WIDE + 20)
    places["vec"] = (MARGIN + 3 * (WIDE + 20), 4 + HIGH + GAP, WIDE)
    y = 4 + 2 * (HIGH + GAP)
    for kind in ("double", "single"):
        names = [part.name for part in those if part.name.startswith(f"{kind}.")]
        for first in range(0, len(names), A_ROW):
            row = names[first : first + A_ROW]
            each = min(WIDE, (WIDTH - 4 * (len(row) - 1)) / len(row))
            for i, name in enumerate(row):
                places[name] = (MARGIN + i * (each + 4), y, each)
            y += HIGH + GAP
    for i, name in enumerate(("final", "solver", "image")):
        places[name] = (MARGIN + i * (WIDE + 20), y, WIDE)
    return places


def _box(part: Part, x: float, y: float, w: float) -> Box:
    short = part.title.removeprefix("Autoencoder: ").replace("-stream block", "").replace(" text encoder", "")
    label = short if w > 40 else part.name.split(".")[1]
    return (label, x + 1, y, w, HIGH, SHADES[part.kind])


def _way(places, a: str, b: str) -> Way:
    """From a part to the next: down, or across where they stand beside each other."""
    (xa, ya, wa), (xb, yb, wb) = places[a], places[b]
    if ya == yb:
        ends = (xa + wa, xb) if xa < xb else (xa, xb + wb)
        return (ends[0], ya + HIGH / 2, ends[1], yb + HIGH / 2)
    return (xa + wa / 2, ya + HIGH, xb + wb / 2, yb)


def _modulations(places, order: Sequence[str]) -> list[Way]:
    """From ``vec``, down the right side, to the last block of every row, and from above to the last layer."""
    (x, y, w), trunk = places["vec"], WIDTH + 2 + 1.6 * MARGIN
    start = (x + w, y + HIGH / 2, trunk, y + HIGH / 2)
    ends = {places[name][1]: places[name] for name in order}  # the last one of each row
    ways = [(*start, trunk, top + HIGH / 2, left + wide + 2, top + HIGH / 2) for left, top, wide in ends.values()]
    left, top, wide = places["final"]
    return [*ways, (*start, trunk, top - GAP / 3, left + 0.8 * wide, top - GAP / 3, left + 0.8 * wide, top)]


def _loop(places) -> Way:
    """From below the solver round the left side to where patches go in."""
    (x, y, w), (left, top, _) = places["solver"], places["in"]
    middle, bottom, side = x + w / 2, y + HIGH, 0.4 * MARGIN
    return (middle, bottom, middle, bottom + 8, side, bottom + 8, side, top + HIGH / 2, left, top + HIGH / 2)
