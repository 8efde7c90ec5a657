"""Rotary positions: the attention score of a query and a key on a grid depends only on their offset."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxedu.errors import InstrumentError, check_choice, check_integer
from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.instruments.recorder import record
from fluxedu.models.attention import rope_table, rotate
from fluxedu.sampling.latents import image_ids
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, Try, View, explorer
from fluxedu.widgets.panels import Lines, Pixels, between, upscale

VECTORS = ("all ones, so that only the position matters", "mean query and key of a head of the model")


def scores(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    """``q . k / sqrt(d)`` of one query vector and one key vector ``[d]`` at all pairs of positions, ``[N, N]``."""
    n = table.shape[-2]
    q_rotated = rotate(q.expand(1, 1, n, -1).float(), table)[0, 0]
    k_rotated = rotate(k.expand(1, 1, n, -1).float(), table)[0, 0]
    return q_rotated @ k_rotated.T * len(q) ** -0.5


def positions_view(table: Tensor, side: int, query: tuple[int, int], key: tuple[int, int]) -> View:
    """Scores of the query with all keys, of the key with all queries, and of all offsets along a row and a column.

    ``table``: :func:`scores` on a grid of ``side x side`` patches.
    """
    q_index, k_index = query[0] * side + query[1], key[0] * side + key[1]
    low, high = float(table.min()), float(table.max())
    offset, middle = (key[0] - query[0], key[1] - query[1]), side // 2
    from_middle = table.reshape(side, side, side, side)[middle, middle]
    series = {"along a row": from_middle[middle].tolist(), "along a column": from_middle[:, middle].tolist()}
    ends, note = (f"{low:.1f}", f"{high:.1f}"), "colours from the lowest score on the grid to the highest"
    query_scores, key_scores = table[q_index].reshape(side, side), table[:, k_index].reshape(side, side)
    panels = [
        Pixels("Query (frame): its score with a key at each patch", upscale(between(query_scores, low, high), 256),
               (side, side), query, ends, "viridis", unit="score before softmax", note=note, pointer="query"),
        Pixels("Key (frame): its score with a query at each patch", upscale(between(key_scores, low, high), 256),
               (side, side), key, ends, "viridis", unit="score before softmax", note=note, pointer="key"),
        Lines("Score for each offset", [i - middle for i in range(side)], series, "offset from query to key (patches)",
              "score before softmax", max(-middle, min(offset[1], side - 1 - middle)), dashed=["along a column"]),
    ]  # fmt: skip
    return View(
        panels,
        f"The query is in row {query[0] + 1}, column {query[1] + 1}, the key in row {key[0] + 1}, column {key[1] + 1}: "
        f"their offset is {offset[0]} rows and {offset[1]} columns, their score {float(table[q_index, k_index]):.2f}. "
        "The score is the same for every pair with this offset.",
    )


@explorer(example=lambda pipe: positions(pipe, side=8))
def positions(pipe: FluxPipeline, *, side: int = 16, block: str = "single.1", head: int = 0) -> Explorer:
    """Move a query and a key over a grid of ``side x side`` patches and see their attention score.

    Their vectors are all ones, so that only the position matters, or the mean query and key, before RoPE, of a head of
    the model. This takes one run.
    """
    check_integer("side", side, 2, 64, error=InstrumentError)
    check_choice("block", block, blocks_of(pipe), error=InstrumentError)
    config = pipe.flux.config
    with record(f"{block}.q_norm", f"{block}.k_norm", steps=-1, heads=head) as rec:
        pipe(EXAMPLE_PROMPT, progress=False)
    txt_len = pipe.prompt_encoder.tokenizer.length
    q, k = (rec[f"{block}.{site}"].tensor.flatten(0, -3)[0, txt_len:].float().mean(0) for site in ("q_norm", "k_norm"))
    ids = image_ids(2 * side, 2 * side, axes=len(config.axes_dim))
    rope = rope_table(ids, config.axes_dim, config.theta)
    ones = torch.ones_like(q)
    tables = [scores(ones, ones, rope), scores(q, k, rope)]

    def draw(vectors: int, query: tuple[int, int], key: tuple[int, int]) -> View:
        return positions_view(tables[vectors], side, query, key)

    controls, pointers = [Choice("vectors", "vectors", VECTORS)], {"query": (side // 2,) * 2}
    pointers["key"] = (side // 2, min(side // 2 + 3, side - 1))
    offset = pointers["key"][1] - pointers["query"][1]
    return Explorer(
        "How does RoPE make an attention score depend on the distance?",
        controls,
        draw,
        pointers,
        instruction="Point at a patch in the first image to move the query, in the second to move the key.",
        tries=[
            Try("Move both to the corner, at the same offset: does the score change?", query=(0, 0), key=(0, offset)),
            Try("Move the key far away: what is left of the score?", key=(0, 0)),
            Try("At which offset does a head of the model score highest?", vectors=1),
        ],
    )
