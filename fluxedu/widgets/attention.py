"""Attention of a run: point at a patch or a word to see its row or column of the exact attention map.

The run's queries and keys are recorded, not its maps. A row or column is computed from them when it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from fluxedu.attention_map import AttentionMap
from fluxedu.instruments.lenses.run import (
    blocks_of,
    check_one_image,
    check_one_prompt,
    enough_steps,
    few_steps_note,
    patch_grid,
    recorded_blocks,
    run_recorded,
)
from fluxedu.instruments.recorder import record
from fluxedu.probe import Sited
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.solvers import get_solver
from fluxedu.sampling.step_context import StepContext, Steps, current_context
from fluxedu.widgets.explorer import (
    EXAMPLE_PROMPT,
    Chips,
    Choice,
    Explorer,
    Try,
    View,
    check_request,
    explorer,
    time_slider,
)
from fluxedu.widgets.panels import Pixels, downscale, overlay, overlay_colours, to_rgb, upscale, whole_percentages

SIDE = 256  # approximate minimum size of a displayed image, in pixels


@dataclass
class RunAttention:
    """The attention of a run. ``q``, ``k``: block -> ``[S, H, T, d]``, after RoPE, text first · ``grid``: rows and
    columns of patches · ``txt_len``: number of text tokens.
    """

    image: Image.Image
    q: dict[str, torch.Tensor]
    k: dict[str, torch.Tensor]
    txt_len: int
    grid: tuple[int, int]
    _maps: dict[tuple[str, int], AttentionMap] = field(default_factory=dict, repr=False)
    _last_column: tuple = (None, None)  # (arguments, values); kept while the pointer moves over patches

    @cached_property
    def shown_image(self) -> np.ndarray:
        """The image, scaled to its display size."""
        return upscale(to_rgb(downscale(self.image, 2 * SIDE)), SIDE)

    def map(self, block: str, step: int) -> AttentionMap:
        """The lazy map of one block at one step, cached, so that it computes its log-sum-exp only once."""
        if (block, step) not in self._maps:
            q, k = self.q[block][step][None], self.k[block][step][None]
            # the values v do not matter here, but with them the fused kernel computes the log-sum-exp
            self._maps[block, step] = AttentionMap(q, k, v=k, txt_len=self.txt_len)
        return self._maps[block, step]

    def row(self, block: str, step: int, head: int | None, token: int) -> np.ndarray:
        """Attention of one token to every token, ``[T]``, of one head or (None) averaged over heads."""
        row = self.map(block, step).rows([token])[0, :, 0]
        return (row.mean(0) if head is None else row[head]).numpy()

    def column(self, block: str, step: int, head: int | None, token: int) -> np.ndarray:
        """Attention of every token to one token, ``[T]``."""
        arguments = block, step, head, token
        if self._last_column[0] != arguments:
            column = self.map(block, step).columns([token])[0, :, :, 0]
            self._last_column = arguments, (column.mean(0) if head is None else column[head]).numpy()
        return self._last_column[1]


def attention_view(
    run: RunAttention, pieces: Sequence[str], block: str, step: int, head: int | None, patch: tuple[int, int], word: int
) -> View:
    """The attention of a patch to the image and the words (a row of the map) and of the image to a word (a column)."""
    rows, columns = run.grid
    row = run.row(block, step, head, run.txt_len + patch[0] * columns + patch[1])
    image = slice(run.txt_len, run.txt_len + rows * columns)  # tokens of a reference image would follow
    column = run.column(block, step, head, word)[image].reshape(rows, columns)
    to_patches, to_words = row[image].reshape(rows, columns), row[: len(pieces)]
    strongest = int(to_words.argmax())
    peak = np.unravel_index(column.argmax(), column.shape)
    shown = [piece.replace("▁", "") for piece in pieces]  # T5 marks the beginning of a word with ▁
    shares = row[image].sum(), to_words.sum(), row[len(pieces) : run.txt_len].sum()
    of_image, of_prompt, of_padding = whole_percentages(np.array(shares) / sum(shares))
    text = (
        f"The patch in row {patch[0] + 1}, column {patch[1] + 1} gives {of_image}% of its attention to the "
        f"image, {of_prompt}% to the prompt (most to “{shown[strongest]}”, {to_words[strongest]:.1%}) and "
        f"{of_padding}% to the padding. The patch that attends most to “{shown[word]}” "
        f"is in row {int(peak[0]) + 1}, column {int(peak[1]) + 1} ({column.max():.1%} of its attention)."
    )
    base, colours = run.shown_image, overlay_colours()
    row_key, column_key = ("0", f"{to_patches.max():.1%}"), ("0", f"{column.max():.1%}")
    panels = [
        Pixels("Attention of the framed patch to every patch", overlay(base, to_patches), run.grid, patch, row_key,
               colours, unit="share of the framed patch's attention", pointer="patch"),
        Pixels(f"Attention of every patch to “{shown[word]}”", overlay(base, column), run.grid, key=column_key,
               colours=colours, unit="share of each patch's attention"),
    ]  # fmt: skip
    return View(panels, text, {"word": to_words / max(float(to_words.max()), 1e-12)})


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most ``limit`` indices out of ``count``, evenly spaced; if their number is odd, one is in the middle.

    >>> evenly_spaced(50, 1), evenly_spaced(50, 3), evenly_spaced(5, 9)
    ([25], [8, 25, 41], [0, 1, 2, 3, 4])
    """
    limit = min(count, limit)
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


class QueryKeyRecorder(record):
    """Records queries and keys of as many steps and blocks, evenly spaced, as its budget allows.

    They are chosen when the first queries pass, since their size is known only then. Steps are left out first, down to
    one, and then blocks.
    """

    def __init__(self):
        super().__init__("*.attn.q", "*.attn.k", passes="prompted")
        self.names: set[str] | None = None
        self.note = ""  # a sentence on what was left out

    def see(self, owner: Sited, name: str, site: str, value: torch.Tensor) -> torch.Tensor:
        if self.names is None:
            self._choose(current_context(), value)
        return super().see(owner, name, site, value) if site.partition(".attn.")[0] in self.names else value

    def _choose(self, context: StepContext, q: torch.Tensor) -> None:
        evaluations = len(get_solver(context.request.solver).stages)
        nbytes = 2 * q.nbytes // len(q) * evaluations  # queries and keys of one block and step
        budget = self.budget.limit
        names, affordable = blocks_of(context.pipe), int(budget // nbytes)
        steps = evenly_spaced(context.steps, max(affordable // len(names), 1))
        self.selection.steps = steps
        self.names = {names[i] for i in evenly_spaced(len(names), max(affordable, 1))}
        if len(steps) * len(self.names) < context.steps * len(names):
            self.note = (
                f" {len(self.names)} of {len(names)} blocks and {len(steps)} of {context.steps} steps were recorded, "
                f"as many as fit in {budget / 2**30:.3g} GiB. Use blocks= and at_steps= to choose others."
            )


@explorer(example=lambda pipe: attention(pipe, EXAMPLE_PROMPT, steps=enough_steps(pipe), progress=False))
def attention(
    pipe: FluxPipeline, prompt: str, *, blocks: str | None = None, at_steps: Steps = None, **request
) -> Explorer:
    """Point at a patch or a word of a run of ``prompt`` to see what attends to what, in any block, step and head.

    This takes one run. blocks: a glob such as ``"double.*"`` · at_steps: steps to record · ``request``: as for the
    pipeline. Queries and keys are recorded, ``2 x T x D`` numbers per block and step. By default all of them are, or as
    many as the recorder's budget allows: fewer steps, evenly spaced, and if one step of all blocks is too much, fewer
    blocks (37 of the 57 of FLUX.1-dev at 1024 x 1024). Blocks or steps that you name are recorded completely;
    BudgetError is raised if they do not fit. Words are shaded by the attention they receive from the patch.
    """
    check_request(request)
    if blocks is None and at_steps is None:
        with QueryKeyRecorder() as rec:
            out = pipe(check_one_prompt(prompt), **request)
        check_one_image(out)
        note = rec.note + few_steps_note(pipe, request)
    else:
        globs = [f"{blocks or '*'}.attn.q", f"{blocks or '*'}.attn.k"]
        out, rec = run_recorded(pipe, prompt, *globs, options=request, steps=at_steps)
        note = few_steps_note(pipe, request)
    names = recorded_blocks(rec, pipe, "attn.q")
    q = {name: rec[f"{name}.attn.q"].tensor for name in names}
    k = {name: rec[f"{name}.attn.k"].tensor for name in names}
    run = RunAttention(out.images[0], q, k, rec.txt_len, patch_grid(out.latents.shape))
    times, pieces = rec[f"{names[0]}.attn.q"].coords["step"], pipe.prompt_encoder.tokenizer.pieces(prompt)
    heads = range(q[names[0]].shape[1])
    longest = max(range(len(pieces)), key=lambda i: len(pieces[i]))
    last = max(len(pieces) - 2, 0)  # before the token that ends the prompt
    controls = [
        Choice("block", "block", names, len(names) // 2),
        time_slider(times, len(times) // 2),
        Choice("head", "head", ["mean of all heads", *(f"head {i}" for i in heads)], values=[None, *heads]),
        Chips("word", "word", pieces, longest),
    ]

    def draw(block: int, step: int, head: int, word: int, patch: tuple[int, int]) -> View:
        view = attention_view(run, pieces, names[block], step, head - 1 if head else None, patch, word)
        return replace(view, text=view.text + note)

    pointers = {"patch": (run.grid[0] // 2, run.grid[1] // 4)}
    return Explorer(
        "Which words and patches does a patch attend to?",
        controls,
        draw,
        pointers,
        instruction="Point at a patch on the left to see what it attends to; click a word to see, on the right, which "
        "patches attend to it.",
        tries=[
            Try("What does the patch in the corner attend to?", patch=(0, 0)),
            Try(f"Which patches attend to “{pieces[last].replace('▁', '')}”?", word=last),
            Try("Is it the same at the first step, in pure noise?", step=0),
        ],
        play="step",
    )
