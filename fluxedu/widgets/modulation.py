"""Modulation: the shift, scale and gate of every layer over time, channel by channel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fluxedu.errors import InstrumentError, check_integer
from fluxedu.instruments.lenses.layers import KINDS, modulation_channels
from fluxedu.instruments.named import Named
from fluxedu.plots import TIME_LABEL
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, Slider, Try, View, explorer, prompt_list
from fluxedu.widgets.panels import Lines, Pixels, between, resize_table

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0)


SOME = 5  # channels whose curves are shown
PARTS = {"txt": "text", "img": "image", "attn": "attention", "mlp": "MLP"}


def readable(layer: str) -> str:
    """A layer's name in words.

    >>> readable("double.0.txt_attn"), readable("single.3")
    ('double 0, text, attention', 'single 3')
    """
    words = [PARTS.get(word, word) for word in re.split("[._]", layer)]
    return ", ".join([" ".join(words[:2]), *words[2:]])


def relative_change(table: Named, usual: Named) -> Tensor:
    """How much a table differs from the usual one, as a share of the size of the latter: ``[time, layer, kind]``."""
    difference = (table.tensor - usual.tensor).square().mean(-1)
    return (difference / usual.tensor.square().mean(-1).clamp(min=1e-12)).sqrt()


def modulation_view(table: Named, kind: str, cell: tuple[int, int], usual: Named | None = None) -> View:
    """Sizes over depth and time, the three kinds of one layer over time, and some of that layer's channels.

    ``table``: :func:`fluxedu.instruments.lenses.layers.modulation_channels`, axes ``time, layer, kind, channel`` ·
    ``cell``: layer and time · ``usual``: another table to compare it with, of the first prompt at the usual guidance.
    """
    times, layers = table.coords["time"], [readable(name) for name in table.coords["layer"]]
    layer, time = cell
    sizes = table.tensor.square().mean(-1).sqrt()  # [time, layer, kind]
    size = sizes[..., KINDS.index(kind)].T  # [layer, time]
    low, high = float(size.min()), float(size.max())
    values = table.tensor[:, layer, KINDS.index(kind)].T  # [channel, time]
    order, columns = values.mean(1).argsort().tolist(), [f"t={t:.2f}" for t in times]
    some = [order[i * (len(order) - 1) // (SOME - 1)] for i in range(SOME)]
    series = {name: sizes[:, layer, i].tolist() for i, name in enumerate(KINDS)}
    panels = [
        Pixels(
            f"Size of the {kind}, by layer and time",
            resize_table(between(size, low, high), 260, 260), tuple(size.shape), cell,
            (f"{low:.2f}", f"{high:.2f}"), "viridis", layers, columns, unit="root mean square over channels",
            axes=("layer", "time"), pointer="cell",
        ),
        Lines(
            f"Sizes in {layers[layer]}, over time", times, series, TIME_LABEL, "root mean square over channels",
            times[time],
        ),
        Lines(
            f"The {kind} of {SOME} of the {len(values)} channels, from the smallest mean to the largest", times,
            {f"channel {c}": values[c].tolist() for c in some}, TIME_LABEL, kind, times[time],
        ),
    ]  # fmt: skip
    least, most = values[:, time].min(), values[:, time].max()
    text = f"In {layers[layer]}, at t = {times[time]:.2f}, the root mean square of {kind} is {size[layer, time]:.3f}; "
    text += f"over channels it runs from {least:.2f} to {most:.2f}."
    if usual is not None:
        change = float(relative_change(table, usual)[time, layer, KINDS.index(kind)])
        text += f" It differs by {change:.0%} of its size from that of the first prompt at the usual guidance scale."
    return View(panels, text)


@explorer(example=lambda pipe: modulation(pipe, [EXAMPLE_PROMPT, "a green star"], times=9))
def modulation(pipe: FluxPipeline, prompts: str | Sequence[str], *, times: int = 21) -> Explorer:
    """Shift, scale and gate of every layer for each of ``prompts`` and, if the model takes it, any guidance scale.

    They depend on time, guidance and the pooled text only, so this takes no run: each move computes them for all
    ``times``.
    """
    prompts = prompt_list(prompts)
    check_integer("times", times, 2, 1000, error=InstrumentError)
    controls, default = [Choice("kind", "show", KINDS), Choice("prompt", "prompt", prompts)], None
    if pipe.flux.config.guidance_embed:
        labels = [f"{s:g}" for s in GUIDANCE_SCALES]
        default = min(range(len(labels)), key=lambda i: abs(GUIDANCE_SCALES[i] - pipe.defaults.guidance))
        controls.append(Slider("guidance", "guidance scale", labels, default, GUIDANCE_SCALES))
    all_times = torch.linspace(1, 0, times, dtype=torch.float32, device="cpu")

    @lru_cache(maxsize=32)
    def table(prompt: int, guidance: int | None) -> Named:
        scale = None if guidance is None else GUIDANCE_SCALES[guidance]
        return modulation_channels(pipe, prompts[prompt], times=all_times, guidance=scale)

    usual = table(0, default)

    def largest_change(other: Named) -> dict:
        change = relative_change(other, usual)
        time, layer, kind = (int(i) for i in np.unravel_index(int(change.argmax()), change.shape))
        return {"kind": KINDS[kind], "cell": (layer, time)}

    def draw(kind: int, prompt: int, cell: tuple[int, int], guidance: int | None = None) -> View:
        is_usual = (prompt, guidance) == (0, default)
        return modulation_view(table(prompt, guidance), KINDS[kind], cell, None if is_usual else usual)

    tries = [Try("How large are the gates of each layer?", kind="gate")]
    if len(prompts) > 1 and pipe.flux.config.vec_in_dim:
        tries.append(Try("Where does the other prompt matter most?", prompt=1, **largest_change(table(1, default))))
    elif len(prompts) > 1:  # FLUX.2 has no pooled vector: the difference is 0 % everywhere
        tries.append(Try("Does the prompt change the modulation?", prompt=1))
    if default is not None:
        last = len(GUIDANCE_SCALES) - 1
        moves = largest_change(table(0, last)) | {"guidance": GUIDANCE_SCALES[last]}
        tries.append(Try("Where does strong guidance matter most?", **moves))
    return Explorer(
        "How do time, guidance and the prompt control each layer?",
        controls,
        draw,
        {"cell": (0, times // 2)},
        widths=[3.4, 3.4, 3.4],
        instruction="Point at a layer and a time in the left table, or press play; the other panels show that layer.",
        tries=tries,
        play="cell",
    )
