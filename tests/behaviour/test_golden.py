"""The latents of every shipped model with every solver are those that it drew when it was first shipped."""

import json
import sys
from pathlib import Path

import pytest
import torch

import fluxedu as fe
from fluxedu.nano.shipped import SHIPPED_MODELS
from fluxedu.sampling import SOLVERS

FILE = Path(__file__).parent / "golden.json"
GOLDEN = json.loads(FILE.read_text())["latents"]
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


def latents_of(name):
    """24 numbers of the latents of each run, after four steps with two prompts and two seeds, by its name."""
    model, _, lora = name.partition("+")
    pipe = fe.load(model, **({"lora": lora} if lora else {}))
    for solver in ("euler", "midpoint", "heun"):
        for options, suffix in (({}, ""), (CFG, " cfg")):
            prompts = ["a red circle left of a blue square", "a green star"]
            out = pipe(prompts, seed=[3, 4], steps=4, solver=solver, progress=False, **inputs(model), **options)
            latents = out.latents.flatten()
            yield f"{name} {solver}{suffix}", latents[torch.linspace(0, latents.numel() - 1, 24).long()]


@pytest.mark.parametrize("name", sorted({key.split()[0] for key in GOLDEN} | set(SHIPPED_MODELS)))
def test_every_model_draws_what_it_drew(name):
    """Kernels round differently, and a run amplifies that: to 1e-4 at most here."""
    for run, found in latents_of(name):
        assert torch.allclose(found, torch.tensor(GOLDEN[run]), atol=1e-3), run


def test_every_solver_has_its_golden_latents():
    assert {key.split()[1] for key in GOLDEN} == set(SOLVERS)


if __name__ == "__main__":  # python tests/behaviour/test_golden.py NAME adds a model that has just been shipped
    added = {run: [round(x, 4) for x in found.tolist()] for run, found in latents_of(sys.argv[1])}
    FILE.write_text(json.dumps(json.loads(FILE.read_text()) | {"latents": GOLDEN | added}, indent=0))
