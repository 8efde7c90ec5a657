"""What guidance buys: pictures of several seeds at several strengths, which of the prompt's claims hold, how much the
pictures differ, and how large the latent's numbers get.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from fluxedu.errors import InstrumentError
from fluxedu.instruments.lenses.run import one_prompt
from fluxedu.nano.judge import Verdict, diversity, judge
from fluxedu.nano.scenes import Claim
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.controls import Choice
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.grid import sheet
from fluxedu.widgets.paint import Pixels8, picture
from fluxedu.widgets.panels import Lines, Pixels


@dataclass(frozen=True)
class Sweep:
    """One prompt at ``strengths``, ``seeds`` pictures each.

    ``pictures [strength][seed]`` · ``verdicts`` alike · by strength: ``right``, the share of claims that hold,
    ``differ``, the judge's diversity of the seeds' pictures, ``size``, the root mean square of the latent's numbers.
    """

    prompt: str
    strengths: Sequence[float]
    seeds: Sequence[int]
    pictures: Sequence[Sequence[Pixels8]]
    verdicts: Sequence[Sequence[Verdict]]
    right: Sequence[float]
    differ: Sequence[float]
    size: Sequence[float]


def claims(verdict: Verdict) -> list[bool]:
    """All that was claimed, one by one: does it hold?"""
    all_ = (verdict.background, *verdict.colors, *verdict.forms, *verdict.sizes, *verdict.relations)
    return [ok for ok in all_ if ok is not None]


def sweep(
    pipe: FluxPipeline,
    prompt: str,
    claim: Claim,
    *,
    strengths: Sequence[float] = (1.0, 3.0, 6.0, 15.0),
    seeds: Sequence[int] = range(5),
    **asked,
) -> Sweep:
    """Draw ``prompt``, which makes ``claim``, at every strength and seed; ``asked`` as for the pipeline."""
    strengths, seeds = list(strengths), list(seeds)
    if not strengths or not seeds:
        raise InstrumentError("give at least one strength and one seed.")
    pictures, verdicts, right, differ, size = [], [], [], [], []
    for strength in tqdm(strengths, desc="strengths", delay=1, leave=False, disable=not asked.get("progress", True)):
        out = pipe(one_prompt(prompt), **(asked | {"seed": seeds, "guidance": strength, "progress": False}))
        pictures.append([picture(image) for image in out.images])
        verdicts.append([judge(image, claim) for image in out.images])
        held = [ok for verdict in verdicts[-1] for ok in claims(verdict)]
        right.append(sum(held) / len(held))
        differ.append(diversity([verdict.reading for verdict in verdicts[-1]]))
        size.append(float(out.latents.float().square().mean().sqrt()))
    return Sweep(prompt, strengths, seeds, pictures, verdicts, right, differ, size)


def strength_view(run: Sweep, cell: tuple[int, int]) -> View:
    """A contact sheet (a row a strength, a column a seed), one of its pictures, and the curves over strength."""
    row, column = cell
    held = claims(run.verdicts[row][column])
    strengths = ", ".join(f"{s:g}" for s in run.strengths)
    panels = [
        Pixels(f"rows: strength {strengths}; columns: seeds", sheet(run.pictures),
               (len(run.strengths), len(run.seeds)), cell, pointer="cell"),
        Pixels(f"strength {run.strengths[row]:g}, seed {run.seeds[column]}", run.pictures[row][column]),
        Lines(
            "over the strength", run.strengths,
            {"claims that hold, share": run.right, "difference of the seeds": run.differ,
             "size of the latent's numbers": run.size},
            "guidance strength", "", run.strengths[row],
        ),
    ]  # fmt: skip
    return View(
        panels,
        f'"{run.prompt}": {sum(held)} of {len(held)} claims hold here, {run.right[row]:.0%} at this strength; '
        f"the seeds differ by {run.differ[row]:.2f}, and the latent's numbers have the size {run.size[row]:.2f}.",
    )


def strength(runs: Mapping[str, Sweep]) -> Explorer:
    """Look through sweeps by name, such as one of each kind of guidance; see :func:`sweep`. All have the same shape."""
    if not runs:
        raise InstrumentError("give at least one sweep.")
    names, made = list(runs), list(runs.values())
    if len({(len(run.strengths), len(run.seeds)) for run in made}) != 1:
        raise InstrumentError("all sweeps must have equally many strengths, and equally many seeds.")

    def draw(kind: int, cell: tuple[int, int]) -> View:
        return strength_view(made[kind], cell)

    start = {"cell": (len(made[0].strengths) // 2, 0)}
    return Explorer("Strength", [Choice("kind", "guidance", names)], draw, start, widths=[3.6, 2.6, 3.4])
