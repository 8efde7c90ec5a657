"""What T5 makes of every word: how alike two tokens are, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.instruments.recorder import record
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.controls import Chips, Slider
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import enlarged, two_sided
from fluxedu.widgets.panels import Lines, Pixels


@torch.no_grad()
def by_layer(pipe: FluxPipeline, prompt: str) -> tuple[Tensor, list[str]]:
    """T5's token vectors ``[K, L, D]`` and what the K rows are called: the words alone, after each block, at the end.

    L counts the padding as well.
    """
    encoder = pipe.prompt_encoder
    blocks = [f"t5.encoder.block.{i}.out" for i in range(encoder.t5.config.num_layers)]
    names = ["t5.embedded", *blocks, "t5.states"]
    with record(*names) as rec:
        encoder.t5(encoder.t5_tokenizer([prompt]).to(pipe.device))
    length, width = encoder.t5_tokenizer.length, encoder.t5.config.d_model
    layers = torch.stack([rec[name].tensor.reshape(length, width).float() for name in names])
    return layers, ["words alone", *(f"after block {i}" for i in range(len(blocks))), "after the last norm"]


def tokens_view(
    layers: Tensor, pieces: Sequence[str], names: Sequence[str], layer: int, first: int, second: int
) -> View:
    """``layers [K, L, D]`` · the cosines of all tokens at one layer, and those of two tokens over the layers."""
    cosines = F.cosine_similarity(layers[:, :, None], layers[:, None], dim=-1)  # [K, L, L]
    table, pair = cosines[layer], cosines[:, first, second]
    panels = [
        Pixels(
            f"cosine of all tokens with all, {names[layer]}", enlarged(two_sided(table, 1.0), 256),
            cells=tuple(table.shape), mark=(first, second), key=("-1", "1"), colours="RdBu_r",
        ),
        Lines(
            f"{pieces[first]} and {pieces[second]}, layer by layer", list(range(len(layers))),
            {"cosine": pair.tolist()}, across=f"0: {names[0]} · {len(layers) - 1}: {names[-1]}", up="cosine",
            mark=layer,
        ),
    ]  # fmt: skip
    others = [i for i in range(len(pieces)) if i != first]
    nearest = max(others, key=lambda i: float(table[first, i]))
    text = (
        f"{pieces[first]} (number {first}) and {pieces[second]} (number {second}), {names[layer]}: cosine "
        f"{float(pair[layer]):.2f}. Most like the first is {pieces[nearest]} (number {nearest}), "
        f"{float(table[first, nearest]):.2f}."
    )
    shades = {"first": table[second].clamp(0, 1).tolist(), "second": table[first].clamp(0, 1).tolist()}
    return View(panels, text, shades)


def tokens(pipe: FluxPipeline, prompt: str) -> Explorer:
    """Choose two tokens of ``prompt`` and a layer; each row of words is shaded by how like the other's choice they are.

    The first of the padding is shown as well, which FLUX reads like any word.
    """
    layers, names = by_layer(pipe, prompt)
    pieces = pipe.prompt_encoder.t5_tokenizer.pieces(prompt)
    if len(pieces) < layers.shape[1]:
        pieces = [*pieces, "<pad>"]
    shown = layers[:, : len(pieces)]
    controls = [
        Slider("layer", "layer", names, len(names) - 1),
        Chips("first", "first token", pieces, min(1, len(pieces) - 1)),
        Chips("second", "second token", pieces, min(2, len(pieces) - 1)),
    ]

    def draw(layer: int, first: int, second: int) -> View:
        return tokens_view(shown, pieces, names, layer, first, second)

    return Explorer("Tokens", controls, draw, widths=[3.4, 3.8])
