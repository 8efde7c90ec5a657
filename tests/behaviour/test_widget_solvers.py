"""The explorer of solvers agrees with runs of the pipeline."""

import numpy as np
import pytest

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.widgets.grid import shifted
from fluxedu.widgets.panels import contact_sheet, to_rgb
from fluxedu.widgets.solvers import solvers, solvers_view, steps_for

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.fixture(scope="module")
def made(pipe):
    return solvers(pipe, PROMPT, evaluations=[4, 2], solvers=["euler", "heun"], reference=3, seed=7)


def test_each_cell_is_a_run_at_its_cost(pipe, made):
    goal = shifted(pipe, 3.0)(PROMPT, seed=7, steps=3, solver="midpoint", progress=False).latents
    for shift, row, column, solver, steps in ((1.0, 0, 1, "euler", 4), (3.0, 1, 0, "heun", 1)):
        out = shifted(pipe, shift)(PROMPT, seed=7, steps=steps, solver=solver, progress=False)
        view = made.set(shift=f"{shift:g}", cell=(row, column)).current_view()
        assert np.array_equal(view.panels[1].image, to_rgb(out.images[0]))
        far = float((out.latents - goal).norm() / goal.norm())
        assert view.panels[2].series[solver][column] == pytest.approx(far, rel=1e-5)
        assert f"{solver} has an error of {far:.0%} of the latent's norm" in view.text


def test_the_view_names_the_best_solver_of_a_column():
    blank = np.zeros((4, 4, 3), np.uint8)
    far = np.array([[0.1, 0.9], [0.5, 0.2]])
    for column, best in ((0, "a"), (1, "b")):
        view = solvers_view([[blank, blank]] * 2, far, [2, 4], ["a", "b"], (1, column))
        assert f"this cost {best} has the smallest error" in view.text
        assert view.panels[0].mark == (1, column)
        assert view.panels[0].image.shape == contact_sheet([[blank] * 2] * 2).shape
        assert view.panels[2].mark == [2, 4][column]


def test_steps_for_a_number_of_evaluations():
    assert [steps_for(s, 6) for s in ("euler", "midpoint", "heun")] == [6, 3, 3]
    with pytest.raises(InstrumentError, match="must be a multiple of 2"):
        steps_for("heun", 3)
    with pytest.raises(InstrumentError, match="solver must be one of"):
        steps_for("rk4", 4)


def test_invalid_arguments_are_refused(pipe):
    with pytest.raises(InstrumentError):
        solvers(pipe, PROMPT, evaluations=[])
