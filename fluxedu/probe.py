"""Sites: the one mechanism by which anything in fluxedu is seen or changed.

Whatever has something worth seeing derives from :class:`Probed` (a module) or :class:`Sited` (anything
else) and passes the value through a named site::

    q = self.probe("q", q)

Nobody looking, that is one test of one plain module-level variable. Somebody looking, the watcher
receives ``(owner, name, value)`` and returns the value to go on with: the same one if it only
records, another one if it intervenes. There is no second mechanism; ``fluxedu.instruments`` is built on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import nn

Watcher = Callable[["Sited", str, Any], Any]

# A plain global on purpose: torch.compile guards on it once and emits no code while it is None.
# A ContextVar breaks the graph and a threading.local is read stale inside compiled code.
_watcher: Watcher | None = None

#: every network whose sites were named and that is still alive
networks: WeakSet[nn.Module] = WeakSet()


class Sited:
    """Something with sites."""

    #: where the sites are, e.g. ``double.2.img_attn``; of a module, set by :func:`name_sites`
    site_path: str = ""

    def probe(self, name: str, value: Any) -> Any:
        """Pass ``value`` through the site ``name``; returns what the computation goes on with."""
        if _watcher is None:
            return value
        return _watcher(self, name, value)

    def is_watched(self, name: str) -> bool:
        """Is anybody looking at this site? For values that are not even made when nobody is.

        A watcher may have a method ``wants(owner, name)``; one without it is given everything.
        """
        if _watcher is None:
            return False
        wants = getattr(_watcher, "wants", None)
        return wants is None or wants(self, name)


class Probed(Sited, nn.Module):
    """A module with sites."""


def site(owner: Sited, name: str) -> str:
    """A site's whole name: ``double.2.img_attn.q``."""
    return f"{owner.site_path}.{name}" if owner.site_path else name


def name_sites(network: nn.Module, prefix: str = "") -> None:
    """Give every :class:`Probed` module below ``network`` its site path.

    The path is the module's path in the state dict with ``double_blocks.2`` said as ``double.2`` and
    ``single_blocks.2`` as ``single.2`` (an attribute called ``double`` would shadow
    ``nn.Module.double``, so the modules cannot carry the short name themselves); a single block's one
    modulation is the block's own, ``single.2.gate``.
    """
    name_parts(network, prefix)
    networks.add(network)


def name_parts(module: nn.Module, prefix: str) -> None:
    """The same for the parts of a module that stands at ``prefix`` in a network."""
    for path, part in module.named_modules():
        if isinstance(part, Probed):
            whole = ".".join(name for name in (prefix, short_path(path)) if name)
            part.site_path = whole.removesuffix(".modulation")


def short_path(path: str) -> str:
    """A module's path in the state dict with the blocks' short names."""
    return path.replace("double_blocks.", "double.").replace("single_blocks.", "single.")


def watch(watcher: Watcher | None) -> Watcher | None:
    """Install ``watcher`` (or ``None`` to stop watching) and return the one it replaces."""
    global _watcher
    previous, _watcher = _watcher, watcher
    return previous


def watched() -> bool:
    """Is anybody looking at anything?"""
    return _watcher is not None
