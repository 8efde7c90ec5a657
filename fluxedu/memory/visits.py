"""Weights that live on the host and visit the device, each for as long as its module is called.

    Visits(flux.single_blocks, device="cuda")     # now only two of 38 blocks are there at a time

While a module computes, the next one's weights travel: a thread copies them, on CUDA in a stream of its own.
Nothing is computed differently, so results are equal to the bit. On the CPU a visit is a copy, made and
dropped all the same, so that tests run the very same lines.

For inference: a visitor's weights are not where autograd or ``fe.swap`` would look for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_porter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fluxedu-weights")


@dataclass
class _Arrival:
    """Copies on the device of some weights, and what they are copies of."""

    copies: list[Tensor]
    source: list[tuple[int, int]]  # where each lay, and how often it had been changed
    done: torch.cuda.Event | None


class Visits:
    """``modules``, in the order in which they run, are visitors on ``device`` from now on.

    A module brings the parameters of all that is below it, but not those of the modules in ``apart``, which are
    visitors of their own. The next one is fetched while one computes.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device | str, apart: Iterable[nn.Module] = ()):
        self.modules, self.device, self.apart = list(modules), torch.device(device), set(apart)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.coming: dict[int, Future] = {}
        self.homes: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        for number, module in enumerate(self.modules):
            module.register_forward_pre_hook(lambda _, args, i=number: self._arrive(i, args))
            module.register_forward_hook(lambda *_, i=number: self._leave(i), always_call=True)

    def _weights(self, number: int) -> list[nn.Parameter]:
        return list(owned(self.modules[number], self.apart))

    def _arrive(self, number: int, args: tuple) -> tuple:
        """Put the copies in the place of the weights, and send for the next ones."""
        weights = self._weights(number)
        arrival = self.coming.pop(number, None)
        arrival = arrival.result() if arrival else None
        if arrival is None or arrival.source != _source(weights):  # not sent for, or changed since
            arrival = self._fetch(weights)
        if number + 1 < len(self.modules) and number + 1 not in self.coming:
            self.coming[number + 1] = _porter.submit(self._fetch, self._weights(number + 1))
        if arrival.done is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival.done)
        self.homes[number] = [(weight, weight.data) for weight in weights]
        for weight, copy in zip(weights, arrival.copies, strict=True):
            weight.data = copy
            if copy.is_cuda:  # its memory is not given away before this stream has used it
                copy.record_stream(torch.cuda.current_stream(self.device))
        return tuple(a.to(self.device) if isinstance(a, Tensor) else a for a in args)

    def _leave(self, number: int) -> None:
        for weight, home in self.homes.pop(number, ()):
            weight.data = home

    def _fetch(self, weights: list[nn.Parameter]) -> _Arrival:
        with torch.cuda.stream(self.stream), torch.no_grad():  # no stream: as it is
            copies = [weight.data.to(self.device, copy=True, non_blocking=True) for weight in weights]
        return _Arrival(copies, _source(weights), self.stream.record_event() if self.stream else None)


def owned(module: nn.Module, apart: Collection[nn.Module] = ()) -> Iterator[nn.Parameter]:
    """The parameters that a visitor brings: its own and those below it, without the modules ``apart``."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if child not in apart:
            yield from owned(child, apart)


def _source(weights: list[nn.Parameter]) -> list[tuple[int, int]]:
    return [(weight.data_ptr(), weight._version) for weight in weights]
