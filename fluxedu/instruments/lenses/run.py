"""How lenses are registered and run, and helpers for writing one.

A lens that needs a single run is a generator; this function is all you have to write::

    @lens
    def my_lens(pipe: FluxPipeline, prompt: str) -> LensRun:
        rec = record("*.attn.map", passes="prompted", reduce="entropy")
        out = yield rec  # now the pipeline draws the image
        return stack_blocks(rec, pipe, "attn.map")

    my_lens(pipe, "a red circle", seed=1)  # draws the image and returns the result
    my_lens(pipe, ["a red circle", "a blue square"])  # for each prompt; the result has a first axis, ``picture``
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps

import torch
from PIL import Image

from fluxedu.errors import InstrumentError, check_choice, checked, describe
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.sampling.pipeline import FluxPipeline, Output

#: a lens that yields its recorder, is sent the pipeline's output, and returns its result
LensRun = Generator[record, Output, Named]
LENSES: dict[str, Callable[..., Named]] = {}  # all lenses by name
SINGLE_RUN_LENSES: dict[str, Callable[..., LensRun]] = {}  # the generators of those that can share a run


@dataclass(frozen=True, eq=False)
class LensResult(Named):
    """A measurement with the ``images`` that it was made on, one per ``picture``.

    It is a :class:`Named` with one attribute more, not a pair of both, so that figures and arithmetic take it as it is.
    What is computed from it, such as ``result.mean("block")``, is a plain Named, since that may mix several images.
    """

    images: list[Image.Image] = field(default_factory=list)


def lens(function: Callable) -> Callable[..., LensResult]:
    """Register a lens under the function's name.

    A generator ``(pipe, prompt, ...) -> LensRun`` becomes a function that draws the image; it takes the pipeline's
    arguments as further keywords. Other functions ``(pipe, prompt, ...) -> LensResult`` run the pipeline themselves.
    Both are written for one image, and called for each image in turn if there is a list of prompts or of seeds: the
    numbers are those of single runs, to the last bit. A lens without a prompt measures the trajectory of a run.
    """
    signature = inspect.signature(function)
    is_generator = inspect.isgeneratorfunction(function)
    function = checked(InstrumentError)(function)
    if "prompt" not in signature.parameters:
        LENSES[function.__name__] = function
        return function

    def one(pipe: FluxPipeline, prompt: str, *args, **kwargs) -> LensResult:
        check_one_prompt(prompt)
        if not is_generator:
            found = function(pipe, prompt, *args, **kwargs)
            return LensResult(found.tensor, found.axes, found.coords, getattr(found, "images", []))
        own = {name: kwargs.pop(name) for name in signature.parameters if name in kwargs}
        out, (found,) = _run(pipe, prompt, [function(pipe, prompt, *args, **own)], kwargs)
        return LensResult(found.tensor, found.axes, found.coords, out.images)

    @wraps(function)
    def for_each(pipe: FluxPipeline, prompt: str | list[str], *args, **kwargs) -> LensResult:
        seed = None if "seeds" in signature.parameters else kwargs.get("seed")  # those lenses average over the seeds
        if not isinstance(prompt, (list, tuple)) and not isinstance(seed, (list, tuple)):
            return one(pipe, prompt, *args, **kwargs)
        labels, pairs = _pairs(prompt, seed)
        found = [one(pipe, text, *args, **kwargs | ({} if s is None else {"seed": s})) for text, s in pairs]
        coords = found[0].coords | {"picture": labels}
        images = [image for result in found for image in result.images]
        return LensResult(torch.stack([result.tensor for result in found]), ("picture", *found[0].axes), coords, images)

    parameters = list(signature.parameters.values())
    if is_generator:
        SINGLE_RUN_LENSES[function.__name__] = function
        parameters.append(inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD))
    # as help() and the documentation show them
    parameters = [p.replace(annotation="str | list[str]") if p.name == "prompt" else p for p in parameters]
    for_each.__signature__ = signature.replace(parameters=parameters, return_annotation="LensResult")
    LENSES[function.__name__] = for_each
    return for_each


def _pairs(prompt, seed) -> tuple[list, list[tuple[str, int | None]]]:
    """The (prompt, seed) of each image, as the pipeline pairs them, and a label for each."""
    prompts, seeds = ([*value] if isinstance(value, (list, tuple)) else [value] for value in (prompt, seed))
    count = max(len(prompts), len(seeds))
    if {len(prompts), len(seeds)} - {1, count} or not count:
        raise InstrumentError(f"pass as many prompts as seeds, or one of either, not {len(prompts)} and {len(seeds)}.")
    pairs = list(
        zip(map(check_one_prompt, prompts * (count // len(prompts))), seeds * (count // len(seeds)), strict=True)
    )
    if len(seeds) == 1:
        return prompts, pairs
    return (seeds if len(prompts) == 1 else [f"{text}, seed {one}" for text, one in pairs]), pairs


def run_lenses(
    pipe: FluxPipeline, prompt: str, lenses: Mapping[str, Mapping], **options
) -> tuple[Output, dict[str, Named]]:
    """Draw one image with several single-run lenses, ``{"word_maps": {"words": ["red"]}}``; their results by name."""
    check_one_prompt(prompt)
    runs = []
    for name, arguments in lenses.items():
        check_choice("the name of a lens", name, SINGLE_RUN_LENSES, error=InstrumentError)
        runs.append(SINGLE_RUN_LENSES[name](pipe, prompt, **arguments))
    out, results = _run(pipe, prompt, runs, options)
    return out, dict(zip(lenses, results, strict=True))


def _run(pipe: FluxPipeline, prompt: str, runs: Sequence[LensRun], options: dict) -> tuple[Output, list[Named]]:
    with ExitStack() as recorders:
        for run in runs:
            recorders.enter_context(next(run))
        out = pipe(prompt, **options)
    check_one_image(out)
    results = []
    for run in runs:
        try:
            run.send(out)
        except StopIteration as end:
            results.append(end.value)
        else:
            raise InstrumentError(f"the lens {run.__name__} must yield once, its recorder, and return its result.")
    return out, results


def run_recorded(pipe: FluxPipeline, prompt: str, *globs: str, options: dict, **settings) -> tuple[Output, record]:
    """Draw one image with a recorder, of the prompted pass only; ``settings`` are those of the recorder."""
    with record(*globs, passes="prompted", **settings) as rec:
        out = pipe(check_one_prompt(prompt), **options)
    check_one_image(out)
    return out, rec


def check_one_prompt(prompt: str) -> str:
    """The prompt; raises InstrumentError for several prompts, and for text that no tokenizer can encode."""
    if not isinstance(prompt, str) or prompt.encode(errors="ignore").decode() != prompt:
        raise InstrumentError(f"the prompt must be a text, or a list of texts, not {describe(prompt)}.")
    return prompt


def check_encoder(pipe: FluxPipeline, name: str) -> None:
    """Raises InstrumentError for a model without the text encoder ``clip`` or ``t5``, which is FLUX.2."""
    if name not in pipe.networks():
        reads = "T5 alone" if "t5" in pipe.networks() else "a language model"
        raise InstrumentError(
            f"this shows {name.upper()}, but this FLUX.2 reads prompts with {reads}; load a FLUX.1, such as nano."
        )


def check_one_image(out: Output) -> None:
    """Raises InstrumentError if several images were drawn at once."""
    if len(out.latents) != 1:
        raise InstrumentError("a lens draws its images one by one; pass a list of prompts or of seeds.")


# ---------------------------------------------------------------- numbers of steps

#: with fewer, images can be wrong. Of 24 images (3 prompts, 8 seeds) the judge finds the right objects and colours
#: in 5, 15, 22 and 24 after 4, 6, 8 and 10 steps of nano; in 3, 12, 19 and (12 steps) 22 of nano-base; and in 11, 20,
#: 24 and 23 after 1, 2, 3 and 4 steps of nano-schnell
ENOUGH_STEPS = 8


def enough_steps(pipe: FluxPipeline) -> int:
    """A number of steps for experiments of many runs: 8, or the model's own number if that is smaller."""
    return min(ENOUGH_STEPS, pipe.defaults.steps)


def few_steps_note(pipe: FluxPipeline, request: Mapping, unit: str = "step") -> str:
    """A sentence if ``request`` asks for fewer steps than the model needs, else an empty string."""
    steps = request.get("steps") or pipe.defaults.steps
    if request.get("times") is not None:
        steps = len(request["times"]) - 1
    if steps >= enough_steps(pipe):
        return ""
    number = f"1 {unit}" if steps == 1 else f"{steps} {unit}s"
    return f" This run has {number}; with fewer than {enough_steps(pipe)}, this model's images can be wrong."


# ---------------------------------------------------------------- blocks and patches


def blocks_of(pipe: FluxPipeline) -> list[str]:
    """The names of all blocks in the order in which they run: ``double.0, ..., single.0, ...``."""
    config = pipe.flux.config
    return [f"double.{i}" for i in range(config.depth)] + [f"single.{i}" for i in range(config.depth_single_blocks)]


def recorded_blocks(rec: record, pipe: FluxPipeline, site: str) -> list[str]:
    """The blocks of which ``site`` was recorded, in order; raises InstrumentError if there are none."""
    names = [block for block in blocks_of(pipe) if f"{block}.{site}" in rec]
    if not names:
        raise InstrumentError("the run has no such step, so nothing was recorded.")
    return names


def stack_blocks(rec: record, pipe: FluxPipeline, site: str) -> Named:
    """The values of ``site`` in every block that has it, along a first axis ``block``, labelled by name."""
    names = recorded_blocks(rec, pipe, site)
    values = [rec[f"{block}.{site}"] for block in names]
    stacked = torch.stack([value.tensor for value in values])
    return Named(stacked, ("block", *values[0].axes), values[0].coords | {"block": names})


def patch_grid(latent_shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches of a latent ``[..., h, w]``."""
    return latent_shape[-2] // 2, latent_shape[-1] // 2


def unfold_patches(value: Named, axis: str, grid: tuple[int, int]) -> Named:
    """Split an axis of image tokens into ``row`` and ``column``; tokens of a reference image are left out."""
    at = value.axis(axis)
    axes = (*value.axes[:at], "row", "column", *value.axes[at + 1 :])
    return Named(value.tensor.narrow(at, 0, grid[0] * grid[1]).unflatten(at, grid), axes, value.coords)
