"""A warning when a run computes NaN or infinity: it names the step and the first site with such a value."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fluxedu.probe import Sited, Watcher, current_watcher, site, watch
from fluxedu.sampling.step_context import current_context, entered

_thread = threading.local()


class FirstNotFinite:
    """A watcher that notes the first site whose value is not finite. Interventions act; recorders receive nothing."""

    def __init__(self, watcher: Watcher | None):
        self.watcher, self.thread = watcher, threading.get_ident()
        self.first: str | None = None

    def interventions(self) -> Watcher | None:
        return self.watcher and self.watcher.interventions()

    def wants(self, owner: Sited, name: str) -> bool:
        """As in the run without recorders, so that no value is computed which that run did not need."""
        watcher = self.interventions() if threading.get_ident() == self.thread else self.watcher
        return watcher is not None and (not hasattr(watcher, "wants") or watcher.wants(owner, name))

    def __call__(self, owner: Sited, name: str, value: Any) -> Any:
        if threading.get_ident() != self.thread:
            return value if self.watcher is None else self.watcher(owner, name, value)
        interventions = self.interventions()
        value = value if interventions is None else interventions(owner, name, value)
        if self.first is None and isinstance(value, Tensor) and not torch.isfinite(value).all():
            self.first = site(owner, name)
        return value

    __call__._torchdynamo_disable = True  # as torch.compiler.disable: do not compile it, call it


def check_finite(what: str, value: Tensor, compute: Callable[[], Any]) -> None:
    """Warn, once per run, if ``value`` is not finite; ``compute()`` computes it again to find the first such site."""
    if torch.isfinite(value).all():
        return
    context = current_context()
    run = None if context is None else context.run
    if run is not None and run == getattr(_thread, "warned_run", None):
        return
    _thread.warned_run = run
    first = first_site(compute)
    step = "" if context is None or context.step is None else f" after step {context.step}"
    where = "" if first is None else f": {first} is the first site with NaN or infinity"
    advice = ""
    if value.dtype == torch.float16:
        advice = "; float16 has no numbers above 65504, so load the pipeline with dtype='bfloat16'"
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fluxedu."):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{what} are not finite{step}{where}{advice}.", RuntimeWarning, stacklevel=level)


def first_site(compute: Callable[[], Any]) -> str | None:
    """The first site that is not finite while ``compute()`` runs."""
    context, before = current_context(), current_watcher()
    finder = FirstNotFinite(before)
    # compiled code reads no watcher
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    watch(finder)
    try:
        # an intervention may not expect to be called again
        with eager, entered(context and replace(context, stage=-1)), suppress(Exception):
            compute()
    finally:
        watch(before)
    return finder.first
