"""Progress bars for work that takes more than a second."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm.auto import tqdm

_enabled = True


def progress_bar(iterable: Iterable | None = None, *, show: bool = True, **options) -> tqdm:
    """``tqdm(iterable, ...)``, shown after one second if ``show`` is True and :func:`disable_bars` was not called."""
    return tqdm(iterable, disable=not (show and _enabled), **{"delay": 1.0, **options})


def disable_bars() -> None:
    """Show no bars in this process: where stored outputs are compared, a bar would differ from machine to machine."""
    global _enabled
    _enabled = False
