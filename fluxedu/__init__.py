"""fluxedu: FLUX.1 in code that reads like its diagram.

>>> import fluxedu as fe
>>> pipe = fe.load()                                     # the miniature that ships with the package
>>> out = pipe("a red circle left of a blue square", seed=0)
>>> out.images[0].size
(128, 128)
"""

from importlib import import_module

__version__ = "0.1.0"

# name -> where it lives; imported when first asked for, so that `import fluxedu` stays light
_PUBLIC = {
    "load": "fluxedu.loading",
    "FluxPipeline": "fluxedu.sampling.pipeline",
    "sites": "fluxedu.instruments.catalogue",
    "record": "fluxedu.instruments.recorder",
    "intervene": "fluxedu.instruments.interventions",
    "ablate": "fluxedu.instruments.ablation",
    "patch": "fluxedu.instruments.interventions",
    "swap": "fluxedu.instruments.swapping",
    "check": "fluxedu.course",
    "predict": "fluxedu.course",
    "score": "fluxedu.course",
    "models": None,
    "sampling": None,
    "checkpoints": None,
    "memory": None,
    "nano": None,
    "instruments": None,
    "plots": None,
    "widgets": None,
    "arena": None,
    "course": None,
    "probe": None,
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"fluxedu has no attribute {name!r}; it has {', '.join(_PUBLIC)}.")
    home = _PUBLIC[name]
    return import_module(f"fluxedu.{name}") if home is None else getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
