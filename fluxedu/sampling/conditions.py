"""What the members of the family read besides text, as tokens.

    fill      channels after the noise: [64 noise | 64 masked picture | 256 mask]
    control   channels after the noise: [64 noise | 64 control picture]           (canny, depth)
    kontext   tokens after the picture's own, at ids (1, row, column)
    redux     tokens after T5's, made from a picture by the Redux head

Source: black-forest-labs/flux, sampling.py (prepare_fill, prepare_control, prepare_kontext, prepare_redux).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.errors import RequestError
from fluxedu.models.config import FluxConfig
from fluxedu.sampling.images import fitted
from fluxedu.sampling.latents import image_ids, pack
from fluxedu.sampling.request import Request

Encode = Callable[[Tensor], Tensor]  # pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]


def fold_mask(mask: Tensor, downscale: int = 8) -> Tensor:
    """A mask of pixels, ``[B, 1, H, W]``, 1 where to paint, as tokens ``[B, N, 4 * downscale**2]``.

    The ``downscale x downscale`` pixels of a latent cell become that cell's channels, so nothing of the
    mask's edge is lost; then 2 x 2 cells are one token, as for any latent.
    """
    b, _, h, w = mask.shape
    d = downscale
    cells = mask.reshape(b, h // d, d, w // d, d).permute(0, 2, 4, 1, 3)  # [B, d, d, H/d, W/d]
    return pack(cells.reshape(b, d * d, h // d, w // d))


def hidden(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture ``[B, 3, H, W]`` in [-1, 1] with grey, 0, where the mask is 1."""
    return picture * (1 - mask)


def fill_channels(picture: Tensor, mask: Tensor, encode: Encode, downscale: int = 8) -> Tensor:
    """What fill reads beside the noise, ``[B, N, 64 + 256]``: the picture with its hole, and the hole's mask."""
    seen = pack(encode(hidden(picture, mask)))
    return torch.cat([seen, fold_mask(mask, downscale).to(seen)], dim=-1)


def reference_ids(height: int, width: int) -> Tensor:
    """Positions of a reference picture's tokens, (1, row, column): the same places, another frame."""
    ids = image_ids(height, width)
    ids[:, 0] = 1
    return ids


def reference_cells(asked: Request, downscale: int) -> tuple[int, int]:
    """Rows and columns of a reference picture's latent: its own size, in whole patches."""
    height, width = (2 * max(1, round(side / (2 * downscale))) for side in asked.reference.shape[-2:])
    return height, width


# ---------------------------------------------------------------- what a request brings, ready for every step


@dataclass(frozen=True)
class Given:
    """What the pictures of a request are to the transformer, the same in every step."""

    channels: Tensor | None = None  # [1, N, C], after each token's own
    tokens: Tensor | None = None  # [1, M, 64], behind the picture's own
    ids: Tensor | None = None  # [M, 3], where those are

    def around(self, x: Tensor) -> Tensor:
        """The state ``[B, N, 64]`` with what is given beside and behind its tokens."""
        if self.channels is not None:
            x = torch.cat([x, self.channels.expand(len(x), -1, -1)], dim=-1)
        if self.tokens is not None:
            x = torch.cat([x, self.tokens.expand(len(x), -1, -1)], dim=1)
        return x

    def places(self, ids: Tensor) -> Tensor:
        """The ids of the state's tokens, and of those behind them."""
        return ids if self.ids is None else torch.cat([ids, self.ids.to(ids)])


def picture_and_mask(asked: Request, downscale: int) -> tuple[Tensor, Tensor]:
    """A request's image and mask, in the size that is drawn: ``[1, 3, H, W]`` and ``[1, 1, H, W]``."""
    picture = fitted(asked.image, asked.shape, downscale)
    return picture, F.interpolate(asked.mask, picture.shape[-2:], mode="nearest")


def read(asked: Request, encode: Encode, downscale: int) -> Given:
    """Encode the pictures of a request."""
    if asked.mask is not None:
        return Given(channels=fill_channels(*picture_and_mask(asked, downscale), encode, downscale))
    if asked.control is not None:
        return Given(channels=pack(encode(fitted(asked.control, asked.shape, downscale))))
    if asked.reference is not None:
        cells = reference_cells(asked, downscale)
        latent = encode(fitted(asked.reference, cells, downscale))
        return Given(tokens=pack(latent), ids=reference_ids(*cells))
    return Given()


def pasted(drawn: Tensor, asked: Request, downscale: int) -> Tensor:
    """What was drawn inside the mask, and the request's own pixels outside it, which the autoencoder would soften."""
    picture, mask = (of.to(drawn) for of in picture_and_mask(asked, downscale))
    return torch.where(mask > 0.5, drawn, picture)


def reads(config: FluxConfig, downscale: int) -> str:
    """What a transformer's channels are for: ``text`` (no more than noise), ``mask`` or ``control``."""
    more = config.in_channels - config.out_channels
    kinds = {0: "text", config.out_channels: "control", config.out_channels + 4 * downscale**2: "mask"}
    return kinds.get(more, "unknown")


def check_fits(config: FluxConfig, downscale: int, has_redux: bool, **pictures) -> None:
    """Refuse pictures the model cannot read, and the lack of one that it must have: RequestError."""
    kind = reads(config, downscale)
    brought = {name for name, picture in pictures.items() if picture is not None}
    if kind == "mask" and not {"image", "mask"} <= brought:
        raise RequestError("this model fills holes: give it image= and mask=, the mask white where it is to paint.")
    if kind == "control" and "control" not in brought:
        raise RequestError("this model follows a control picture: give it control=, edges or depths as it was trained.")
    if "mask" in brought and kind != "mask":
        raise RequestError("mask= needs a model that fills holes, such as nano-fill; this one does not read a mask.")
    if "control" in brought and kind != "control":
        raise RequestError("control= needs a model such as nano-canny; this one does not read a control picture.")
    if "reference" in brought and kind != "text":
        raise RequestError("reference= needs a model such as nano-kontext; this one reads another kind of picture.")
    if "image_prompt" in brought and not has_redux:
        raise RequestError("image_prompt= needs a Redux head, as nano-redux has; this model reads words only.")
    if {"image", "reference"} <= brought:
        raise RequestError("give image= (to begin from) or reference= (to be edited), not both.")
