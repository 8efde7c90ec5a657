"""Notebook 16: which change of FLUX.2 costs or buys what, in a miniature?

FLUX.1 as it is (the twin), FLUX.2, and FLUX.1 with one change of FLUX.2 at a time, all with as many parameters and
trained on the same scenes for the same computing time: ``training/flux2.py``. This only reads the figures of the runs
that are judged in the folder ``runs``, or in the one that FLUXEDU_RUNS names; a run that is missing there is missing in
the table. Judged are 500 held-out prompts, drawn from the same noise by every model.

    runs    by model, the twin first: parameters, steps, images per step; ``right``, the share of right claims in each
            row of the exam; ``minus twin``, the difference from the twin; ``paired``, whether that was compared prompt
            by prompt, or as two samples because only the twin's sums are stored
    seeds   the difference between two runs of one recipe with different seeds: of the models above, ``NAME@SEED`` (if
            there is one), and of the tiny flows of notebook 07b, where one image in fifty is entirely right

The intervals include the choice of prompts and noises, but not the training run. Each model is trained once; a
difference that is no larger than that of two seeds says nothing about the change.
"""

from __future__ import annotations

import os
from pathlib import Path

from evidence import intervals
from fluxedu.course import evidence
from training.baselines import TWIN
from training.flux2 import NAMES
from training.flux2_exam import difference, finished, is_paired, percentage, wilson

FOLDER = Path(os.environ.get("FLUXEDU_RUNS", "runs"))
ROWS_07B = ("colours right", "shapes right", "everything right")


def entry(value: float, low: float, high: float, n: int) -> dict:
    """Percentages as shares, in the form of every stored result; rounding must not exclude the value."""
    return {"value": value / 100, "low": min(low, value) / 100, "high": max(high, value) / 100, "n": n}


def cells_of(run: dict) -> dict[str, list]:
    """Right and claimed, by row; without rows in which nothing is claimed."""
    return {row: cells for row, cells in run["rows"].items() if any(claimed for _, claimed in cells)}


def figures(run: dict) -> dict:
    """How a model was trained, and its share of right claims in each row."""
    right = {}
    for row, cells in cells_of(run).items():
        percent, n = float(percentage(cells)), sum(claimed for _, claimed in cells)
        right[row] = entry(percent, *wilson(percent, n), n)
    return {key: run[key] for key in ("parameters", "steps", "batch")} | {"right": right}


def minus(run: dict, other: dict) -> dict:
    """The differences of a run from another one, by row."""
    rows = cells_of(run).items()
    return {row: entry(*difference(cells, other["rows"][row]), sum(n for _, n in cells)) for row, cells in rows}


def two_seeds_of_07b() -> dict:
    """Of both kinds of flows of notebook 07b: the share of each seed, and the second minus the first."""
    found = {}
    for kind, stored in evidence.load("twins").items():
        found[kind] = {}
        for row in ROWS_07B:
            hits = [int(digit) for digit in stored[row]["hits"]]
            first, second = hits[: len(hits) // 2], hits[len(hits) // 2 :]  # the same captions and noises
            found[kind][row] = {
                "first": intervals.mean(first),
                "second": intervals.mean(second),
                "second minus first": intervals.difference(second, first),
            }
    return found


def run() -> dict:
    """The table of all runs that are judged, the control first."""
    found = finished(FOLDER)
    twin, runs, seeds = found[TWIN], {}, {}
    for name in (TWIN, *(name for name in NAMES if name in found)):
        runs[name] = figures(found[name])
        if name != TWIN:
            paired = is_paired(found[name]["rows"]["everything"], twin["rows"]["everything"])
            runs[name] |= {"minus twin": minus(found[name], twin), "paired": paired}
    for name in found:
        recipe = name.partition("@")[0]
        if recipe != name and recipe in found:
            seeds[name] = figures(found[name]) | {f"minus {recipe}": minus(found[name], found[recipe])}
    return {"runs": runs, "seeds": seeds | {"notebook 07b": two_seeds_of_07b()}}
