"""Notebook 11: with few evaluations of the network, does a better solver or the shift of the times help?

100 prompts, each with its own seed, drawn by every solver with equal numbers of evaluations, and judged; the times are
spaced evenly or shifted towards noise as the miniature's own are.
"""

from __future__ import annotations

import fluxedu as fe
from evidence.intervals import share
from evidence.prompts import questions, verdicts

EVALUATIONS = (4, 8, 16, 32)


def run(samples: int = 100) -> dict:
    """Per shift, solver and number of evaluations: the share of pictures with everything right."""
    pipe, asked, table = fe.load(), questions(samples), {}
    for shift in ("shifted", "even"):
        for name, solver in fe.sampling.SOLVERS.items():
            for evaluations in EVALUATIONS:
                steps = evaluations // len(solver.stages)
                settings = {"solver": name, "steps": steps} | ({"shift": 1.0} if shift == "even" else {})
                found = verdicts(pipe, asked, **settings)
                row = {"steps": steps, "everything right": share([verdict.everything for verdict in found])}
                table.setdefault(shift, {}).setdefault(name, {})[str(evaluations)] = row
                print(shift, name, evaluations, row, flush=True)
    return table
