"""Contributions of attention and MLP, which share one matrix in single blocks, checked against the run's sites."""

import pytest
import torch

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.widgets.contributions import contributions, measure_contributions, rms_over_tokens, split_contribution

PROMPT = "a red circle left of a blue square"
OPTIONS = {"seed": 3, "steps": 2, "height": 64, "width": 96, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


def rms(x):
    return x.square().mean(-1).sqrt()


def test_both_parts_of_a_single_block_add_up_to_its_contribution(pipe):
    with fe.record("single.1.*", steps=1) as rec:
        pipe(PROMPT, **OPTIONS)
    heads, hidden, gate, full = (
        rec[f"single.1.{site}"].at(step=0).tensor for site in ("heads", "mlp_hidden", "gate", "contribution")
    )
    with torch.no_grad():
        attention, mlp = split_contribution(pipe.flux.single_blocks[1], heads[None], hidden[None], gate.view(1, 1, -1))
    assert attention.shape == (1, *full.shape) and not torch.allclose(attention[0], full, atol=1e-2)
    assert torch.allclose((attention + mlp)[0], full, atol=1e-4)


def test_each_part_is_that_of_a_run_without_the_other(pipe):
    with fe.record("single.1.*", steps=0) as rec:
        pipe(PROMPT, **OPTIONS)
    heads, hidden, gate = (rec[f"single.1.{s}"].at(step=0).tensor[None] for s in ("heads", "mlp_hidden", "gate"))
    with torch.no_grad():
        attention, _ = split_contribution(pipe.flux.single_blocks[1], heads, hidden, gate.view(1, 1, -1))
    off = lambda x, ctx: torch.zeros_like(x)  # noqa: E731
    bias = pipe.flux.single_blocks[1].linear2.bias
    with fe.intervene("single.1.mlp_hidden", off), fe.record("single.1.added", "single.1.gate", steps=0) as cut:
        pipe(PROMPT, **OPTIONS)
    alone = (cut["single.1.added"].at(step=0).tensor - bias.detach()) * cut["single.1.gate"].at(step=0).tensor
    assert torch.allclose(attention[0], alone, atol=1e-4)


def test_sizes_match_the_sites(pipe):
    sizes, added, out = measure_contributions(pipe, PROMPT, **OPTIONS)
    with fe.record("double.1.*_contribution", "double.0.txt", "single.2.x", "single.4.contribution") as rec:
        pipe(PROMPT, **OPTIONS)
    words, blocks = pipe.prompt_encoder.t5_tokenizer.length, sizes.coords["block"]
    assert sizes.axes == ("block", "step", "token") and sizes.shape == (8, 2, words + 4 * 6)
    assert added.shape == (8, 3, 2, words + 24) and added.coords["source"] == ["attention", "MLP", "sum"]
    assert torch.allclose(sizes.tensor[0, :, :words], rms(rec["double.0.txt"].tensor), atol=1e-5)
    assert torch.allclose(sizes.tensor[blocks.index("single.2")], rms(rec["single.2.x"].tensor), atol=1e-5)
    image = rec["double.1.img_mlp_contribution"].tensor
    assert torch.allclose(added.tensor[1, 1, :, words:], rms(image), atol=1e-5)
    both = rec["double.1.txt_attn_contribution"].tensor + rec["double.1.txt_mlp_contribution"].tensor
    assert torch.allclose(added.tensor[1, 2, :, :words], rms(both), atol=1e-4)
    assert torch.allclose(added.tensor[6, 2], rms(rec["single.4.contribution"].tensor), atol=1e-4)


def test_the_explorer_agrees_with_the_lens(pipe):
    made = contributions(pipe, PROMPT, **OPTIONS)
    lens = fe.instruments.lenses.contributions(pipe, PROMPT, **OPTIONS).tensor  # |added| / |x| of the image tokens
    for block, name in ((1, "double.1"), (5, "single.3")):
        made.set(source="sum", stream="image", cell=(block, 1))
        assert made.view["text"].startswith(f"Block {name.replace('.', ' ')} at t")
        assert f"both together {float(lens[block, 1]):.0%}" in made.view["text"]
        assert made.current_view().panels[1].series["sum"][1] == pytest.approx(float(lens[block, 1]), rel=1e-4)
    before = made.view["text"]
    assert made.set(stream="text").view["text"] != before
    assert rms_over_tokens(torch.tensor([[3.0, 4.0, 9.0]]), slice(0, 2)).item() == pytest.approx(12.5**0.5)
    with pytest.raises(InstrumentError, match="one image"):
        contributions(pipe, PROMPT, seed=[1, 2])
