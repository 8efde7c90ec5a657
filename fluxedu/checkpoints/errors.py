"""The one error of this package, and how lists of names are said in it."""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A file or a set of tensors that is not what it should be; the message is one sentence."""


def naming(names: Iterable[str]) -> str:
    """``'a'``, or ``'a' (and 3 more)``: the first name and how many follow."""
    names = list(names)
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"
