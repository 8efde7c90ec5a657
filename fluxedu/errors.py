"""Every error that fluxedu raises on purpose, and the checks that raise them.

All derive from :class:`FluxeduError`, which is a ValueError, so ``except fe.FluxeduError`` catches whatever a user of
fluxedu can mend. A message is one sentence: which argument, what it was, what is allowed, and the nearest fix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from reprlib import repr as short_repr


class FluxeduError(ValueError):
    """Base class of all errors below."""


class ConfigError(FluxeduError):
    """A configuration that cannot describe a network."""


class CheckpointError(FluxeduError):
    """A file or a set of tensors that is not what it should be."""


class PlacementError(FluxeduError):
    """An unknown memory mode, or weights that do not fit in it."""


class QuantiseError(FluxeduError):
    """An unknown format, a missing library, or weights that cannot be quantised."""


class CompileError(FluxeduError):
    """torch.compile does not work here, or cannot take these blocks."""


class OutOfMemory(FluxeduError, MemoryError):
    """Memory ran out; the message says what would need less."""


class RequestError(FluxeduError):
    """An argument of the pipeline that cannot be carried out."""


class InstrumentError(FluxeduError):
    """A site, head, token or step that does not exist, or a change that does not fit."""


class WordNotInPrompt(InstrumentError):
    """The prompt does not contain a word. While several prompts are encoded, another one may."""


class BudgetError(InstrumentError):
    """A recording that would need more bytes than its budget."""


class GradientError(InstrumentError):
    """A gradient is wanted where none can flow."""


class CourseError(FluxeduError):
    """An exercise, a prediction or a notebook that does not exist or is malformed."""


class ArenaError(FluxeduError):
    """A match, vote or contestant that does not exist or is malformed."""


class VotesFileError(ArenaError):
    """A file of votes that cannot be read or written, such as one on a full disk."""


class SweepError(FluxeduError):
    """A sweep that cannot be run as it is described."""


def describe(value) -> str:
    """``repr(value)`` on one line and cut to a readable length, for use in a message."""
    try:
        return " ".join(short_repr(value).split())
    except Exception:  # a broken __repr__ must not hide the message
        return f"a {type(value).__name__}"


def first_of(names: Iterable[str]) -> str:
    """``'a'``, or ``'a' (and 3 more)``."""
    names = list(names)
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"


def check_integer(name: str, value, low: int, high: int, hint: str = "", error: type = RequestError) -> int:
    """``value`` as an int if it is a whole number in [low, high]; raises ``error`` otherwise. A bool is refused."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise error(f"{name} must be a whole number from {low} to {high}, not {describe(value)}{_after(hint)}.")
    return int(value)


def check_number(name: str, value, low: float, high: float, hint: str = "", error: type = RequestError) -> float:
    """``value`` as a float if it is a finite number in [low, high]; raises ``error`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise error(f"{name} must be a number from {low:g} to {high:g}, not {describe(value)}{_after(hint)}.")
    return float(value)


def check_choice(name: str, value, options: Collection[str], hint: str = "", error: type = RequestError) -> str:
    """``value`` if it is one of ``options``; raises ``error`` otherwise."""
    if not isinstance(value, str) or value not in options:
        raise error(f"{name} must be one of {', '.join(options)}, not {describe(value)}{_after(hint)}.")
    return value


def check_text(name: str, value, error: type = RequestError) -> str:
    """``value`` if it is a text that can be encoded; raises ``error`` otherwise."""
    if not isinstance(value, str) or value.encode(errors="ignore").decode() != value:
        raise error(f"{name} must be text (in quotes where YAML reads something else), not {describe(value)}.")
    return value


def check_list(name: str, value, error: type = RequestError, least: int = 1) -> list:
    """``value`` if it is a list of at least so many items, all different; raises ``error`` otherwise."""
    if not isinstance(value, list) or len(value) < least:
        raise error(
            f"{name} must be a list with at least {least} item{'' if least == 1 else 's'}, not {describe(value)}."
        )
    if len(set(map(repr, value))) < len(value):
        counts = Counter(map(repr, value))
        raise error(f"{name} contains {describe(next(item for item in value if counts[repr(item)] > 1))} twice.")
    return value


def check_keys(
    name: str, value, allowed: Collection[str] | None = None, required: Collection = (), error: type = RequestError
) -> dict:
    """``value`` if it is a dict with all ``required`` and only ``allowed`` keys; raises ``error`` otherwise."""
    if not isinstance(value, dict):
        raise error(f"{name} must be a mapping of names to values, not {describe(value)}.")
    for key in value:
        if allowed is not None and key not in allowed:
            raise error(f"{name} has an unknown key {describe(key)}; the keys are {', '.join(allowed)}.")
    for key in required:
        if key not in value:
            raise error(f"{name} needs the key {key!r}.")
    return value


def _after(hint: str) -> str:
    return f"; {hint}" if hint else ""
