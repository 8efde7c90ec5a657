"""The public names of a package, each imported on first use: ``import fluxedu`` takes little longer than torch itself.

    __getattr__, __dir__, __all__ = public_names(__name__, {"loading": ["load"]}, modules=["models"])

A package calls this in its ``__init__.py``; Python then looks names up in ``__getattr__`` (PEP 562).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def public_names(
    package: str, names: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of ``package``.

    names: module -> the public names that it defines; the module is one of the package (``"blocks"``) or, with its full
    name, any other of fluxedu · modules: those modules of the package that are public names themselves
    """
    home = {name: module for module, of in names.items() for name in of}

    def get(name: str) -> Any:
        if name in home:
            module = home[name] if home[name].startswith("fluxedu.") else f"{package}.{home[name]}"
            return getattr(import_module(module), name)
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"{package} has no attribute {name!r}; it has {', '.join([*home, *modules])}.")

    return get, lambda: [*home, *modules], list(home)
