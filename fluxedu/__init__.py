"""fluxedu: FLUX.1 in code that reads like its diagram.

>>> import fluxedu as fe
>>> pipe = fe.load()                                     # the miniature that ships with the package
>>> out = pipe("a red circle left of a blue square", seed=0)
>>> out.images[0].size
(128, 128)
"""

from fluxedu.lazy import public_names

__version__ = "0.1.0"

#: module -> the public names that it defines; all are imported on first use, to keep ``import fluxedu`` light
_NAMES = {
    "loading": ["load"],
    "sampling.pipeline": ["FluxPipeline"],
    "errors": ["FluxeduError"],
    "instruments.catalogue": ["sites"],
    "instruments.recorder": ["record"],
    "instruments.interventions": ["intervene", "patch"],
    "instruments.ablation": ["ablate"],
    "instruments.variants": ["ablate_each"],
    "instruments.tokens": ["region"],
    "instruments.swapping": ["swap"],
    "sampling.gradients": ["gradients"],
    "sampling.inversion": ["invert"],
    "course": ["check", "passed", "predict", "score"],
}
#: modules that are public names themselves
_MODULES = ["models", "sampling", "checkpoints", "memory", "nano", "instruments", "plots", "widgets", "arena", "course"]
_MODULES += ["probe", "errors"]
__getattr__, __dir__, __all__ = public_names(__name__, _NAMES, _MODULES)
__all__ += [*_MODULES, "__version__"]
