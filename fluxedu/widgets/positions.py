"""What rotary positions do to a score: move a query and a key over the grid, only their difference counts."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxedu.instruments.recorder import record
from fluxedu.models.attention import rope_table, rotate
from fluxedu.sampling.latents import image_ids
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.controls import Choice
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import enlarged, two_sided
from fluxedu.widgets.panels import Lines, Pixels

VECTORS = ("all ones: position alone", "a query and a key of the miniature")


def scores(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    """``q . k / sqrt(d)`` of one query vector and one key vector ``[d]`` at all pairs of positions: ``[N, N]``."""
    n = table.shape[-2]
    turned = [rotate(x.expand(1, 1, n, -1).float(), table)[0, 0] for x in (q, k)]
    return turned[0] @ turned[1].T * len(q) ** -0.5


def positions_view(table: Tensor, side: int, query: tuple[int, int], key: tuple[int, int]) -> View:
    """The query's row over the grid, the key's column, and the score against the distance along a row and a column.

    ``table``: :func:`scores` on a grid of ``side x side``.
    """
    at = [row * side + column for row, column in (query, key)]
    seen = table[at[0]].reshape(side, side)
    most = float(table.abs().max())
    apart = (key[0] - query[0], key[1] - query[1])
    middle = side // 2
    around = table.reshape(side, side, side, side)[middle, middle]
    row, column = around[middle], around[:, middle]
    offsets = [i - middle for i in range(side)]
    ends = (f"{-most:.1f}", f"{most:.1f}")
    panels = [
        Pixels(
            "the query: its score with a key at each place", enlarged(two_sided(seen, most), 256), (side, side),
            query, ends, "RdBu_r", pointer="query",
        ),
        Pixels(
            "the key: its score with a query at each place",
            enlarged(two_sided(table[:, at[1]].reshape(side, side), most), 256), (side, side), key, ends, "RdBu_r",
            pointer="key",
        ),
        Lines(
            "the score against the distance", offsets,
            {"along a row": row.tolist(), "along a column": column.tolist()}, "places from query to key", "score",
            max(-middle, min(apart[1], side - 1 - middle)),
        ),
    ]  # fmt: skip
    text = (
        f"Query at {query}, key at {key}: difference {apart}, score {float(table[at[0], at[1]]):.2f}. "
        "Wherever the two are this far apart, the score is the same."
    )
    return View(panels, text)


def positions(pipe: FluxPipeline, *, side: int = 16, block: str = "single.1", head: int = 0) -> Explorer:
    """Drag a query and a key over a grid of ``side x side`` patches and see their score.

    Their vectors are all ones, so that only the position speaks, or the mean query and key of a head of the
    miniature, before they are turned.
    """
    config = pipe.flux.config
    with record(f"{block}.q_norm", f"{block}.k_norm", steps=-1, heads=head) as rec:
        pipe("a red circle left of a blue square", progress=False)
    vectors = [(torch.ones(config.head_dim),) * 2]
    words = pipe.prompt_encoder.t5_tokenizer.length
    means = [rec[f"{block}.{x}"].tensor.flatten(0, -3)[0, words:].float().mean(0) for x in ("q_norm", "k_norm")]
    vectors.append(tuple(means))
    turns = rope_table(image_ids(2 * side, 2 * side), config.axes_dim, config.theta)
    tables = [scores(q, k, turns) for q, k in vectors]

    def draw(vectors: int, query: tuple[int, int], key: tuple[int, int]) -> View:
        return positions_view(tables[vectors], side, query, key)

    start = {"query": (side // 2, side // 2), "key": (side // 2, side // 2 + 3)}
    return Explorer("Positions", [Choice("vectors", "vectors", VECTORS)], draw, start)
