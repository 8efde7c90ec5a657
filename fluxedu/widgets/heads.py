"""A bench for cutting heads: the picture without one head, or with one head alone of its block's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from fluxedu.instruments.interventions import ablate
from fluxedu.instruments.lenses.run import blocks_of, one_prompt
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.asked import checked, numbers
from fluxedu.widgets.controls import Choice
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import Pixels8, heat, picture, stretched, two_sided
from fluxedu.widgets.panels import Pixels

CUTS = ("this head", "all other heads of its block")


def heads_view(
    whole: Pixels8,
    without: Sequence[Sequence[Pixels8]],
    far: np.ndarray,
    blocks: Sequence[str],
    cell: tuple[int, int],
    cut: str,
) -> View:
    """Distances ``far [blocks, heads]`` as a table, the picture of one cell, and how it differs from the whole."""
    block, head = cell
    changed = without[block][head]
    apart = (changed.astype(float) - whole).mean(-1) / 255
    panels = [
        Pixels(
            "how far the latent goes: a row a block, a column a head", stretched(heat(far, name="viridis"), 256, 200),
            far.shape, cell, ("0", f"{far.max():.0%} of its length"), "viridis", blocks, range(far.shape[1]),
            pointer="cell",
        ),
        Pixels("whole", whole),
        Pixels("cut", changed),
        Pixels("brighter (red) or darker (blue)", two_sided(apart, 1.0), key=("-1", "1"), colours="RdBu_r"),
    ]  # fmt: skip
    others = int((far > far[block, head]).sum())
    lost = f"head {head} of {blocks[block]}" if cut == CUTS[0] else f"all heads of {blocks[block]} but head {head}"
    gone = f"Without {lost} the latent goes {far[block, head]:.0%} of its length away"
    return View(panels, f"{gone}; {others} of {far.size} cuts go further.")


@torch.no_grad()
def heads(pipe: FluxPipeline, prompt: str, *, steps: int = 6, **asked) -> Explorer:
    """Cut every head of every block once, and keep every head alone once, then look at what became of the picture.

    ``2 x blocks x heads`` runs of a few ``steps`` are drawn at first, seconds on the miniature; ``asked`` as for
    the pipeline. Which heads matter: arXiv 1905.10650, there for translation.
    """
    (steps,) = numbers("steps", steps, 1)
    asked = checked(asked, "trajectory") | {"steps": steps, "trajectory": False, "progress": False}
    blocks, count = blocks_of(pipe), pipe.flux.config.num_heads
    whole = pipe(one_prompt(prompt), **asked)
    tables = []
    with tqdm(total=2 * len(blocks) * count, desc="cutting heads", delay=1, leave=False) as bar:
        for alone in (False, True):
            outs = []
            for block in blocks:
                row = []
                for head in range(count):
                    lost = [i for i in range(count) if (i != head) == alone]
                    with ablate(f"{block}.heads", heads=lost):
                        row.append(pipe(prompt, **asked))
                    bar.update()
                outs.append(row)
            latents = torch.stack([torch.stack([out.latents for out in row]) for row in outs]).float()
            far = (latents - whole.latents.float()).flatten(2).norm(dim=-1) / whole.latents.float().norm()
            tables.append(([[picture(out.images[0]) for out in row] for row in outs], far.numpy(force=True)))
    base = picture(whole.images[0])

    def draw(cut: int, cell: tuple[int, int]) -> View:
        return heads_view(base, *tables[cut], blocks, cell, CUTS[cut])

    control = Choice("cut", "cut", CUTS)
    return Explorer("Heads", [control], draw, {"cell": (0, 0)}, widths=[3.0, 2.6, 2.6, 2.6])
