"""The number of torch's threads with which a run is fastest right now: all of the caller's, or one.

Small matrix products run in well under a millisecond, and at the end of each all threads wait for the slowest. Beside a
busy process one of them waits several milliseconds for its turn on a core: two threads on two cores are then ten times
slower than one. So the first run of a small model on the CPU begins with one thread, then tries all of the caller's. It
returns to one after a step that takes twice as long, or three in a row that are not faster, and tries again later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL = 2**21  # numbers in the largest weight of a network whose products are so short
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 16.0  # seconds until the next trial; doubled after each trial that fails

_one_thread: dict[Hashable, float] = {}  # seconds of a step of the same size with one thread
_pause, _next_trial = FIRST_PAUSE, 0.0
_step_done: Callable[[], None] | None = None


def threads_wait(most: int, products: int = 20) -> bool:
    """Whether small products take more than twice as long with ``most`` threads as with one; takes about 5 ms."""
    with torch.no_grad():
        x = torch.ones(96, 160, dtype=torch.float32, device="cpu")
        weight = torch.ones(160, 640, dtype=torch.float32, device="cpu")
        seconds = {}
        for threads, count in ((1, products // 4), (most, products)):
            torch.set_num_threads(threads)
            x @ weight  # the first product with another number of threads is slower
            start, done = time.perf_counter(), 0
            while done < count and (threads == 1 or time.perf_counter() - start < 2 * count * seconds[1]):
                x @ weight
                done += 1
            seconds[threads] = (time.perf_counter() - start) / done
    return seconds[most] > 2 * seconds[1]


class _Loop:
    """Chooses the number of threads of a loop; called after each step."""

    def __init__(self, most: int, size: Hashable):
        self.most, self.size = most, size
        self.choose()

    def choose(self) -> None:
        """All threads if a trial is due and they need not wait for each other, else one."""
        threads, self.slow_steps = 1, 0
        if self.size in _one_thread and time.perf_counter() >= _next_trial:
            if threads_wait(self.most):
                self.put_off()
            else:
                threads = self.most
        torch.set_num_threads(threads)
        self.started = time.perf_counter()

    def put_off(self) -> None:
        """The next trial is later, after a pause that doubles each time."""
        global _pause, _next_trial
        _next_trial = time.perf_counter() + _pause
        _pause = min(2 * _pause, LONGEST_PAUSE)

    def __call__(self) -> None:
        """A trial fails after one step that takes twice as long as with one thread, or three that are not faster."""
        global _pause
        seconds = time.perf_counter() - self.started
        if torch.get_num_threads() == 1:
            _one_thread[self.size] = seconds
            self.choose()
            return
        is_faster = seconds < _one_thread[self.size]
        self.slow_steps = 0 if is_faster else self.slow_steps + 1
        _pause = FIRST_PAUSE if is_faster else _pause
        if self.slow_steps == 3 or seconds > 2 * _one_thread[self.size]:
            self.put_off()
            self.choose()
        else:
            self.started = time.perf_counter()


def _is_small(network: nn.Module) -> bool:
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    return not compiled and all(p.numel() <= SMALL and p.device.type == "cpu" for p in network.parameters())


@contextmanager
def adapted_threads(network: nn.Module, size: Hashable = None) -> Iterator[None]:
    """Inside the ``with``, torch runs with all of the caller's threads or with one, whichever is faster.

    size: whatever the time of one of the network's steps depends on. The loop inside calls :func:`step_done` after each
    step. The number stays as it is for a network with a weight of more than 2**21 numbers, for a compiled one (its code
    belongs to one number of threads), on a GPU, and inside :func:`fixed_threads`.
    """
    global _step_done
    most = torch.get_num_threads()
    if _step_done is not None or most == 1 or not _is_small(network):
        yield
        return
    try:
        _step_done = _Loop(most, (id(network), size))
        yield
    finally:
        _step_done = None
        torch.set_num_threads(most)


def step_done() -> None:
    """A step of the loop in the surrounding :func:`adapted_threads` has ended."""
    if _step_done is not None:
        _step_done()


@contextmanager
def fixed_threads() -> Iterator[None]:
    """Inside the ``with``, the number of threads stays as it is: another one may round differently."""
    global _step_done
    before, _step_done = _step_done, lambda: None
    try:
        yield
    finally:
        _step_done = before
