"""Editing a latent: add a number to one cell of a channel, or to a whole channel, and decode."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fluxedu.errors import InstrumentError
from fluxedu.instruments.lenses.run import enough_steps, few_steps_note
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.sampling.images import Picture, to_tensor
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, Slider, Try, View, check_request, explorer
from fluxedu.widgets.panels import Pixels, diverging, sequential, to_rgb, upscale

AMOUNTS = tuple(x / 2 for x in range(-8, 9))
AREAS = ("one cell", "3 x 3 cells", "the whole channel")


def edited(latent: Tensor, channel: int, cell: tuple[int, int], area: int, amount: float) -> Tensor:
    """``latent [C, h, w]`` with ``amount`` added to a channel, at or around a cell or everywhere (index into AREAS)."""
    latent, (row, column) = latent.clone(), cell
    if area == 2:
        latent[channel] += amount
    else:
        latent[channel, max(row - area, 0) : row + area + 1, max(column - area, 0) : column + area + 1] += amount
    return latent


@torch.no_grad()
def latents_view(
    autoencoder: AutoEncoder,
    latent: Tensor,
    before: Tensor,
    channel: int,
    cell: tuple[int, int],
    area: int,
    amount: float,
) -> View:
    """A channel after the edit, the image decoded from it, and its difference from ``before [3, H, W]``."""
    new = edited(latent, channel, cell, area, amount)
    after = autoencoder.decode(new[None])[0].float().cpu()
    difference = (after.clamp(-1, 1) - before.clamp(-1, 1)).abs().amax(0) / 2  # of the colour that changes most
    visible = float((difference > 0.02).float().mean())
    vmax, mark = float(latent.abs().max()), None if area == 2 else cell
    panels = [
        Pixels(
            f"Channel {channel} of the latent after the edit", upscale(diverging(new[channel], vmax), 256),
            tuple(new[channel].shape), mark, (f"{-vmax:.1f}", f"{vmax:.1f}"), "RdBu_r",
            unit="value of the latent", pointer="cell",
        ),
        Pixels("Decoded before the edit", to_rgb(before)),
        Pixels("Decoded after the edit", to_rgb(after)),
        Pixels("Change of each pixel", sequential(difference, 0.5), key=("0", "0.5 or more"),
               unit="largest change of a colour, as a share of its range"),
    ]  # fmt: skip
    here = f"row {cell[0] + 1}, column {cell[1] + 1}"
    where = (f"in {here}", f"in the 3 x 3 cells around {here}", "in every cell")[area]
    return View(panels, f"{amount:+g} in channel {channel}, {where}: {visible:.0%} of the pixels change visibly.")


@explorer(example=lambda pipe: latents(pipe, EXAMPLE_PROMPT, steps=enough_steps(pipe), progress=False))
@torch.no_grad()
def latents(pipe: FluxPipeline, image: Picture | str, *, seed: int = 0, **request) -> Explorer:
    """Edit the latent of an image (PIL, a tensor in [-1, 1], or a prompt to draw first) and see it decoded.

    This takes one run for a prompt, one encoding for an image, and one decoding for each move.
    """
    note = ""
    if isinstance(image, str):
        latent = pipe(image, **check_request(request | {"seed": seed})).latents[0]
        note = few_steps_note(pipe, request)
    else:
        x = to_tensor(image)
        if min(x.shape[-2:]) < 16:
            raise InstrumentError(f"image must have at least 16 x 16 pixels, not {x.shape[-2]} x {x.shape[-1]}.")
        latent = pipe.autoencoder.encode(x.to(pipe.device, pipe.dtype))[0]
    before = pipe.autoencoder.decode(latent[None])[0].float().cpu()
    channels, rows, columns = latent.shape
    spread = latent.flatten(1).std(1)
    controls = [
        Slider("channel", "channel", [str(i) for i in range(channels)], int(spread.argmax())),
        Slider("amount", "add", [f"{a:+g}" for a in AMOUNTS], len(AMOUNTS) - 1, AMOUNTS),
        Choice("area", "to", AREAS, 1),
    ]

    def draw(channel: int, amount: int, area: int, cell: tuple[int, int]) -> View:
        view = latents_view(pipe.autoencoder, latent, before, channel, cell, area, AMOUNTS[amount])
        return replace(view, text=view.text + note)

    return Explorer(
        "What do the numbers of a latent mean?",
        controls,
        draw,
        {"cell": (rows // 2, columns // 2)},
        instruction="Point at a cell on the left: the amount is added there, and the decoder draws the changed latent.",
        tries=[
            Try("How far does the change of a single cell reach?", area="one cell"),
            Try("What does this channel mean for the whole image?", area="the whole channel"),
            Try("Does the channel that varies least matter as much?", channel=int(spread.argmin())),
        ],
    )
