"""The step context: which image, step and time the sampler is at, for instruments that watch it.

The pipeline sets it (``entered(context)``, ``at_step(step, time)``); instruments, the prompt encoder and the gradient
mode read it (``current_context()``).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fluxedu.errors import InstrumentError, RequestError, describe
from fluxedu.probe import Sited, Watcher, current_watcher, matches, site, watch

if TYPE_CHECKING:
    from fluxedu.sampling.pipeline import FluxPipeline
    from fluxedu.sampling.request import Request

Steps = int | Sequence[int] | slice | None

# Nothing that runs inside compiled code reads it, so a thread-local variable is safe here.
_thread = threading.local()


@dataclass(frozen=True)
class StepContext:
    """A point of a sampling run. All indices count from 0.

    run: index of this pipeline call in the process · txt_len: number of text tokens · picture: index among
    ``pictures`` requested images · step: index among ``steps``, None before the first step · time: t in [0, 1], 1 is
    noise, of the latest model evaluation, before the first that of the step's beginning · stage: index of the latest
    model evaluation within the step (midpoint and Heun have two), -1 before the first · text: the prompt that is being
    encoded, None afterwards · negative: whether that is the negative prompt of classifier-free guidance · batch: the
    requests of the images that are computed at once, of which ``picture`` is the first, or the prompts that are encoded
    at once · row: index in ``batch`` of the one whose value an instrument receives, None elsewhere · ended: (picture,
    step) of every completed step of the run, shared by all its contexts.
    """

    pipe: FluxPipeline
    request: Request
    run: int
    txt_len: int
    picture: int
    pictures: int
    steps: int
    step: int | None = None
    time: float | None = None
    stage: int = -1
    text: str | None = None
    negative: bool = False
    batch: tuple[Request | str, ...] = ()
    row: int | None = None
    ended: set[tuple[int, int]] = field(default_factory=set)

    @cached_property
    def rows(self) -> list[StepContext]:
        """The step context of each image, or prompt, of a batch of several; empty for one alone."""
        if len(self.batch) < 2 or self.row is not None:
            return []
        if self.text is not None:
            return [replace(self, text=text, row=i) for i, text in enumerate(self.batch)]
        return [replace(self, request=r, picture=self.picture + i, row=i) for i, r in enumerate(self.batch)]


def current_context() -> StepContext | None:
    """This thread's step context; None where no pipeline is running."""
    return getattr(_thread, "context", None)


@contextmanager
def entered(context: StepContext | None) -> Iterator[None]:
    """Make ``context`` the current step context inside the ``with``."""
    before = current_context()
    _thread.context = context
    try:
        yield
    finally:
        _thread.context = before


def changed(**fields: Any) -> AbstractContextManager[None]:
    """Inside the ``with``, the current step context has these fields."""
    context = current_context()
    return entered(context and replace(context, **fields))


@contextmanager
def at_step(step: int, time: float) -> Iterator[None]:
    """Inside the ``with``, the pipeline is at this step of its run; afterwards the step counts as completed."""
    context = current_context()
    with changed(step=step, time=time, stage=-1):
        yield
    if context is not None:
        context.ended.update((context.picture + i, step) for i in range(len(context.batch) or 1))


def at_pictures(requests: list[Request], first: int) -> AbstractContextManager[None]:
    """Inside the ``with``, the pipeline computes these images; ``first`` counts from the current context's image."""
    context = current_context()
    picture = first if context is None else context.picture + first
    return changed(request=requests[0], picture=picture, batch=tuple(requests))


def at_texts(texts: list[str]) -> AbstractContextManager[None]:
    """Inside the ``with``, a text encoder encodes these prompts."""
    return changed(text=texts[0], batch=tuple(texts))


def next_evaluation(time: float) -> None:
    """Advance the step context to the next model evaluation of this step, at ``time``."""
    context = current_context()
    _thread.context = context and replace(context, time=time, stage=context.stage + 1)


# ---------------------------------------------------------------- stopping early


class StopRun(Exception):
    """The site of ``stop_after=`` has passed; the pipeline ends the run."""


class StopAfter:
    """A watcher that ends the run after a site, once the watcher before it has seen the value."""

    def __init__(self, glob: str, watcher: Watcher | None):
        self.glob, self.watcher, self.thread = glob, watcher, threading.get_ident()

    def interventions(self) -> Watcher | None:
        return self.watcher and self.watcher.interventions()

    def wants(self, owner: Sited, name: str) -> bool:
        wants = getattr(self.watcher, "wants", None)
        return matches(site(owner, name), self.glob) or (wants is not None and wants(owner, name))

    def __call__(self, owner: Sited, name: str, value: Any) -> Any:
        value = value if self.watcher is None else self.watcher(owner, name, value)
        if threading.get_ident() == self.thread and matches(site(owner, name), self.glob):
            raise StopRun
        return value


@contextmanager
def stopping_after(glob: str | None) -> Iterator[None]:
    """End what runs inside the ``with`` after the first site that matches ``glob``; None ends nothing."""
    if glob is None:
        yield
        return
    if not isinstance(glob, str):
        raise RequestError(f"stop_after must be a step or the name of a site, not {describe(glob)}.")
    before = current_watcher()
    watch(StopAfter(glob, before))
    try:
        yield
        raise RequestError(f"stop_after={glob!r} is no site of this run; fe.sites(pipe) lists them all.")
    except StopRun:
        pass
    finally:
        watch(before)


# ---------------------------------------------------------------- selecting steps


def checked_steps(steps: Steps) -> int | list[int] | slice | None:
    """Valid ``steps``, with a sequence as a list; raises InstrumentError for what cannot select steps."""
    ends = [steps.start, steps.stop, steps.step] if isinstance(steps, slice) else []
    if steps is None or (ends and all(end is None or isinstance(end, int) for end in ends) and steps.step != 0):
        return steps
    try:
        return integers(steps)
    except TypeError:
        raise InstrumentError(f"steps must be a number, a list of numbers or a slice, not {describe(steps)}.") from None


def integers(values) -> int | list[int]:
    """An integer as int, an iterable of integers as a list; raises TypeError."""
    if isinstance(values, (str, bytes, bool)):
        raise TypeError
    try:
        return operator.index(values)
    except TypeError:  # an iterable; arrays of length 1 were handled above
        return [operator.index(value) for value in values]


def is_selected(steps: Steps, step: int | None, count: int | None) -> bool:
    """Whether ``step`` is selected; None, outside the steps, always is. Negative numbers count from ``count``."""
    if steps is None or step is None:
        return True
    if isinstance(steps, slice):
        return step in range(*steps.indices(count if count is not None else step + 1))
    selected = [steps] if isinstance(steps, int) else steps
    return step in [s + count if s < 0 and count is not None else s for s in selected]
