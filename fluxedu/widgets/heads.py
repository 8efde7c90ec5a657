"""Ablation of attention heads: the image without one head, or with only one head of its block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fluxedu.instruments.ablation import ablate
from fluxedu.instruments.lenses.run import blocks_of, check_one_prompt
from fluxedu.progress import progress_bar
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, View, check_request, explorer
from fluxedu.widgets.panels import RGB, Pixels, difference_panel, resize_table, sequential, to_rgb

REMOVED = ("this head", "all other heads of its block")


def heads_view(
    original: RGB,
    images: Sequence[Sequence[RGB]],
    distances: np.ndarray,
    blocks: Sequence[str],
    cell: tuple[int, int],
    removed: str,
) -> View:
    """Distances ``[blocks, heads]`` as a table, the image of one cell, and its difference from the original."""
    block, head = cell
    image = images[block][head]
    panels = [
        Pixels(
            "Change of the latent (rows: blocks; columns: heads)",
            resize_table(sequential(distances, name="viridis"), 256, 200), distances.shape, cell,
            ("0", f"{distances.max():.0%} of its norm"), "viridis", blocks, range(distances.shape[1]), pointer="cell",
        ),
        Pixels("All heads", original),
        Pixels("After the ablation", image),
        difference_panel(original, image),
    ]  # fmt: skip
    more = int((distances > distances[block, head]).sum())
    what = f"head {head} of {blocks[block]}"
    if removed != REMOVED[0]:
        what = f"all heads of {blocks[block]} except head {head}"
    text = f"Without {what} the latent changes by {distances[block, head]:.0%} of its norm"
    return View(panels, f"{text}; {more} of {distances.size} such ablations change it more.")


@explorer(example=lambda pipe: heads(pipe, EXAMPLE_PROMPT, steps=1))
@torch.no_grad()
def heads(pipe: FluxPipeline, prompt: str, *, steps: int = 6, **request) -> Explorer:
    """Remove every attention head once, and keep every head as the only one of its block once; compare the images.

    This takes ``2 x blocks x heads`` runs of ``steps`` steps, about a minute on the miniature; ``request``: as for the
    pipeline. Which heads matter was first measured for translation: arXiv 1905.10650.
    """
    request = check_request(request, "trajectory") | {"steps": steps, "trajectory": False, "progress": False}
    blocks, count = blocks_of(pipe), pipe.flux.config.num_heads
    original = pipe(check_one_prompt(prompt), **request)
    latents = original.latents.float()
    images, distances = [[[] for _ in blocks] for _ in REMOVED], np.zeros((len(REMOVED), len(blocks), count))
    for keep_only, b, head in progress_bar(list(np.ndindex(distances.shape)), desc="removing heads", leave=False):
        others = [i for i in range(count) if i != head]
        with ablate(f"{blocks[b]}.heads", heads=others if keep_only else [head], passes="both"):
            out = pipe(prompt, **request)
        images[keep_only][b].append(to_rgb(out.images[0]))
        distances[keep_only, b, head] = (out.latents.float() - latents).norm() / latents.norm()
    base = to_rgb(original.images[0])

    def draw(removed: int, cell: tuple[int, int]) -> View:
        return heads_view(base, images[removed], distances[removed], blocks, cell, REMOVED[removed])

    control = Choice("removed", "remove", REMOVED)
    return Explorer("Which attention heads matter?", [control], draw, {"cell": (0, 0)}, widths=[3.0, 2.6, 2.6, 2.6])
