"""Every error that fluxedu raises on purpose, and the checks that raise them.

All derive from :class:`FluxeduError`, which is a ValueError, so ``except fe.FluxeduError`` catches whatever a user of
fluxedu can mend. A message is one sentence: which argument, what it was, what is allowed, and the nearest fix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from reprlib import repr as short_repr
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


class FluxeduError(ValueError):
    """Base class of all errors below. Names in a message may be anything, so it is kept to one readable line."""

    def __init__(self, message: object = ""):
        text = " ".join(str(message).split())
        text = printable(re.sub(r"\S{250,}", lambda word: f"{word[0][:100]}...{word[0][-100:]}", text))
        super().__init__(text if len(text) <= 900 else f"{text[:500]} ... {text[-300:]}")


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
    """A match, vote or contestant that does not exist or is malformed. ``on_page``: what the voting page says."""

    def __init__(self, message: object = "", on_page: str = ""):
        super().__init__(message)
        self.on_page = on_page or str(self)


class VotesFileError(ArenaError):
    """A file of votes that cannot be read or written, such as one on a full disk."""


class SweepError(FluxeduError):
    """A sweep that cannot be run as it is described."""


class PromptWarning(UserWarning):
    """A prompt that the miniature cannot draw, because it was not trained on prompts like it."""


def printable(text: str) -> str:
    """``text`` with escapes such as ``\\x1b`` for control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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


def check_tensor(name: str, value, axes: str, error: type = RequestError):
    """``value`` if it is a tensor of floating-point numbers with these axes, ``"[B, C, h, w]"``; else ``error``."""
    if not hasattr(value, "is_floating_point") or value.ndim != axes.count(",") + 1 or 0 in value.shape:
        found = list(value.shape) if hasattr(value, "is_floating_point") else describe(value)
        raise error(f"{name} must be a tensor {axes}, not {found}.")
    if not value.is_floating_point() or value.is_meta:
        raise error(f"{name} must hold floating-point numbers, not {value.dtype} on {value.device}.")
    return value


def check_device(device, error: type = RequestError):
    """The torch.device, if it can be used here; "cuda" becomes the current GPU. Raises ``error`` otherwise."""
    import torch  # only here, so that a command can fail before it has loaded PyTorch

    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # raises where there is no such device, and on "meta", which has no values
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, OverflowError):
        gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
        usable = "'cpu'" + (f" or {gpu!r}" if gpu else "")
        raise error(f"device {describe(device)} cannot be used here; use {usable}.") from None
    if chosen.type == "cuda" and chosen.index is None:  # some functions of torch.cuda need the number
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _after(hint: str) -> str:
    return f"; {hint}" if hint else ""


# ---------------------------------------------------------------- arguments and their annotations


def checked(error: type = RequestError, *names: str) -> Callable[[Callable], Callable]:
    """Decorator of a public function or dataclass: an argument of another type than its annotation raises ``error``.

    With ``names``, only those arguments are checked. Ranges, names and shapes are for the function itself. Only tuples,
    lists and dicts are looked into: the values of other mappings may be read from a file, and those of an iterator can
    be read once.
    """

    def decorate(function: Callable) -> Callable:
        if isinstance(function, type):  # the arguments of a dataclass
            function.__init__ = decorate(function.__init__)
            return function
        parameters = signature(function)

        @wraps(function)
        def call(*args, **kwargs):
            try:
                arguments = parameters.bind(*args, **kwargs).arguments
            except TypeError:
                return function(*args, **kwargs)  # Python's own message names the function
            hints = _hints(function)
            for name, value in arguments.items():
                kind = parameters.parameters[name].kind
                values = value if kind is Parameter.VAR_POSITIONAL else [value]
                values = value.values() if kind is Parameter.VAR_KEYWORD else values
                for item in values if name in hints and name in (names or hints) else ():
                    if not _fits(item, hints[name]):
                        raise error(f"{name} must be of the type {_type_name(hints[name])}, not {describe(item)}.")
            return function(*args, **kwargs)

        return call

    return decorate


@cache
def _hints(function: Callable) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):  # somebody's own function, with annotations that cannot be read
        return {}


def _fits(value, hint) -> bool:
    """Whether a value is of the type that an annotation says. A bool is no number."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is Callable:
        return callable(value)
    if kind in (list, tuple, Sequence) and not isinstance(value, (str, bytes)):
        if kind is tuple and ... not in inner:
            return isinstance(value, (list, tuple)) and len(value) == len(inner) and all(map(_fits, value, inner))
        items = value if isinstance(value, (list, tuple)) else value[:1] if isinstance(value, Sequence) else None
        is_list = kind is Sequence or isinstance(value, (list, tuple))
        return is_list and items is not None and (not inner or all(_fits(item, inner[0]) for item in items))
    if kind in (dict, Mapping) and isinstance(value, dict) and inner:
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    return isinstance(value, kind) and not (kind is Sequence and isinstance(value, (str, bytes)))


def _type_name(hint) -> str:
    """An annotation without the names of modules: ``str | Path | None``."""
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"(\w+\.)+(?=\w)", "", name)
