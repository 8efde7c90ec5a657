"""An experiment bench: choose a block and what is done to it, and see the picture before and after."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fluxedu.instruments.interventions import Context, ablate, intervene, patch
from fluxedu.instruments.lenses.run import blocks_of, one_prompt
from fluxedu.instruments.recorder import record
from fluxedu.instruments.recording import Recording, open_recording
from fluxedu.instruments.watching import Instrument
from fluxedu.nano.judge import Reading, read
from fluxedu.sampling.latents import image_ids, text_ids
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.controls import Choice
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import Pixels8, picture, two_sided
from fluxedu.widgets.panels import Lines, Pixels

CHANGES = (
    "cut the block",
    "cut its heads",
    "put all patches in one place",
    "put in the other prompt's words",
    "put in the other prompt's picture",
)
FOREIGN = 3  # from here on the changes come from the other prompt's run


def told(reading: Reading) -> str:
    """What the judge sees, in words."""
    return ", ".join(f"{t.color} {t.form}" for t in reading.things) or "nothing"


def bench_view(
    pictures: tuple[Pixels8, Pixels8, Pixels8],
    far: np.ndarray,
    seen: str,
    blocks: Sequence[str],
    prompts: tuple[str, str],
    block: int,
    change: int,
) -> View:
    """One experiment: the picture before and after, what it may be compared with, and the same change elsewhere.

    ``pictures``: before, after, and the other prompt's · ``far [changes, blocks]``: distances of latents · ``seen``:
    what the judge reads after the change.
    """
    whole, after, other = pictures
    if change >= FOREIGN:
        beside = Pixels(f"the other prompt: {prompts[1]}", other)
    else:
        apart = (after.astype(float) - whole).mean(-1) / 255
        beside = Pixels("brighter (red) or darker (blue)", two_sided(apart, 1.0), key=("-1", "1"), colours="RdBu_r")
    row = far[change]
    panels = [
        Pixels(f"before: {prompts[0]}", whole),
        Pixels(f"after: {blocks[block]}, {CHANGES[change]}", after),
        beside,
        Lines(
            f"how far the picture goes, {blocks[0]} to {blocks[-1]}", range(len(blocks)),
            {CHANGES[change]: row.tolist()}, "block", "distance / length of the latent", block,
        ),
    ]  # fmt: skip
    further = int((row > row[block]).sum())
    which = "no other block goes further" if not further else f"{further} of {len(blocks) - 1} other blocks go further"
    return View(panels, f"{blocks[block]}, {CHANGES[change]}: the latent goes {row[block]:.0%} of its length away "
                        f"({which}). The judge reads: {seen}.")  # fmt: skip


def _in_tokens(site: str, source: Recording, places: slice) -> intervene:
    """Of the joint tokens, put in those of another run at ``places``."""
    theirs = {(when.step, when.stage): value.tensor for when, value in source.entries(site)}

    def change(x: Tensor, ctx: Context) -> Tensor:
        new = x.clone()
        new[:, places] = theirs[ctx.step, max(ctx.step_context.stage, 0)].to(x).reshape(x.shape)[:, places]
        return new

    return intervene(site, change)


def _change(which: int, block: str, other: Recording, one_place: Tensor, words: int) -> Instrument:
    """What is done to a block."""
    if which == 0:
        return ablate(block)
    if which == 1:
        return ablate(f"{block}.heads")
    if which == 2:
        return patch(f"{block}.attn.rope", one_place)
    if block.startswith("double"):
        return patch(f"{block}.{'txt' if which == FOREIGN else 'img'}", other)
    return _in_tokens(f"{block}.x", other, slice(0, words) if which == FOREIGN else slice(words, None))


def _experiments(
    pipe: FluxPipeline, prompt: str, foreign: Recording, latents: Tensor, asked: dict, quiet: bool
) -> tuple[list[list[Pixels8]], list[list[float]]]:
    """Every change of every block: the picture, and how far its latent is from ``latents``."""
    blocks, words, changed, far = blocks_of(pipe), pipe.prompt_encoder.t5_tokenizer.length, [], []
    ids = image_ids(*latents.shape[-2:])
    one_place = pipe.flux.rope(torch.zeros_like(ids).to(pipe.device), text_ids(words).to(pipe.device))
    with tqdm(total=len(CHANGES) * len(blocks), desc="experiments", delay=1, leave=False, disable=quiet) as bar:
        for which in range(len(CHANGES)):
            outs = []
            for block in blocks:
                with _change(which, block, foreign, one_place, words):
                    outs.append(pipe(prompt, **asked))
                bar.update()
            changed.append([picture(out.images[0]) for out in outs])
            far.append([float((out.latents - latents).norm() / latents.norm()) for out in outs])
    return changed, far


@torch.no_grad()
def bench(pipe: FluxPipeline, prompt: str, other: str, *, steps: int = 6, **asked) -> Explorer:
    """Do each of five things to each block once, draw ``prompt``, and then look.

    The last two go on with tokens of a run of the prompt ``other`` from the same noise, as they come into the block:
    the words' or the picture's. ``5 x blocks + 2`` runs of a few ``steps`` are drawn at first, seconds on the
    miniature; ``asked`` as for the pipeline. Meanwhile the other run is in a temporary folder: of FLUX.1-dev at
    1024 x 1024, 10 GB. The judge (:mod:`fluxedu.nano.judge`) knows the miniature's world only.
    """
    quiet = not asked.get("progress", True)
    asked = asked | {"steps": steps, "trajectory": False, "progress": False}
    blocks = blocks_of(pipe)
    whole = pipe(one_prompt(prompt), **asked)
    with TemporaryDirectory(ignore_cleanup_errors=True) as home:
        with record("double.*.img", "double.*.txt", "single.*.x", to=Path(home) / "other"):
            theirs = pipe(one_prompt(other), **asked)
        foreign = open_recording(Path(home) / "other")  # the files, of which is read what is looked at
        changed, far = _experiments(pipe, prompt, foreign, whole.latents, asked, quiet)
    before, beside, table = picture(whole.images[0]), picture(theirs.images[0]), np.array(far)

    judged = cache(lambda change, block: told(read(changed[change][block])))

    def draw(block: int, change: int) -> View:
        pictures = before, changed[change][block], beside
        return bench_view(pictures, table, judged(change, block), blocks, (prompt, other), block, change)

    controls = [Choice("block", "block", blocks, len(blocks) // 2), Choice("change", "what is done", CHANGES)]
    return Explorer("Bench", controls, draw, widths=[2.6, 2.6, 2.6, 3.2])
