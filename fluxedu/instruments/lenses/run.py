"""How lenses are registered and run, and helpers for writing one.

A lens that needs a single run is a generator; this function is all you have to write::

    @lens
    def my_lens(pipe: FluxPipeline, prompt: str) -> LensRun:
        rec = record("*.attn.map", passes="prompted", reduce="entropy")
        out = yield rec  # now the pipeline draws the image
        return stack_blocks(rec, pipe, "attn.map")

    my_lens(pipe, "a red circle", seed=1)  # draws the image and returns the result
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps

import torch

from fluxedu.errors import InstrumentError, check_choice, describe
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.sampling.pipeline import FluxPipeline, Output

#: a lens that yields its recorder, is sent the pipeline's output, and returns its result
LensRun = Generator[record, Output, Named]
LENSES: dict[str, Callable[..., Named]] = {}  # all lenses by name
SINGLE_RUN_LENSES: dict[str, Callable[..., LensRun]] = {}  # the generators of those that can share a run


def lens(function: Callable) -> Callable[..., Named]:
    """Register a lens under the function's name.

    A generator ``(pipe, prompt, ...) -> LensRun`` becomes a function that draws the image; it takes the pipeline's
    arguments as further keywords. Other functions ``(pipe, prompt, ...) -> Named`` run the pipeline themselves. For
    both, ``prompt`` must be a single prompt. A lens without a prompt measures the trajectory of a run.
    """
    signature = inspect.signature(function)
    is_generator = inspect.isgeneratorfunction(function)
    if "prompt" not in signature.parameters:
        LENSES[function.__name__] = function
        return function

    @wraps(function)
    def checked(pipe: FluxPipeline, prompt: str, *args, **kwargs) -> Named:
        check_one_prompt(prompt)
        if not is_generator:
            return function(pipe, prompt, *args, **kwargs)
        own = {name: kwargs.pop(name) for name in signature.parameters if name in kwargs}
        return _run(pipe, prompt, [function(pipe, prompt, *args, **own)], kwargs)[1][0]

    if is_generator:
        SINGLE_RUN_LENSES[function.__name__] = function
        options = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
        parameters = [*signature.parameters.values(), options]  # as help() and the documentation show them
        checked.__signature__ = signature.replace(parameters=parameters, return_annotation="Named")
    LENSES[function.__name__] = checked
    return checked


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
        raise InstrumentError(f"the prompt must be one prompt, a text, not {describe(prompt)}.")
    return prompt


def check_one_image(out: Output) -> None:
    """Raises InstrumentError if several images were drawn."""
    if len(out.images) != 1:
        raise InstrumentError("only one image at a time can be measured; pass one seed.")


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
