"""How time steers the blocks: every shift, scale and gate over time and depth, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from fluxedu.instruments.lenses.modulation import KINDS, channels
from fluxedu.instruments.named import Named
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.asked import numbers, prompts_of
from fluxedu.widgets.controls import Choice, Slider
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import heat, stretched, two_sided
from fluxedu.widgets.panels import Lines, Pixels

STRENGTHS = (1.0, 1.5, 2.0, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0)


def modulation_view(table: Named, kind: str, cell: tuple[int, int]) -> View:
    """Sizes over depth and time, one layer's three kinds over time, and its channels.

    ``table``: :func:`fluxedu.instruments.lenses.modulation.channels`, axes ``time, layer, kind, channel`` ·
    ``cell``: layer and time.
    """
    times, layers = table.coords["time"], table.coords["layer"]
    layer, at = cell
    sizes = table.tensor.square().mean(-1).sqrt()  # [time, layer, kind]
    one = sizes[..., KINDS.index(kind)].T  # [layer, time]
    values = table.tensor[:, layer, KINDS.index(kind)].T  # [channel, time]
    order = values.mean(1).argsort()  # channels that act alike stand together
    most = float(values.abs().max())
    series = {name: sizes[:, layer, i].tolist() for i, name in enumerate(KINDS)}
    panels = [
        Pixels(
            f"size of {kind}: a row a layer, a column a time, noise at the left",
            stretched(heat(one, name="viridis"), 260, 260),
            tuple(one.shape),
            cell,
            ("0", f"{one.max():.2f}, root mean square"),
            "viridis",
            layers,
            pointer="cell",
        ),
        Lines(f"{layers[layer]} over time", times, series, "time (1 is noise)", "size", times[at]),
        Pixels(
            f"{kind} of {layers[layer]}: a row a channel, by its mean",
            stretched(two_sided(values[order], most), 256, 260),
            key=(f"{-most:.1f}", f"{most:.1f}"),
            colours="RdBu_r",
        ),
    ]
    text = f"{layers[layer]} at t = {times[at]:.2f}: {kind} has size {one[layer, at]:.3f}, between "
    return View(panels, text + f"{values[:, at].min():.2f} and {values[:, at].max():.2f} over its channels.")


def modulation(pipe: FluxPipeline, prompts: str | Sequence[str], *, times: int = 21) -> Explorer:
    """Shift, scale and gate of every layer, for each of ``prompts`` and, where the model has the input, any guidance.

    They depend on time, guidance and the pooled text alone, so no picture is drawn: a move plans all times anew.
    """
    prompts = prompts_of(prompts)
    (times,) = numbers("times", times, 2)
    embedded = pipe.flux.config.guidance_embed
    controls = [Choice("kind", "kind", KINDS), Choice("prompt", "prompt", prompts)]
    if embedded:
        labels = [f"{s:g}" for s in STRENGTHS]
        usual = min(range(len(labels)), key=lambda i: abs(STRENGTHS[i] - pipe.defaults.guidance))
        controls.append(Slider("guidance", "guidance", labels, usual, STRENGTHS))
    clock = torch.linspace(1, 0, times)

    @lru_cache(maxsize=32)
    def table(prompt: int, guidance: int | None) -> Named:
        strength = None if guidance is None else STRENGTHS[guidance]
        return channels(pipe, prompts[prompt], times=clock, guidance=strength)

    def draw(kind: int, prompt: int, cell: tuple[int, int], guidance: int | None = None) -> View:
        return modulation_view(table(prompt, guidance), KINDS[kind], cell)

    return Explorer("Modulation", controls, draw, {"cell": (0, 0)}, widths=[3.4, 3.4, 3.4])
