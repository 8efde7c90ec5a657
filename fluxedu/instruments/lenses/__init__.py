"""Lenses: measurements on a run of the pipeline, with tensors of named axes as results.

    lenses.word_maps(pipe, "a red circle left of a blue square", ["circle", "square"], seed=1)

Each lens runs the pipeline, records what it needs and reduces it during the run; its docstring names the paper that the
measurement comes from. Further keywords (``seed``, ``steps``, ``guidance``, ...) go to the pipeline. With a list of
prompts or of seeds, the result has a first axis, ``picture``; ``result.images`` are the images. A lens is a function
with the decorator :func:`fluxedu.instruments.lenses.run.lens` in any module of this package.
"""

from importlib import import_module
from pkgutil import iter_modules

from fluxedu.instruments.lenses.run import LENSES

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
globals().update(LENSES)  # after the imports: a lens may have the name of its module
__all__ = sorted(LENSES)
