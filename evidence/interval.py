"""Notebook 12b: does it help to switch classifier-free guidance off at both ends of a run?

64 prompts, each with its own seed, with `nano-base` in eight steps; guidance always on, from t = 0.9 to 0.3 only, and
at the other times only, which is the control. A scale that is usual and one that is far too high.
"""

from __future__ import annotations

import fluxedu as fe
from evidence.intervals import difference, mean, share
from evidence.prompts import correct, questions, verdicts

INTERVAL = (0.3, 0.9)


def run(samples: int = 64) -> dict:
    """Per scale and times of guidance: everything right, the claims that hold, and their difference from always on."""
    pipe, asked, table = fe.load("nano-base"), questions(samples), {}
    for scale in (3.0, 15.0):
        always = None
        for name, interval in (("always", (0.0, 1.0)), ("0.9 to 0.3", INTERVAL), ("0.3 to 0", (0.0, INTERVAL[0]))):
            found = verdicts(pipe, asked, guidance=scale, guidance_interval=interval, steps=8)
            claims = correct(found)
            always = claims if always is None else always
            table[f"{scale:g}, {name}"] = {
                "everything right": share([verdict.everything for verdict in found]),
                "claims that hold": mean(claims),
                "more than always on": difference(claims, always),
            }
            print(scale, name, table[f"{scale:g}, {name}"], flush=True)
    return table
