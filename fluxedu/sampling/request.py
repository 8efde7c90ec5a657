"""The arguments of a pipeline call, checked before anything is computed: one :class:`Request` per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxedu.errors import RequestError, check_choice, check_integer, check_number, describe
from fluxedu.sampling.latents import latent_size
from fluxedu.sampling.limits import check_setting
from fluxedu.sampling.solvers import SOLVERS, active

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: arguments of diffusers' FluxPipeline -> what they are here
DIFFUSERS_NAMES = {
    "num_inference_steps": "steps=",
    "guidance_scale": "guidance=",
    "num_images_per_prompt": "num_images=",
    "generator": "seed=, a number for each image",
    "sigmas": "times=, with 0 at the end",
    "timesteps": "times=, from 1 (noise) to 0",
    "mu": "shift=, which is e to the power of mu",
    "prompt_embeds": "a Conditioning in place of the prompt, such as pipe.prompt_encoder(['a red circle'])",
    "pooled_prompt_embeds": "a Conditioning in place of the prompt, such as pipe.prompt_encoder(['a red circle'])",
    "prompt_2": "prompt=; for another text in T5 than in CLIP, pass a Conditioning",
    "negative_prompt_2": "negative_prompt=",
    "mask_image": "mask=",
    "control_image": "control=",
    "ip_adapter_image": "image_prompt=, with a Redux model",
    "output_type": "decode=False for latents; images are PIL images",
    "return_dict": "not needed: the result is an Output with images, latents and trajectory",
    "callback_on_step_end": "fe.record and fe.intervene",
    "joint_attention_kwargs": "fe.load(lora=..., lora_scale=...)",
    "max_sequence_length": "the length of the tokenizer, pipe.prompt_encoder.t5_tokenizer.length",
}


def refuse_unknown(arguments: dict) -> None:
    """Raises RequestError for an argument that the pipeline does not have; it names the one that was meant."""
    for name in arguments:
        hint = f"here it is {DIFFUSERS_NAMES[name]}" if name in DIFFUSERS_NAMES else "help(pipe) lists them all"
        raise RequestError(f"the pipeline has no argument {name}; {hint}.")


def checked_times(times) -> Tensor:
    """The user's own schedule, ``[N+1]`` falling times in [0, 1]; raises RequestError."""
    try:
        found = torch.as_tensor(times, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0, device="cpu")
    falls = found.ndim == 1 and len(found) >= 2 and bool((found[1:] < found[:-1]).all())
    if not falls or not 0 <= float(found[-1]) <= float(found[0]) <= 1:
        raise RequestError(f"times must fall from at most 1 to at least 0, such as (1, 0.5, 0), not {describe(times)}.")
    return found


def checked_latents(latents, count: int, channels: int) -> list[Tensor]:
    """The user's own start, one latent ``[1, C, h, w]`` per image; raises RequestError."""
    shape = f"({count} or 1, {channels}, rows, columns), with even numbers of rows and columns"
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or latents.ndim != 4:
        raise RequestError(f"latents must be a tensor of shape {shape}, not {describe(latents)}.")
    b, c, rows, columns = latents.shape
    if b not in (1, count) or c != channels or rows % 2 or columns % 2 or 0 in latents.shape:
        raise RequestError(f"latents must have the shape {shape}, not {list(latents.shape)}.")
    if not torch.isfinite(latents).all():
        raise RequestError("latents must be finite numbers, but these have NaN or infinity.")
    return [latents[i : i + 1] for i in range(b)] * (count // b)


def checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype, given by name or as it is; float32 for None."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    return DTYPES[check_choice("dtype", "float32" if dtype is None else dtype, DTYPES)]


def as_prompts(prompt, name: str = "prompt") -> list[str]:
    """One prompt or several, as a list. The empty prompt is allowed, an empty list is not."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, (list, tuple)) else None
    if not prompts or not all(isinstance(p, str) and _is_utf8(p) for p in prompts):
        raise RequestError(f"{name} must be a string or a non-empty list of strings, not {describe(prompt)}.")
    return prompts


def _is_utf8(text: str) -> bool:
    """False for half a character (a lone surrogate), which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Request:
    """The checked arguments of one image; pictures are ``[1, 3, H, W]`` in [-1, 1], or None."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    true_cfg_scale: float
    guidance_interval: tuple[float, float]
    shape: tuple[int, int]  # rows and columns of the latent
    solver: str
    strength: float
    image: Tensor | None = None
    mask: Tensor | None = None  # [1, 1, H, W], 1 where to paint
    paste: bool = True
    control: Tensor | None = None
    references: tuple[Tensor, ...] = ()  # pictures that the prompt edits; they may differ in size
    image_prompt: Tensor | None = None
    latents: Tensor | None = None  # [1, C, h, w], in place of noise
    shift: float | None = None  # of the schedule, e^mu; None: the variant's own

    @property
    def is_image_to_image(self) -> bool:
        """Whether sampling starts from ``image``; with a mask, the image is an input of the model instead."""
        return self.image is not None and self.mask is None

    @property
    def uses_cfg(self) -> bool:
        """Whether classifier-free guidance is on: two model evaluations, with the prompt and the negative prompt."""
        return self.true_cfg_scale != 1.0

    def uses_cfg_at(self, t: float) -> bool:
        """Whether classifier-free guidance is on at the time ``t``."""
        return self.uses_cfg and active(t, self.guidance_interval)


def make_requests(
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
    guidance_embed: bool,
    downscale: int,
    paste: bool = True,
    num_images=1,
    latents=None,
    shift=None,
    channels: int = 16,
    references: list[Tensor] = (),
    **pictures: Tensor | None,
) -> list[Request]:
    """Check all arguments and pair prompts with seeds: one Request per image. Raises RequestError.

    ``guidance_embed``: the model has a guidance input; without one, ``guidance`` is the scale of classifier-free
    guidance. ``references``: each a batch of tensors, with one picture for all images or one for each. ``pictures``:
    image, mask, control and image_prompt, each a batch of tensors or None.
    """
    prompts = as_prompts(prompt)
    num_images = check_integer("num_images", num_images, 1, 4096, "it is the number of images of each prompt")
    if num_images > 1:
        if isinstance(seed, (list, tuple)):
            raise RequestError("seed must be one number with num_images=, which draws seed, seed + 1, ...")
        first = check_integer("seed", seed, 0, 2**63 - 1 - num_images, "any number will do, such as 0")
        seed = [first + i for _ in prompts for i in range(num_images)]
        prompts = [prompt for prompt in prompts for _ in range(num_images)]
    negatives = [""] if negative_prompt is None else as_prompts(negative_prompt, "negative_prompt")
    count = max(len(prompts), len(seed) if isinstance(seed, (list, tuple)) else 1)
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * count
    if not seeds:
        raise RequestError("seed must be a whole number or a list of them, not an empty list.")
    seeds = [check_setting("seed", one) for one in seeds]

    check_choice("solver", solver, SOLVERS)
    guidance = check_setting("guidance", guidance)
    if true_cfg_scale is None:
        true_cfg_scale = 1.0 if guidance_embed or guidance == 0 else guidance
    true_cfg_scale = check_setting("true_cfg_scale", true_cfg_scale)
    if negative_prompt is not None and true_cfg_scale == 1.0:
        raise RequestError("negative_prompt needs classifier-free guidance; set true_cfg_scale above 1.")
    common = {
        "steps": check_setting("steps", steps),
        "guidance": guidance,
        "true_cfg_scale": true_cfg_scale,
        "guidance_interval": _interval(guidance_interval),
        "shape": _latent_shape(height, width, downscale, rounding),
        "solver": solver,
        "paste": bool(paste),
        "shift": shift if shift is None else check_number("shift", shift, 0.01, 100, "1 is no shift, dev's is near 3"),
        "strength": check_setting("strength", strength),
    }

    per_image = {"prompt": prompts, "negative_prompt": negatives, "seed": seeds}
    per_image["latents"] = [None] if latents is None else checked_latents(latents, count, channels)
    for name, batch in pictures.items():
        per_image[name] = [None] if batch is None else [batch[i : i + 1] for i in range(len(batch))]
    references = [[batch[i : i + 1] for i in range(len(batch))] for batch in references]
    for name, items in [*per_image.items(), *(("reference", one) for one in references)]:
        if len(items) not in (1, count):
            allowed = "1" if count == 1 else f"1 or {count}"
            raise RequestError(f"{name} has {len(items)} entries for {count} images; give {allowed}.")
    requests = []
    for i in range(count):
        own = {name: items[i] if len(items) > 1 else items[0] for name, items in per_image.items()}
        own["references"] = tuple(items[i] if len(items) > 1 else items[0] for items in references)
        requests.append(Request(**own, **common))
    return requests


def _latent_shape(height, width, downscale: int, rounding: str) -> tuple[int, int]:
    """Pixels to rows and columns of the latent."""
    height, width = check_setting("height", height), check_setting("width", width)
    try:
        shape = latent_size(height, width, downscale, rounding)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if 0 in shape:
        raise RequestError(
            f"height x width must round to at least one patch, which {height} x {width} does not; "
            f"use more pixels, or rounding='up'."
        )
    return shape


def _interval(interval) -> tuple[float, float]:
    if not isinstance(interval, (list, tuple)) or len(interval) != 2:
        raise RequestError(f"guidance_interval must be two times such as (0.2, 0.8), not {describe(interval)}.")
    low, high = (check_number("guidance_interval", t, 0, 1, "1 is noise, 0 is the image") for t in interval)
    if low > high:
        raise RequestError(f"guidance_interval must be (low, high), not {describe(interval)}.")
    return low, high
