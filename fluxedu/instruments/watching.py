"""Many instruments at once, on the one watcher that :mod:`fluxedu.probe` calls.

Interventions act first, in the order in which they were entered; recorders then receive the value that the computation
continues with. An instrument sees only what happens in the thread that entered it. Contexts may overlap and be left in
any order.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fluxedu import probe
from fluxedu.attention_map import AttentionMap
from fluxedu.errors import InstrumentError, WordNotInPrompt, describe
from fluxedu.instruments.aliases import own_name
from fluxedu.instruments.catalogue import axes_of, is_own, site_names
from fluxedu.probe import Sited, matches, site
from fluxedu.sampling.step_context import StepContext, current_context, entered


def accepts(function: Callable, *arguments: Any) -> bool:
    """Whether the function can be called with so many arguments; True if it has no signature."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


class Instrument:
    """A context manager that receives the values of the sites that match its globs: ``see(...) -> value``."""

    changes = False  # True for interventions, which act before recorders
    picture: int | None = None  # index of the only image of a run to act on; None for all

    def __init__(self, *globs: str):
        if not globs:
            raise InstrumentError("name at least one site, such as 'double.*.attn.map'.")
        for glob in globs:
            if not isinstance(glob, str) or not glob:
                hint = (
                    "every run inside the `with` block is watched" if callable(glob) else "such as 'double.*.attn.map'"
                )
                raise InstrumentError(f"a site is given by its name, not by {describe(glob)}; {hint}.")
        self.globs = globs
        self.thread: int | None = None
        self.any_site_passed = self.own_site_passed = self.passed_in_other_thread = False
        self.missing_words: dict[str, WordNotInPrompt] = {}  # site of a text encoder -> why nothing happened there
        self.matches = lru_cache(maxsize=None)(lambda name: any(matches(name, glob) for glob in globs))

    def wants(self, name: str) -> bool:
        """Whether the instrument is to receive the site's value now."""
        if threading.get_ident() != self.thread:
            self.passed_in_other_thread = self.passed_in_other_thread or self.matches(name)
            return False
        self.any_site_passed = True
        matches = self.matches(name)
        self.own_site_passed = self.own_site_passed or matches
        return matches

    def see(self, owner: Sited, name: str, full_name: str, value: Any) -> Any:
        """``value`` passes the site ``name`` of ``owner``; returns the value that the computation continues with."""
        raise NotImplementedError

    def __enter__(self):
        if self.thread is not None:
            raise InstrumentError(f"this {type(self).__name__.lower()} is already active; create another one.")
        _check_globs(self.globs)
        self.thread = threading.get_ident()
        _add(self)
        return self

    def __exit__(self, *exception) -> None:
        _remove(self)
        self.thread = None
        if exception[0] is not None or self.own_site_passed:
            return
        if self.any_site_passed or self.passed_in_other_thread:
            where = " except in a thread that did not enter it" if self.passed_in_other_thread else ""
            warnings.warn(f"no value passed {' or '.join(self.globs)}{where}, so nothing was seen.", stacklevel=3)


class Chain:
    """The watcher: passes every value through the active instruments."""

    def __init__(self, instruments: tuple[Instrument, ...]):
        self.instruments = tuple(sorted(instruments, key=lambda i: not i.changes))  # stable
        self.changes_all_images = any(i.changes and i.picture is None for i in instruments)

    def interventions(self) -> Chain:
        return Interventions(self.instruments)

    def wants(self, owner: Sited, name: str) -> bool:
        full_name = site(owner, name)
        return any(instrument.wants(full_name) for instrument in self.instruments)

    def __call__(self, owner: Sited, name: str, value: Any) -> Any:
        _eager_mode.enter()  # again, in case the compiler was imported after the instrument was entered
        full_name = site(owner, name)
        active = [instrument for instrument in self.instruments if instrument.wants(full_name)]
        return for_each_picture(owner, name, value, active) if active else value


class Interventions(Chain):
    """The interventions of a chain alone, in any thread: for values that a backward pass computes again."""

    def wants(self, owner: Sited, name: str) -> bool:
        """As in the forward pass, where a recorder may have chosen the way in which a value was computed."""
        return any(instrument.matches(site(owner, name)) for instrument in self.instruments)

    def __call__(self, owner: Sited, name: str, value: Any) -> Any:
        full_name = site(owner, name)
        active = [i for i in self.instruments if i.changes and i.matches(full_name)]
        return for_each_picture(owner, name, value, active) if active else value


#: what torch.compiler.disable would set, without importing the compiler: do not compile these, call them
Chain.__call__._torchdynamo_disable = Chain.wants._torchdynamo_disable = True


class EagerMode:
    """While an instrument is active, compiled code runs uncompiled. Does nothing where nothing was compiled."""

    def __init__(self):
        self.stack, self.entered = ExitStack(), False

    def enter(self) -> None:
        if not self.entered and "torch._dynamo" in sys.modules:
            self.entered = True
            self.stack.enter_context(torch.compiler.set_stance("force_eager"))

    def leave(self) -> None:
        self.stack.close()
        self.entered = False


# ---------------------------------------------------------------- several images at once


def for_each_picture(owner: Sited, name: str, value: Any, instruments: list[Instrument]) -> Any:
    """Pass a value through the instruments: in a batch of P images, the part of each image in its own step context.

    With classifier-free guidance, the batch is [negative x P, prompted x P], and an image's part is [negative,
    prompted]. A value that all images share (``attn.rope``, T5's ``bias``) is passed on once for each image; if it is
    changed, every image gets a value of its own. What changes nothing returns ``value`` itself.
    """
    context = current_context()
    rows = [] if context is None else context.rows
    if not rows:
        return _see(owner, name, value, _acting_on(context, instruments), context)
    count, axes = len(rows), axes_of(owner, name)
    has_batch = axes is None or axes[0] == "batch"
    is_shared = not has_batch or not hasattr(value, "shape") or value.shape[0] not in (count, 2 * count)
    # a recorder may keep the part of an image, which must then be part of the graph
    in_graph = torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad and not is_shared
    changed: dict[int, Any] = {}
    for i, row in enumerate(rows):
        active = _acting_on(row, instruments)
        if not active:
            continue
        part = value if is_shared else picture_part(value, i, count)
        with entered(row):
            result = _see(owner, name, part, active, row)
        if result is not part or in_graph:
            changed[i] = result
    if not changed:
        return value
    if isinstance(value, AttentionMap):
        return MapsOfPictures(value, changed, count)
    if not is_shared:
        value = value.clone()
        for i, part in changed.items():
            value[i::count] = part
        return value
    each = [changed.get(i, value) for i in range(count)]
    if has_batch:  # T5's bias, [1, H, L, L] for all
        return torch.cat(each)  # [P, H, L, L]
    # attn.rope, [1, T, d/2] for all
    return torch.stack(each * (2 if context.request.uses_cfg_at(context.time) else 1))  # [P or 2 P, 1, T, d/2]


def picture_part(value: Tensor | AttentionMap, index: int, count: int) -> Tensor | AttentionMap:
    """Rows ``index`` and, with classifier-free guidance, ``count + index`` of a batch of ``count`` images."""
    rows = slice(index, None, count)
    return value.picture(rows) if isinstance(value, AttentionMap) else value[rows]


class MapsOfPictures:
    """The attention maps of a batch in which those of some images were changed: ``maps @ v`` is the output of all."""

    def __init__(self, whole: AttentionMap, changed: dict[int, AttentionMap | Tensor], count: int):
        self.whole, self.changed, self.count = whole, changed, count

    def __matmul__(self, v: Tensor) -> Tensor:
        out = (self.whole @ v).clone()
        for i, part in self.changed.items():
            rows = slice(i, None, self.count)
            out[rows] = part.output() if isinstance(part, AttentionMap) else part.to(v.dtype) @ v[rows]
        return out


def _acting_on(context: StepContext | None, instruments: list[Instrument]) -> list[Instrument]:
    """The instruments that act on the image of the context: all, except those of another image alone."""
    return [i for i in instruments if i.picture is None or context is None or i.picture == context.picture]


def _see(owner: Sited, name: str, value: Any, instruments: list[Instrument], context: StepContext | None) -> Any:
    """The value after all instruments. A word that is missing from one of several encoded prompts is no error."""
    full_name = site(owner, name)
    for instrument in instruments:
        try:
            value = instrument.see(owner, name, full_name, value)
        except WordNotInPrompt as error:
            if context is None or context.text is None:
                raise
            # another prompt may contain the word
            instrument.missing_words[full_name] = error.with_traceback(None)  # which would keep all frames alive
    return value


_lock = threading.RLock()
_active: list[Instrument] = []
_eager_mode = EagerMode()


def _add(instrument: Instrument) -> None:
    with _lock:
        _eager_mode.enter()
        _active.append(instrument)
        probe.watch(Chain(tuple(_active)))


def _remove(instrument: Instrument) -> None:
    with _lock:
        if instrument in _active:
            _active.remove(instrument)
        probe.watch(Chain(tuple(_active)) if _active else None)
        if not _active:
            _eager_mode.leave()


def known_sites() -> set[str]:
    """The names of all sites of the networks that are alive in this process, and of the pipeline."""
    return {name for network in list(probe.networks) for name in site_names(network)} | set(site_names(None))


def _check_globs(globs: tuple[str, ...]) -> None:
    """Raises InstrumentError for a glob that matches no site: better now than after the run."""
    if not len(probe.networks):
        return  # nothing is loaded yet, so no site is known
    names = known_sites()
    for glob in globs:
        if not any(matches(name, glob) for name in names) and not _is_own_path(glob):
            near, here = get_close_matches(glob, names, n=3, cutoff=0.5), own_name(glob)
            hint = f"did you mean {', '.join(near)}?" if near else "fe.sites(pipe) lists them all."
            hint = f"here it is {here}." if here else hint
            raise InstrumentError(f"no site of a loaded model is called {glob!r}; {hint}")


def _is_own_path(glob: str) -> bool:
    """Whether the glob lies in a module of a user's class, which may have more sites than are known."""
    modules = (m for network in list(probe.networks) for m in network.modules() if isinstance(m, probe.Probed))
    return any(is_own(m) and glob.startswith(f"{m.site_path}.") for m in modules)
