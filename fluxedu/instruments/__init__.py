"""See, keep and change what happens inside: recorders, interventions, lenses."""

from importlib import import_module
from pkgutil import iter_modules


def __getattr__(name: str):
    """``fe.instruments.lenses``, and every other part, without importing it by hand first."""
    if name in {part.name for part in iter_modules(__path__)}:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"fluxedu.instruments has no part {name!r}.")
