"""Both streams: the sizes of their tokens and of what is added to them match the run's sites."""

import pytest

import fluxedu as fe
from fluxedu.widgets.contributions import rms_over_tokens
from fluxedu.widgets.streams import QUANTITIES, streams

PROMPT = "a red circle left of a blue square"
OPTIONS = {"seed": 3, "steps": 3, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.fixture(scope="module")
def explorer(pipe):
    return streams(pipe, PROMPT, **OPTIONS)


def test_curves_match_the_sites(pipe, explorer):
    with fe.record("double.1.txt", "double.1.img", "double.1.*_contribution", steps=2, reduce="rms") as rec:
        pipe(PROMPT, **OPTIONS)
    explorer.set(block="double.1", step=2)
    depth, over_time, _ = explorer.current_view().panels
    for name, stream in (("text", "txt"), ("image", "img")):
        size = rms_over_tokens(rec[f"double.1.{stream}"].tensor[0], slice(None))
        assert depth.series[name][1] == pytest.approx(float(size), rel=1e-4)
        for part, source in (("attn", "attention"), ("mlp", "MLP")):
            added = rms_over_tokens(rec[f"double.1.{stream}_{part}_contribution"].tensor[0], slice(None))
            assert over_time.series[f"{source}, {name}"][2] == pytest.approx(float(added), rel=1e-4)
    assert depth.mark == 1 and len(depth.x) == 8


def test_words_are_shaded_by_the_chosen_quantity(pipe, explorer):
    explorer.set(block="double.1", step=1)
    with fe.record("double.1.txt_attn_contribution", steps=1, reduce="rms") as rec:
        pipe(PROMPT, **OPTIONS)
    shown = explorer.set(quantity=QUANTITIES[1]).current_view().shades["word"]
    added = rec["double.1.txt_attn_contribution"].tensor[0][: len(shown)]
    assert shown == pytest.approx(((added - added.min()) / (added.max() - added.min())).tolist(), abs=1e-4)
    assert explorer.set(quantity=QUANTITIES[2]).current_view().shades["word"] != shown
    first = explorer.set(word="▁red").view["text"]
    assert "“red” has size" in first and explorer.set(word="▁blue").view["text"] != first
