"""Solvers at equal numbers of model evaluations, under several schedules, compared with a run of many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fluxedu.errors import InstrumentError, check_choice
from fluxedu.instruments.lenses.run import check_one_prompt, enough_steps, few_steps_note
from fluxedu.progress import progress_bar
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.solvers import SOLVERS, get_solver
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, Try, View, explorer
from fluxedu.widgets.grid import shifted
from fluxedu.widgets.panels import RGB, Lines, Pixels, contact_sheet, to_rgb


def solvers_view(
    images: Sequence[Sequence[RGB]],
    errors: np.ndarray,
    evaluations: Sequence[int],
    solvers: Sequence[str],
    cell: tuple[int, int],
) -> View:
    """Images ``[solver][evaluations]``, one of them, and the ``errors [solvers, evaluations]`` of all latents: the
    distance from the reference, as a share of its norm.
    """
    row, column = cell
    best = solvers[int(errors[:, column].argmin())]
    series = {name: errors[i].tolist() for i, name in enumerate(solvers)}
    panels = [
        Pixels("Images by solver (rows) and model evaluations (columns)", contact_sheet(images),
               (len(solvers), len(evaluations)), cell, rows=solvers, columns=[str(n) for n in evaluations],
               axes=("solver", "model evaluations"), pointer="cell"),
        Pixels(f"{solvers[row]}, {evaluations[column]} model evaluations", images[row][column]),
        Lines("Error: distance from a run of many steps", evaluations, series, "model evaluations (NFE)",
              "distance / norm of the latent", evaluations[column]),
    ]  # fmt: skip
    return View(
        panels,
        f"With {evaluations[column]} model evaluations, {solvers[row]} has an error of {errors[row, column]:.0%} of the"
        f" latent's norm; at this cost {best} has the smallest error.",
    )


def steps_for(solver: str, evaluations: int) -> int:
    """Number of steps of ``solver`` that take this many model evaluations; raises InstrumentError if there is none."""
    check_choice("solver", solver, SOLVERS, error=InstrumentError)
    per_step = len(get_solver(solver).stages)
    if evaluations < per_step or evaluations % per_step:
        whole = f"a multiple of {per_step}, its number of model evaluations per step"
        raise InstrumentError(f"evaluations of {solver} must be {whole}, not {evaluations}.")
    return evaluations // per_step


@explorer(
    example=lambda pipe: solvers(pipe, EXAMPLE_PROMPT, evaluations=[4, 8], shifts=[3.0], reference=8, progress=False)
)
def solvers(
    pipe: FluxPipeline,
    prompt: str,
    *,
    evaluations: Sequence[int] = (2, 4, 8, 16),
    solvers: Sequence[str] = ("euler", "midpoint", "heun"),
    shifts: Sequence[float] = (1.0, 3.0),
    reference: int = 24,
    **request,
) -> Explorer:
    """Draw ``prompt`` with each of ``solvers`` and each number of model ``evaluations``, under each time ``shift``.

    Errors are distances from the midpoint solver's result after ``reference`` steps under the last shift. This takes
    one run for each image, and the reference: 25 by default, about 4 seconds on the miniature. ``request``: as for the
    pipeline.
    """
    check_one_prompt(prompt)
    evaluations, shifts = sorted(evaluations), list(shifts)
    if not evaluations or not solvers or not shifts:
        raise InstrumentError("give at least one number of evaluations, one solver and one shift.")
    steps = {(name, n): steps_for(name, n) for name in solvers for n in evaluations}
    hide_bar, request = request.get("progress", True) is False, request | {"progress": False}
    settings = request | {"solver": "midpoint", "steps": reference}
    goal = shifted(pipe, shifts[-1])(prompt, **settings).latents[0].float()
    images = [[[] for _ in solvers] for _ in shifts]
    errors = np.zeros((len(shifts), len(solvers), len(evaluations)))
    for s, i, j in progress_bar(list(np.ndindex(errors.shape)), desc="solvers", leave=False, show=not hide_bar):
        settings = request | {"solver": solvers[i], "steps": steps[solvers[i], evaluations[j]]}
        out = shifted(pipe, shifts[s])(prompt, **settings)
        images[s][i].append(to_rgb(out.images[0]))
        errors[s, i, j] = (out.latents[0].float() - goal).norm() / goal.norm()

    def draw(shift: int, cell: tuple[int, int]) -> View:
        view = solvers_view(images[shift], errors[shift], evaluations, solvers, cell)
        note = few_steps_note(pipe, {"steps": evaluations[cell[1]]}, "model evaluation")
        return replace(view, text=view.text + note)

    # the number of evaluations that the suggestions are about: enough for an image, and as few as that
    column = next((i for i, n in enumerate(evaluations) if n >= enough_steps(pipe)), len(evaluations) - 1)
    n, row = evaluations[column], errors[-1][:, column]
    return Explorer(
        "Which solver needs the fewest model evaluations?",
        [Choice("shift", "time shift", [f"{s:g}" for s in shifts], len(shifts) - 1, shifts)],
        draw,
        {"cell": (len(solvers) - 1, len(evaluations) - 1)},
        widths=[3.8, 2.4, 3.2],
        instruction="Point at an image in the table to see it large; within a column all cost the same.",
        tries=[
            Try(f"Which solver is closest after {n} model evaluations?", cell=(int(row.argmin()), column)),
            Try("Which one is farthest from the reference then?", cell=(int(row.argmax()), column)),
            *[Try("Does another schedule change the order?", shift=f"{s:g}") for s in shifts[:-1][:1]],
        ],
    )
