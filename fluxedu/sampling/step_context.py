"""The step context: which image, step and time the sampler is at, for instruments that watch it.

The pipeline sets it (``entered(context)``, ``at_step(step, time)``), instruments read it (``current_context()``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxedu.sampling.pipeline import FluxPipeline
    from fluxedu.sampling.request import Request

# Only instruments read it, and they never run inside compiled code, so a thread-local variable is safe here.
_thread = threading.local()


@dataclass(frozen=True)
class StepContext:
    """A point of a sampling run. All indices count from 0.

    run: number of this pipeline call in the process · txt_len: number of text tokens · picture: index among
    ``pictures`` requested images · step: index among ``steps``, None before the first step · time: t in [0, 1], 1 is
    noise · stage: index of the model evaluation within the step (midpoint and Heun have two) · text: the prompt that
    is being encoded, None afterwards · ended: (picture, step) of every completed step of the run, shared by all its
    contexts.
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
    ended: set[tuple[int, int]] = field(default_factory=set)


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


@contextmanager
def at_step(step: int, time: float) -> Iterator[None]:
    """Inside the ``with``, the pipeline is at this step of its run; afterwards the step counts as completed."""
    context = current_context()
    with entered(context and replace(context, step=step, time=time, stage=-1)):
        yield
    if context is not None:
        context.ended.add((context.picture, step))


def next_evaluation(time: float) -> None:
    """The model is evaluated once more in this step, at ``time``."""
    context = current_context()
    _thread.context = context and replace(context, time=time, stage=context.stage + 1)
