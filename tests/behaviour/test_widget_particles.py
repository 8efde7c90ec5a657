"""The explorer of a flow in the plane agrees with the velocity field."""

import numpy as np
import pytest
import torch

from fluxedu.errors import InstrumentError
from fluxedu.widgets.particles import euler_path, particles

DATA = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])


def to_the_first(x, t):
    """The best field of one point: every path is straight."""
    return (x - DATA[0]) / t


def around(x, t):
    return torch.stack([-x[:, 1], x[:, 0]], dim=1)


def test_euler_on_a_straight_field_ends_at_its_point_in_any_number_of_steps():
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    for times in ([1.0, 0.0], [1.0, 0.7, 0.2, 0.0]):
        states, velocities = euler_path(to_the_first, x, times)
        assert states.shape == velocities.shape == (len(times), 5, 2)
        assert torch.allclose(states[-1], DATA[0].expand(5, 2), atol=1e-5)
        assert torch.allclose(velocities[:-1], (x - DATA[0]).expand(len(times) - 1, 5, 2), atol=1e-4)
        assert not velocities[-1].any()


def test_the_view_predicts_x0_and_measures_paths():
    made = particles({"straight": to_the_first, "round": around}, DATA, count=7, steps=8, seed=3)
    view = made.set(step=2, particle=4).current_view()
    assert np.allclose(view.panels[1].xy, DATA[0].numpy(), atol=1e-4)  # every particle predicts the one point
    assert "spread of 0.0" in view.text and "1.00 times as long" in view.text
    assert set(view.panels[0].group) == {0} and view.panels[0].mark == 4
    x, t = view.panels[0].xy, 0.75
    assert np.allclose(view.panels[0].arrows, -0.2 * (x - DATA[0].numpy()), atol=1e-4)  # t v leads to the point
    turning = made.set(field="round").current_view()
    x = turning.panels[0].xy
    assert np.allclose(turning.panels[1].xy, x - t * np.stack([-x[:, 1], x[:, 0]], axis=1), atol=1e-5)
    assert "1.00 times" not in turning.text


def test_every_field_starts_from_the_same_noise():
    made = particles({"straight": to_the_first, "round": around}, DATA, count=7, steps=8)
    first = made.set(step=0).current_view().panels[0].xy
    assert np.array_equal(first, made.set(field="round").current_view().panels[0].xy)


@pytest.mark.parametrize(
    "fields, data, more",
    [({}, DATA, {}), ({"a": around}, torch.zeros(7, 2), {}), ({"a": around}, DATA, {"count": 0})],
)
def test_invalid_arguments_are_refused(fields, data, more):
    with pytest.raises(InstrumentError):
        particles(fields, data, **more)


def test_a_particle_that_does_not_exist():
    with pytest.raises(InstrumentError, match="particle must be an index into 3"):
        particles({"a": around}, DATA, count=3, steps=2).set(particle=3)
