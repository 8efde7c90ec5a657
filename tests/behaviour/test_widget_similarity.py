"""The explorer of prompts: its table and its sentence are the cosines of the vectors that the pipeline uses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.widgets.similarity import PROMPTS, similarity, similarity_view, swapped


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


def test_a_word_is_swapped_at_its_place():
    assert swapped("a red circle", 1, "blue") == "a blue circle"
    assert swapped("a red circle", 7, "star") == "a red star"
    assert swapped("a red circle", 1, None) == "a red circle"


def test_the_view_says_the_cosine_and_paints_its_sign():
    vectors = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [3.0, 4.0, 0.0]])
    view = similarity_view(vectors, ["one", "two", "three"], 0, 2)
    assert view.text == "“one” and “three”: cosine 0.60."
    table = view.panels[0].image[:: 256 // 3, :: 256 // 3].astype(int)
    assert table[0, 0, 0] > table[0, 0, 2] and table[0, 1, 2] > table[0, 1, 0]  # red and blue
    assert np.array_equal(table[0, 1], table[1, 0]) and view.panels[0].mark == (0, 2)
    assert view.panels[1].series == {"first": [1.0, 0.0, 0.0], "second": pytest.approx([3.0, 4.0, 0.0])}


def test_a_swapped_word_takes_the_place_of_the_second():
    vectors = torch.eye(2)
    view = similarity_view(vectors, ["one", "two"], 0, 1, torch.tensor([2.0, 0.0]), "another")
    assert view.text == "“one” and “another”: cosine 1.00."


def test_it_shows_what_the_pipeline_is_given(pipe):
    made = similarity(pipe).set(first=PROMPTS[0], second=PROMPTS[4])
    a, b, c = (pipe.prompt_encoder([p]).pooled for p in (PROMPTS[0], PROMPTS[4], "a green circle left of a blue star"))
    assert f"cosine {float(F.cosine_similarity(a, b)):.2f}." in made.now().text
    made.set(place="8", word="star")
    assert f"“a green circle left of a blue star”: cosine {float(F.cosine_similarity(a, c)):.2f}." in made.now().text
    assert made.figure().axes


def test_one_prompt_is_refused(pipe):
    with pytest.raises(InstrumentError, match="at least two prompts"):
        similarity(pipe, "a red circle")
