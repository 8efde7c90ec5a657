"""Where in a run the sampler is, for whoever watches: which picture, which step, what time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxedu.sampling.pipeline import FluxPipeline
    from fluxedu.sampling.request import Request

# Read by watchers only, which never run inside compiled code, so a thread's own variable is safe here.
_thread = threading.local()


@dataclass(frozen=True)
class Moment:
    """A point of a run.

    run: the how-manieth call of a pipeline in this process · words: how many tokens are text · picture: the
    how-manieth of ``pictures`` asked for · step: of ``steps``, None before the first one · time: in [0, 1], 1 being
    noise · part: the how-manieth question to the network within the step (midpoint and heun ask twice), counted from
    0 · text: the prompt that is being encoded, None afterwards · ended: (picture, step) of every step of the run that
    came to its end, shared by all its moments.
    """

    pipe: FluxPipeline
    asked: Request
    run: int
    words: int
    picture: int
    pictures: int
    steps: int
    step: int | None = None
    time: float | None = None
    part: int = -1
    text: str | None = None
    ended: set[tuple[int, int]] = field(default_factory=set)


def now() -> Moment | None:
    """This thread's moment; None where no pipeline is drawing."""
    return getattr(_thread, "moment", None)


@contextmanager
def at(moment: Moment | None = None, **changes) -> Iterator[None]:
    """Be at ``moment``, or at the present one with ``changes``, for a while."""
    before = now()
    here = _thread.moment = moment or (before and replace(before, **changes))
    try:
        yield
        if here is not None and "step" in changes:
            here.ended.add((here.picture, here.step))
    finally:
        _thread.moment = before


def ask(time: float) -> None:
    """The network is asked, at ``time``, once more in this step."""
    moment = now()
    _thread.moment = moment and replace(moment, time=time, part=moment.part + 1)
