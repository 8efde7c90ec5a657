"""What each block does: how much it adds, how the image depends on it, and how time and prompt modulate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fluxedu.errors import InstrumentError, check_integer, check_number, describe
from fluxedu.instruments.ablation import ablate
from fluxedu.instruments.interventions import intervene, positions
from fluxedu.instruments.lenses.run import (
    LensResult,
    LensRun,
    blocks_of,
    check_one_prompt,
    lens,
    patch_grid,
    run_recorded,
    stack_blocks,
)
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.recording import StepKey
from fluxedu.instruments.reductions import StepReduction, Value, to_named
from fluxedu.instruments.watching import Instrument
from fluxedu.progress import progress_bar
from fluxedu.sampling.latents import unpack
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.step_context import Steps, current_context

KINDS = ("shift", "scale", "gate")
Times = int | Sequence[float] | Tensor


@lens
def contributions(pipe: FluxPipeline, prompt: str) -> LensRun:
    """How much each block adds to the image tokens, relative to their size: axes ``block, step``.

    ``|block(x) - x| / |x|``, with norms over all image tokens. A block that does nothing has 0. The measure is our own;
    that the blocks of a residual network refine their input little by little: arXiv 1612.07771.
    """
    sites = ("double.*.img", "double.*.img_out", "single.*.x", "single.*.out")
    rec = record(*sites, passes="prompted", reduce=_RelativeChange())
    yield rec
    names = blocks_of(pipe)
    changes = [rec[_output_site(name)] for name in names]
    coords = {"block": names, "step": changes[-1].coords["step"]}
    return Named(torch.stack([change.tensor for change in changes]), ("block", "step"), coords)


def _output_site(block: str) -> str:
    return f"{block}.img_out" if block.startswith("double") else f"{block}.out"


class _RelativeChange(StepReduction):
    """A reduction to ``|block(x) - x| / |x|`` of the image's own tokens, computed where a block ends.

    The tokens that enter a block are held on the device until it ends.
    """

    def __init__(self):
        self.before: Tensor | None = None

    def __call__(self, value: Named, site: str, key: StepKey) -> Named | None:
        context = current_context()
        rows, columns = patch_grid(context.request.shape)
        first = 0 if site.startswith("double") else context.txt_len
        x = value.tensor[:, first : first + rows * columns]
        if not site.endswith("out"):
            self.before = x.clone()
            return None
        before, self.before = self.before, None
        if before is None:  # a user's own block, without a site where it begins
            return None
        return Named((x - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1), ("batch",))


@lens
def x0_by_block(
    pipe: FluxPipeline, prompt: str, *, at_steps: Steps = None, decoded: bool = False, **options
) -> LensResult:
    """The predicted x0 after each block, a latent or (decoded) pixels: axes ``block, step, channel, row, column``.

    The image tokens that leave a block go through the last layer as if it came next: ``x0 = x - t v``. This is our own
    adaptation of the logit lens (see arXiv 2303.08112) to a flow; the last layer was trained on the output of the last
    block only, so for early blocks the result is a guess at best. For the last block it is ``sample.x0`` of the run or,
    with classifier-free guidance, the predicted x0 of the prompted pass. Needs solver="euler", which evaluates the
    model once per step.
    """
    if options.get("solver", "euler") != "euler":
        raise InstrumentError(f"x0_by_block is defined for solver='euler' only, not {describe(options['solver'])}.")
    globs = ("double.*.img_out", "single.*.out", "vec", "sample.x")
    out, rec = run_recorded(pipe, prompt, *globs, options=options, steps=at_steps)
    if "sample.x" not in rec:
        raise InstrumentError("the run has no such step, so nothing was recorded.")
    x, vec, names = rec["sample.x"], rec["vec"].tensor.to(pipe.device), blocks_of(pipe)
    times = torch.tensor(x.coords["step"], dtype=torch.float32, device="cpu").view(-1, 1, 1, 1).to(x.tensor)
    height, width = out.latents.shape[-2:]
    rows, columns = patch_grid(out.latents.shape)
    last_layer, predictions = pipe.flux.final_layer, []
    with torch.no_grad():
        for name in progress_bar(names, desc="blocks", leave=False):
            tokens = rec[_output_site(name)].tensor.to(pipe.device)
            image_tokens = tokens if name.startswith("double") else tokens[:, rec.txt_len :]
            v = last_layer(image_tokens[:, : rows * columns], last_layer.plan(vec))
            x0 = x.tensor - times * unpack(v, height, width).to(x.tensor)
            if decoded:
                x0 = pipe.autoencoder.decode(x0.to(pipe.device, pipe.dtype)).to(x0)
            predictions.append(x0)
    return LensResult(torch.stack(predictions), ("block", *x.axes), x.coords | {"block": names}, out.images)


@lens
def vital_layers(pipe: FluxPipeline, prompt: str, *, seeds: Sequence[int] = (0,), **options) -> LensResult:
    """How much the image changes without each block: axis ``block``, the mean over ``seeds``.

    ``|latent without - latent with| / |latent with|``. The blocks with large values are called vital layers in arXiv
    2411.14430 (Stable Flow), which measures the distance with DINOv2 instead of latents.
    """
    return _distances(pipe, prompt, seeds, options, partial(ablate, passes="both"), "without each block")


@lens
def position_dependence(
    pipe: FluxPipeline,
    prompt: str,
    *,
    seeds: Sequence[int] = (0,),
    edit: Callable[[Tensor], Tensor] = torch.zeros_like,
    **options,
) -> LensResult:
    """How much the image changes if one block has other position ids: axis ``block``, as :func:`vital_layers`.

    ``edit(ids [N, 3]) -> ids``; by default, all patches get the same position. Some blocks depend on positions, others
    on content: arXiv 2503.16153 (FreeFlux), which shifts the positions.
    """

    def change(block: str) -> Instrument:
        return intervene(f"{block}.attn.rope", positions(edit))

    return _distances(pipe, prompt, seeds, options, change, "other positions")


def _distances(pipe: FluxPipeline, prompt: str, seeds, options: dict, change: Callable, description: str) -> LensResult:
    """The distance of the latents from those of the unchanged run, with ``change(block)`` for each block in turn.

    The images are those of the unchanged run, one per seed.
    """
    seeds = options.get("seed", seeds)
    seeds = list(seeds) if isinstance(seeds, Sequence) else [seeds]  # the pipeline checks them
    options = {"trajectory": False} | options | {"seed": seeds, "progress": False}
    unchanged = pipe(prompt, **options)
    original, options = unchanged.latents, options | {"decode": False}
    distances = []
    for block in progress_bar(blocks_of(pipe), desc=description, leave=False):
        with change(block):
            changed = pipe(prompt, **options).latents
        distance = (changed - original).flatten(1).norm(dim=1) / original.flatten(1).norm(dim=1)  # [B]
        distances.append(distance.mean())
    return LensResult(torch.stack(distances), ("block",), {"block": blocks_of(pipe)}, unchanged.images)


@lens
def massive_activations(pipe: FluxPipeline, prompt: str, *, at_step: int = 0) -> LensRun:
    """The largest activation among the tokens that leave each block: axes ``block, what``.

    what: its size, the median size for comparison, its token and its channel (in double-stream blocks, of image
    tokens). Massive activations occur in a few fixed channels and in all tokens of diffusion transformers:
    arXiv 2510.11538.
    """
    what = ["largest", "median", "token", "channel"]

    def largest(value: Value) -> Named:
        size = to_named(value).tensor.abs().float()  # [B, T, D]
        index, width = size.flatten(1).argmax(1), size.shape[-1]
        numbers = [size.flatten(1).amax(1), size.flatten(1).median(1).values, index // width, index % width]
        return Named(torch.stack([n.float() for n in numbers], dim=1), ("batch", "what"), {"what": what})

    rec = record("double.*.img_out", "single.*.out", passes="prompted", steps=at_step, reduce=largest)
    yield rec
    double = stack_blocks(rec, pipe, "img_out").at(step=0)
    single = stack_blocks(rec, pipe, "out").at(step=0)
    coords = {"block": double.coords["block"] + single.coords["block"], "what": what}
    return Named(torch.cat([double.tensor, single.tensor]), ("block", "what"), coords)


# ---------------------------------------------------------------- modulation


@lens
def modulation(pipe: FluxPipeline, prompt: str, *, times: Times = 21, guidance: float | None = None) -> Named:
    """The size of every modulation over time: axes ``time, layer, kind``, the root mean square over channels.

    times: their number, evenly spaced from 1 to 0, or the times themselves. A layer is a part of a block,
    ``double.0.img_attn``, ``double.0.img_mlp``, ``single.3``; the kinds are shift, scale and gate. They depend on the
    time, the guidance scale and the pooled text only. AdaLN: arXiv 2212.09748.
    """
    table = modulation_channels(pipe, prompt, times=times, guidance=guidance)
    return table.dropped("channel", table.tensor.square().mean(-1).sqrt())


@torch.no_grad()
def modulation_channels(pipe: FluxPipeline, prompt: str, *, times: Times = 21, guidance: float | None = None) -> Named:
    """The modulation of every channel: axes ``time, layer, kind, channel``; arguments as for :func:`modulation`."""
    check_one_prompt(prompt)
    times = _times(times)
    scale = pipe.defaults.guidance
    if guidance is not None:
        scale = check_number("guidance", guidance, -1e30, 1e30, error=InstrumentError)
    scale = (
        torch.tensor([float(scale)], dtype=torch.float32, device=pipe.device)
        if pipe.flux.config.guidance_embed
        else None
    )
    plan = pipe.flux.plan(times.to(pipe.device)[:, None], scale, pipe.prompt_encoder([prompt]).pooled)

    layers: dict[str, Tensor] = {}  # [T, 3 D] each
    for i, mods in enumerate(plan.double):
        for stream in mods:
            attn, mlp = mods[stream][:, 0].chunk(2, dim=-1)
            layers[f"double.{i}.{stream}_attn"] = attn
            layers[f"double.{i}.{stream}_mlp"] = mlp
    for i, mods in enumerate(plan.single):
        layers[f"single.{i}"] = mods[:, 0]
    table = torch.stack([mods.unflatten(-1, (3, -1)).float() for mods in layers.values()], dim=1).cpu()
    coords = {"time": times.tolist(), "layer": list(layers), "kind": list(KINDS)}
    return Named(table, ("time", "layer", "kind", "channel"), coords)


def _times(times: Times) -> Tensor:
    """The times as a tensor ``[T]``; raises InstrumentError for what is not in [0, 1]."""
    if isinstance(times, int) and not isinstance(times, bool):
        check_integer("times", times, 1, 10_000, "or pass a list of times in [0, 1]", error=InstrumentError)
        return torch.linspace(1, 0, times, dtype=torch.float32, device="cpu")
    try:
        found = torch.as_tensor(times, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.zeros((), device="cpu")
    if found.ndim != 1 or not len(found) or not bool(((found >= 0) & (found <= 1)).all()):
        raise InstrumentError(f"times must be a number of times, or a list of times in [0, 1], not {describe(times)}.")
    return found
