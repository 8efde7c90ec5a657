"""The latents of every shipped model with every solver are those that it drew when it was first shipped."""

import json
from pathlib import Path

import pytest
import torch

import fluxedu as fe
from fluxedu.sampling import SOLVERS

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["latents"]
CFG = {"true_cfg_scale": 2.0, "negative_prompt": "a blue circle"}


def inputs(name):
    """A fixed picture for the members of the family that read one."""
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(7)) * 2 - 1
    mask = torch.zeros(128, 128)
    mask[30:90, 40:100] = 1
    return {
        "nano-fill": {"image": picture, "mask": mask},
        "nano-canny": {"control": picture},
        "nano-depth": {"control": picture},
        "nano-kontext": {"reference": picture},
        "nano-redux": {"image_prompt": picture},
    }.get(name, {})


@pytest.mark.parametrize("name", sorted({key.split()[0] for key in GOLDEN}))
def test_every_model_draws_what_it_drew(name):
    """Four steps, two prompts, two seeds. Kernels round differently, and a run amplifies that: to 1e-4 at most here."""
    model, _, lora = name.partition("+")
    pipe = fe.load(model, **({"lora": lora} if lora else {}))
    for solver in ("euler", "midpoint", "heun"):
        for options, suffix in (({}, ""), (CFG, " cfg")):
            prompts = ["a red circle left of a blue square", "a green star"]
            out = pipe(prompts, seed=[3, 4], steps=4, solver=solver, progress=False, **inputs(model), **options)
            latents = out.latents.flatten()
            found = latents[torch.linspace(0, latents.numel() - 1, 24).long()]
            assert torch.allclose(found, torch.tensor(GOLDEN[f"{name} {solver}{suffix}"]), atol=1e-3), (name, solver)


def test_every_solver_has_its_golden_latents():
    assert {key.split()[1] for key in GOLDEN} == set(SOLVERS)
