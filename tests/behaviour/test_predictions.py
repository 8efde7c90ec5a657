"""Predictions: what is accepted as an answer, what is refused before anything is computed, and the points."""

import sys

import numpy as np
import pytest
import torch

import fluxedu as fe
from fluxedu.course.predictions import points
from fluxedu.errors import CourseError

CHANGE = "How much does it change: 'not', 'a little' or 'much'?"
WHOSE = "Whose prompt is drawn: 'T5', 'CLIP' or 'neither'?"
ANSWER = "Does it: 'yes' or 'no'?"


@pytest.fixture(autouse=True)
def new_session(monkeypatch):
    monkeypatch.setattr(sys.modules["fluxedu.course.predictions"], "_predictions", {})


@pytest.mark.parametrize(
    ("question", "answer", "understood"),
    [
        (CHANGE, "a little", "a little"),
        (CHANGE, " A  LITTLE. ", "a little"),
        (CHANGE, "little", "a little"),
        (CHANGE, "a-little", "a little"),
        (CHANGE, "mu", "much"),
        (WHOSE, "t5", "T5"),
        (ANSWER, True, "yes"),
        (ANSWER, "N", "no"),
        (ANSWER, "yes, no no yes", ["yes", "no", "no", "yes"]),
        (ANSWER, "yes, no, no", ["yes", "no", "no"]),
        (ANSWER, "Yes no NO", ["yes", "no", "no"]),
        (ANSWER, "yes, no and no", ["yes", "no", "no"]),
        (ANSWER, (True, False), ["yes", "no"]),
        (CHANGE, "not / a little", ["not", "a little"]),
        ("Is it 12 or 'more than 12'?", "more than 12", "more than 12"),
        ("How many?", 4096, 4096),
        ("How many?", "4096", 4096),
        ("How many?", "4,096", 4096),
        ("How many?", "4_096", 4096),
        ("How many?", "1,234,567", 1234567),
        ("How many?", "about 27 %", 27),
        ("How many?", "2.4x", 2.4),
        ("How many?", "1/4", 0.25),
        ("How many?", "1e5", 100000),
        ("How many?", np.float32(0.5), 0.5),
        ("How many?", np.int64(3), 3),
        ("How many?", torch.tensor(7), 7),
        ("How many each?", [1, "2"], [1, 2]),
        ("How many each?", np.array([1, 2]), [1, 2]),
        ("How many each?", "1, 2, 3", [1, 2, 3]),
    ],
)
def test_an_answer_may_be_spelled_in_any_clear_way(question, answer, understood):
    assert fe.predict(question, answer).answer == understood


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (CHANGE, "maybe"),
        (CHANGE, ""),
        (CHANGE, None),
        (CHANGE, 3),
        (CHANGE, ["not", "maybe"]),
        (ANSWER, "yes or no"),
        ("'double.0' or 'double.1'?", "double"),
        ("How many?", "many"),
        ("How many?", "nan"),
        ("How many?", float("inf")),
        ("How many?", True),
        ("How many?", None),
        ("How many?", {}),
        ("How many?", "1/0"),
        ("How many?", torch.nn.Identity()),
        ("How many?", object),
    ],
)
def test_another_answer_is_refused_when_it_is_given(question, answer):
    with pytest.raises(CourseError, match=r"^the prediction must be (one of|a number).* is not\.$"):
        fe.predict(question, answer)


@pytest.mark.parametrize("question", [4096, "", "  ", None])
def test_a_prediction_needs_a_question(question):
    with pytest.raises(CourseError, match="needs a question"):
        fe.predict(question, 1)


@pytest.mark.parametrize(
    ("answer", "measured", "scored"),
    [
        (4000, 4096, 1),
        (3000, 4096, 0.5),
        (2000, 4096, 0),
        (0, 0, 1),
        (0, 3, 0),
        (-3, 3, 0),
        ("a little", "a little", 1),
        ("not", "a little", 0),
        ("yes", True, 1),
        (["yes", "no"], [True, True], 0.5),
        (["yes", "no", "no"], ["yes", "no"], 0),
        ("yes", ["yes", "no"], 0),
        ([1, 2], 1, 0),
        ("a", 3, 0),
    ],
)
def test_points(answer, measured, scored):
    assert points(answer, measured) == scored


def test_a_session(capsys):
    fe.predict("how many?", 4000).against(4096)
    fe.predict("which: 'a' or 'b'?", ...).against("a")
    fe.predict("in what order: 'a', 'b'?", "a, b").against(["b", "a"])
    fe.score()
    assert capsys.readouterr().out.splitlines() == [
        "predicted: 4,000 (a number; within 10% is right, within a factor of two is half right)",
        "right · predicted: 4,000 · measured: 4,096",
        "not predicted yet: one of a, b",
        "no prediction was made · measured: a",
        "predicted: a, b (one of a, b)",
        "wrong · predicted: a, b · measured: b, a",
        "1 of 3 points for 2 predictions",
    ]
