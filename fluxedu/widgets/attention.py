"""Who looks at whom: point at a patch or a word, and its row or column of the exact map is there.

Queries and keys of the run are kept, not maps: a row or a column is made when it is pointed at, from the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from fluxedu.instruments.lenses.run import blocks_in, blocks_of, grid, one_picture, one_prompt, recorded
from fluxedu.instruments.recorder import Steps, record
from fluxedu.models.attention_map import AttentionMap
from fluxedu.probe import Sited
from fluxedu.sampling.pipeline import FluxPipeline, Output
from fluxedu.sampling.step_context import StepContext, current_context
from fluxedu.widgets.asked import checked, evenly
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

    @cached_property
    def base(self) -> np.ndarray:
        """The picture, as large as it is painted."""
        return enlarged(picture(reduced(self.image, 2 * SIDE)), SIDE)

    def map(self, block: str, step: int) -> AttentionMap:
        """The lazy map of one block at one step; it remembers its log-sum-exp."""
        if (block, step) not in self._maps:
            q, k = (x[block][step][None] for x in (self.q, self.k))
            self._maps[block, step] = AttentionMap(q, k, v=k, words=self.txt_len)  # any v has the fused kernel tell it
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
    token = run.txt_len + patch[0] * columns + patch[1]
    row = run.rows(block, step, head, token)
    image = slice(run.txt_len, run.txt_len + rows * columns)  # behind it are a reference picture's tokens, if any
    column = run.columns(block, step, head, word)[image].reshape(rows, columns)
    seen, said = row[image].reshape(rows, columns), row[: len(pieces)]
    strongest = int(said.argmax())
    peak = np.unravel_index(column.argmax(), column.shape)
    text = (
        f"The patch in row {patch[0]}, column {patch[1]} gives {row[image].sum():.0%} of its attention to the "
        f"picture, {said.sum():.0%} to the prompt, most to “{pieces[strongest]}” ({said[strongest]:.1%}), and "
        f"{row[len(pieces) : run.txt_len].sum():.0%} to the padding. “{pieces[word]}” is looked at most from row "
        f"{int(peak[0])}, column {int(peak[1])} ({column.max():.1%})."
    )
    key = {"colours": over_stops()}
    mine, theirs = ("0", f"{seen.max():.1%} of its attention"), ("0", f"{column.max():.1%} of theirs")
    panels = [
        Pixels("what the patch looks at", over(run.base, seen), run.grid, patch, mine, pointer="patch", **key),
        Pixels(f"who looks at “{pieces[word]}”", over(run.base, column), run.grid, key=theirs, **key),
    ]
    return View(panels, text, {"word": said / max(float(said.max()), 1e-12)})


class Kept(record):
    """A recorder of queries and keys, of as many steps and blocks, evenly spaced, as its budget has room for.

    Which, is known when the first queries pass: no run is needed to find out. Steps are left out first, all but one.
    """

    def __init__(self):
        super().__init__("*.attn.q", "*.attn.k", passes="prompted")
        self.names: set[str] | None = None
        self.said = ""  # what was left out, in a sentence

    def see(self, owner: Sited, name: str, site: str, value: torch.Tensor) -> torch.Tensor:
        if self.names is None:
            self._choose(current_context(), value)
        return super().see(owner, name, site, value) if site.partition(".attn.")[0] in self.names else value

    def _choose(self, context: StepContext, q: torch.Tensor) -> None:
        each = 2 * q.nbytes // len(q) * self._questions(context)  # bytes of a block and step: queries and keys
        names, room = blocks_of(context.pipe), int(self.budget // each)
        self.steps = evenly(context.steps, max(room // len(names), 1))
        self.names = {names[i] for i in evenly(len(names), max(room, 1))}
        if len(self.steps) * len(self.names) < context.steps * len(names):
            self.said = (
                f" Kept are {len(self.names)} of {len(names)} blocks and {len(self.steps)} of {context.steps} steps, as "
                f"many as {self.budget / 2**30:.3g} GiB hold; blocks= and at_steps= choose others."
            )


def attention(
    pipe: FluxPipeline, prompt: str, *, blocks: str | None = None, at_steps: Steps = None, **asked
) -> Explorer:
    """Point at a patch or a word of a run of ``prompt``, in any block, step and head.

    blocks: a glob such as ``"double.*"`` · at_steps: which steps to keep · ``asked``: as for the pipeline. Queries and
    keys are kept, ``2 x T x D`` numbers a block and step. Where neither is said, that is everything, or what the
    recorder's budget has room for: fewer steps, evenly spaced, and where one of all blocks is too much, one and fewer
    blocks (of FLUX.1-dev at 1024 x 1024, 37 of 57); the controls list them and the text says how many. What is said is
    kept whole; raises BudgetError where that is too much, with how to ask for less. The words' shade is what the patch
    gives them.
    """
    out, rec = _recorded(pipe, prompt, blocks, at_steps, checked(asked))
    names = blocks_in(rec, pipe, "attn.q")
    q, k = ({b: rec[f"{b}.attn.{x}"].tensor for b in names} for x in "qk")
    times, tokenizer = rec[f"{names[0]}.attn.q"].coords["step"], pipe.prompt_encoder.t5_tokenizer
    run, pieces = Attended(out.images[0], q, k, rec.txt_len, grid(pipe, out)), tokenizer.pieces(prompt)
    count, left_out = q[names[0]].shape[1], rec.said if isinstance(rec, Kept) else ""
    controls = [
        Choice("block", "block", names, len(names) // 2),
        clock(times, len(times) // 2),
        Choice("head", "head", ["mean", *(f"head {i}" for i in range(count))], values=[None, *range(count)]),
        Chips("word", "word", pieces, min(1, len(pieces) - 1)),
    ]

    def draw(block: int, step: int, head: int, word: int, patch: tuple[int, int]) -> View:
        view = attention_view(run, pieces, names[block], step, head - 1 if head else None, patch, word)
        return replace(view, text=view.text + left_out)

    return Explorer("Attention", controls, draw, {"patch": (run.grid[0] // 2, run.grid[1] // 4)})


def _recorded(
    pipe: FluxPipeline, prompt: str, blocks: str | None, at_steps: Steps, asked: dict
) -> tuple[Output, record]:
    """The run, and of its queries and keys what was asked for, or what there is room for."""
    if blocks is not None or at_steps is not None:
        sites = [f"{blocks or '*'}.attn.{x}" for x in "qk"]
        return recorded(pipe, prompt, *sites, asked=asked, steps=at_steps)
    with Kept() as rec:
        out = pipe(one_prompt(prompt), **asked)
    one_picture(out)
    return out, rec
