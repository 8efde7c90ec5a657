"""From a prompt to an image: latents, schedule, solvers, guidance, and the pipeline.

Names are imported on first use: ``fe.sampling.schedule``, ``fe.sampling.SOLVERS``.
"""

from importlib import import_module

_PUBLIC = {
    "FluxPipeline": "pipeline",
    "Flux2Pipeline": "flux2",
    "Flux2PromptEncoder": "flux2",
    "ChatTokenizer": "flux2",
    "empirical_mu": "flux2",
    "Output": "pipeline",
    "Trajectory": "pipeline",
    "Request": "request",
    "Conditioning": "prompts",
    "PromptEncoder": "prompts",
    "T5Prompts": "prompts",
    "Tokenizer": "prompts",
    "VelocityField": "velocity_field",
    "SOLVERS": "solvers",
    "Solver": "solvers",
    "euler": "solvers",
    "midpoint": "solvers",
    "heun": "solvers",
    "schedule": "solvers",
    "shift_amount": "solvers",
    "shift_times": "solvers",
    "guide": "solvers",
    "draw_noise": "latents",
    "pack": "latents",
    "unpack": "latents",
    "image_ids": "latents",
    "text_ids": "latents",
    "edges": "images",
    "invert": "inversion",
}
_MODULES = (
    "batches",
    "conditions",
    "flux2",
    "images",
    "inversion",
    "latents",
    "limits",
    "pipeline",
    "prompts",
    "request",
    "solvers",
    "step_context",
    "velocity_field",
)
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"fluxedu.sampling.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"fluxedu.sampling has no attribute {name!r}; it has {', '.join(_PUBLIC)}.")
    return getattr(import_module(f"fluxedu.sampling.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
