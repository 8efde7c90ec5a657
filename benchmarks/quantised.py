"""The error that fewer bits make after each block of the miniature: ``python -m benchmarks.quantised``."""

from __future__ import annotations

import json
from importlib.metadata import version

import fluxedu as fe
from fluxedu.memory.quantised import FORMATS

SITES = ("double.*.img_out", "double.*.txt_out", "single.*.out", "velocity")
PROMPT = "a red circle left of a blue square"


def relative_errors(quantise: str, model: str = "nano", seed: int = 1) -> dict[str, float]:
    """``|quantised - exact| / |exact|`` after each block in the first step, and of the final latent.

    The error after a block includes that of all blocks before it.
    """
    recorded, latents = [], []
    for pipe in (fe.load(model, memory="full"), fe.load(model, memory="full", quantise=quantise)):
        with fe.record(*SITES, steps=[0]) as rec:
            latents.append(pipe(PROMPT, seed=seed, progress=False).latents)
        recorded.append({name: rec[name].tensor for name in rec})
    exact, quantised = recorded
    errors = {name: float((quantised[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    return {**errors, "latent": float((latents[1] - latents[0]).norm() / latents[0].norm())}


if __name__ == "__main__":
    versions = {name: version(name) for name in ("torch", "torchao", "bitsandbytes")}
    figures = {"command": "python -m benchmarks.quantised", "gpu": None, **versions}
    errors = {quantise: relative_errors(quantise) for quantise in FORMATS}
    print(json.dumps({**figures, "relative_errors": errors}, indent=2))
