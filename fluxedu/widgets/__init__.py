"""Explorers: interactive views of a run, for a notebook.

    from fluxedu import widgets
    widgets.attention(pipe, "a red circle left of a blue square")

Each explorer is one module of this package: a pure function from recorded tensors to a view, and a function of the
module's name, registered with ``@explorer``, that makes the runs and the controls. ``widgets.attention`` is that
module, and calling it calls that function. Explorers respond to mouse and keyboard, show a static figure where there is
no kernel, and load nothing from the network.
"""

from importlib import import_module
from pkgutil import iter_modules

from fluxedu.widgets.explorer import EXPLORERS, Explorer, Registration, Try, View

_MODULES = sorted({module.name for module in iter_modules(__path__)} - {"explorer", "panels", "reruns"})
__all__ = ["Explorer", "Try", "View", "explorers", *_MODULES]


def explorers() -> dict[str, Registration]:
    """Every registered explorer by name: those of this package and any that a notebook has registered."""
    for name in _MODULES:
        import_module(f"{__name__}.{name}")
    return EXPLORERS


def __getattr__(name: str):
    """Import an explorer's module when it is first used."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in EXPLORERS:
        return EXPLORERS[name].function
    raise AttributeError(f"fluxedu.widgets has no explorer {name!r}; it has {', '.join(_MODULES)}.")


def __dir__() -> list[str]:
    return [*__all__, *EXPLORERS]
