"""The interventions that a sweep may name, and what it may record: fluxedu's instruments, said as data.

    {ablate: double.1.heads, heads: [2]}        fe.ablate("double.1.heads", heads=[2])
    {scale: single.*.gate, by: 0.5}             fe.intervene("single.*.gate", lambda x, ctx: 0.5 * x)
    {patch: double.1.img_contribution, from: {prompt: a blue circle, seed: 0}}
                                                fe.patch(..., a recording of that run)

``steps: [0, 1]`` and ``times: [0.5, 1.0]`` go with each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from fluxedu.errors import SweepError, describe
from fluxedu.instruments.interventions import ablate, intervene, patch
from fluxedu.instruments.recorder import record
from fluxedu.instruments.recording import Recording
from fluxedu.instruments.reductions import maker
from fluxedu.sweep.strict import number, numbers, only, text, texts, whole

_WHEN = ("steps", "times")
_WITH = {"ablate": ("heads", "streams", "tokens", "to", *_WHEN), "scale": ("by", *_WHEN), "patch": ("from", *_WHEN)}
_NEEDED = {"ablate": (), "scale": ("by",), "patch": ("from",)}
_RECORD = ("sites", "steps", "tokens", "heads", "reduce", "passes")
#: ``recorded(globs, prompt, seed)``: a run of the pipeline, recorded
Recorded = Callable[[tuple[str, ...], str, int], Recording]


def checked_changes(changes, name: str) -> list[dict]:
    """One change or a list of them, each with one kind and what goes with it."""
    changes = [changes] if isinstance(changes, dict) else changes
    if not isinstance(changes, list):
        raise SweepError(f"{describe(name)} is a change, or a list of changes, not {describe(changes)}.")
    return [_checked(change, f"{describe(name)}") for change in changes]


def _checked(change, where: str) -> dict:
    if not isinstance(change, dict):
        raise SweepError(f"{where} changes something with {', '.join(_WITH)}, not with {describe(change)}.")
    kinds = [kind for kind in _WITH if kind in change]
    if len(kinds) != 1:
        raise SweepError(f"{where} has a change that says {' and '.join(kinds) or 'none'} of {', '.join(_WITH)}.")
    kind = kinds[0]
    only(change, (kind, *_WITH[kind]), where, needed=_NEEDED[kind])
    change = {**change, kind: _globs(change[kind], kind)}
    if kind == "patch" and len(change[kind]) != 1:
        raise SweepError(f"{where} patches {len(change[kind])} globs; a patch is at one.")
    _check_values(change)
    return change


def _globs(value, name: str) -> list[str]:
    return texts([value] if isinstance(value, str) else value, name)


def _check_values(values: dict) -> None:
    """The values that go with sites, whatever they are for."""
    places = {"heads": False, "steps": False, "tokens": True}
    for name in (n for n in places if n in values):
        given = values[name] if isinstance(values[name], list) else [values[name]]
        for item in given:
            if not (places[name] and isinstance(item, str)):
                whole(item, f"each of {name}", -(2**31), 2**31)
        if not given:
            raise SweepError(f"{name} is empty; leave it out for all of them.")
        values[name] = given
    if "times" in values and len(numbers(values["times"], "times")) != 2:
        raise SweepError(f"times is from, to, in [0, 1], not {describe(values['times'])}.")
    if "by" in values:
        number(values["by"], "by")
    if "to" in values and values["to"] != "mean":
        number(values["to"], "to, if not mean,")
    if "streams" in values:
        values["streams"] = _globs(values["streams"], "streams")
    if "from" in values:
        only(values["from"], ("prompt", "seed"), "from", needed=("prompt", "seed"))
        text(values["from"]["prompt"], "from's prompt", empty=True)
        whole(values["from"]["seed"], "from's seed", 0, 2**63 - 1)


def checked_record(values) -> dict:
    """What is to be recorded in every cell."""
    only(values, _RECORD, "record", needed=("sites",))
    values = {**values, "sites": _globs(values["sites"], "sites")}
    _check_values(values)
    if "reduce" in values:
        values["reduce"] = _globs(values["reduce"], "reduce")
        maker(values["reduce"])  # raises InstrumentError for a name that is none
    if values.get("passes") not in (None, "prompted", "negative"):
        raise SweepError(f"passes is prompted or negative, not {describe(values['passes'])}.")
    return values


def made(change: dict, recorded: Recorded) -> AbstractContextManager:
    """The context manager that makes a change."""
    kind = next(kind for kind in _WITH if kind in change)
    globs, options = change[kind], {name: value for name, value in change.items() if name in _WHEN}
    if kind == "ablate":
        return ablate(*globs, **{name: value for name, value in change.items() if name != kind})
    if kind == "scale":
        return intervene(*globs, partial(_scaled, change["by"]), **options)
    return patch(globs[0], recorded(tuple(globs), **change["from"]), **options)


def _scaled(by: float, value, ctx):
    if not hasattr(value, "is_complex"):
        raise SweepError(f"{ctx.site!r} is no plain tensor to be scaled.")
    return value * by


def recorders(wanted: tuple[dict, ...]) -> list[record]:
    """A new recorder for each entry of ``record``."""
    return [record(*r["sites"], **{k: v for k, v in r.items() if k != "sites"}) for r in wanted]
