"""The explorer of prompts shows the cosines of the vectors that the pipeline uses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.widgets.similarity import PROMPTS, replace_word, similarity, similarity_view


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


def test_a_word_is_replaced_by_its_index():
    assert replace_word("a red circle", 1, "blue") == "a blue circle"
    assert replace_word("a red circle", 7, "star") == "a red star"
    assert replace_word("a red circle", 1, None) == "a red circle"


def test_the_view_shows_the_cosine_and_its_sign():
    vectors = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [3.0, 4.0, 0.0]])
    view = similarity_view(vectors, ["one", "two", "three"], 0, 2)
    assert view.text == "“one” and “three”: cosine 0.6000."
    table = view.panels[0].image[:: 256 // 3, :: 256 // 3].astype(int)
    assert view.panels[0].values[0] == pytest.approx([0.0, 2.0, 0.4])  # 1 - cosine
    assert table[0, 0].sum() < table[0, 2].sum() < table[0, 1].sum()
    assert np.array_equal(table[0, 1], table[1, 0]) and view.panels[0].mark == (0, 2)
    assert view.panels[1].series == {"first": [1.0, 0.0, 0.0], "second - first": pytest.approx([2.0, 4.0, 0.0])}


def test_a_changed_prompt_replaces_the_second():
    vectors = torch.eye(2)
    view = similarity_view(vectors, ["one", "two"], 0, 1, torch.tensor([2.0, 0.0]), "another")
    assert view.text == "“one” and “another”: cosine 1.0000."


def test_it_uses_the_vectors_of_the_pipeline(pipe):
    made = similarity(pipe).set(first=PROMPTS[0], second=PROMPTS[4])
    a, b, c = (pipe.prompt_encoder([p]).pooled for p in (PROMPTS[0], PROMPTS[4], "a green circle left of a blue star"))
    assert f"cosine {float(F.cosine_similarity(a, b)):.4f}." in made.current_view().text
    made.set(index="8", word="star")
    cosine = float(F.cosine_similarity(a, c))
    assert f"“a green circle left of a blue star”: cosine {cosine:.4f}." in made.current_view().text
    assert made.figure().axes


def test_one_prompt_is_refused(pipe):
    with pytest.raises(InstrumentError, match="prompts must be of the type Sequence.str., not 'a red circle'"):
        similarity(pipe, "a red circle")
    with pytest.raises(InstrumentError, match="at least two prompts"):
        similarity(pipe, ["a red circle"])
