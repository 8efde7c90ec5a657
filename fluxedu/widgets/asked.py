"""What explorers are asked for: checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxedu.errors import InstrumentError
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.solvers import from_strength


def checked(asked: dict[str, Any], *own: str) -> dict[str, Any]:
    """``asked``, for one picture; raises InstrumentError for several seeds, or for what the explorer sets itself."""
    taken = [name for name in own if name in asked]
    if taken:
        raise InstrumentError(f"{taken[0]} is set by the explorer itself; leave it out.")
    if not isinstance(asked.get("seed", 0), int):
        raise InstrumentError(f"an explorer shows one picture at a time; give one seed, not {asked['seed']!r}.")
    return asked


def prompts_of(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several, different ones, as a list."""
    found = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Sequence) else []
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise InstrumentError(f"give a prompt, or several in a list, not {prompts!r}.")
    if len(set(found)) < len(found):
        raise InstrumentError("the prompts are alike; give different ones.")
    return found


def numbers(name: str, given: Any, least: float) -> list:
    """A list of numbers from ``least`` on; one alone is a list of one."""
    found = list(given) if isinstance(given, (Sequence, range)) and not isinstance(given, str) else [given]
    good = [x for x in found if isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x < float("inf")]
    if not found or len(good) < len(found):
        raise InstrumentError(f"{name} is a number from {least:g} on, or a list of them, not {given!r}.")
    return found


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` places out of ``count``, evenly spaced; of an odd number of them one is in the middle.

    >>> evenly(50, 1), evenly(50, 3), evenly(5, 9)
    ([25], [8, 25, 41], [0, 1, 2, 3, 4])
    """
    most = min(count, most)
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


def some_steps(pipe: FluxPipeline, asked: dict[str, Any], most: int = 6) -> list[int] | None:
    """At most ``most`` steps, evenly chosen among those that will be run; None, all of them, where that is unknown."""
    count = asked.get("steps") or pipe.defaults.steps
    if not isinstance(count, int) or count < 1:
        return None  # the pipeline will say what is wrong
    if asked.get("image") is not None:
        strength = asked.get("strength", 0.6)
        count = len(from_strength(list(range(count + 1)), strength)) - 1 if 0 < strength <= 1 else count
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})
