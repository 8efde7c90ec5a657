"""From a prompt to an image: latents, schedule, solvers, guidance, and the pipeline.

Names are imported on first use: ``fe.sampling.schedule``, ``fe.sampling.SOLVERS``.
"""

from pkgutil import iter_modules

from fluxedu.lazy import public_names

_NAMES = {
    "pipeline": ["FluxPipeline", "Output", "Trajectory"],
    "flux2": ["Flux2Pipeline", "Flux2PromptEncoder", "ChatTokenizer", "empirical_mu"],
    "request": ["Request"],
    "prompts": ["Conditioning", "PromptEncoder", "T5Prompts", "Tokenizer"],
    "velocity_field": ["VelocityField"],
    "solvers": ["SOLVERS", "Solver", "euler", "midpoint", "heun", "schedule", "shift_amount", "shift_times", "guide"],
    "latents": ["draw_noise", "pack", "unpack", "image_ids", "text_ids"],
    "images": ["edges"],
    "inversion": ["invert"],
}
__getattr__, __dir__, __all__ = public_names(__name__, _NAMES, [module.name for module in iter_modules(__path__)])
