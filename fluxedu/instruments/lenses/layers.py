"""What each block does: how much it adds, how much it matters, what the picture is so far, whether places matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fluxedu.errors import InstrumentError
from fluxedu.instruments.ablation import ablate
from fluxedu.instruments.interventions import intervene, positions
from fluxedu.instruments.lenses.run import Look, alone, blocks_of, grid, recorded
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.watching import Instrument
from fluxedu.sampling.latents import unpack
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.step_context import current_context


def contributions(pipe: FluxPipeline, prompt: str, **asked) -> Named:
    """How much each block adds to the image tokens, beside what was there: axes ``block, step``.

    ``|block(x) - x| / |x|``, the norms over all image tokens. 0 is a block that does nothing. The measure is our own;
    that blocks of a residual network refine what is there, little by little: arXiv 1612.07771.
    """
    return alone(pipe, prompt, look_at_contributions(pipe), asked)


def look_at_contributions(pipe: FluxPipeline) -> Look:
    """:func:`contributions` in two halves."""
    sites = ("double.*.img", "double.*.img_out", "single.*.x", "single.*.out")
    rec = record(*sites, passes="prompted", reduce=_Added())
    yield rec
    names = blocks_of(pipe)
    added = [rec[f"{name}.{'img_out' if name.startswith('double') else 'out'}"] for name in names]
    steps = added[-1].coords["step"]
    return Named(torch.stack([a.tensor for a in added]), ("block", "step"), {"block": names, "step": steps})


class _Added:
    """A reduction: ``|block(x) - x| / |x|`` of the picture's own tokens, a number where a block ends.

    A block's tokens are put by where it begins, on the device and until it ends.
    """

    site = ""  # told by the recorder

    def __init__(self):
        self.before: Tensor | None = None

    def __call__(self, value: Named) -> Named | None:
        context = current_context()
        height, width = (cells // 2 for cells in context.request.shape)
        first = 0 if self.site.startswith("double") else context.txt_len
        x = value.tensor[:, first : first + height * width]
        if not self.site.endswith("out"):
            self.before = x.clone()
            return None
        before, self.before = self.before, None
        if before is None:  # a block of somebody's own, which does not say where it begins
            return None
        return Named((x - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1), ("batch",))


def x0_by_block(pipe: FluxPipeline, prompt: str, *, at_steps=None, decoded: bool = False, **asked) -> Named:
    """The picture foreseen after each block: axes ``block, step, channel, row, column``, a latent or (decoded) pixels.

    The image tokens as a block leaves them, through the last layer as if it came next: ``x0 = x - t v``. This is our
    own adaptation of the logit lens (see arXiv 2303.08112) to a flow; the last layer was trained to read the last
    block only, so early blocks are a guess at best. At the last block it is the run's own ``sample.x0``, or, with
    classifier-free guidance, what the prompted pass alone foresees. Only for solver="euler", which asks once a step.
    """
    if asked.get("solver", "euler") != "euler":
        raise InstrumentError(f"x0_by_block is for solver='euler', which asks once a step, not {asked['solver']!r}.")
    globs = ("double.*.img_out", "single.*.out", "vec", "sample.x")
    out, rec = recorded(pipe, prompt, *globs, asked=asked, steps=at_steps)
    if "sample.x" not in rec:
        raise InstrumentError("the run has no such step, so there is nothing to look at.")
    x, vec, names = rec["sample.x"], rec["vec"].tensor.to(pipe.device), blocks_of(pipe)
    times = torch.tensor(x.coords["step"]).view(-1, 1, 1, 1).to(x.tensor)
    last, found, (rows, columns) = pipe.flux.final_layer, [], grid(pipe, out)
    with torch.no_grad():
        for name in tqdm(names, desc="blocks", delay=1, leave=False):
            double = name.startswith("double")
            tokens = rec[f"{name}.{'img_out' if double else 'out'}"].tensor.to(pipe.device)
            v = last((tokens if double else tokens[:, rec.txt_len :])[:, : rows * columns], last.plan(vec))
            x0 = x.tensor - times * unpack(v, *out.latents.shape[-2:]).to(x.tensor)
            found.append(pipe.autoencoder.decode(x0.to(pipe.device, pipe.dtype)).to(x0) if decoded else x0)
    return Named(torch.stack(found), ("block", *x.axes), x.coords | {"block": names})


def vital_layers(pipe: FluxPipeline, prompt: str, *, seeds: Sequence[int] = (0,), **asked) -> Named:
    """How far the picture goes without each block: axis ``block``, the mean over ``seeds``.

    ``|latent without - latent with| / |latent with|``. Vital layers are those it goes far without; arXiv
    2411.14430 (Stable Flow), which measures the distance with DINOv2 where this takes the latent's.
    """
    return _each_block(pipe, prompt, seeds, asked, ablate, "without each block")


def position_dependence(
    pipe: FluxPipeline,
    prompt: str,
    *,
    seeds: Sequence[int] = (0,),
    edit: Callable[[Tensor], Tensor] = torch.zeros_like,
    **asked,
) -> Named:
    """How far the picture goes when one block is told other places: axis ``block``, as :func:`vital_layers`.

    ``edit(ids [N, 3]) -> ids``; all patches at one place if not said. Some blocks go by places, others by content:
    arXiv 2503.16153 (FreeFlux), which shifts them.
    """

    def lost(block: str) -> Instrument:
        return intervene(f"{block}.attn.rope", positions(edit))

    return _each_block(pipe, prompt, seeds, asked, lost, "other places")


def _each_block(pipe: FluxPipeline, prompt: str, seeds, asked: dict, change, said: str) -> Named:
    names, seeds = blocks_of(pipe), asked.get("seed", seeds)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    asked = {"trajectory": False} | asked | {"seed": seeds, "progress": False}
    whole = pipe(prompt, **asked).latents
    far = []
    for name in tqdm(names, desc=said, delay=1, leave=False):
        with change(name):
            other = pipe(prompt, **asked).latents
        far.append(((other - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)).mean())
    return Named(torch.stack(far), ("block",), {"block": names})
