"""Experiments on one block: choose a block and a change to it, and compare the image before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from fluxedu.instruments.ablation import ablate
from fluxedu.instruments.interventions import intervene, patch
from fluxedu.instruments.lenses.run import blocks_of, check_one_prompt, enough_steps, few_steps_note
from fluxedu.instruments.recorder import record
from fluxedu.instruments.recording import Recording, open_recording
from fluxedu.nano.judge import Detections, detect
from fluxedu.sampling.latents import image_ids, text_ids
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, Slider, Try, View, check_request, explorer
from fluxedu.widgets.heads import latents_of_each
from fluxedu.widgets.panels import RGB, Lines, Pixels, difference_panel, to_rgb

CHANGES = (
    "remove the block",
    "remove its attention heads",
    "give all patches the same position",
    "use the other prompt's text tokens",
    "use the other prompt's image tokens",
)
OTHER_TEXT, OTHER_IMAGE = 3, 4  # the changes that take tokens from the other prompt's run


def describe_objects(detections: Detections) -> str:
    """The detected objects in words: ``red circle, blue square``."""
    return ", ".join(f"{found.color} {found.form}" for found in detections.objects) or "nothing"


def bench_view(
    images: tuple[RGB, RGB, RGB],
    distances: np.ndarray,
    detected: str,
    blocks: Sequence[str],
    prompts: tuple[str, str],
    block: int,
    change: int,
) -> View:
    """One experiment: the image before and after, an image to compare with, and the same change to the other blocks.

    ``images``: before, after, and the other prompt's · ``distances [changes, blocks]``: of latents · ``detected``: the
    objects that the judge detects after the change.
    """
    before, after, other = images
    if change >= OTHER_TEXT:
        comparison = Pixels(f"The other prompt: {prompts[1]}", other)
    else:
        comparison = difference_panel(before, after)
    row = distances[change]
    panels = [
        Pixels(f"Before: {prompts[0]}", before),
        Pixels(f"After: {blocks[block]}, {CHANGES[change]}", after),
        comparison,
        Lines("How much the latent changes, by block", range(len(blocks)), {CHANGES[change]: row.tolist()}, "block",
              "change of the latent / its norm", block, x_names=blocks),
    ]  # fmt: skip
    more = int((row > row[block]).sum())
    rank = f"{more} of the {len(blocks) - 1} other blocks change it more" if more else "no other block changes it more"
    text = f"{blocks[block]}, {CHANGES[change]}: the latent changes by {row[block]:.0%} of its norm ({rank}). "
    return View(panels, f"{text}The judge detects: {detected}.")


def _intervention(change: int, block: str, other: Recording, same_position: Tensor) -> intervene:
    if change == 0:
        return ablate(block, passes="both")
    if change == 1:
        return ablate(f"{block}.heads", passes="both")
    if change == 2:
        return patch(f"{block}.attn.rope", same_position)
    return patch(f"{block}.x", other, streams="txt" if change == OTHER_TEXT else "img", passes="both")


@explorer(example=lambda pipe: bench(pipe, EXAMPLE_PROMPT, EXAMPLE_PROMPT.replace("red", "green"), progress=False))
@torch.no_grad()
def bench(pipe: FluxPipeline, prompt: str, other: str, *, steps: int | None = None, **request) -> Explorer:
    """Make each of five changes to each block, draw ``prompt`` every time, and compare the images.

    The last two changes replace the text or image tokens that enter the block by those of a run of the prompt ``other``
    from the same noise. This takes ``5 x blocks + 2`` runs of ``steps`` steps, several at once: about 4 seconds for the
    42 runs of the miniature on one core. By default 8 steps, or the model's own number if that is smaller. An image is
    decoded when it is first shown. ``request``: as for the pipeline. Meanwhile a temporary folder holds the other run:
    10 GB for FLUX.1-dev at 1024 x 1024. The judge (:mod:`fluxedu.nano.judge`) detects the shapes of the miniature only.
    """
    check_request(request, "trajectory", "decode")
    request |= {"steps": enough_steps(pipe) if steps is None else steps}
    blocks, txt_len = blocks_of(pipe), pipe.prompt_encoder.tokenizer.length
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with record("*.x", to=Path(folder) / "other"):
            other_run = pipe(check_one_prompt(other), **request | {"progress": False})
        recording = open_recording(Path(folder) / "other")  # reads from the files only what is used
        axes = len(pipe.flux.config.axes_dim)
        ids = torch.zeros_like(image_ids(*other_run.latents.shape[-2:], axes))
        same_position = pipe.flux.rope(ids.to(pipe.device), text_ids(txt_len, axes).to(pipe.device))
        shape = len(CHANGES), len(blocks)
        changes = [_intervention(change, blocks[i], recording, same_position) for change, i in np.ndindex(shape)]
        latents = latents_of_each(pipe, [[], *changes], prompt, request, "experiments")
    before, changed = latents[:1], latents[1:].unflatten(0, shape)
    distances = ((changed - before[0]).float().flatten(2).norm(dim=-1) / before.float().norm()).numpy(force=True)

    @torch.no_grad()
    def decoded(latent: Tensor) -> RGB:
        return to_rgb(pipe.autoencoder.decode(latent)[0])

    @cache
    def after(change: int, block: int) -> tuple[RGB, str]:
        image = decoded(changed[change, block][None])
        return image, describe_objects(detect(image))

    first, second, note = decoded(before), to_rgb(other_run.images[0]), few_steps_note(pipe, request)

    def draw(block: int, change: int) -> View:
        image, objects = after(change, block)
        view = bench_view((first, image, second), distances, objects, blocks, (prompt, other), block, change)
        return replace(view, text=view.text + note)

    most = int(distances[0].argmax())
    return Explorer(
        "What happens to the image when one block is changed?",
        [Slider("block", "block", blocks, len(blocks) // 2), Choice("change", "change", CHANGES)],
        draw,
        widths=[2.6, 2.6, 2.6, 3.2],
        instruction="Choose a change and move through the blocks: in which blocks does the image change, and how?",
        tries=[
            Try("Remove the block that changes this image most", block=most, change=0),
            Try("Which block needs the positions of the patches?", block=int(distances[2].argmax()), change=2),
            Try("Can the other prompt's text tokens change the image?", block=int(distances[3].argmax()), change=3),
        ],
        play="block",
    )
