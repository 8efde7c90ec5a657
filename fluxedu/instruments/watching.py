"""Many instruments at once over the one watcher that the sites know.

Interventions act first, in the order in which they were entered; recorders then see the value the computation
goes on with. An instrument sees only what happens in the thread that entered it. Contexts may overlap
and be left in any order.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from fluxedu import probe
from fluxedu.errors import InstrumentError, WordNotInPrompt, describe
from fluxedu.instruments.catalogue import is_own, site_names
from fluxedu.probe import Sited, site
from fluxedu.sampling.step_context import current_context


def takes(function: Callable, *given: Any) -> bool:
    """Can it be called with so many arguments? Yes for what does not tell."""
    try:
        inspect.signature(function).bind(*given)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


class Instrument:
    """A context manager that is shown the values of the sites its globs name: ``see(...) -> value``."""

    changes = False  # an intervention, which acts before recorders see

    def __init__(self, *globs: str):
        if not globs or not all(isinstance(g, str) and g for g in globs):
            raise InstrumentError(f"name one site or more, such as 'double.*.attn.map', not {describe(globs)}.")
        self.globs = globs
        self.thread: int | None = None
        self.ran = self.passed = self.elsewhere = False  # did anything run, what is named pass, in another thread
        self.absent: dict[str, WordNotInPrompt] = {}  # sites of encoders, at a prompt that does not say the word
        self.matches = lru_cache(maxsize=None)(lambda name: any(fnmatchcase(name, g) for g in globs))

    def wants(self, name: str) -> bool:
        if threading.get_ident() != self.thread:
            self.elsewhere = self.elsewhere or self.matches(name)
            return False
        self.ran, matches = True, self.matches(name)
        self.passed = self.passed or matches
        return matches

    def see(self, owner: Sited, name: str, whole: str, value: Any) -> Any:
        """A value passes the site ``name`` of ``owner``, ``whole`` with its path; returns what to go on with."""
        raise NotImplementedError

    def __enter__(self):
        if self.thread is not None:
            raise InstrumentError(f"this {type(self).__name__.lower()} is in use already; make another one.")
        _refuse_unknown(self.globs)
        self.thread = threading.get_ident()
        _add(self)
        return self

    def __exit__(self, *exception) -> None:
        _remove(self)
        self.thread = None
        if exception[0] is None and not self.passed and (self.ran or self.elsewhere):
            where = " but in a thread that did not enter it" if self.elsewhere else ""
            warnings.warn(f"{' and '.join(self.globs)} never passed{where}, so nothing was seen.", stacklevel=3)


class Chain:
    """The one watcher: hands every value from instrument to instrument."""

    def __init__(self, instruments: tuple[Instrument, ...]):
        self.instruments = tuple(sorted(instruments, key=lambda i: not i.changes))  # stable

    def wants(self, owner: Sited, name: str) -> bool:
        whole = site(owner, name)
        return any(i.wants(whole) for i in self.instruments)

    def __call__(self, owner: Sited, name: str, value: Any) -> Any:
        if not _eager.entered:
            _eager.enter()  # the compiler came after the instrument
        whole = site(owner, name)
        for instrument in self.instruments:
            if instrument.wants(whole):
                value = _shown(instrument, owner, name, whole, value)
        return value


#: what torch.compiler.disable would say, which imports the compiler: not to be compiled, but called
Chain.__call__._torchdynamo_disable = Chain.wants._torchdynamo_disable = True


def _shown(instrument: Instrument, owner: Sited, name: str, whole: str, value: Any) -> Any:
    """Let it see the value. While prompts are encoded, one that lacks a word is no error: another may say it."""
    try:
        return instrument.see(owner, name, whole, value)
    except WordNotInPrompt as error:
        if getattr(current_context(), "text", None) is None:
            raise
        instrument.absent[whole] = error.with_traceback(None)  # which would hold all that it came through
        return value


class Eager:
    """While an instrument is in use, what is compiled runs as it is written; does nothing where nothing is compiled."""

    def __init__(self):
        self.stack, self.entered = ExitStack(), False

    def enter(self) -> None:
        if "torch._dynamo" in sys.modules and not self.entered:
            import torch

            self.entered = True
            self.stack.enter_context(torch.compiler.set_stance("force_eager"))

    def leave(self) -> None:
        self.stack.close()
        self.entered = False


_lock = threading.RLock()
_active: list[Instrument] = []
_eager = Eager()


def _add(instrument: Instrument) -> None:
    with _lock:
        _eager.enter()
        _active.append(instrument)
        probe.watch(Chain(tuple(_active)))


def _remove(instrument: Instrument) -> None:
    with _lock:
        if instrument in _active:
            _active.remove(instrument)
        probe.watch(Chain(tuple(_active)) if _active else None)
        if not _active:
            _eager.leave()


def known_sites() -> set[str]:
    """The names of all sites of the networks that are alive in this process, and the sampler's."""
    return {name for network in list(probe.networks) for name in site_names(network)} | set(site_names(None))


def _refuse_unknown(globs: tuple[str, ...]) -> None:
    """A glob that no site answers to is a typing error, and better found now than after the run."""
    if not len(probe.networks):
        return  # nothing is loaded yet, so nothing is known
    names = known_sites()
    modules = (m for network in list(probe.networks) for m in network.modules() if isinstance(m, probe.Probed))
    own = tuple(f"{m.site_path}." for m in modules if is_own(m))  # a learner's module may have sites of its own
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names) and not (own and glob.startswith(own)):
            near = get_close_matches(glob, names, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "fe.sites(pipe) lists them all."
            raise InstrumentError(f"no site of a loaded model is called {glob!r}; {hint}")
