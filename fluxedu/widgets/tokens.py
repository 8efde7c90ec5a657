"""T5's token vectors: how similar two tokens of a prompt are, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.instruments.lenses.run import check_encoder
from fluxedu.instruments.recorder import record
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Chips, Explorer, Slider, Try, View, explorer
from fluxedu.widgets.panels import Lines, Pixels, diverging, upscale


@torch.no_grad()
def layer_states(pipe: FluxPipeline, prompt: str) -> tuple[Tensor, list[str]]:
    """T5's token vectors ``[K, L, D]`` and the names of the K layers: the embedding, each block, the final norm.

    The L tokens include the padding.
    """
    check_encoder(pipe, "t5")
    encoder = pipe.prompt_encoder
    blocks = [f"t5.encoder.block.{i}.out" for i in range(encoder.t5.config.num_layers)]
    sites = ["t5.embedded", *blocks, "t5.states"]
    with record(*sites) as rec:
        encoder.t5(encoder.t5_tokenizer([prompt]).to(pipe.device))
    length, width = encoder.t5_tokenizer.length, encoder.t5.config.d_model
    states = torch.stack([rec[site].tensor.reshape(length, width).float() for site in sites])
    return states, ["embedding", *(f"after block {i}" for i in range(len(blocks))), "after the final norm"]


def tokens_view(
    states: Tensor, pieces: Sequence[str], names: Sequence[str], layer: int, first: int, second: int
) -> View:
    """Cosines of all tokens at one layer, and those of two tokens at all layers; ``states [K, L, D]``."""
    cosines = F.cosine_similarity(states[:, :, None], states[:, None], dim=-1)  # [K, L, L]
    table, pair = cosines[layer], cosines[:, first, second]
    words = [piece.replace("▁", "") or piece for piece in pieces]  # T5 marks the beginning of a word with ▁
    panels = [
        Pixels(
            f"Cosine of every two tokens, {names[layer]}", upscale(diverging(table, 1.0), 256),
            cells=tuple(table.shape), mark=(first, second), key=("-1", "1"), colours="RdBu_r",
            rows=words, columns=range(len(pieces)), unit="cosine similarity", axes=("token", "token"),
        ),
        Lines(f"“{words[first]}” and “{words[second]}”, layer by layer", range(len(states)), {"cosine": pair.tolist()},
              "layer", "cosine similarity", layer, x_names=names),
    ]  # fmt: skip
    others = [i for i in range(len(pieces)) if i != first]
    nearest = max(others, key=lambda i: float(table[first, i]))
    text = (
        f"“{words[first]}” (token {first}) and “{words[second]}” (token {second}), {names[layer]}: cosine "
        f"{float(pair[layer]):.2f}. The most similar token to the first is “{words[nearest]}” (token {nearest}), with "
        f"{float(table[first, nearest]):.2f}."
    )
    shades = {"first": table[second].clamp(0, 1).tolist(), "second": table[first].clamp(0, 1).tolist()}
    return View(panels, text, shades)


@explorer(example=lambda pipe: tokens(pipe, EXAMPLE_PROMPT))
def tokens(pipe: FluxPipeline, prompt: str) -> Explorer:
    """Choose two tokens of ``prompt`` and a layer; each row of tokens is shaded by similarity to the other's choice.

    The first padding token is shown as well, since FLUX reads padding like any other token. This takes no run, only
    one pass of T5.
    """
    states, names = layer_states(pipe, prompt)
    pieces = pipe.prompt_encoder.t5_tokenizer.pieces(prompt)
    if len(pieces) < states.shape[1]:
        pieces = [*pieces, "<pad>"]
    controls = [
        Slider("layer", "layer", names, len(names) - 1),
        Chips("first", "first token", pieces, min(1, len(pieces) - 1)),
        Chips("second", "second token", pieces, min(2, len(pieces) - 1)),
    ]
    draw = partial(tokens_view, states[:, : len(pieces)], pieces, names)
    tries = [Try("How similar are they before T5 has read the prompt?", layer=0)]
    twice = next((i for i, piece in enumerate(pieces) if piece in pieces[:i]), None)
    if twice is not None:
        word, former = pieces[twice].replace("▁", ""), pieces.index(pieces[twice])
        tries.append(Try(f"“{word}” occurs twice: are its two vectors equal?", first=former, second=twice))
    tries.append(Try(f"How similar is {pieces[-1]} to the words?", second=len(pieces) - 1))
    return Explorer(
        "How similar are two tokens to T5?",
        controls,
        draw,
        widths=[3.4, 3.8],
        instruction="Choose two tokens, then press play: their similarity changes from layer to layer.",
        tries=tries,
        play="layer",
    )
