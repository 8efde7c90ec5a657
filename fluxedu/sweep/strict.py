"""Plain values, looked at strictly: each function returns the value or raises SweepError, one sentence."""

from __future__ import annotations

import math

from fluxedu.errors import SweepError, describe


def only(values, known: tuple[str, ...], where: str, needed: tuple[str, ...] = ()) -> dict:
    """A mapping that has no other keys than these, and the needed ones."""
    if not isinstance(values, dict):
        raise SweepError(f"{where} is made of names and values, not {describe(values)}.")
    for key in values:
        if key not in known:
            raise SweepError(f"{where} has an unknown {describe(key)}; known are {', '.join(known)}.")
    for key in needed:
        if key not in values:
            raise SweepError(f"{where} lacks {key!r}.")
    return values


def text(value, name: str, empty: bool = False) -> str:
    """A string. What YAML reads as something else (no, 12, 2020-01-01) needs quotes."""
    if not isinstance(value, str) or not (value or empty):
        raise SweepError(f"{name} is text, in quotes where YAML reads something else, not {describe(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SweepError(f"{name} is text, and {describe(value)} is none that can be written down.") from None
    return value


def texts(value, name: str, empty: bool = False) -> list[str]:
    """A list of strings, itself not empty."""
    if not isinstance(value, list) or not value:
        raise SweepError(f"{name} is a list of texts, at least one, not {describe(value)}.")
    return [text(v, f"each of {name}", empty) for v in value]


def whole(value, name: str, low: int, high: int) -> int:
    """A whole number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SweepError(f"{name} is a whole number from {low} to {high}, not {describe(value)}.")
    return value


def number(value, name: str) -> float:
    """A finite number."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or abs(value) > 1e30 or not math.isfinite(value):
        raise SweepError(f"{name} is a number (write 1.0e-3, not 1e-3), not {describe(value)}.")
    return value


def numbers(value, name: str) -> list:
    """A list of numbers, itself not empty."""
    if not isinstance(value, list) or not value:
        raise SweepError(f"{name} is a list of numbers, at least one, not {describe(value)}.")
    return [number(v, f"each of {name}") for v in value]
