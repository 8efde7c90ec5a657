"""fluxedu: FLUX.1 in code that reads like its diagram.

>>> import fluxedu as fe
>>> pipe = fe.load()                                     # the miniature that ships with the package
>>> out = pipe("a red circle left of a blue square", seed=0)
>>> out.images[0].size
(128, 128)
"""

from importlib import import_module

__version__ = "0.1.0"

#: public name -> the module that defines it (None: the name is a module); imported on first use, to keep
#: ``import fluxedu`` light
_PUBLIC = {
    "load": "fluxedu.loading",
    "FluxPipeline": "fluxedu.sampling.pipeline",
    "FluxeduError": "fluxedu.errors",
    "sites": "fluxedu.instruments.catalogue",
    "record": "fluxedu.instruments.recorder",
    "intervene": "fluxedu.instruments.interventions",
    "ablate": "fluxedu.instruments.ablation",
    "ablate_each": "fluxedu.instruments.variants",
    "patch": "fluxedu.instruments.interventions",
    "region": "fluxedu.instruments.tokens",
    "gradients": "fluxedu.sampling.gradients",
    "invert": "fluxedu.sampling.inversion",
    "swap": "fluxedu.instruments.swapping",
    "check": "fluxedu.course",
    "passed": "fluxedu.course",
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
    "errors": None,
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"fluxedu has no attribute {name!r}; it has {', '.join(_PUBLIC)}.")
    module = _PUBLIC[name]
    return import_module(f"fluxedu.{name}") if module is None else getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
