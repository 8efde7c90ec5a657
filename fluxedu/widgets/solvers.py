"""How few questions will do: solvers at the same price, under several schedules, against a run of many steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from fluxedu.errors import InstrumentError
from fluxedu.instruments.lenses.run import one_prompt
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.solvers import SOLVERS, evaluation_times
from fluxedu.widgets.controls import Choice
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.grid import sheet, shifted
from fluxedu.widgets.paint import Pixels8, picture
from fluxedu.widgets.panels import Lines, Pixels


def solvers_view(
    pictures: Sequence[Sequence[Pixels8]],
    far: np.ndarray,
    questions: Sequence[int],
    solvers: Sequence[str],
    cell: tuple[int, int],
) -> View:
    """Pictures ``[solver][questions]``, one of them, and how ``far [solvers, questions]`` each latent is from the
    reference, as a share of its length.
    """
    row, column = cell
    best = solvers[int(far[:, column].argmin())]
    panels = [
        Pixels(
            f"rows: {', '.join(solvers)}; columns: {', '.join(map(str, questions))} questions", sheet(pictures),
            (len(solvers), len(questions)), cell, pointer="cell",
        ),
        Pixels(f"{solvers[row]}, {questions[column]} questions", pictures[row][column]),
        Lines(
            "how far from a run of many steps", questions,
            {name: line.tolist() for name, line in zip(solvers, far, strict=True)}, "questions to the network",
            "share of the latent's length", questions[column],
        ),
    ]  # fmt: skip
    return View(
        panels,
        f"With {questions[column]} questions {solvers[row]} is {far[row, column]:.0%} of the latent's length away from "
        f"the reference; at this price {best} is nearest.",
    )


def steps_for(solver: str, questions: int) -> int:
    """How many steps of ``solver`` ask the network so often; raises InstrumentError where none do."""
    if solver not in SOLVERS:
        raise InstrumentError(f"a solver is one of {', '.join(SOLVERS)}, not {solver!r}.")
    each = len(evaluation_times(solver, [1.0, 0.0]))
    if questions < each or questions % each:
        raise InstrumentError(f"{solver} asks {each} questions a step, so {questions} make no whole number of steps.")
    return questions // each


def solvers(
    pipe: FluxPipeline,
    prompt: str,
    *,
    questions: Sequence[int] = (2, 4, 8, 16),
    solvers: Sequence[str] = ("euler", "midpoint", "heun"),
    shifts: Sequence[float] = (1.0, 3.0),
    reference: int = 40,
    **asked,
) -> Explorer:
    """Draw ``prompt`` with each of ``solvers`` at the price of each number of ``questions``, under each time ``shift``.

    The reference is midpoint's run of so many steps under the last shift; ``asked`` as for the pipeline.
    """
    one_prompt(prompt)
    questions, shifts = sorted(questions), list(shifts)
    if not questions or not solvers or not shifts:
        raise InstrumentError("give at least one number of questions, one solver and one shift.")
    steps = [[steps_for(name, count) for count in questions] for name in solvers]
    quiet, asked = not asked.get("progress", True), asked | {"progress": False}
    goal = shifted(pipe, shifts[-1])(prompt, **(asked | {"solver": "midpoint", "steps": reference})).latents[0].float()
    tables = []
    count = len(shifts) * len(solvers) * len(questions)
    with tqdm(total=count, desc="solvers", delay=1, leave=False, disable=quiet) as bar:
        for shift in shifts:
            outs = []
            for name, counts in zip(solvers, steps, strict=True):
                for count in counts:
                    outs.append(shifted(pipe, shift)(prompt, **(asked | {"solver": name, "steps": count})))
                    bar.update()
            far = torch.stack([(out.latents[0].float() - goal).norm() / goal.norm() for out in outs])
            drawn = [picture(out.images[0]) for out in outs]
            rows = [drawn[i : i + len(questions)] for i in range(0, len(drawn), len(questions))]
            tables.append((rows, far.view(len(solvers), len(questions)).numpy(force=True)))

    def draw(shift: int, cell: tuple[int, int]) -> View:
        return solvers_view(*tables[shift], questions, solvers, cell)

    control = Choice("shift", "time shift", [f"{s:g}" for s in shifts], len(shifts) - 1, shifts)
    return Explorer("Solvers", [control], draw, {"cell": (0, len(questions) - 1)}, widths=[3.8, 2.4, 3.2])
