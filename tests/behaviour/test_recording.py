"""Recording: everything, exactly, changing nothing, within a budget, whatever the context."""

import sys

import numpy as np
import pytest
import torch
from runs import MAP, PROMPT, draw, off
from torch.nn.functional import cosine_similarity

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.instruments import reductions
from fluxedu.instruments.catalogue import EVERYTHING
from fluxedu.sampling.latents import image_ids, text_ids

pytestmark = pytest.mark.usefixtures("nothing_stays")


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"solver": "heun"}, {"true_cfg_scale": 3.0}, {"height": 48, "width": 32}])
def test_recording_everything_changes_nothing(pipe, options):
    plain = draw(pipe, **options)
    with fe.record(*EVERYTHING) as rec:
        seen = draw(pipe, **options)
    assert torch.equal(plain.latents, seen.latents)
    assert torch.equal(plain.trajectory.velocities, seen.trajectory.velocities)
    assert len(rec) > 100


def test_the_samplers_sites_are_the_trajectory(pipe):
    with fe.record("sample.*") as rec:
        out = draw(pipe)
    path = out.trajectory
    assert torch.equal(rec["sample.x"].tensor, path.latents[:-1, 0])
    assert torch.equal(rec["sample.velocity"].tensor, path.velocities[:, 0])
    assert off(rec["sample.x0"].tensor, path.x0[:, 0]) <= 1e-6
    assert torch.equal(rec["sample.latent"].tensor, out.latents[0])
    assert rec["sample.x"].coords["step"] == path.times[:-1].tolist()
    assert rec["sample.x"].axes == ("step", "channel", "row", "column")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_map_is_what_mixes_the_values(make_pipe, dtype):
    """map @ v gives the heads that the fused kernel gave, in every block."""
    pipe = make_pipe().to(dtype)
    with fe.record("double.*", "single.*") as rec:
        draw(pipe, steps=1)
    for block in ("double.0", "double.1", "single.0", "single.1"):
        streams = ["txt_attn.v", "img_attn.v"] if block.startswith("double") else ["v"]
        v = torch.cat([rec[f"{block}.{s}"].tensor for s in streams], dim=-2)
        weights = rec[f"{block}.attn.map"].tensor
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        mixed, heads = weights.double() @ v.double(), rec[f"{block}.heads"].tensor.double()
        assert off(mixed, heads) <= {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


def test_contributions_are_what_is_added(pipe):
    with fe.record("double.1.*", "single.0.*") as rec:
        draw(pipe, steps=2)
    for s in ("txt", "img"):
        added = rec[f"double.1.{s}_attn_contribution"].tensor + rec[f"double.1.{s}_mlp_contribution"].tensor
        assert off(rec[f"double.1.{s}"].tensor + added, rec[f"double.1.{s}_out"].tensor) <= 1e-5
    assert off(rec["single.0.x"].tensor + rec["single.0.contribution"].tensor, rec["single.0.out"].tensor) <= 1e-5


# --- choosing -------------------------------------------------------------------------------------


def test_a_words_columns_are_the_maps(pipe):
    with (
        fe.record(MAP) as full,
        fe.record(MAP, tokens=["red", "square"]) as rec,
        fe.record(MAP, tokens=[1]) as by_index,
    ):
        draw(pipe)
    columns = rec[MAP]
    assert columns.axes == ("step", "head", "query", "key")
    assert columns.coords["key"] == ["▁red", "▁square"]
    assert off(columns.tensor, full[MAP].tensor[:, :, 32:, [1, 7]]) <= 1e-6  # the image's queries
    assert torch.equal(by_index[MAP].tensor, columns.tensor[..., :1])


def test_heads_and_steps_are_chosen(pipe):
    with fe.record(MAP, "sample.x") as full, fe.record(MAP, heads=[1], steps=[0, -1]) as rec:
        draw(pipe, steps=4)
    assert torch.equal(rec[MAP].tensor, full[MAP].tensor[[0, 3]][:, [1]])
    assert rec[MAP].coords["step"] == [full["sample.x"].coords["step"][i] for i in (0, 3)]
    with fe.record("sample.x", steps=slice(None, None, 2)) as every_second:
        draw(pipe, steps=4)
    assert torch.equal(every_second["sample.x"].tensor, full["sample.x"].tensor[::2])


def test_tokens_of_a_stream_are_chosen(pipe):
    with fe.record("txt_in", "single.0.x") as full, fe.record("txt_in", "single.0.x", tokens="blue") as rec:
        draw(pipe)
    assert torch.equal(rec["txt_in"].tensor, full["txt_in"].tensor[:, [6]])
    assert torch.equal(rec["single.0.x"].tensor, full["single.0.x"].tensor[:, [6]])


# --- reductions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduce", "by_hand"),
    [
        ("head-mean", lambda w: w.mean(1)),
        ("entropy", lambda w: torch.special.entr(w).sum(-1)),
        ("norm", lambda w: w.norm(dim=-1)),
        ("rms", lambda w: w.square().mean(-1).sqrt()),
        ("step-mean", lambda w: w.mean(0)),
        ("cosine", lambda w: cosine_similarity(w[:-1], w[1:], dim=-1)),
        (["head-mean", "entropy"], lambda w: torch.special.entr(w.mean(1)).sum(-1)),
        (reductions.mean("query"), lambda w: w.mean(-2)),
        (reductions.rows([35, 2]), lambda w: w[:, :, [35, 2]]),
        (reductions.columns([0, 35]), lambda w: w[..., [0, 35]]),
        ("top-2", lambda w: torch.stack([w.topk(2).values, w.topk(2).indices.float()], -1)),
        (lambda value: reductions.to_named(value).at(query=3), lambda w: w[:, :, 3]),
    ],
)
def test_a_reduction_is_the_reduced_map(pipe, reduce, by_hand):
    with fe.record(MAP) as full, fe.record(MAP, reduce=reduce) as rec:
        draw(pipe)
    assert off(rec[MAP].tensor, by_hand(full[MAP].tensor)) <= 1e-5


@pytest.mark.parametrize("reduce", ["head-mean", "entropy", "norm"])
def test_reductions_of_chosen_heads_and_words(pipe, reduce):
    chosen = {"heads": [1], "tokens": ["red", "circle"]}
    with fe.record(MAP, **chosen) as full, fe.record(MAP, reduce=reduce, **chosen) as rec:
        draw(pipe)
    w = full[MAP].tensor
    by_hand = {"head-mean": w.mean(1), "entropy": torch.special.entr(w).sum(-1), "norm": w.norm(dim=-1)}[reduce]
    assert off(rec[MAP].tensor, by_hand) <= 1e-6


def test_a_reduced_map_is_never_whole(pipe, monkeypatch):
    """Neither a word's columns nor the entropy makes the map."""
    monkeypatch.setattr("fluxedu.attention_map.AttentionMap.rows", None)
    with fe.record("*.attn.map", tokens=["red"], reduce="head-mean"), fe.record("*.attn.map", reduce="entropy"):
        draw(pipe)


# --- pictures, passes, calls ----------------------------------------------------------------------


def test_pictures_have_an_axis(pipe):
    with fe.record("sample.x", "t5.states", "vec") as rec:
        out = draw(pipe, [PROMPT, "a green star"], seed=3)
    assert rec["sample.x"].axes[:2] == ("picture", "step")
    assert torch.equal(rec["sample.x"].tensor.transpose(0, 1), out.trajectory.latents[:-1])
    assert rec["t5.states"].axes == ("call", "text", "channel")  # each prompt is encoded once


def test_pictures_have_memories_of_their_own(pipe):
    """A reduction over steps begins anew with every picture."""
    with fe.record("vec", reduce="step-mean") as both:
        draw(pipe, [PROMPT, "a green star"], batch=1)
    with fe.record("vec", reduce="step-mean") as second:
        draw(pipe, "a green star")
    assert torch.equal(both["vec"].tensor[1], second["vec"].tensor)


def test_both_passes_of_guidance(plain_pipe):
    options = {"guidance": 3.0}
    with fe.record("img_in", "txt_in") as both, fe.record("txt_in", passes="prompted") as one:
        draw(plain_pipe, **options)
    assert both["txt_in"].axes == ("step", "pass", "text", "channel")
    assert torch.equal(both["txt_in"].tensor[:, 1], one["txt_in"].tensor)
    assert torch.equal(both["img_in"].tensor[:, 0], both["img_in"].tensor[:, 1])  # the same noise, twice


def test_guidance_for_a_while_cannot_be_stacked(plain_pipe):
    with fe.record("txt_in") as rec:
        draw(plain_pipe, guidance=3.0, guidance_interval=(0.8, 1.0))
    with pytest.raises(InstrumentError, match="differ in shape"):
        rec["txt_in"]
    assert len(rec.entries("txt_in")) == 3


def test_solvers_that_ask_twice(pipe):
    with fe.record("sample.velocity") as rec:
        out = draw(pipe, solver="midpoint", steps=2)
    assert len(rec["sample.velocity"].tensor) == 4
    assert torch.equal(rec["sample.velocity"].tensor[::2], out.trajectory.velocities[:, 0])


def test_a_network_called_by_hand(pipe):
    ids = pipe.prompt_encoder.t5_tokenizer([PROMPT, "a star"])
    with fe.record("t5.states") as rec:
        states = pipe.prompt_encoder.t5(ids)
    assert rec["t5.states"].axes == ("step", "batch", "text", "channel")
    assert torch.equal(rec["t5.states"].tensor[0], states)


def call_network(pipe):
    """The velocity of the transformer, called directly and with gradients, as in training."""
    g, c = torch.Generator().manual_seed(0), pipe.flux.config
    widths = (4, c.in_channels), (3, c.context_in_dim)
    img, txt = (torch.randn(1, *width, generator=g) for width in widths)
    return pipe.flux(img, image_ids(4, 4), txt, text_ids(3), torch.ones(1), torch.zeros(1, c.vec_in_dim), torch.ones(1))


def test_a_recorded_value_is_a_copy(pipe):
    with fe.record("velocity") as rec:
        velocity = call_network(pipe)
    before = velocity.clone()
    velocity.detach().zero_()
    assert torch.equal(rec["velocity"].tensor[0], before[0])


@pytest.mark.parametrize("reduce", [None, "head-mean", "entropy"])
def test_a_recording_keeps_no_graph(pipe, reduce):
    """Of a network that is being trained, the values are recorded and not how they were computed."""
    with fe.record("double.0.attn.map", reduce=reduce) as rec:
        assert call_network(pipe).requires_grad
    assert not rec["double.0.attn.map"].tensor.requires_grad


# --- the budget and the folder --------------------------------------------------------------------


# --- contexts -------------------------------------------------------------------------------------


# --- what outsiders may get wrong -----------------------------------------------------------------


def test_a_dataset_without_xarray(pipe, monkeypatch):
    with fe.record("vec", "single.0.gate") as rec:
        draw(pipe)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(InstrumentError, match="pip install xarray"):
        rec.to_dataset()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InstrumentError, match="pip install pandas"):
        rec["vec"].to_pandas()


# --- several runs, two texts, changed maps --------------------------------------------------------


def test_runs_in_one_recorder_are_separate(pipe):
    prompts = [PROMPT, "a green star"]
    with fe.record("sample.x", "vec") as rec, fe.record("vec", reduce="step-mean") as means:
        first, second = (pipe(prompts, steps=2, seed=s, progress=False).trajectory.latents[:-1] for s in (0, 4))
    assert rec["sample.x"].axes[:3] == ("run", "picture", "step")
    assert torch.equal(rec["sample.x"].tensor, torch.stack([first, second]).transpose(1, 2))
    assert off(means["vec"].tensor, rec["vec"].tensor.mean(2)) <= 1e-6


def test_runs_of_other_lengths_are_not_stacked(pipe):
    with fe.record("vec") as rec:
        draw(pipe, steps=1)
        draw(pipe, steps=2)
    with pytest.raises(InstrumentError, match="differ in shape or number"):
        rec["vec"]


def test_clip_is_read_with_its_own_pieces(pipe):
    """CLIP has a mark before the first word, T5 has none."""
    with fe.record("clip.states", "t5.states") as full, fe.record("clip.states", "t5.states", tokens="red") as rec:
        draw(pipe)
    assert torch.equal(rec["clip.states"].tensor, full["clip.states"].tensor[[2]])
    assert torch.equal(rec["t5.states"].tensor, full["t5.states"].tensor[[1]])


def test_each_prompt_is_searched_for_itself(pipe):
    with fe.record("t5.states") as full, fe.record("t5.states", tokens="star") as rec:
        draw(pipe, ["a red star", "a big green star"])
    assert torch.equal(rec["t5.states"].tensor[:, 0], full["t5.states"].tensor[[0, 1], [2, 3]])


def test_words_are_the_prompted_pass(plain_pipe):
    options = {"guidance": 3.0, "negative_prompt": "a big green star"}
    with fe.record(MAP, passes="prompted", tokens="red") as prompted, fe.record(MAP, tokens="red") as rec:
        draw(plain_pipe, **options)
    assert torch.equal(rec[MAP].tensor, prompted[MAP].tensor)
    with fe.record(MAP, passes="negative", tokens="star") as negative:
        draw(plain_pipe, **options)
    assert negative[MAP].coords["key"] == ["▁star"]
    with (
        pytest.raises(InstrumentError, match="does not contain 'red'"),
        fe.record(MAP, passes="negative", tokens="red"),
    ):
        draw(plain_pipe, **options)


def test_a_pass_that_is_not_there_is_not_kept(plain_pipe):
    options = {"guidance": 3.0, "guidance_interval": (0.8, 1.0)}
    with fe.record("txt_in", "sample.prompted", passes="negative") as rec, fe.record("sample.x") as all_steps:
        draw(plain_pipe, **options)
    on = sum(t >= 0.8 for t in all_steps["sample.x"].coords["step"])
    assert 0 < rec["txt_in"].shape[0] == on < 3
    assert "sample.prompted" not in rec


def test_a_changed_map_is_recorded_as_changed(pipe):
    with fe.ablate(MAP, tokens="red"), fe.record(MAP) as full, fe.record(MAP, tokens=["red", "blue"]) as rec:
        draw(pipe)
    assert off(rec[MAP].tensor, full[MAP].tensor[:, :, 32:, [1, 6]]) <= 1e-6
    assert not rec[MAP].tensor[..., 0].any()
    assert rec[MAP].coords["key"] == ["▁red", "▁blue"]


def test_places_keep_their_numbers_in_bfloat16(make_pipe):
    pipe = make_pipe().to(torch.bfloat16)
    site = "single.0.mlp_hidden"
    with fe.record(site) as full, fe.record(site, reduce="top-3", dtype=torch.bfloat16) as rec:
        draw(pipe, steps=1)
    values, indices = rec[site].tensor.unbind(-1)
    assert torch.equal(full[site].tensor.float().gather(-1, indices.long()), values)


def test_a_turn_has_length_one(pipe):
    with fe.record("double.0.attn.rope", reduce="rms") as rec:
        draw(pipe)
    assert torch.allclose(rec["double.0.attn.rope"].tensor, torch.ones(()))


def test_a_word_that_one_of_several_prompts_says(pipe):
    """While prompts are encoded, one after the other, only some of them may say it."""
    with fe.record("t5.states", tokens=["star"]) as rec:
        pipe(["a red circle", "a green star"], steps=1, progress=False)
    assert rec["t5.states"].sizes["text"] == 1
    with pytest.raises(InstrumentError, match="does not contain 'ring'"), fe.record("t5.states", tokens=["ring"]):
        pipe(["a red circle", "a green star"], steps=1, progress=False)


def test_heads_and_steps_from_arrays(pipe):
    with fe.record("double.0.heads", heads=torch.tensor([0, 1]), steps=np.arange(2)) as rec:
        draw(pipe)
    assert rec["double.0.heads"].sizes["head"] == rec["double.0.heads"].sizes["step"] == 2


def test_cosine_compares_the_same_question_of_two_steps(pipe):
    """Heun asks twice a step; worked out from the values themselves."""
    with fe.record("sample.velocity") as full, fe.record("sample.velocity", reduce="cosine") as rec:
        draw(pipe, solver="heun")
    values = [v.tensor for _, v in full.entries("sample.velocity")]
    got = [v.tensor for _, v in rec.entries("sample.velocity")]
    want = [torch.cosine_similarity(values[i], values[i + 2], dim=-1) for i in range(len(values) - 2)]
    assert len(values) == 6 and len(got) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_mean_over_steps_of_other_shapes_is_refused(plain_pipe):
    """Guidance in an interval: two passes, then one."""
    options = {"guidance": 3.0, "negative_prompt": "a star", "guidance_interval": (0.7, 1.0), "steps": 6}
    with pytest.raises(InstrumentError, match="values of one shape.*passes='prompted'"):
        with fe.record("vec", reduce="step-mean"):
            draw(plain_pipe, **options)
    with fe.record("vec", reduce="step-mean", passes="prompted") as mean, fe.record("vec", passes="prompted") as rec:
        draw(plain_pipe, **options)
    by_hand = torch.stack([v.tensor for _, v in rec.entries("vec")]).mean(0)
    assert off(mean["vec"].tensor, by_hand) < 1e-6
