"""Explorers of a pipeline that calculates in bfloat16, as the official ones do: each opens, and shows numbers."""

import numpy as np
import pytest
import torch

from fluxedu import widgets
from fluxedu.sampling.pipeline import FluxPipeline

A, B = "a red circle left of a blue square", "a green circle left of a blue square"
ASKED = {"seed": 4, "steps": 3, "progress": False}
OPENED = {
    "architecture": lambda pipe: widgets.architecture(pipe, A, **ASKED),
    "attention": lambda pipe: widgets.attention(pipe, A, **ASKED),
    "bench": lambda pipe: widgets.bench(pipe, A, B, **ASKED),
    "contributions": lambda pipe: widgets.contributions(pipe, A, **ASKED),
    "grid": lambda pipe: widgets.grid(pipe, A, steps=[1, 2], strengths=[1.0, 3.0], seed=4),
    "heads": lambda pipe: widgets.heads(pipe, A, **ASKED),
    "latents": lambda pipe: widgets.latents(pipe, A, **ASKED),
    "modulation": lambda pipe: widgets.modulation(pipe, [A, B], times=3),
    "positions": lambda pipe: widgets.positions(pipe),
    "similarity": lambda pipe: widgets.similarity(pipe),
    "solvers": lambda pipe: widgets.solvers(pipe, A, questions=[2, 4], reference=3, seed=4),
    "streams": lambda pipe: widgets.streams(pipe, A, **ASKED),
    "tokens": lambda pipe: widgets.tokens(pipe, A),
    "trajectory": lambda pipe: widgets.trajectory(pipe, A, **ASKED),
    "velocity": lambda pipe: widgets.velocity(pipe, [A, B], seeds=2, steps=3, progress=False),
}


@pytest.fixture(scope="module")
def half(make_pipe) -> FluxPipeline:
    return make_pipe().to(torch.bfloat16)


@pytest.mark.parametrize("name", OPENED)
def test_it_opens(half, name):
    view = OPENED[name](half).now()
    for panel in view.panels:
        shown = [getattr(panel, part) for part in ("image", "series") if getattr(panel, part, None) is not None]
        for part in shown:
            values = part.values() if isinstance(part, dict) else [part]
            assert all(np.isfinite(np.asarray(value, float)).all() for value in values)
