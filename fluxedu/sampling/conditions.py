"""The pictures that members of the FLUX.1 family read besides text, as tokens.

    fill      extra channels: [64 noise | 64 masked picture | 256 mask]
    control   extra channels: [64 noise | 64 control picture]              (canny, depth)
    kontext   extra tokens after the image's own, with position ids (1, row, column)
    FLUX.2    the same with position ids (10, row, column, 0); 20, 30, ... for further pictures
    redux     extra tokens after T5's, from the Redux head

Source: black-forest-labs/flux, sampling.py (prepare_fill, prepare_control, prepare_kontext, prepare_redux).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.errors import RequestError, describe
from fluxedu.models.config import Flux2Config, TransformerConfig
from fluxedu.sampling.checks import warn
from fluxedu.sampling.images import Picture, resized, to_mask, to_tensor, usual_size
from fluxedu.sampling.latents import image_ids, pack
from fluxedu.sampling.request import Request

Encode = Callable[[Tensor], Tensor]  # pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]


@dataclass(frozen=True)
class Conditions:
    """The pictures of B requests as the transformer reads them; the same in every step."""

    channels: Tensor | None = None  # [B, N, C], concatenated to every token's own channels
    tokens: Tensor | None = None  # [B, M, 64], concatenated after the image's own tokens
    ids: Tensor | None = None  # [M, 3], the position ids of those tokens

    @staticmethod
    def stacked(each: list[Conditions]) -> Conditions:
        """Those of several images as one batch."""

        def stack(parts: list[Tensor | None]) -> Tensor | None:
            return None if parts[0] is None else torch.cat(parts)

        return Conditions(stack([one.channels for one in each]), stack([one.tokens for one in each]), each[0].ids)

    def join(self, x: Tensor) -> Tensor:
        """The state ``[B, N, 64]`` with the extra channels and tokens."""
        if self.channels is not None:
            x = torch.cat([x, self.channels], dim=-1)
        if self.tokens is not None:
            x = torch.cat([x, self.tokens], dim=1)
        return x

    def join_ids(self, ids: Tensor) -> Tensor:
        """The position ids of the state's tokens and of the extra ones."""
        return ids if self.ids is None else torch.cat([ids, self.ids.to(ids)])


def encode_conditions(request: Request, encode: Encode, downscale: int, axes: int = 3) -> Conditions:
    """Encode the pictures of a request; ``axes`` is the number of position ids of a token."""
    if request.mask is not None:
        picture, mask = picture_and_mask(request, downscale)
        return Conditions(channels=fill_channels(picture, mask, encode, downscale))
    if request.control is not None:
        return Conditions(channels=pack(encode(resized(request.control, request.shape, downscale))))
    if request.references:
        shapes = [reference_shape(picture, downscale) for picture in request.references]
        pictures = zip(request.references, shapes, strict=True)
        tokens = [pack(encode(resized(picture, shape, downscale))) for picture, shape in pictures]
        return Conditions(tokens=torch.cat(tokens, dim=1), ids=all_reference_ids(request, downscale, axes))
    return Conditions()


def fold_mask(mask: Tensor, downscale: int = 8) -> Tensor:
    """A pixel mask ``[B, 1, H, W]``, 1 where to paint, as tokens ``[B, N, 4 * downscale**2]``.

    The ``downscale x downscale`` pixels of a latent cell become channels of that cell, so the mask keeps its full
    resolution; then 2 x 2 cells are one token, as for any latent.
    """
    b, _, h, w = mask.shape
    d = downscale
    cells = mask.reshape(b, h // d, d, w // d, d).permute(0, 2, 4, 1, 3)  # [B, d, d, H/d, W/d]
    return pack(cells.reshape(b, d * d, h // d, w // d))


def masked(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture ``[B, 3, H, W]`` in [-1, 1], grey (0) where the mask is 1."""
    return picture * (1 - mask)


def fill_channels(picture: Tensor, mask: Tensor, encode: Encode, downscale: int = 8) -> Tensor:
    """The extra channels of fill, ``[B, N, 64 + 256]``: the masked picture's latent and the mask."""
    latent = pack(encode(masked(picture, mask)))
    return torch.cat([latent, fold_mask(mask, downscale).to(latent)], dim=-1)


def reference_ids(height: int, width: int, axes: int = 3, index: int = 0) -> Tensor:
    """Position ids of a reference picture's tokens: (1, row, column), frame 1 instead of 0.

    In FLUX.2 (``axes=4``) they are (10, row, column, 0) for the first picture, (20, ...) for the second (``index=1``).
    """
    ids = image_ids(height, width, axes)
    ids[:, 0] = 10 * (index + 1) if axes == 4 else 1
    return ids


def all_reference_ids(request: Request, downscale: int, axes: int = 3) -> Tensor:
    """Position ids of the tokens of all reference pictures of a request, ``[M, axes]``."""
    shapes = [reference_shape(picture, downscale) for picture in request.references]
    return torch.cat([reference_ids(*shape, axes, index) for index, shape in enumerate(shapes)])


def reference_shape(picture: Tensor, downscale: int) -> tuple[int, int]:
    """Rows and columns of a reference picture's latent: its own size in whole patches."""
    height, width = picture.shape[-2:]
    return 2 * max(1, round(height / (2 * downscale))), 2 * max(1, round(width / (2 * downscale)))


def picture_and_mask(request: Request, downscale: int) -> tuple[Tensor, Tensor]:
    """A request's image and mask at the size of the result: ``[1, 3, H, W]`` and ``[1, 1, H, W]``."""
    picture = resized(request.image, request.shape, downscale)
    return picture, F.interpolate(request.mask, picture.shape[-2:], mode="nearest")


def paste_outside(drawn: Tensor, requests: list[Request], downscale: int) -> Tensor:
    """``drawn`` inside the masks; outside them the requests' own pixels, which the autoencoder would soften."""
    pictures, masks = zip(*(picture_and_mask(request, downscale) for request in requests), strict=True)
    return torch.where(torch.cat(masks).to(drawn) > 0.5, drawn, torch.cat(pictures).to(drawn))


def extra_input(config: TransformerConfig, downscale: int) -> str:
    """What a transformer's input channels are for besides noise: ``text`` (nothing), ``mask`` or ``control``."""
    extra = config.in_channels - config.out_channels
    kinds = {0: "text", config.out_channels: "control", config.out_channels + 4 * downscale**2: "mask"}
    return kinds.get(extra, "unknown")


def read_pictures(pictures: dict[str, Picture | list[Picture] | None]) -> dict[str, Tensor | list[Tensor] | None]:
    """The pictures of a call by the name of their argument, as tensors; the references as a list.

    Raises RequestError for what is no picture, and for a list of pictures where the model reads one.
    """
    tensors = {}
    for name, picture in pictures.items():
        is_list = isinstance(picture, (list, tuple))
        if is_list and (name != "reference" or not picture):
            several = "" if name == "reference" else "; FLUX.2 edits several pictures, reference=[a, b]"
            raise RequestError(f"{name}= must be a picture, not {describe(picture)}{several}.")
        if name == "reference" and picture is not None:
            tensors[name] = [to_tensor(one) for one in (picture if is_list else [picture])]
        else:
            tensors[name] = None if picture is None else to_mask(picture) if name == "mask" else to_tensor(picture)
    return tensors


def default_size(pictures: dict, side: int, downscale: int, is_given: bool) -> tuple[int, int]:
    """Height and width of the image by default: those of the picture that it starts from, follows or edits.

    pictures: as :func:`read_pictures` returns them. Of several references, the first counts. Photos are scaled down,
    see :func:`fluxedu.sampling.images.usual_size`; this replaces references, whose tokens are read in every step. A
    warning says so, unless the size is given and the picture is no reference.
    """
    references = pictures.get("reference") or []
    for i, picture in enumerate(references):
        height, width = picture.shape[-2:]
        usual = usual_size(height, width, side, 2 * downscale)
        if usual != (height, width):
            warn(f"reference= has {height} x {width} pixels and is scaled down to {usual[0]} x {usual[1]}.")
            references[i] = resized(picture, tuple(pixels // downscale for pixels in usual), downscale)
    name = next((name for name in ("image", "control") if pictures[name] is not None), None)
    if name is None:
        return tuple(references[0].shape[-2:]) if references else (side, side)
    height, width = pictures[name].shape[-2:]
    usual = usual_size(height, width, side, 2 * downscale)
    if usual != (height, width) and not is_given:
        hint = "; pass height= and width= for another size"
        warn(f"{name}= has {height} x {width} pixels and is scaled down to {usual[0]} x {usual[1]}{hint}.")
    return usual


def check_pictures(config: TransformerConfig, downscale: int, has_redux: bool, pictures: dict) -> None:
    """Raises RequestError for pictures that the model cannot read, and for missing ones that it needs."""
    kind = extra_input(config, downscale)
    names = {name for name, picture in pictures.items() if picture is not None}
    if kind == "mask" and not {"image", "mask"} <= names:
        raise RequestError("this model fills holes: pass image= and mask=, the mask white where it is to paint.")
    if kind == "control" and "control" not in names:
        raise RequestError("this model follows a control picture: pass control=, edges or depths as in its training.")
    if "mask" in names and kind != "mask":
        raise RequestError("mask= needs a model that fills holes, such as nano-fill; this one does not read a mask.")
    if "control" in names and kind != "control":
        raise RequestError("control= needs a model such as nano-canny; this one does not read a control picture.")
    if "reference" in names and kind != "text":
        raise RequestError("reference= needs a model such as nano-kontext; this one reads another kind of picture.")
    if "reference" in names and len(pictures["reference"]) > 1 and not isinstance(config, Flux2Config):
        count = len(pictures["reference"])
        raise RequestError(f"reference= must be one picture, not {count}; only FLUX.2 reads several, fe.load('klein').")
    if "image_prompt" in names and not has_redux:
        raise RequestError("image_prompt= needs a Redux head, as nano-redux has; this model reads text only.")
    if {"image", "reference"} <= names:
        raise RequestError("pass image= (to start from) or reference= (to be edited), not both.")
