"""The number of torch's threads in a run: as many as pay, and afterwards the caller's."""

import pytest
import torch
from torch import nn

import fluxedu as fe
from fluxedu import threads

SMALL = nn.Linear(160, 640)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told, two threads, and a short measurement that says that they need not wait."""
    now = [100.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(threads, "threads_wait", lambda most: False)
    for name, value in {"_one_thread": {}, "_pause": threads.FIRST_PAUSE, "_next_trial": 0.0}.items():
        monkeypatch.setattr(threads, name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield now
    torch.set_num_threads(before)


def run(clock, steps, seconds):
    """The number of threads of every step, where ``seconds[threads]`` is the duration of a step."""
    used = []
    with threads.adapted_threads(SMALL):
        for _ in range(steps):
            used.append(torch.get_num_threads())
            clock[0] += seconds[used[-1]]
            threads.step_done()
    assert torch.get_num_threads() == 2
    return used


def test_all_threads_are_kept_while_they_are_faster(clock):
    assert run(clock, 6, {1: 0.03, 2: 0.02}) == [1, 2, 2, 2, 2, 2]
    assert run(clock, 3, {1: 0.03, 2: 0.02}) == [2, 2, 2]  # the next run need not begin with one


def test_one_slow_step_is_enough_to_return_to_one_thread(clock):
    busy = {1: 0.03, 2: 0.4}
    assert run(clock, 6, busy) == [1, 2, 1, 1, 1, 1]
    assert run(clock, 20, busy).count(2) == 1  # 0.6 s: tried once again after half a second


def test_a_few_steps_that_are_not_faster_are_enough_too(clock):
    assert run(clock, 8, {1: 0.03, 2: 0.04}) == [1, 2, 2, 2, 1, 1, 1, 1]


def test_trials_become_rare_and_all_threads_come_back(clock):
    used = run(clock, 2000, {1: 0.03, 2: 0.4})  # a minute
    assert 5 <= used.count(2) <= 9
    clock[0] += threads.LONGEST_PAUSE
    assert run(clock, 4, {1: 0.03, 2: 0.02})[-1] == 2


def test_where_products_are_slower_no_step_is_tried(clock, monkeypatch):
    monkeypatch.setattr(threads, "threads_wait", lambda most: True)
    assert set(run(clock, 200, {1: 0.03, 2: 0.4})) == {1}


def test_wide_compiled_and_distant_networks_keep_the_number(clock):
    compiled = nn.Linear(160, 640)
    compiled.compile(backend="eager")
    for network in (nn.Linear(1024, 4096), compiled, nn.Linear(160, 640, device="meta")):
        with threads.adapted_threads(network):
            assert torch.get_num_threads() == 2


def test_the_number_can_be_fixed_and_is_restored_after_an_error(clock):
    with threads.fixed_threads(), threads.adapted_threads(SMALL):
        assert torch.get_num_threads() == 2
    with pytest.raises(KeyboardInterrupt), threads.adapted_threads(SMALL):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 2


def test_a_run_uses_it(clock, monkeypatch):
    """A real run, in which the clock stands still: all threads are never faster, so a trial fails after three steps."""
    used, inside = [], threads.step_done
    monkeypatch.setattr("fluxedu.sampling.pipeline.step_done", lambda: (used.append(torch.get_num_threads()), inside()))
    adapted = fe.load()("a red circle", seed=1, steps=5, progress=False)
    assert used == [1, 2, 2, 2, 1]
    with threads.fixed_threads():
        fixed = fe.load()("a red circle", seed=1, steps=5, progress=False)
    torch.testing.assert_close(adapted.latents, fixed.latents, rtol=1e-4, atol=1e-4)


def test_the_measurement_sees_two_threads_wait(monkeypatch):
    """Products that take 16 ms with two threads, as beside a busy process, against 0.2 ms with one."""
    now, product = [0.0], torch.Tensor.__matmul__
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])

    def slow(self, other):
        now[0] += 0.016 if torch.get_num_threads() > 1 else 0.0002
        return product(self, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
    before = torch.get_num_threads()
    try:
        assert threads.threads_wait(2)
        assert now[0] < 0.06
    finally:
        torch.set_num_threads(before)
