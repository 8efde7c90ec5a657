"""Guidance: images of several seeds at several guidance scales, how many of the prompt's claims hold, how much the
images differ, and how large the latents become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fluxedu.errors import InstrumentError
from fluxedu.instruments.lenses.run import check_one_prompt, enough_steps
from fluxedu.nano.judge import Verdict, diversity, judge
from fluxedu.nano.scenes import Claim
from fluxedu.progress import progress_bar
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import Choice, Explorer, Try, View, explorer
from fluxedu.widgets.panels import RGB, Lines, Pixels, contact_sheet, to_rgb


@dataclass(frozen=True)
class GuidanceSweep:
    """Images of one prompt at several guidance scales, with several seeds each.

    ``images``, ``verdicts``: ``[scale][seed]`` · for each scale: ``correct``, the share of claims that hold,
    ``diversity``, the judge's measure of how much the seeds' images differ, ``latent_rms``, the root mean square of the
    latents.
    """

    prompt: str
    scales: Sequence[float]
    seeds: Sequence[int]
    images: Sequence[Sequence[RGB]]
    verdicts: Sequence[Sequence[Verdict]]
    correct: Sequence[float]
    diversity: Sequence[float]
    latent_rms: Sequence[float]


def sweep(
    pipe: FluxPipeline,
    prompt: str,
    claim: Claim,
    *,
    scales: Sequence[float] = (1.0, 3.0, 6.0, 15.0),
    seeds: Sequence[int] = range(4),
    **request,
) -> GuidanceSweep:
    """Draw ``prompt``, which makes ``claim``, at every guidance scale and seed; ``request``: as for the pipeline.

    This takes ``scales x seeds`` runs, several at once.
    """
    scales, seeds = list(scales), list(seeds)
    if not scales or not seeds:
        raise InstrumentError("give at least one guidance scale and one seed.")
    hide_bar = request.get("progress", True) is False
    images, verdicts, correct, differ, latent_rms = [], [], [], [], []
    for scale in progress_bar(scales, desc="guidance scales", leave=False, show=not hide_bar):
        out = pipe(check_one_prompt(prompt), **(request | {"seed": seeds, "guidance": scale, "progress": False}))
        images.append([to_rgb(image) for image in out.images])
        verdicts.append([judge(image, claim) for image in out.images])
        results = [ok for verdict in verdicts[-1] for ok in verdict.results]
        correct.append(sum(results) / len(results))
        differ.append(diversity([verdict.detections for verdict in verdicts[-1]]))
        latent_rms.append(float(out.latents.float().square().mean().sqrt()))
    return GuidanceSweep(prompt, scales, seeds, images, verdicts, correct, differ, latent_rms)


def guidance_view(run: GuidanceSweep, cell: tuple[int, int]) -> View:
    """A contact sheet (rows: guidance scales, columns: seeds), one of its images, and curves over the scale."""
    row, column = cell
    results, scale = run.verdicts[row][column].results, run.scales[row]
    series = {
        "share of claims that hold": run.correct,
        "diversity over seeds": run.diversity,
        "root mean square of the latent": run.latent_rms,
    }
    panels = [
        Pixels("Images by guidance scale (rows) and seed (columns)", contact_sheet(run.images),
               (len(run.scales), len(run.seeds)), cell, rows=[f"{s:g}" for s in run.scales],
               columns=[str(s) for s in run.seeds], axes=("guidance scale", "seed"), pointer="cell"),
        Pixels(f"Guidance scale {scale:g}, seed {run.seeds[column]}", run.images[row][column]),
        Lines("Effect of the guidance scale", run.scales, series, "guidance scale", "share or root mean square", scale,
              units=dict(zip(series, ("share", "0 to 1", "root mean square"), strict=True))),
    ]  # fmt: skip
    return View(
        panels,
        f"“{run.prompt}”: {sum(results)} of {len(results)} claims hold in this image, {run.correct[row]:.0%} over all "
        f"seeds at this scale; their diversity is {run.diversity[row]:.2f}, the root mean square of their latents "
        f"{run.latent_rms[row]:.2f}.",
    )


def _example(pipe: FluxPipeline) -> Explorer:
    claim = Claim((("red", "circle", None),), (), None)
    return guidance(
        {"example": sweep(pipe, "a red circle", claim, scales=[1.0, 6.0], seeds=[0, 1], steps=enough_steps(pipe))}
    )


@explorer(example=_example)
def guidance(runs: Mapping[str, GuidanceSweep]) -> Explorer:
    """Compare sweeps of equal shape by name, such as one for each kind of guidance; :func:`sweep` draws them."""
    if not runs:
        raise InstrumentError("give at least one sweep.")
    names, sweeps = list(runs), list(runs.values())
    if len({(len(run.scales), len(run.seeds)) for run in sweeps}) != 1:
        raise InstrumentError("all sweeps must have equally many guidance scales, and equally many seeds.")

    def draw(kind: int, cell: tuple[int, int]) -> View:
        return guidance_view(sweeps[kind], cell)

    scales, seeds = sweeps[0].scales, len(sweeps[0].seeds)
    first = {"cell": (len(scales) // 2, seeds // 2)}
    return Explorer(
        "What does the guidance scale change?",
        [Choice("kind", "kind of guidance", names)],
        draw,
        first,
        widths=[3.6, 2.6, 3.4],
        instruction="Point at an image: does it show what the prompt asks for, and how different are its neighbours?",
        tries=[
            Try(f"What changes at guidance scale {scales[0]:g}?", cell=(0, 0)),
            Try(f"Is a scale of {scales[-1]:g} too much?", cell=(len(scales) - 1, 0)),
            *[Try(f"Is it the same for {name}?", kind=name) for name in names[1:2]],
        ],
    )
