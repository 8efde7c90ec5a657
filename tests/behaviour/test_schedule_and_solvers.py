"""The arithmetic of sampling by itself: the published schedule, and solvers on equations whose answer is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxedu.sampling.solvers import SOLVERS, from_strength, schedule, shift_amount, shift_times

few = settings(max_examples=40, deadline=None, derandomize=True)


# --- schedule -------------------------------------------------------------------------------------


@few
@given(st.integers(1, 100), st.integers(1, 16384))
def test_the_schedule_is_the_published_one(steps, tokens):
    """The official formula, in double precision: ``t' = e^mu / (e^mu + (1/t - 1))``, mu linear, not clamped."""
    mu = (1.15 - 0.5) / (4096 - 256) * tokens + 0.5 - (1.15 - 0.5) / (4096 - 256) * 256
    even = [1 - i / steps for i in range(steps + 1)]
    shifted = [math.exp(mu) / (math.exp(mu) + (1 / t - 1)) for t in even[:-1]] + [0.0]
    ours = schedule(steps, tokens)
    assert shift_amount(tokens) == pytest.approx(mu, abs=1e-12)
    assert ours.dtype == torch.float32 and ours.shape == (steps + 1,)
    assert float((ours.double() - torch.tensor(shifted, dtype=torch.float64)).abs().max()) <= 2e-7
    assert (
        float((schedule(steps, tokens, shift=False).double() - torch.tensor(even, dtype=torch.float64)).abs().max())
        <= 6e-8
    )
    assert ours[0] == 1 and ours[-1] == 0 and (ours.diff() < 0).all()


def test_the_shift_by_hand():
    assert [shift_amount(n) for n in (256, 4096)] == pytest.approx([0.5, 1.15])
    assert shift_amount(8160) == pytest.approx(1.838, abs=1e-3)
    assert shift_times(torch.tensor([0.0, 0.5, 1.0]), math.log(3)).tolist() == pytest.approx([0, 0.75, 1])
    assert schedule(4, 64, shift=False).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert schedule(1, 4096).tolist() == [1, 0]  # with one step the shift does nothing
    for steps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="steps must be (of the type int|a whole number from 1 to 1000), not"):
            schedule(steps, 64)


def test_strength_is_a_share_of_the_steps():
    times = schedule(10, 64)
    assert torch.equal(from_strength(times, 1), times)
    assert [len(from_strength(times, s)) - 1 for s in (0.001, 0.1, 0.3, 0.55, 0.6, 0.95)] == [1, 1, 3, 6, 6, 10]
    assert all(torch.equal(from_strength(times, s), times[-len(from_strength(times, s)) :]) for s in (0.01, 0.5, 0.77))
    for strength in (0, -1, 1.1, math.nan):
        with pytest.raises(ValueError, match="strength"):
            from_strength(times, strength)


# --- solvers --------------------------------------------------------------------------------------


def integrate(solver, velocity, x, times):
    for t, t_next in zip(times, times[1:], strict=False):
        x, _ = SOLVERS[solver].step(x, t, t_next, velocity)
    return x


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """``dx/dt = x^2 cos(3 t)`` has ``1/x = c - sin(3 t) / 3``; twice the steps leave ``2^-order`` of the error."""

    def velocity(x, t):
        return x**2 * math.cos(3 * t)

    start = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    truth = 1 / (1 / start + math.sin(3) / 3)
    even = lambda n: torch.linspace(1, 0, n + 1, dtype=torch.float64).tolist()  # noqa: E731
    errors = [float((integrate(solver, velocity, start, even(n)) - truth).norm()) for n in (80, 160, 320)]
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert measured == pytest.approx([order, order], abs=0.1)


def test_one_step_by_hand():
    """``v = 2 x + t`` from x = 1, t = 1 to t = 0.5, where v(1, 1) = 3."""
    velocity = lambda x, t: 2 * x + t  # noqa: E731
    steps = {s: [float(y) for y in SOLVERS[s].step(torch.tensor(1.0), 1.0, 0.5, velocity)] for s in SOLVERS}
    assert steps["euler"] == pytest.approx([1 - 0.5 * 3, 3])
    assert steps["midpoint"] == pytest.approx([1 - 0.5 * (2 * 0.25 + 0.75), 3])
    assert steps["heun"] == pytest.approx([1 - 0.25 * (3 + (2 * -0.5 + 0.5)), 3])
