"""What a latent's numbers mean: change one cell of one channel, or a whole channel, and decode."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.sampling.images import Picture, to_tensor
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.asked import checked
from fluxedu.widgets.controls import Choice, Slider
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import enlarged, heat, picture, two_sided
from fluxedu.widgets.panels import Pixels

AMOUNTS = tuple(x / 2 for x in range(-8, 9))
REACH = ("one cell", "3 x 3 cells", "the whole channel")


def edited(latent: Tensor, channel: int, cell: tuple[int, int], reach: int, amount: float) -> Tensor:
    """``latent [C, h, w]`` with ``amount`` added to a channel, around a cell or everywhere."""
    changed, (row, column) = latent.clone(), cell
    around = slice(max(row - reach, 0), row + reach + 1), slice(max(column - reach, 0), column + reach + 1)
    where = (slice(None), slice(None)) if reach == 2 else around
    changed[(channel, *where)] += amount
    return changed


@torch.no_grad()
def latents_view(
    autoencoder: AutoEncoder,
    latent: Tensor,
    before: Tensor,
    channel: int,
    cell: tuple[int, int],
    reach: int,
    amount: float,
) -> View:
    """A channel after the edit, the picture decoded from it, and where it differs from ``before [3, H, W]``, the
    unedited one.
    """
    changed = edited(latent, channel, cell, reach, amount)
    after = autoencoder.decode(changed[None])[0].float().cpu()
    apart = (after.clamp(-1, 1) - before.clamp(-1, 1)).abs().amax(0) / 2  # of the colour that moves most
    moved = float((apart > 0.02).float().mean())
    shown = changed[channel]
    most = float(latent.abs().max())
    mark = None if reach == 2 else cell
    panels = [
        Pixels(
            f"channel {channel}, edited", enlarged(two_sided(shown, most), 256), tuple(shown.shape), mark,
            (f"{-most:.1f}", f"{most:.1f}"), "RdBu_r", pointer="cell",
        ),
        Pixels("decoded before", picture(before)),
        Pixels("decoded after", picture(after)),
        Pixels("how far a pixel's colour moves", heat(apart, 0.5), key=("0", "half of the range")),
    ]  # fmt: skip
    where = f"cell {cell}" if reach == 0 else f"the 3 x 3 cells around {cell}" if reach == 1 else "every cell"
    return View(panels, f"{amount:+g} in channel {channel}, {where}: {moved:.0%} of the pixels change visibly.")


@torch.no_grad()
def latents(pipe: FluxPipeline, image: Picture | str, *, seed: int = 0, **asked) -> Explorer:
    """Edit the latent of a picture (PIL, a tensor in [-1, 1] or, drawn from it, a prompt) and see it decoded."""
    if isinstance(image, str):
        latent = pipe(image, **checked(asked | {"seed": seed})).latents[0]
    else:
        x = to_tensor(image.convert("RGB") if isinstance(image, Image.Image) else image)
        latent = pipe.autoencoder.encode(x.to(pipe.device, pipe.dtype))[0]
    before = pipe.autoencoder.decode(latent[None])[0].float().cpu()
    channels, rows, columns = latent.shape
    controls = [
        Slider("channel", "channel", [str(i) for i in range(channels)], int(latent.flatten(1).std(1).argmax())),
        Slider("amount", "add", [f"{a:+g}" for a in AMOUNTS], len(AMOUNTS) - 1, AMOUNTS),
        Choice("reach", "to", REACH, 1),
    ]

    def draw(channel: int, amount: int, reach: int, cell: tuple[int, int]) -> View:
        return latents_view(pipe.autoencoder, latent, before, channel, cell, reach, AMOUNTS[amount])

    return Explorer("Latent", controls, draw, {"cell": (rows // 2, columns // 2)})
