"""Where the weights are: a treemap, areas being numbers of parameters."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from fluxedu.errors import InstrumentError
from fluxedu.plots.canvas import figure, quiet


def parts_of(network: nn.Module, depth: int = 2) -> dict[str, int]:
    """Parameters by the first ``depth`` parts of their names, the numbers of blocks left out, the largest first."""
    counts: dict[str, int] = {}
    for name, p in network.named_parameters():
        parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
        key = ".".join(parts[:depth])
        counts[key] = counts.get(key, 0) + p.numel()
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def cut_up(items: list[tuple[str, float]], x: float, y: float, w: float, h: float):
    """Cut a rectangle in two along its longer side, as evenly as the items allow, and so on."""
    if len(items) == 1:
        yield items[0][0], x, y, w, h
        return
    total, half, cut = sum(v for _, v in items), 0.0, 0
    while cut < len(items) - 1 and (cut == 0 or half + items[cut][1] / 2 < total / 2):
        half += items[cut][1]
        cut += 1
    share = half / total
    if w >= h:
        yield from cut_up(items[:cut], x, y, w * share, h)
        yield from cut_up(items[cut:], x + w * share, y, w * (1 - share), h)
    else:
        yield from cut_up(items[:cut], x, y, w, h * share)
        yield from cut_up(items[cut:], x, y + h * share, w, h * (1 - share))


def treemap(network: nn.Module | Mapping[str, int], depth: int = 2, title: str = "") -> Figure:
    """Every part as a rectangle as large as its share of the parameters; a network, or name -> number."""
    counts = parts_of(network, depth) if isinstance(network, nn.Module) else dict(network)
    total = sum(counts.values())
    if total <= 0:
        raise InstrumentError("there are no parameters to show.")
    fig, ((ax,),) = figure(1, 1, (7.0, 4.2))
    quiet(ax).set(xlim=(0, 16), ylim=(9, 0))
    groups = sorted({name.split(".")[0] for name in counts})
    for name, x, y, w, h in cut_up(list(counts.items()), 0, 0, 16, 9):
        shade = f"C{groups.index(name.split('.')[0]) % 10}"
        ax.add_patch(Rectangle((x, y), w, h, facecolor=shade, alpha=0.55, edgecolor="white", linewidth=2))
        share = counts[name] / total
        said = [*name.split("."), f"{share:.1%}"]
        size = min(8.0, 4.4 * w / max(map(len, said)) * 2.6, 15 * h / len(said))
        if size >= 4.5:  # what could not be read is not written
            ax.text(x + w / 2, y + h / 2, "\n".join(said), ha="center", va="center", fontsize=size)
    ax.set_title(title or f"{total:,} parameters", fontsize=10)
    return fig
