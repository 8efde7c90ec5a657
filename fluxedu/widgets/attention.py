"""Who looks at whom: point at a patch or a word, and its row or column of the exact map is there.

Queries and keys of the run are kept, not maps: a row or a column is made when it is pointed at, from the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from fluxedu.instruments.lenses.run import by_block, grid, recorded
from fluxedu.models.attention_map import AttentionMap
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.asked import checked
from fluxedu.widgets.controls import Chips, Choice, clock
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import enlarged, over, over_stops, picture, reduced
from fluxedu.widgets.panels import Pixels

SIDE = 256  # pixels of a painted picture, at least about


@dataclass
class Attended:
    """A run's attention. ``q``, ``k``: block -> ``[S, H, T, d]``, turned by position, text first · ``grid``: rows and
    columns of patches · ``words``: how many tokens are text.
    """

    image: Image.Image
    q: dict[str, torch.Tensor]
    k: dict[str, torch.Tensor]
    words: int
    grid: tuple[int, int]
    _maps: dict[tuple[str, int], AttentionMap] = field(default_factory=dict, repr=False)
    _column: tuple = (None, None)  # the last one: it stays while the pointer moves over patches

    def map(self, block: str, step: int) -> AttentionMap:
        """The lazy map of one block at one step; it remembers its log-sum-exp."""
        if (block, step) not in self._maps:
            q, k = (x[block][step][None] for x in (self.q, self.k))
            self._maps[block, step] = AttentionMap(q, k, v=k, words=self.words)  # any v has the fused kernel tell it
        return self._maps[block, step]

    def rows(self, block: str, step: int, head: int | None, token: int) -> np.ndarray:
        """What one token looks at, ``[T]``, of one head or averaged over them."""
        return self._one(self.map(block, step).rows([token])[0, :, 0], head)

    def columns(self, block: str, step: int, head: int | None, token: int) -> np.ndarray:
        """How much every token looks at one, ``[T]``."""
        asked = (block, step, head, token)
        if self._column[0] != asked:
            self._column = (asked, self._one(self.map(block, step).columns([token])[0, :, :, 0], head))
        return self._column[1]

    @staticmethod
    def _one(each: torch.Tensor, head: int | None) -> np.ndarray:
        return (each.mean(0) if head is None else each[head]).numpy()


def attention_view(
    run: Attended, pieces: Sequence[str], block: str, step: int, head: int | None, patch: tuple[int, int], word: int
) -> View:
    """The row of a patch over picture and words, and the column of a word over the picture."""
    rows, columns = run.grid
    base = enlarged(picture(reduced(run.image, 2 * SIDE)), SIDE)
    token = run.words + patch[0] * columns + patch[1]
    row = run.rows(block, step, head, token)
    image = slice(run.words, run.words + rows * columns)  # behind it are a reference picture's tokens, if any
    column = run.columns(block, step, head, word)[image].reshape(rows, columns)
    seen, said = row[image].reshape(rows, columns), row[: len(pieces)]
    strongest = int(said.argmax())
    peak = np.unravel_index(column.argmax(), column.shape)
    text = (
        f"The patch in row {patch[0]}, column {patch[1]} gives {row[image].sum():.0%} of its attention to the "
        f"picture, {said.sum():.0%} to the prompt, most to “{pieces[strongest]}” ({said[strongest]:.1%}), and "
        f"{row[len(pieces) : run.words].sum():.0%} to the padding. “{pieces[word]}” is looked at most from row "
        f"{int(peak[0])}, column {int(peak[1])} ({column.max():.1%})."
    )
    key = {"colours": over_stops()}
    mine, theirs = ("0", f"{seen.max():.1%} of its attention"), ("0", f"{column.max():.1%} of theirs")
    panels = [
        Pixels("what the patch looks at", over(base, seen), run.grid, patch, mine, pointer="patch", **key),
        Pixels(f"who looks at “{pieces[word]}”", over(base, column), run.grid, key=theirs, **key),
    ]
    return View(panels, text, {"word": said / max(float(said.max()), 1e-12)})


def attention(pipe: FluxPipeline, prompt: str, *, blocks: str = "*", at_steps=None, **asked) -> Explorer:
    """Point at a patch or a word of a run of ``prompt``, in any block, step and head.

    blocks: a glob such as ``"double.*"`` · at_steps: which steps to keep, all if not said · ``asked``: as for the
    pipeline. Queries and keys are kept, ``2 x T x D`` numbers a block and step; raises BudgetError where that is too
    much, with how to ask for less. The words' shade is what the patch gives them.
    """
    sites = (f"{blocks}.attn.q", f"{blocks}.attn.k")
    out, rec = recorded(pipe, prompt, *sites, asked=checked(asked), steps=at_steps)
    stacked = [by_block(rec, pipe, f"attn.{x}") for x in "qk"]
    names = stacked[0].coords["block"]
    q, k = ({b: x.tensor[i] for i, b in enumerate(names)} for x in stacked)
    tokenizer = pipe.prompt_encoder.t5_tokenizer
    run = Attended(out.images[0], q, k, rec.words, grid(pipe, out))
    times, pieces = stacked[0].coords["step"], tokenizer.pieces(prompt)
    count = q[names[0]].shape[1]
    controls = [
        Choice("block", "block", names, len(names) // 2),
        clock(times, len(times) // 2),
        Choice("head", "head", ["mean", *(f"head {i}" for i in range(count))], values=[None, *range(count)]),
        Chips("word", "word", pieces, min(1, len(pieces) - 1)),
    ]

    def draw(block: int, step: int, head: int, word: int, patch: tuple[int, int]) -> View:
        return attention_view(run, pieces, names[block], step, head - 1 if head else None, patch, word)

    return Explorer("Attention", controls, draw, {"patch": (run.grid[0] // 2, run.grid[1] // 4)})
