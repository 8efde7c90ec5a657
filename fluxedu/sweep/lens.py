"""The lenses that a sweep may name: fluxedu's own, with their own arguments, each looking at the cell's one run.

    lens: {word_maps: {words: [circle]}, head_gallery: {query: circle, at_step: 0}, contributions: {}}

What each finds is kept as ``lens/word_maps``, with the axes and labels that ``lenses.word_maps`` gives. Lenses that
draw many pictures (vital_layers, divergence, ...) are not among them.
"""

from __future__ import annotations

import inspect

from fluxedu.errors import SweepError, describe
from fluxedu.instruments.lenses.attention import look_at_balance, look_at_heads, look_at_padding
from fluxedu.instruments.lenses.layers import look_at_contributions
from fluxedu.instruments.lenses.run import Look
from fluxedu.instruments.lenses.tokens import look_at_largest
from fluxedu.instruments.lenses.words import attention_to_words, similarity_to_concepts
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sweep.strict import only, text, texts, whole

LENSES = {
    "attention_balance": look_at_balance,
    "concept_maps": similarity_to_concepts,
    "contributions": look_at_contributions,
    "head_gallery": look_at_heads,
    "massive_activations": look_at_largest,
    "padding_mass": look_at_padding,
    "word_maps": attention_to_words,
}


def checked_lenses(values) -> dict[str, dict]:
    """Lenses by name, each with its arguments."""
    only(values, tuple(LENSES), "lens")
    return {name: _checked(name, given) for name, given in values.items()}


def _checked(name: str, given) -> dict:
    takes = _arguments(name)
    needed = tuple(key for key, argument in takes.items() if argument.default is argument.empty)
    only(given, tuple(takes), f"lens {name}", needed)
    return {key: _CHECKS[key](value) for key, value in given.items()}


def _arguments(name: str) -> dict[str, inspect.Parameter]:
    takes = inspect.signature(LENSES[name]).parameters
    return {key: argument for key, argument in takes.items() if key not in ("pipe", "prompt")}


def _query(value):
    if isinstance(value, list) and len(value) == 2:
        return [_step(v, "a patch's row or column") for v in value]
    if not isinstance(value, str):
        raise SweepError(f"query is a word or a patch, [row, column], not {describe(value)}.")
    return text(value, "query")


def _step(value, name: str = "a step") -> int:
    return whole(value, name, -(2**31), 2**31)


def _steps(value) -> list[int]:
    if value == []:
        raise SweepError("at_steps is empty; leave it out for all of them.")
    return [_step(v) for v in (value if isinstance(value, list) else [value])]


_CHECKS = {"words": lambda v: texts(v, "words"), "query": _query, "at_step": _step, "at_steps": _steps}


def looks(lenses: dict[str, dict], pipe: FluxPipeline, prompt: str) -> list[Look]:
    """The lenses, ready to look at one run with ``prompt``."""
    with_prompt = {name: "prompt" in inspect.signature(LENSES[name]).parameters for name in lenses}
    return [
        LENSES[name](pipe, **({"prompt": prompt} if with_prompt[name] else {}), **given)
        for name, given in lenses.items()
    ]
