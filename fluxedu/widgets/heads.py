"""Ablation of attention heads: the image without one head, or with only one head of its block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fluxedu.instruments.ablation import ablate
from fluxedu.instruments.lenses.run import blocks_of, check_one_prompt, enough_steps, few_steps_note
from fluxedu.instruments.variants import Variant, ablate_each
from fluxedu.progress import progress_bar
from fluxedu.sampling.batches import parts
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, Try, View, check_request, explorer
from fluxedu.widgets.panels import RGB, Pixels, difference_panel, resize_table, sequential, to_rgb

REMOVED = ("this head", "all other heads of its block")


def heads_view(
    original: RGB,
    image: RGB,
    distances: np.ndarray,
    blocks: Sequence[str],
    cell: tuple[int, int],
    removed: str,
) -> View:
    """Distances ``[blocks, heads]`` as a table, the ``image`` of one cell, and its difference from the original."""
    block, head = cell
    name = blocks[block].replace(".", " ")
    what = f"head {head} of block {name}"
    if removed != REMOVED[0]:
        what = f"all heads of block {name} except head {head}"
    panels = [
        Pixels(
            "How much the latent changes, by block and head",
            resize_table(sequential(distances, name="viridis"), 256, 200), distances.shape, cell,
            ("0", f"{distances.max():.0%}"), "viridis", blocks, range(distances.shape[1]),
            unit="share of the latent's norm", axes=("block", "head"), pointer="cell",
        ),
        Pixels("With all heads", original),
        Pixels(f"Without {what}", image),
        difference_panel(original, image),
    ]  # fmt: skip
    more = int((distances > distances[block, head]).sum())
    text = f"Without {what} the latent changes by {distances[block, head]:.0%} of its norm"
    return View(panels, f"{text}; {more} of {distances.size} such ablations change it more.")


def _removal(block: str, head: int, count: int, keep_only: bool) -> ablate:
    removed = [i for i in range(count) if i != head] if keep_only else [head]
    return ablate(f"{block}.heads", heads=removed, passes="both")


def latents_of_each(pipe: FluxPipeline, variants: Sequence[Variant], prompt: str, request: dict, desc: str) -> Tensor:
    """The latents ``[variants, C, h, w]`` of a run of ``prompt`` with each of ``variants``, see :func:`ablate_each`.

    They are drawn at most 16 at once: with more, looking for the instrument that a value belongs to takes longer.
    """
    texts = pipe.prompt_encoder([check_one_prompt(prompt)])
    show = request.get("progress", True) is not False
    request = request | {"trajectory": False, "decode": False, "progress": False}
    bar = progress_bar(list(parts(len(variants), 16)), desc=desc, leave=False, show=show)
    return torch.cat([ablate_each(pipe, variants[part], texts, **request).latents for part in bar])


def _cell(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """An index into a flattened table as its row and column."""
    return tuple(map(int, np.unravel_index(index, shape)))


@explorer(example=lambda pipe: heads(pipe, EXAMPLE_PROMPT, progress=False))
@torch.no_grad()
def heads(pipe: FluxPipeline, prompt: str, *, steps: int | None = None, **request) -> Explorer:
    """Remove every attention head once, and keep every head as the only one of its block once; compare the images.

    This takes ``2 x blocks x heads + 1`` runs of ``steps`` steps, several at once: about 5 seconds for the 81 runs of
    the miniature on one core. By default 8 steps, or the model's own number if that is smaller. An image is decoded
    when it is first shown. ``request``: as for the pipeline. Which heads matter was first measured for translation:
    arXiv 1905.10650.
    """
    check_request(request, "trajectory", "decode")
    request |= {"steps": enough_steps(pipe) if steps is None else steps}
    blocks, count = blocks_of(pipe), pipe.flux.config.num_heads
    shape = len(REMOVED), len(blocks), count
    removals = [_removal(blocks[b], head, count, bool(keep_only)) for keep_only, b, head in np.ndindex(shape)]
    latents = latents_of_each(pipe, [[], *removals], prompt, request, "removing heads")
    original, changed = latents[0], latents[1:].unflatten(0, shape)
    change = (changed - original).float().flatten(3).norm(dim=-1) / original.float().norm()
    distances = change.numpy(force=True)  # [removed, block, head]

    @cache
    @torch.no_grad()
    def decoded(*index: int) -> RGB:
        return to_rgb(pipe.autoencoder.decode(changed[index][None])[0])

    before, note = to_rgb(pipe.autoencoder.decode(original[None])[0]), few_steps_note(pipe, request)

    def draw(removed: int, cell: tuple[int, int]) -> View:
        view = heads_view(before, decoded(removed, *cell), distances[removed], blocks, cell, REMOVED[removed])
        return replace(view, text=view.text + note)

    one, alone = distances  # without one head, and with one head of its block alone
    return Explorer(
        "Which attention heads matter?",
        [Choice("removed", "remove", REMOVED)],
        draw,
        {"cell": (len(blocks) // 2, 0)},
        widths=[3.0, 2.6, 2.6, 2.6],
        instruction="Point at a head in the table to see the image without it, and what has changed.",
        tries=[
            Try("Remove the head that changes this image most", removed=0, cell=_cell(one.argmax(), one.shape)),
            Try("Remove the head that changes it least", removed=0, cell=_cell(one.argmin(), one.shape)),
            Try("Which block can spare all heads but one?", removed=1, cell=_cell(alone.argmin(), one.shape)),
        ],
    )
