"""Results of the experiments behind the course's claims, made by ``make evidence``; the folder ``evidence/`` of the
repository has the code.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from matplotlib.axes import Axes

from fluxedu.errors import CourseError, check_choice

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The experiments with stored results."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def load(name: str) -> dict:
    """The table of an experiment. Each entry at its end is ``{"value", "low", "high", "n"}`` with a 95 % interval.

    What the rows are, and the controls, is in the docstring of ``evidence/NAME.py`` in the repository.
    """
    check_choice("name", name, names(), error=CourseError)
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["table"]


def percent(entry: dict) -> str:
    """``"80 % (71 to 87, n = 100)"``"""
    return f"{entry['value']:.0%} ({100 * entry['low']:.0f} to {100 * entry['high']:.0f}, n = {entry['n']})".replace(
        "%", " %"
    )


def number(entry: dict, digits: int = 2) -> str:
    """``"0.39 (0.31 to 0.45, n = 40)"``"""
    value, low, high = (f"{entry[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high}, n = {entry['n']})"


def plot(ax: Axes, entries: dict[str, dict], label: str | None = None, **style) -> None:
    """One point per entry with its interval, from left to right; ``style``: as for matplotlib's ``errorbar``."""
    values = [entry["value"] for entry in entries.values()]
    below = [entry["value"] - entry["low"] for entry in entries.values()]
    above = [entry["high"] - entry["value"] for entry in entries.values()]
    ax.errorbar(range(len(values)), values, yerr=[below, above], label=label, **({"fmt": "o", "capsize": 3} | style))
    ax.set_xticks(range(len(values)), entries)
