"""The explorer of solvers: what it says is what runs of the pipeline say."""

import numpy as np
import pytest

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.widgets.grid import sheet, shifted
from fluxedu.widgets.paint import picture
from fluxedu.widgets.solvers import solvers, solvers_view, steps_for

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.fixture(scope="module")
def made(pipe):
    return solvers(pipe, PROMPT, questions=[4, 2], solvers=["euler", "heun"], reference=3, seed=7)


def test_each_cell_is_a_run_at_its_price(pipe, made):
    goal = shifted(pipe, 3.0)(PROMPT, seed=7, steps=3, solver="midpoint", progress=False).latents
    for shift, row, column, solver, steps in ((1.0, 0, 1, "euler", 4), (3.0, 1, 0, "heun", 1)):
        out = shifted(pipe, shift)(PROMPT, seed=7, steps=steps, solver=solver, progress=False)
        view = made.set(shift=f"{shift:g}", cell=(row, column)).now()
        assert np.array_equal(view.panels[1].image, picture(out.images[0]))
        far = float((out.latents - goal).norm() / goal.norm())
        assert view.panels[2].series[solver][column] == pytest.approx(far, rel=1e-5)
        assert f"{solver} is {far:.0%} of the latent's length" in view.text


def test_the_view_names_the_nearest_solver_of_a_column():
    blank = np.zeros((4, 4, 3), np.uint8)
    far = np.array([[0.1, 0.9], [0.5, 0.2]])
    for column, best in ((0, "a"), (1, "b")):
        view = solvers_view([[blank, blank]] * 2, far, [2, 4], ["a", "b"], (1, column))
        assert f"this price {best} is nearest" in view.text
        assert view.panels[0].mark == (1, column) and view.panels[0].image.shape == sheet([[blank] * 2] * 2).shape
        assert view.panels[2].mark == [2, 4][column]


def test_prices():
    assert [steps_for(s, 6) for s in ("euler", "midpoint", "heun")] == [6, 3, 3]
    with pytest.raises(InstrumentError, match="no whole number"):
        steps_for("heun", 3)
    with pytest.raises(InstrumentError, match="a solver is one of"):
        steps_for("rk4", 4)


def test_what_cannot_be_drawn_is_refused(pipe):
    with pytest.raises(InstrumentError):
        solvers(pipe, PROMPT, questions=[])
