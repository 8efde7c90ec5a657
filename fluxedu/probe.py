"""Sites: the one mechanism by which anything in fluxedu is seen or changed.

A module with something worth seeing derives from :class:`Probed` and passes the value through a
named site::

    q = self.probe("q", q)

Nobody looking, that is one test of one plain module-level variable. Somebody looking, the watcher
receives ``(module, name, value)`` and returns the value to go on with: the same one if it only
records, another one if it intervenes. There is no second mechanism.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Watcher = Callable[["Probed", str, Any], Any]

# A plain global on purpose: torch.compile guards on it once and emits no code while it is None.
# A ContextVar breaks the graph and a threading.local is read stale inside compiled code.
_watcher: Watcher | None = None


class Probed(nn.Module):
    """A module with sites."""

    #: path of the module inside its network, e.g. ``double.2.img_attn``; set by :func:`name_sites`
    site_path: str = ""

    def probe(self, name: str, value: Any) -> Any:
        """Pass ``value`` through the site ``name``; returns what the computation goes on with."""
        if _watcher is None:
            return value
        return _watcher(self, name, value)


def name_sites(network: nn.Module, prefix: str = "") -> None:
    """Give every :class:`Probed` module below ``network`` its site path.

    The path is the module's path in the state dict with ``double_blocks.2`` said as ``double.2`` and
    ``single_blocks.2`` as ``single.2`` (an attribute called ``double`` would shadow
    ``nn.Module.double``, so the modules cannot carry the short name themselves).
    """
    for path, module in network.named_modules():
        if isinstance(module, Probed):
            short = path.replace("double_blocks.", "double.").replace("single_blocks.", "single.")
            module.site_path = ".".join(part for part in (prefix, short) if part)


def watch(watcher: Watcher | None) -> Watcher | None:
    """Install ``watcher`` (or ``None`` to stop watching) and return the one it replaces."""
    global _watcher
    previous, _watcher = _watcher, watcher
    return previous


def watched() -> bool:
    """Is anybody looking? For values that are not even made when nobody is."""
    return _watcher is not None
