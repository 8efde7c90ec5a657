"""The explorer of tokens shows the states of T5's layers and their cosines."""

import pytest
import torch
import torch.nn.functional as F

import fluxedu as fe
from fluxedu.widgets.tokens import layer_states, tokens, tokens_view

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


def test_states_match_the_encoder(pipe):
    layers, names = layer_states(pipe, PROMPT)
    t5, ids = pipe.prompt_encoder.t5, pipe.prompt_encoder.t5_tokenizer([PROMPT])
    assert len(names) == len(layers) == 2 + t5.config.num_layers
    x, bias = t5.shared(ids), t5.encoder.block[0].attention.bias(ids.shape[1])
    assert torch.equal(layers[0], x[0])
    for i, block in enumerate(t5.encoder.block):
        x = block(x, bias)
        assert torch.allclose(layers[i + 1], x[0], atol=1e-4)
    assert torch.allclose(layers[-1], pipe.prompt_encoder([PROMPT]).txt[0], atol=1e-5)


def test_the_view_shows_the_cosine_and_the_most_similar_token():
    layers = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    view = tokens_view(layers, ["x", "y", "z"], ["before", "after"], 0, 0, 1)
    assert "“x” (token 0) and “y” (token 1), before: cosine 0.00." in view.text
    assert "The most similar token to the first is “z” (token 2), with 0.71." in view.text
    assert view.panels[1].series == {"cosine": [0.0, 1.0]} and view.panels[1].mark == 0
    assert view.shades["second"] == pytest.approx([1.0, 0.0, 0.7071], abs=1e-4)
    after = tokens_view(layers, ["x", "y", "z"], ["before", "after"], 1, 0, 2)
    assert "cosine -1.00. The most similar token to the first is “y”" in after.text
    assert after.shades["first"] == [0.0, 0.0, 1.0]  # below 0 is not shaded


def test_it_uses_the_vectors_of_the_pipeline(pipe):
    made = tokens(pipe, PROMPT).set(layer="after the final norm", first="▁blue", second="▁square")
    txt = pipe.prompt_encoder([PROMPT]).txt[0]
    assert f"cosine {float(F.cosine_similarity(txt[6], txt[7], dim=0)):.2f}." in made.current_view().text
    assert len(made.control["first"].labels) == 10  # eight words, the end and one pad
    assert made.figure().axes
