"""What was asked of the pipeline, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from fluxedu.errors import RequestError, describe
from fluxedu.sampling.latents import latent_size
from fluxedu.sampling.solvers import SOLVERS

LARGEST = 4096  # pixels a side
MOST_STEPS = 1000
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _whole(name: str, value, low: int, high: int, advice: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, not {describe(value)}; {advice}.")
    return int(value)


def _number(name: str, value, low: float, high: float, advice: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:  # nor is NaN
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, not {describe(value)}; {advice}.")
    return float(value)


def checked_device(device: str | torch.device) -> torch.device:
    """The device, if it can be used here, and which GPU where only "cuda" is said; raises RequestError."""
    try:
        wanted = torch.device(device)
        torch.zeros(1, device=wanted).item()  # raises where there is no such device, and on "meta", which holds nothing
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        have = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
        raise RequestError(
            f"device {str(device)!r} cannot be used here; use 'cpu'{f' or {have!r}' if have else ''}."
        ) from None
    if wanted.type == "cuda" and wanted.index is None:  # some of torch.cuda takes no device without a number
        return torch.device("cuda", torch.cuda.current_device())
    return wanted


def checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype by name or as it is; float32 when None."""
    if dtype is not None and dtype not in DTYPES.values() and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise RequestError(f"dtype must be one of {', '.join(DTYPES)}, not {describe(dtype)}.")
    return dtype if isinstance(dtype, torch.dtype) else DTYPES[dtype or "float32"]


def prompts_of(prompt, name: str = "prompt") -> list[str]:
    """One prompt or a list of them, as a list. The empty prompt is a prompt like any other."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, (list, tuple)) else None
    if not prompts or not all(isinstance(p, str) and _in_utf8(p) for p in prompts):
        raise RequestError(f"{name} must be a string or a list of strings (not empty), not {describe(prompt)}.")
    return prompts


def _in_utf8(text: str) -> bool:
    """Half a character (a lone surrogate) is none that a tokenizer can read."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def seeds_of(seed, pictures: int) -> list[int]:
    """A seed for each picture: one number for all of them, or a list."""
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * pictures
    if not seeds:
        raise RequestError("seed must be a whole number or a list of them, not an empty list.")
    return [_whole("seed", s, 0, 2**63 - 1, "any number will do, 0 is fine") for s in seeds]


@dataclass(frozen=True)
class Request:
    """A checked request for one picture; ``image`` is ``[1, 3, H, W]`` in [-1, 1] or None."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    true_cfg_scale: float
    interval: tuple[float, float]
    shape: tuple[int, int]  # latent rows and columns
    solver: str
    image: Tensor | None
    strength: float
    mask: Tensor | None = None  # [1, 1, H, W], 1 where to paint
    paste: bool = True
    control: Tensor | None = None  # these as image
    reference: Tensor | None = None
    image_prompt: Tensor | None = None

    @property
    def begins_from_image(self) -> bool:
        """Image to image; with a mask the image is looked at instead."""
        return self.image is not None and self.mask is None

    @property
    def guided(self) -> bool:
        """Are two passes a step needed, with and without the prompt?"""
        return self.true_cfg_scale != 1.0


def requests_of(
    *,
    prompt,
    negative_prompt,
    seed,
    steps,
    guidance,
    true_cfg_scale,
    guidance_interval,
    height,
    width,
    rounding,
    solver,
    strength,
    embedded: bool,
    downscale: int,
    paste: bool = True,
    **pictures: Tensor | None,
) -> list[Request]:
    """Check everything and pair prompts with seeds: a Request a picture. Raises RequestError, one sentence.

    ``embedded``: has the model a guidance input? If not, ``guidance`` is classifier-free guidance's scale.
    ``pictures``: image, mask, control, reference and image_prompt, each a batch of tensors or None.
    """
    prompts = prompts_of(prompt)
    count = max(len(prompts), len(seed) if isinstance(seed, (list, tuple)) else 1)
    negatives = [""] if negative_prompt is None else prompts_of(negative_prompt, "negative_prompt")
    given = {"prompt": prompts, "negative": negatives, "seed": seeds_of(seed, count)}
    given |= {name: [None] if of is None else [of[i : i + 1] for i in range(len(of))] for name, of in pictures.items()}
    for name, items in given.items():
        if len(items) not in (1, count):
            said_name = "negative_prompt" if name == "negative" else name
            raise RequestError(f"there are {len(items)} of {said_name} for {count} pictures; give 1 or {count}.")
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise RequestError(f"solver must be one of {', '.join(SOLVERS)}, not {describe(solver)}.")
    guidance = _number("guidance", guidance, 0, 100, "3.5 is usual")
    common = {
        "steps": _whole("steps", steps, 1, MOST_STEPS, "20 is a good start"),
        "guidance": guidance,
        "true_cfg_scale": _cfg_scale(true_cfg_scale, guidance, embedded, negative_prompt is not None),
        "interval": _interval(guidance_interval),
        "shape": _shape(height, width, downscale, rounding),
        "solver": solver,
        "paste": bool(paste),
        "strength": _number("strength", strength, 0.001, 1, "1 keeps nothing of the image, small numbers keep much"),
    }
    rows = zip(*(items * count if len(items) == 1 else items for items in given.values()), strict=True)
    return [Request(**dict(zip(given, row, strict=True)), **common) for row in rows]


def _cfg_scale(scale, guidance: float, embedded: bool, negative: bool) -> float:
    """Classifier-free guidance's scale: as asked, else the guidance of a model that has no input for it."""
    if scale is None:
        scale = 1.0 if embedded or guidance == 0 else guidance
    scale = _number("true_cfg_scale", scale, 0, 100, "1 is off, 3 to 5 is usual")
    if negative and scale == 1.0:
        raise RequestError("negative_prompt acts through classifier-free guidance only; set true_cfg_scale above 1.")
    return scale


def _shape(height, width, downscale: int, rounding: str) -> tuple[int, int]:
    """Pixels to latent rows and columns."""
    height, width = (
        _whole(name, side, 16, LARGEST, "it is in pixels") for name, side in (("height", height), ("width", width))
    )
    try:
        shape = latent_size(height, width, downscale, rounding)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if 0 in shape:
        raise RequestError(f"{height} x {width} pixels round down to nothing; ask for more, or rounding='up'.")
    return shape


def _interval(interval) -> tuple[float, float]:
    if not isinstance(interval, (list, tuple)) or len(interval) != 2:
        raise RequestError(f"guidance_interval must be two times such as (0.2, 0.8), not {describe(interval)}.")
    low, high = (_number("guidance_interval", t, 0, 1, "time 1 is noise, 0 is the picture") for t in interval)
    if low > high:
        raise RequestError(f"guidance_interval must be (low, high), not {describe(interval)}.")
    return low, high
