"""Figures of recorded values: each function takes tensors or :class:`Named` values and returns a matplotlib Figure.

    plots.word_maps(lenses.word_maps(pipe, prompt, ["red", "blue"]), image)

Nothing here runs a model. The helpers at the top are shared with the explorers and the trace page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import ceil
from textwrap import fill

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from fluxedu.errors import InstrumentError, check_integer, checked, describe
from fluxedu.figure import Figure, hide_axes, new_figure
from fluxedu.instruments.named import Named

__all__ = [
    "contributions",
    "elo",
    "elo_axes",
    "film_strip",
    "head_gallery",
    "modulation",
    "overlay",
    "quiver",
    "side_by_side",
    "spectrum",
    "treemap",
    "word_maps",
]

SEQUENTIAL = "magma"  # colour map of values from 0 up; its brightness rises steadily, so it also prints in grey
DIVERGING = "RdBu_r"  # colour map of values around 0: blue below, red above
#: Okabe and Ito's colours, which colour-blind readers can tell apart, in the order of use
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: kind of a part of the model -> its colour in the architecture diagram
PART_COLOURS = {"text": "#9333ea", "time": "#d97706", "flow": "#2563eb", "image": "#059669"}
FONT = 8.5  # points of the smallest text: 11.8 px at the 100 dots per inch of a notebook
TIME_LABEL = "time t (1 = pure noise, 0 = image)"


def to_array(value) -> np.ndarray:
    """A tensor, a :class:`Named` or an array as an array of floats; raises InstrumentError for anything else."""
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().float().cpu().numpy()
        return np.asarray(value, dtype=float)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InstrumentError(f"a figure shows numbers, in a tensor or an array, not {describe(value)}.") from None


def to_pixels(image) -> np.ndarray:
    """A PIL image, or a tensor ``[3, H, W]`` or ``[1, 3, H, W]`` in [-1, 1], as an array ``[H, W, 3]`` in [0, 1]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"), dtype=float) / 255
    x = to_array(image)
    x = x[0] if x.ndim == 4 and len(x) == 1 else x
    if x.ndim != 3 or x.shape[0] != 3:
        raise InstrumentError(f"an image must be a PIL image or a tensor [3, H, W], not of shape {list(x.shape)}.")
    return np.clip(x.transpose(1, 2, 0) / 2 + 0.5, 0, 1)


def _check_axes(value: Named, *axes: str) -> None:
    if value.axes != axes or 0 in value.shape:
        found = f"axes {', '.join(value.axes)}" if value.axes != axes else "an empty one"
        raise InstrumentError(f"this figure needs a Named with axes {', '.join(axes)}, not {found}.")


def _labels(value: Named, axis: str) -> list:
    """The labels of an axis, or indices if it has none."""
    return value.coords.get(axis) or list(range(value.sizes[axis]))


def _time_ticks(ax: Axes, times: Sequence[float]) -> None:
    """Ticks at the first, middle and last column, labelled with their times."""
    columns = sorted({0, len(times) // 2, len(times) - 1})
    ax.set_xticks(columns, [f"{times[i]:.2f}" for i in columns])
    ax.set_xlabel(TIME_LABEL)


# ---------------------------------------------------------------- figures


BACKGROUND = 0.3  # brightness that an image keeps below a map of weights


def blend(image: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Weights over a darkened image: both 8-bit RGB ``[H, W, 3]``; ``share [H, W]``: each weight over the largest.

    The larger a weight, the more opaque its colour, and the brighter the sum: a small one leaves the image visible.
    """
    share = np.clip(share, 0, 1).astype(np.float32)
    alpha = (0.9 * share**0.7)[..., None]
    colours = matplotlib.colormaps[SEQUENTIAL](np.arange(256))[:, :3].astype(np.float32) * 255
    return (image * (BACKGROUND * (1 - alpha)) + colours[(share * 255).astype(int)] * alpha).astype(np.uint8)


def overlay_ramp(count: int, background: np.ndarray) -> np.ndarray:
    """The colours of :func:`blend` for shares from 0 to 1 over one colour ``[3]``, as ``[count, 3]``: for a key."""
    return blend(np.broadcast_to(background, (1, count, 3)), np.linspace(0, 1, count)[None])[0]


def _draw_overlay(ax: Axes, image, weights: np.ndarray, vmax: float | None = None) -> ScalarMappable:
    """A map of weights over the darkened image; returns what a colour bar of it needs."""
    picture = to_pixels(image) * 255
    vmax = vmax or max(weights.max(), 1e-12)
    rows = np.arange(picture.shape[0]) * weights.shape[0] // picture.shape[0]
    columns = np.arange(picture.shape[1]) * weights.shape[1] // picture.shape[1]
    ax.imshow(blend(picture, (weights / vmax)[rows][:, columns]), interpolation="nearest")
    return ScalarMappable(Normalize(0, vmax), ListedColormap(overlay_ramp(256, picture.reshape(-1, 3).mean(0)) / 255))


@checked(InstrumentError)
def overlay(image, weights, title: str = "Attention of each patch") -> Figure:
    """One attention map ``[rows, columns]`` of patches over the image, with a colour bar."""
    fig, ((ax,),) = new_figure(1, 1, (3.4, 3.0))
    weights = to_array(weights)
    if weights.ndim != 2:
        raise InstrumentError(f"weights must be one map [rows, columns], not of shape {list(weights.shape)}.")
    colours = _draw_overlay(hide_axes(ax), image, weights)
    ax.set_title(title, fontsize=11)
    bar = fig.colorbar(colours, ax=ax, shrink=0.8)
    bar.set_label("share of a patch's attention", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    return fig


@checked(InstrumentError)
def word_maps(maps: Named, image) -> Figure:
    """:func:`fluxedu.instruments.lenses.word_maps` over the image: one row per word, one column per block.

    Each row has its own colour scale, up to the word's largest weight in any block, so that blocks can be compared; the
    number below the word is that weight.
    """
    _check_axes(maps, "block", "word", "row", "column")
    words, blocks, table = _labels(maps, "word"), _labels(maps, "block"), to_array(maps)
    fig, axes = new_figure(len(words), len(blocks) + 1, (1.25, 1.25))
    for i, word in enumerate(words):
        hide_axes(axes[i, 0]).imshow(to_pixels(image))
        axes[i, 0].set_ylabel(f"{word}\n0 to {_percent(table[:, i].max())}", fontsize=FONT)
        for j, block in enumerate(blocks):
            ax = hide_axes(axes[i, j + 1])
            _draw_overlay(ax, image, table[j, i], table[:, i].max())
            if i == 0:
                ax.set_title(block, fontsize=FONT)
    axes[0, 0].set_title("image", fontsize=FONT)
    _title(fig, "Attention of each patch to a word, by block (bright: the row's largest weight)")
    return fig


def _title(fig: Figure, text: str) -> None:
    """A title above all panels, in lines as wide as the figure."""
    fig.suptitle(fill(text, int(fig.get_figwidth() * 11)), fontsize=10)


def _percent(share: float) -> str:
    """A share in per cent, with two digits.

    >>> _percent(0.123), _percent(0.00345)
    ('12%', '0.34%')
    """
    return f"{float(f'{100 * share:.2g}'):g}%"


@checked(InstrumentError)
def head_gallery(heads: Named, image=None, query: str | tuple[int, int] | None = None) -> Figure:
    """:func:`fluxedu.instruments.lenses.head_gallery` as a grid: one row per block, one column per head.

    Each map has its own colour scale, up to its largest weight, which is written below it. The maps lie over ``image``
    if there is one. query: the word or patch (row, column) whose attention it is, for the title; a patch is framed.
    """
    _check_axes(heads, "block", "head", "row", "column")
    blocks, count, table = _labels(heads, "block"), heads.sizes["head"], to_array(heads)
    fig, axes = new_figure(len(blocks), count, (1.0, 1.15))
    for i, block in enumerate(blocks):
        for j in range(count):
            ax = hide_axes(axes[i, j])
            if image is None:
                ax.imshow(table[i, j], cmap=SEQUENTIAL, vmin=0)
            else:
                _draw_overlay(ax, image, table[i, j])
            if query is not None and not isinstance(query, str):
                height, width = ax.images[-1].get_array().shape[:2]
                h, w = height / table.shape[2], width / table.shape[3]
                corner = (query[1] * w - 0.5, query[0] * h - 0.5)
                ax.add_patch(Rectangle(corner, w, h, fill=False, edgecolor="white", linewidth=1.5))
            ax.set_xlabel(_percent(table[i, j].max()), fontsize=FONT, labelpad=1)
            if i == 0:
                ax.set_title(f"head {j}", fontsize=FONT)
        axes[i, 0].set_ylabel(block, fontsize=FONT)
    whose = "" if query is None else f" of “{query}”" if isinstance(query, str) else " of the framed patch"
    _title(fig, f"Attention{whose} in each head (below: its largest weight, the brightest colour)")
    return fig


def _norm(table: np.ndarray) -> tuple[Normalize, str]:
    """The scale of a heat map of positive numbers, and what its label says about it: from 0 up, or logarithmic (over at
    most three decades) where the largest row would leave most others dark.
    """
    top, typical = float(table.max()), float(np.median(table.max(-1)))
    if top > 3 * typical > 0:
        return LogNorm(max(float(table.min()), top / 1000), top, clip=True), " (logarithmic scale)"
    return Normalize(0, top), ""


@checked(InstrumentError)
def contributions(sizes: Named) -> Figure:
    """:func:`fluxedu.instruments.lenses.contributions` as a heat map: one row per block, one column per step.

    The colour scale is logarithmic if one row is more than three times as large as is usual, and its label says so.
    """
    _check_axes(sizes, "block", "step")
    blocks, table = _labels(sizes, "block"), to_array(sizes)
    fig, ((ax,),) = new_figure(1, 1, (5.4, 0.26 * len(blocks) + 1.6))
    norm, remark = _norm(table)
    image = ax.imshow(table, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(blocks)), blocks)
    _time_ticks(ax, _labels(sizes, "step"))
    ax.set_title("How much each block changes the image tokens", fontsize=10)
    bar = fig.colorbar(image, ax=ax)
    bar.set_label(f"size of the addition / size of the token{remark}", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    return fig


@checked(InstrumentError)
def modulation(sizes: Named) -> Figure:
    """:func:`fluxedu.instruments.lenses.modulation` as heat maps of shift, scale and gate: one row per layer.

    As in :func:`contributions`, a colour scale is logarithmic where one row is much larger than the others.
    """
    _check_axes(sizes, "time", "layer", "kind")
    layers, kinds, table = _labels(sizes, "layer"), _labels(sizes, "kind"), to_array(sizes)
    fig, axes = new_figure(1, len(kinds), (2.7, 0.2 * len(layers) + 1.4), sharey=True)
    for i, kind in enumerate(kinds):
        ax, rows = axes[0, i], table[:, :, i].T
        norm, remark = _norm(rows)
        image = ax.imshow(rows, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
        ax.set_title(f"{kind}{remark}", fontsize=10)
        _time_ticks(ax, _labels(sizes, "time"))
        fig.colorbar(image, ax=ax).ax.tick_params(labelsize=FONT)
    axes[0, 0].set_yticks(range(len(layers)), layers)
    fig.suptitle("Size of shift, scale and gate in every layer (root mean square over channels)", fontsize=10)
    return fig


@checked(InstrumentError)
def film_strip(
    rows: Mapping[str, Sequence], times: Sequence[float] | Tensor | np.ndarray | None = None, max_images: int = 8
) -> Figure:
    """Images of a run from left to right, one row per name: for example the decoded states and the predicted x0.

    rows: name -> images (PIL, or tensors ``[3, H, W]`` in [-1, 1]), equally many in each row · times: one per image,
    written above it · max_images: of a longer row, this many evenly spaced images are shown.
    """
    counts = {len(images) for images in rows.values()}
    if len(counts) != 1 or 0 in counts:
        raise InstrumentError(f"every row of a film strip needs equally many images, not {sorted(counts)}.")
    count = counts.pop()
    check_integer("max_images", max_images, 1, 1000, error=InstrumentError)
    times = None if times is None else to_array(times)
    if times is not None and times.shape != (count,):
        raise InstrumentError(f"times must be one for each of the {count} images, not {describe(times.tolist())}.")
    chosen = np.unique(np.linspace(0, count - 1, min(max_images, count)).round().astype(int))
    fig, axes = new_figure(len(rows), len(chosen), (1.3, 1.3))
    for i, (name, images) in enumerate(rows.items()):
        for j, k in enumerate(chosen):
            hide_axes(axes[i, j]).imshow(to_pixels(images[k]))
            if i == 0 and times is not None:
                axes[i, j].set_title(f"t = {times[k]:.2f}", fontsize=FONT)
        axes[i, 0].set_ylabel(name, fontsize=9)
    return fig


@checked(InstrumentError)
def side_by_side(first, second, names: tuple[str, str] = ("before", "after")) -> Figure:
    """Two images and their difference: the mean absolute difference over colours, black where there is none."""
    a, b = to_pixels(first), to_pixels(second)
    if a.shape != b.shape:
        raise InstrumentError(f"the images must have the same size, not {a.shape[:2]} and {b.shape[:2]} pixels.")
    fig, ((left, middle, right),) = new_figure(1, 3, (2.2, 2.2))
    for ax, pixels, name in ((left, a, names[0]), (middle, b, names[1])):
        hide_axes(ax).imshow(pixels)
        ax.set_title(name, fontsize=10)
    difference = hide_axes(right).imshow(np.abs(a - b).mean(-1), cmap=SEQUENTIAL, vmin=0, vmax=1)
    right.set_title("absolute difference", fontsize=10)
    fig.colorbar(difference, ax=right, shrink=0.8).ax.tick_params(labelsize=FONT)
    return fig


def radial_power(value) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in cycles per cell and the mean power of ``[..., h, w]`` at each, averaged over leading axes.

    Power is averaged over eight rings up to half a cycle per cell; the corners beyond belong to the last ring.
    """
    x = to_array(value)
    x = x.reshape(-1, *x.shape[-2:])
    power = (np.abs(np.fft.fft2(x, norm="ortho")) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(x.shape[-2])[:, None], np.fft.fftfreq(x.shape[-1])[None, :])
    ring = np.minimum((frequency * 16).astype(int), 7).ravel()
    counts, sums = np.bincount(ring, minlength=8), np.bincount(ring, power.ravel(), minlength=8)
    filled = counts > 0
    return ((np.arange(8) + 0.5) / 16)[filled], sums[filled] / counts[filled]


@checked(InstrumentError)
def spectrum(values: Mapping[str, object]) -> Figure:
    """Power of each named latent ``[..., h, w]`` over spatial frequency: flat for noise, falling for images."""
    if not isinstance(values, Mapping) or any(to_array(value).ndim < 2 for value in values.values()):
        raise InstrumentError("spectrum needs a dictionary name -> latent [..., h, w].")
    fig, ((ax,),) = new_figure(1, 1, (4.6, 3.0))
    for i, (name, value) in enumerate(values.items()):
        ax.semilogy(*radial_power(value), label=name, marker="o", markersize=3, color=COLOURS[i % len(COLOURS)])
    ax.set(xlabel="spatial frequency (cycles per cell)", ylabel="power")
    ax.set_title("Power spectrum: flat for noise, falling for an image", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=FONT)
    return fig


@checked(InstrumentError)
def quiver(field: Named) -> Figure:
    """:func:`fluxedu.instruments.lenses.velocity_field`: the sampler's direction at each point of a plane of latents.

    The cross is the run's state, the star the image it ends at. If all straight paths led to this one image, every
    arrow would point to the star.
    """
    _check_axes(field, "up", "across", "what")
    a, b, across, up = to_array(field).transpose(2, 0, 1)
    fig, ((ax,),) = new_figure(1, 1, (4.4, 4.0))
    ax.quiver(a, b, across, up, angles="xy", scale_units="xy", scale=3, color=COLOURS[0], width=0.004)
    ax.plot(0, 0, "x", color="black", markersize=9, label="state of the run")
    ax.plot(1, 0, "*", color=COLOURS[1], markersize=13, label="final image of the run")
    ax.set(aspect="equal", xlabel="towards the final image", ylabel="towards another seed's state")
    ax.locator_params(nbins=5)
    ax.legend(fontsize=FONT, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    ax.set_title("Sampling direction around the state\n(arrows show a third of the remaining distance)", fontsize=9)
    return fig


def count_parameters(network: nn.Module, depth: int = 2) -> dict[str, int]:
    """Parameters by the first ``depth`` parts of their names, without block numbers; the largest count first."""
    counts = Counter()
    for name, p in network.named_parameters():
        parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
        counts[".".join(parts[:depth])] += p.numel()
    return dict(counts.most_common())


def treemap_rectangles(items: list[tuple[str, float]], x: float, y: float, w: float, h: float) -> Iterator[tuple]:
    """``(name, x, y, width, height)`` of each item, its area in proportion to its value.

    The rectangle is cut in two along its longer side, as evenly as the items allow, and each half again.
    """
    if len(items) == 1:
        yield items[0][0], x, y, w, h
        return
    total, first, cut = sum(v for _, v in items), 0.0, 0
    while cut < len(items) - 1 and (cut == 0 or first + items[cut][1] / 2 < total / 2):
        first += items[cut][1]
        cut += 1
    share = first / total
    if w >= h:
        yield from treemap_rectangles(items[:cut], x, y, w * share, h)
        yield from treemap_rectangles(items[cut:], x + w * share, y, w * (1 - share), h)
    else:
        yield from treemap_rectangles(items[:cut], x, y, w, h * share)
        yield from treemap_rectangles(items[cut:], x, y + h * share, w, h * (1 - share))


def _fitting(lines: Sequence[str], w: float, h: float) -> bool:
    """Whether lines of text have room in ``w x h``, measured in letters and in lines of text."""
    return max(map(len, lines)) <= w and len(lines) <= h


@checked(InstrumentError)
def treemap(network: nn.Module | Mapping[str, int], depth: int = 2, title: str = "") -> Figure:
    """One rectangle per part of a network (or per name of name -> count), as large as its share of the parameters.

    A part whose name has no room in its rectangle, upright or turned, has a number there, which a list below explains.
    """
    counts = count_parameters(network, depth) if isinstance(network, nn.Module) else dict(network)
    total = sum(counts.values())
    if total <= 0:
        raise InstrumentError("there are no parameters to show.")
    fig, ((ax,),) = new_figure(1, 1, (7.0, 4.2))
    hide_axes(ax).set(xlim=(0, 16), ylim=(9, 0))
    groups, listed = sorted({name.split(".")[0] for name in counts}), []
    for name, x, y, w, h in treemap_rectangles(list(counts.items()), 0, 0, 16, 9):
        colour = COLOURS[groups.index(name.split(".")[0]) % len(COLOURS)]
        ax.add_patch(Rectangle((x, y), w, h, facecolor=colour, alpha=0.35, edgecolor="white", linewidth=2))
        share = _percent(counts[name] / total)
        whole = [*name.split("."), share]
        broken = [*name.replace("_", "_.").split("."), share]  # names in two lines
        width, height = w * 4.6, h * 2.7  # in letters and lines of the size below
        for lines, angle in ((whole, 0), (broken, 0), (whole, 90), (broken, 90)):
            if _fitting(lines, *((width, height) if angle == 0 else (h * 4.6, w * 2.7))):
                break
        else:
            listed.append(f"{len(listed) + 1}: {name} {share}")
            lines, angle = [str(len(listed))], 0
            if not _fitting(lines, width, height):
                continue  # too small for a number too: the list has it
        ax.text(x + w / 2, y + h / 2, "\n".join(lines), ha="center", va="center", fontsize=FONT, rotation=angle)
    ax.set_title(title or f"{total:,} parameters; area is the share of each part", fontsize=10)
    if listed:
        text = fill("   ".join(entry.replace(" ", "\u00a0") for entry in listed), 105)
        fig.set_figheight(fig.get_figheight() + 0.16 * (text.count("\n") + 2))
        ax.set_xlabel(text, fontsize=FONT, loc="left")
    return fig


Rows = Mapping[str, Mapping[str, float]]  # model -> elo, low, high, votes: as fluxedu.arena's Ratings.rows() has them
MAX_DEVIATION = 700.0  # Elo shown on each side of 1000; an interval that goes further ends in an arrow


def _draw_ratings(ax: Axes, rows: Rows, names: Sequence[str], limits: tuple[float, float]) -> None:
    """One line per model, in the order of ``rows`` from the top: a dot at its Elo, a bar over its interval."""
    for y, (name, row) in enumerate(rows.items()):
        low, high = max(row["low"], limits[0]), min(row["high"], limits[1])
        colour = COLOURS[list(names).index(name) % len(COLOURS)]
        ax.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        ax.plot(low, y, "<" if low > row["low"] else "|", color=colour, markersize=6, clip_on=False)
        ax.plot(high, y, ">" if high < row["high"] else "|", color=colour, markersize=6, clip_on=False)
        ax.plot(min(max(row["elo"], limits[0]), limits[1]), y, "o", color=colour, markersize=6)
    ax.axvline(1000, color="0.8", linewidth=1, zorder=0)
    ax.set(xlim=limits, ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), list(rows))
    ax.spines[["top", "right"]].set_visible(False)


def _elo_limits(tables: Collection[Rows]) -> tuple[float, float]:
    """One range for all tables: as wide as their intervals need, at most :data:`MAX_DEVIATION` from the mean."""
    for rows in tables or [{}]:
        if not rows or not all({"elo", "low", "high", "votes"} <= set(row) for row in rows.values()):
            raise InstrumentError("ratings must be a dictionary model -> elo, low, high and votes, and not empty.")
    deviation = max(max(row["high"] - 1000, 1000 - row["low"]) for rows in tables for row in rows.values())
    return 1000 - min(deviation * 1.05 + 5, MAX_DEVIATION), 1000 + min(deviation * 1.05 + 5, MAX_DEVIATION)


@checked(InstrumentError)
def elo(rows: Rows, title: str = "Overall rating of each model") -> Figure:
    """Elo ratings, the strongest model first; ``rows`` as :meth:`fluxedu.arena.Ratings.rows` returns them."""
    limits = _elo_limits([rows])
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["elo"]))
    fig, ((ax,),) = new_figure(1, 1, (5.4, 0.36 * len(rows) + 0.9))
    _draw_ratings(ax, rows, sorted(rows), limits)
    for y, row in enumerate(rows.values()):
        text = f"{row['elo']:.0f}   {row['votes']} votes"
        ax.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=FONT)
    ax.set_xlabel("Elo (mean 1000) with 95% interval")
    ax.set_title(title, fontsize=10)
    return fig


@checked(InstrumentError)
def elo_axes(tables: Mapping[str, Rows]) -> Figure:
    """Elo ratings on several axes of comparison (title -> rows), one panel each, with one order, colour and scale."""
    limits = _elo_limits(tables.values())
    if len({frozenset(rows) for rows in tables.values()}) != 1:
        raise InstrumentError("every axis needs ratings of the same models.")
    names = list(next(iter(tables.values())))
    by_mean = sorted(names, key=lambda name: -sum(rows[name]["elo"] for rows in tables.values()))
    n_rows, n_columns, cell = ceil(len(tables) / 3), min(3, len(tables)), (2.7, 0.26 * len(names) + 0.8)
    fig, axes = new_figure(n_rows, n_columns, cell, sharex=True, sharey=True)
    for ax, (title, rows) in zip(axes.flat, tables.items(), strict=False):
        _draw_ratings(ax, {name: rows[name] for name in by_mean}, sorted(names), limits)
        votes = sum(row["votes"] for row in rows.values()) // 2
        ax.set_title(f"{title}\n{votes} votes", fontsize=9)
    for ax in axes.flat[len(tables) :]:
        ax.set_visible(False)
    fig.supxlabel("Elo (mean 1000) with 95% interval", fontsize=FONT)
    return fig
