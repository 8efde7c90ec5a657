"""Sites: named points of a model at which a value can be recorded or replaced (hook points).

A class with values worth seeing derives from :class:`Probed` (a module) or :class:`Sited` (anything else) and passes
each value through a named site, with its shape and meaning in a comment on the same line::

    q = self.probe("q", q)  # [B, H, N, d] queries, before QKNorm

An unwatched site costs one ``is None`` check. While something is watched, the watcher is called with
``(owner, name, value)`` and returns the value that the computation continues with: the same one if it only records,
another one if it intervenes. ``fluxedu.instruments`` is built on this and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakSet

from torch import nn

Watcher = Callable[["Sited", str, Any], Any]

# A plain module-level variable on purpose: torch.compile guards on it once and emits no code while it is None.
# A ContextVar breaks the graph, and compiled code may read an old value of a threading.local.
_watcher: Watcher | None = None

#: every live network whose sites have been named
networks: WeakSet[nn.Module] = WeakSet()


class Sited:
    """Something with sites."""

    #: where its sites are, such as ``double.2.img_attn``; :func:`name_sites` sets it for modules
    site_path: str = ""

    def probe(self, name: str, value: Any) -> Any:
        """Pass ``value`` through the site ``name``; returns the value that the computation continues with."""
        if _watcher is None:
            return value
        return _watcher(self, name, value)

    def is_watched(self, name: str) -> bool:
        """Whether anything watches this site; for values that are computed only if so.

        :meth:`probe` passes every value to the watcher. Its optional method ``wants(owner, name)`` only decides what
        this returns; without it, every site counts as watched.
        """
        if _watcher is None:
            return False
        wants = getattr(_watcher, "wants", None)
        return wants is None or wants(self, name)


class Probed(Sited, nn.Module):
    """A module with sites."""


def site(owner: Sited, name: str) -> str:
    """The full name of a site, such as ``double.2.img_attn.q``."""
    return f"{owner.site_path}.{name}" if owner.site_path else name


#: what the names of sites outside the transformer begin with
OTHER_NETWORKS = ("clip.", "t5.", "ae.", "sample.")


def matches(name: str, glob: str) -> bool:
    """Whether a site has the name ``glob``, in which ``*`` stands for any characters.

    A glob without the name of a network means the transformer: ``*.heads`` matches ``double.1.heads`` and not
    ``t5.encoder.block.0.layer.0.SelfAttention.heads``, which ``t5.*.heads`` matches.
    """
    if glob.partition(".")[0].strip("*") == "" and name.startswith(OTHER_NETWORKS):
        return False
    return fnmatchcase(name, glob)


def name_sites(network: nn.Module, prefix: str = "") -> None:
    """Set ``site_path`` of every :class:`Probed` module of ``network``, and register the network.

    The path is the module's path in the state dict, with ``double_blocks.2`` shortened to ``double.2`` and
    ``single_blocks.2`` to ``single.2`` (an attribute cannot be called ``double``, since ``nn.Module.double`` exists).
    The modulation of a single block belongs to the block itself: ``single.2.gate``.
    """
    name_submodules(network, prefix)
    networks.add(network)


def name_submodules(module: nn.Module, prefix: str) -> None:
    """Set ``site_path`` of the :class:`Probed` modules in ``module``, which stands at ``prefix`` in a network."""
    for path, submodule in module.named_modules():
        if isinstance(submodule, Probed):
            full = ".".join(name for name in (prefix, short_path(path)) if name)
            submodule.site_path = full.removesuffix(".modulation")


def short_path(path: str) -> str:
    """A state-dict path with the short names of the blocks."""
    return path.replace("double_blocks.", "double.").replace("single_blocks.", "single.")


def watch(watcher: Watcher | None) -> Watcher | None:
    """Install ``watcher`` (``None``: stop watching) and return the one that it replaces."""
    global _watcher
    previous, _watcher = _watcher, watcher
    return previous


def current_watcher() -> Watcher | None:
    """The installed watcher; None while nothing is watched."""
    return _watcher


def is_watching() -> bool:
    """Whether any watcher is installed."""
    return _watcher is not None
