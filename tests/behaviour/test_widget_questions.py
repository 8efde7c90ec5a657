"""Every explorer asks a question, says what to do first, and opens quickly; each of its suggestions shows something."""

import time

import pytest

import fluxedu as fe
from fluxedu import widgets
from fluxedu.instruments.lenses.run import enough_steps, few_steps_note

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.fixture(scope="module")
def schnell():
    return fe.load("nano-schnell")


@pytest.mark.parametrize("name", widgets.explorers())
def test_it_asks_and_suggests_and_opens_in_time(pipe, schnell, name):
    many_runs = name in ("heads", "bench")  # their time is in proportion to the steps: 4 in place of 8
    begun = time.process_time()
    explorer = widgets.explorers()[name].example(schnell if many_runs else pipe)
    assert time.process_time() - begun < (5 if many_runs else 10)  # two cores compute 10 seconds' work in 5

    assert explorer.title.endswith("?") and explorer.instruction.endswith((".", "?"))
    labels = [button["label"] for button in explorer.tries]
    assert len(set(labels)) == len(labels) >= 2
    assert not explorer.play or explorer.play in [*explorer.control, *explorer.pointers]

    first = explorer.view["panels"]
    for i, button in enumerate(explorer.tries):
        explorer.state = explorer.first | button["moves"] | {"moves": i + 1}
        assert explorer.view["moves"] == i + 1 and "cannot be shown" not in explorer.view["text"]
        assert explorer.view["panels"] != first, button["label"]


@pytest.mark.parametrize("name, control", [("attention", "step"), ("trajectory", "step"), ("streams", "block")])
def test_what_runs_over_time_or_depth_can_be_played(pipe, name, control):
    assert getattr(widgets, name)(pipe, PROMPT, steps=2, progress=False).play == control


def test_a_run_of_too_few_steps_says_so(pipe, schnell):
    few, enough = (widgets.trajectory(pipe, PROMPT, steps=n, progress=False).view["text"] for n in (3, 8))
    assert few.endswith("This run has 3 steps; with fewer than 8, this model's images can be wrong.")
    assert "wrong" not in enough
    assert (enough_steps(pipe), enough_steps(schnell)) == (8, 4)
    assert few_steps_note(schnell, {}) == few_steps_note(schnell, {"steps": 4}) == ""
    assert "1 step;" in few_steps_note(schnell, {"times": [1.0, 0.0]})
