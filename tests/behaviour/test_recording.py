"""Recording: everything, exactly, changing nothing, within a budget, whatever the context."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

import fluxedu as fe
from fluxedu import probe
from fluxedu.instruments import reductions
from fluxedu.instruments.errors import BudgetError, InstrumentError
from fluxedu.instruments.recording import open_recording

PROMPT = "a red circle left of a blue square"
MAP = "double.1.attn.map"


def draw(pipe, prompt=PROMPT, **asked):
    return pipe(prompt, **{"progress": False, "steps": 3, **asked})


def off(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max())


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert not probe.watched()


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"solver": "heun"}, {"true_cfg_scale": 3.0}, {"height": 48, "width": 32}])
def test_recording_everything_changes_nothing(pipe, asked):
    plain = draw(pipe, **asked)
    with fe.record("*") as rec:
        seen = draw(pipe, **asked)
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
    with fe.record(MAP) as whole, fe.record(MAP, tokens=["red", "square"]) as rec, fe.record(MAP, tokens=[1]) as place:
        draw(pipe)
    columns = rec[MAP]
    assert columns.axes == ("step", "head", "query", "key")
    assert columns.coords["key"] == ["▁red", "▁square"]
    assert off(columns.tensor, whole[MAP].tensor[:, :, 32:, [1, 7]]) <= 1e-6  # the image's queries
    assert torch.equal(place[MAP].tensor, columns.tensor[..., :1])


def test_heads_and_steps_are_chosen(pipe):
    with fe.record(MAP, "sample.x") as whole, fe.record(MAP, heads=[1], steps=[0, -1]) as rec:
        draw(pipe, steps=4)
    assert torch.equal(rec[MAP].tensor, whole[MAP].tensor[[0, 3]][:, [1]])
    assert rec[MAP].coords["step"] == [whole["sample.x"].coords["step"][i] for i in (0, 3)]
    with fe.record("sample.x", steps=slice(None, None, 2)) as every_second:
        draw(pipe, steps=4)
    assert torch.equal(every_second["sample.x"].tensor, whole["sample.x"].tensor[::2])


def test_tokens_of_a_stream_are_chosen(pipe):
    with fe.record("txt_in", "single.0.x") as whole, fe.record("txt_in", "single.0.x", tokens="blue") as rec:
        draw(pipe)
    assert torch.equal(rec["txt_in"].tensor, whole["txt_in"].tensor[:, [6]])
    assert torch.equal(rec["single.0.x"].tensor, whole["single.0.x"].tensor[:, [6]])


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
        (lambda value: reductions.made(value).at(query=3), lambda w: w[:, :, 3]),
    ],
)
def test_a_reduction_is_the_reduced_map(pipe, reduce, by_hand):
    with fe.record(MAP) as whole, fe.record(MAP, reduce=reduce) as rec:
        draw(pipe)
    assert off(rec[MAP].tensor, by_hand(whole[MAP].tensor)) <= 1e-5


@pytest.mark.parametrize("reduce", ["head-mean", "entropy", "norm"])
def test_reductions_of_chosen_heads_and_words(pipe, reduce):
    chosen = {"heads": [1], "tokens": ["red", "circle"]}
    with fe.record(MAP, **chosen) as whole, fe.record(MAP, reduce=reduce, **chosen) as rec:
        draw(pipe)
    w = whole[MAP].tensor
    by_hand = {"head-mean": w.mean(1), "entropy": torch.special.entr(w).sum(-1), "norm": w.norm(dim=-1)}[reduce]
    assert off(rec[MAP].tensor, by_hand) <= 1e-6


def test_a_reduced_map_is_never_whole(pipe, monkeypatch):
    """Neither a word's columns nor the entropy makes the map."""
    monkeypatch.setattr("fluxedu.models.attention_map.AttentionMap.rows", None)
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
        draw(pipe, [PROMPT, "a green star"])
    with fe.record("vec", reduce="step-mean") as second:
        draw(pipe, "a green star")
    assert torch.equal(both["vec"].tensor[1], second["vec"].tensor)


def test_both_passes_of_guidance(plain_pipe):
    asked = {"guidance": 3.0}
    with fe.record("img_in", "txt_in") as both, fe.record("txt_in", passes="prompted") as one:
        draw(plain_pipe, **asked)
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


# --- the budget and the folder --------------------------------------------------------------------


def test_the_budget_refuses_before_anything_is_made(pipe, monkeypatch):
    monkeypatch.setattr("fluxedu.models.attention_map.AttentionMap.rows", None)
    monkeypatch.setattr("fluxedu.models.attention_map.AttentionMap.columns", None)
    need = 4 * 2 * 36 * 36 * 3  # float32, heads, queries, keys, steps
    with pytest.raises(BudgetError, match=rf"needs {need:,} bytes.*reduce='head-mean'"):
        with fe.record(MAP, budget=need - 1) as rec:
            draw(pipe)
    assert len(rec) == 0


@pytest.mark.parametrize(("asked", "times"), [({}, 3), ({"solver": "heun"}, 6), ({"seed": [1, 2]}, 6)])
def test_the_refusal_says_how_much_would_do(pipe, asked, times):
    need = 4 * 2 * 36 * 36 * times
    with fe.record(MAP, budget=need) as rec:
        draw(pipe, **asked)
    assert rec.nbytes == rec[MAP].tensor.nbytes == need
    with pytest.raises(BudgetError, match=f"{need:,} bytes"), fe.record(MAP, budget=need - 1) as rec:
        draw(pipe, **asked)
    assert len(rec) == 0


def test_a_folder_holds_what_memory_would(pipe, tmp_path):
    globs = ("single.*.attn.map", "sample.*", "vec", "t5.states")
    with fe.record(*globs) as memory, fe.record(*globs, to=tmp_path / "run", budget=200_000) as rec:
        draw(pipe, [PROMPT, "a green star"])
    assert rec.nbytes == 0  # nothing is left in memory
    again = open_recording(tmp_path / "run")
    assert set(again) == set(memory) == set(rec)
    for name in memory:
        assert again[name].axes == memory[name].axes
        assert again[name].coords == memory[name].coords
        assert torch.equal(again[name].tensor, memory[name].tensor)


def test_a_folder_holds_a_mean_over_steps(pipe, tmp_path):
    mean = {"reduce": "step-mean"}
    with fe.record("vec", **mean) as memory, fe.record("vec", to=tmp_path / "run", **mean) as rec:
        draw(pipe, [PROMPT, "a green star"])
    assert torch.equal(rec["vec"].tensor, memory["vec"].tensor)
    assert rec["vec"].axes == ("picture", "channel")


def test_a_folder_with_something_in_it_is_left_alone(pipe, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InstrumentError, match="is there already"):
        fe.record("vec", to=tmp_path)
    with pytest.raises(InstrumentError, match="holds no recording"):
        open_recording(tmp_path)


def test_a_broken_step_is_not_kept(pipe, tmp_path):
    def stop(x, ctx):
        if ctx.step == 2:
            raise RuntimeError("enough")
        return x

    with pytest.raises(RuntimeError, match="enough"):
        with fe.record("vec", "single.1.gate", to=tmp_path / "run"), fe.intervene("single.1.gate", stop):
            draw(pipe)
    assert [when.step for when, _ in open_recording(tmp_path / "run").entries("vec")] == [0, 1]


def test_what_fails_after_a_whole_step_does_not_lose_it(pipe, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="after the run"):
        with fe.record("vec", to=tmp_path / "after"):
            draw(pipe)
            raise RuntimeError("after the run")
    assert [when.step for when, _ in open_recording(tmp_path / "after").entries("vec")] == [0, 1, 2]

    def fail(latent):
        raise RuntimeError("no picture")

    monkeypatch.setattr(pipe.autoencoder, "decode", fail)
    with pytest.raises(RuntimeError, match="no picture"), fe.record("vec", to=tmp_path / "decoding"):
        draw(pipe)
    assert [when.step for when, _ in open_recording(tmp_path / "decoding").entries("vec")] == [0, 1, 2]


def test_a_failure_that_is_caught_while_recording_leaves_whole_steps_only(pipe, tmp_path):
    def stop(x, ctx):
        if ctx.step == 1:
            raise RuntimeError("enough")
        return x

    with fe.record("double.0.img", "single.1.x", to=tmp_path / "run"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="enough"), fe.intervene("single.0.x", stop):
                draw(pipe)
    rec = open_recording(tmp_path / "run")
    for site in ("double.0.img", "single.1.x"):
        assert [when.step for when, _ in rec.entries(site)] == [0, 0]


def test_a_second_run_that_fails_at_once_does_not_lose_the_first(pipe, tmp_path):
    with pytest.raises(InstrumentError):
        with fe.record("double.0.attn.map", tokens=["red"], reduce="head-mean", to=tmp_path / "run"):
            draw(pipe, "a red circle")
            draw(pipe, "a green star")
    assert [when.step for when, _ in open_recording(tmp_path / "run").entries("double.0.attn.map")] == [0, 1, 2]


def test_a_recorder_that_is_done_lets_the_pipeline_go():
    pipe = fe.load()
    with fe.record("vec") as rec:
        draw(pipe)
    gone = weakref.ref(pipe.flux)
    del pipe
    gc.collect()
    assert gone() is None and len(rec) == 1


def test_a_killed_run_leaves_whole_steps(tmp_path):
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {os.getcwd()!r})
        import fluxedu as fe
        pipe = fe.load()
        def die(x, ctx):
            if ctx.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return x
        with fe.record("single.*.x", to={str(tmp_path / "run")!r}), fe.intervene("single.4.x", die):
            pipe("a red circle", steps=6, progress=False)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    rec = open_recording(tmp_path / "run")
    assert rec["single.5.x"].shape[0] == rec["single.0.x"].shape[0] == 3


# --- contexts -------------------------------------------------------------------------------------


def test_recorders_overlap_and_leave_in_any_order(pipe):
    first, second = fe.record("vec"), fe.record("vec")
    first.__enter__()
    draw(pipe, steps=1)
    second.__enter__()
    draw(pipe, steps=1)
    first.__exit__(None, None, None)
    draw(pipe, steps=1)
    second.__exit__(None, None, None)
    draw(pipe, steps=1)
    assert len(first.entries("vec")) == len(second.entries("vec")) == 2


def test_a_generator_records_while_it_is_suspended(pipe):
    def watching():
        with fe.record("vec") as rec:
            yield rec

    suspended = watching()
    rec = next(suspended)
    draw(pipe)
    suspended.close()
    draw(pipe)
    assert rec["vec"].shape[0] == 3


def test_a_thread_sees_its_own_run(pipe):
    recs, plain = {}, {p: draw(pipe, p).latents for p in ("a red circle", "a green star")}
    both = threading.Barrier(2)

    def run(prompt):
        with fe.record("sample.latent") as rec:
            both.wait()
            draw(pipe, prompt)
            both.wait()
        recs[prompt] = rec

    threads = [threading.Thread(target=run, args=[p]) for p in plain]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for prompt, latents in plain.items():
        assert torch.equal(recs[prompt]["sample.latent"].tensor, latents[0])


def test_an_exception_leaves_nobody_watching(pipe):
    with pytest.raises(ZeroDivisionError):
        with fe.record("*"):
            raise ZeroDivisionError
    assert not probe.watched()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_is_recorded(make_pipe, backend):
    pipe = make_pipe()
    plain = draw(pipe).latents
    for block in (*pipe.flux.double_blocks, *pipe.flux.single_blocks):
        block.compile(backend=backend)
    compiled = draw(pipe).latents
    with fe.record(MAP, "single.0.gate") as rec:
        seen = draw(pipe).latents
    assert torch.equal(seen, plain)  # while somebody looks, it runs as it is written
    assert rec[MAP].shape[0] == rec["single.0.gate"].shape[0] == 3
    assert torch.equal(draw(pipe).latents, compiled)


def test_nothing_is_leaked(pipe):
    def run():
        with fe.record("*", steps=0) as rec:
            draw(pipe, steps=1)
        return len(rec)

    def alive():
        gc.collect()
        return sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor)

    run()
    before = alive()
    for _ in range(100):
        run()
    assert alive() == before


# --- what outsiders may get wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: fe.record(), "name one site or more"),
        (lambda: fe.record("doubel.*.attn.map"), "did you mean"),
        (lambda: fe.record(MAP, reduce="head-meen"), "reduce must be one of"),
        (lambda: fe.record(MAP, passes="both"), "passes is"),
        (lambda: fe.record(MAP, tokens=["green"]), "does not say 'green'"),
        (lambda: fe.record(MAP, heads=[7]), "no head 7"),
        (lambda: fe.record("img_in", tokens=["red"]), "no text tokens"),
        (lambda: fe.record("vec", heads=[0]), "no axis 'head'"),
        (lambda: fe.record("vec", reduce="top-9999"), "no top 9999"),
    ],
)
def test_errors_are_one_sentence(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says) as error:
        with wrong():
            draw(pipe)
    assert "\n" not in str(error.value)


def test_asking_for_what_was_not_recorded(pipe):
    with fe.record("vec") as rec:
        draw(pipe)
    with pytest.raises(InstrumentError, match="nothing was recorded at 'vex'; recorded are: vec"):
        rec["vex"]
    with pytest.raises(InstrumentError, match="has recorded already"):
        rec.__enter__()


def test_a_dataset(pipe):
    with fe.record("vec", "single.0.gate") as rec:
        draw(pipe)
    try:
        import xarray  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(InstrumentError, match="pip install xarray"):
            rec.to_dataset()
    else:
        assert rec.to_dataset()["vec"].shape == (3, 48)


# --- several runs, two texts, changed maps --------------------------------------------------------


def test_runs_in_one_recorder_are_told_apart(pipe):
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
    with fe.record("clip.states", "t5.states") as whole, fe.record("clip.states", "t5.states", tokens="red") as rec:
        draw(pipe)
    assert torch.equal(rec["clip.states"].tensor, whole["clip.states"].tensor[[2]])
    assert torch.equal(rec["t5.states"].tensor, whole["t5.states"].tensor[[1]])


def test_each_prompt_is_searched_for_itself(pipe):
    with fe.record("t5.states") as whole, fe.record("t5.states", tokens="star") as rec:
        draw(pipe, ["a red star", "a big green star"])
    assert torch.equal(rec["t5.states"].tensor[:, 0], whole["t5.states"].tensor[[0, 1], [2, 3]])


def test_words_are_the_prompted_pass(plain_pipe):
    asked = {"guidance": 3.0, "negative_prompt": "a big green star"}
    with fe.record(MAP, passes="prompted", tokens="red") as prompted, fe.record(MAP, tokens="red") as rec:
        draw(plain_pipe, **asked)
    assert torch.equal(rec[MAP].tensor, prompted[MAP].tensor)
    with fe.record(MAP, passes="negative", tokens="star") as negative:
        draw(plain_pipe, **asked)
    assert negative[MAP].coords["key"] == ["▁star"]
    with pytest.raises(InstrumentError, match="does not say 'red'"), fe.record(MAP, passes="negative", tokens="red"):
        draw(plain_pipe, **asked)


def test_a_pass_that_is_not_there_is_not_kept(plain_pipe):
    asked = {"guidance": 3.0, "guidance_interval": (0.8, 1.0)}
    with fe.record("txt_in", "sample.prompted", passes="negative") as rec, fe.record("sample.x") as all_steps:
        draw(plain_pipe, **asked)
    on = sum(t >= 0.8 for t in all_steps["sample.x"].coords["step"])
    assert 0 < rec["txt_in"].shape[0] == on < 3
    assert "sample.prompted" not in rec


def test_a_changed_map_is_recorded_as_changed(pipe):
    with fe.ablate(MAP, tokens="red"), fe.record(MAP) as whole, fe.record(MAP, tokens=["red", "blue"]) as rec:
        draw(pipe)
    assert torch.equal(rec[MAP].tensor, whole[MAP].tensor[:, :, 32:, [1, 6]])
    assert not rec[MAP].tensor[..., 0].any()
    assert rec[MAP].coords["key"] == ["▁red", "▁blue"]


def test_places_keep_their_numbers_in_bfloat16(make_pipe):
    pipe = make_pipe().to(torch.bfloat16)
    site = "single.0.mlp_hidden"
    with fe.record(site) as whole, fe.record(site, reduce="top-3", dtype=torch.bfloat16) as rec:
        draw(pipe, steps=1)
    values, places = rec[site].tensor.unbind(-1)
    assert torch.equal(whole[site].tensor.float().gather(-1, places.long()), values)


def test_a_turn_has_length_one(pipe):
    with fe.record("double.0.attn.rope", reduce="rms") as rec:
        draw(pipe)
    assert torch.allclose(rec["double.0.attn.rope"].tensor, torch.ones(()))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: fe.record(MAP, tokens=[-1]), "no token -1"),
        (lambda: fe.record(MAP, tokens=[32]), "no token 32"),
        (lambda: fe.record(MAP, reduce=reductions.rows([999])), "no 999"),
        (lambda: fe.record(MAP, heads=[]), "names no head"),
        (lambda: fe.record(MAP, tokens=[]), "words or places"),
        (lambda: fe.record(MAP, steps="all"), "a number, a list"),
        (lambda: fe.record(MAP, to=None), "'memory' or a new folder"),
        (lambda: fe.record("double.0.attn.rope", reduce="cosine"), "complex"),
        (lambda: fe.record("*.attn.map", reduce="norm", budget=4 * 36 * 36), "this part of the map takes"),
    ],
)
def test_more_errors_of_one_sentence(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says):
        with wrong():
            draw(pipe)


def test_the_budget_is_for_all_runs_of_a_recorder(pipe):
    with fe.record("vec") as rec:
        draw(pipe)
    with fe.record("vec", budget=2 * rec.nbytes) as twice:
        draw(pipe)
        draw(pipe)
        with pytest.raises(BudgetError):
            draw(pipe)
    assert twice.nbytes <= 2 * rec.nbytes


def test_a_generator_that_is_closed_keeps_what_it_recorded(tmp_path):
    flux = fe.load().flux
    x = torch.zeros(1, 4, flux.config.hidden_size)

    def watching():
        with fe.record("final_layer.*", to=tmp_path / "run"):
            yield

    suspended = watching()
    next(suspended)
    flux.final_layer(x, flux.final_layer.plan(torch.zeros(1, flux.config.hidden_size)))
    suspended.close()
    assert len(open_recording(tmp_path / "run"))


def test_a_word_that_one_of_several_prompts_says(pipe):
    """While prompts are encoded, one after the other, only some of them may say it."""
    with fe.record("t5.states", tokens=["star"]) as rec:
        pipe(["a red circle", "a green star"], steps=1, progress=False)
    assert rec["t5.states"].sizes["text"] == 1
    with pytest.raises(InstrumentError, match="does not say 'ring'"), fe.record("t5.states", tokens=["ring"]):
        pipe(["a red circle", "a green star"], steps=1, progress=False)


def test_heads_and_steps_from_arrays(pipe):
    with fe.record("double.0.heads", heads=torch.tensor([0, 1]), steps=np.arange(2)) as rec:
        draw(pipe)
    assert rec["double.0.heads"].sizes["head"] == rec["double.0.heads"].sizes["step"] == 2


def test_the_refusal_knows_what_a_whole_step_needs(pipe):
    """It comes when the first step has gone by, names what the run would have held, and that would do."""
    asked = {"passes": None, "reduce": None}
    globs = ("double.*.attn.map", "single.*.out", "vec")
    with pytest.raises(BudgetError) as refused, fe.record(*globs, budget=1000, **asked) as rec:
        draw(pipe)
    with fe.record(*globs) as whole:
        draw(pipe)
    assert f"recording {len(whole)} sites or more needs {whole.nbytes:,} bytes or more" in str(refused.value)
    assert rec.nbytes <= 1000


def test_what_reductions_remember_is_counted(pipe, tmp_path):
    """A mean over steps is summed in float64: in memory and streaming alike, that and the mean are held."""
    held = 48 * (4 + 8)  # vec: 48 numbers
    for n, to in enumerate(("memory", tmp_path / "a", "memory", tmp_path / "b")):
        recorder = fe.record("vec", reduce="step-mean", to=to, budget=held - (n > 1))
        if n > 1:
            with pytest.raises(BudgetError, match=f"{held:,} bytes"), recorder:
                draw(pipe)
        else:
            with recorder:
                draw(pipe)
    with pytest.raises(BudgetError, match="bytes"), fe.record("sample.x", reduce="cosine", budget=1000):
        draw(pipe)


def test_cosine_compares_the_same_question_of_two_steps(pipe):
    """Heun asks twice a step; worked out from the values themselves."""
    with fe.record("sample.velocity") as whole, fe.record("sample.velocity", reduce="cosine") as rec:
        draw(pipe, solver="heun")
    values = [v.tensor for _, v in whole.entries("sample.velocity")]
    got = [v.tensor for _, v in rec.entries("sample.velocity")]
    want = [torch.cosine_similarity(values[i], values[i + 2], dim=-1) for i in range(len(values) - 2)]
    assert len(values) == 6 and len(got) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_compiler_that_comes_later_does_not_matter():
    """torch.compile, first used inside a recorder: the values are those of the code as it is written."""
    code = """
import sys, torch
import fluxedu as fe
from fluxedu.sampling.latents import image_ids, text_ids
flux = fe.load().flux
c, g = flux.config, torch.Generator().manual_seed(0)
given = (torch.randn(1, 16, 64, generator=g), image_ids(8, 8), torch.randn(1, 5, c.context_in_dim, generator=g),
         text_ids(5), torch.tensor([0.5]), torch.randn(1, c.vec_in_dim, generator=g), torch.tensor([3.0]))
with torch.no_grad():
    with fe.record("double.*.attn.map", "vec") as want:
        plain = flux(*given)
    assert "torch._dynamo" not in sys.modules
    with fe.record("double.*.attn.map", "vec") as rec:
        for block in flux.double_blocks:
            block.compile(backend="eager")
        assert torch.equal(flux(*given), plain)
assert "torch._dynamo" in sys.modules
assert all(torch.equal(rec[name].tensor, want[name].tensor) for name in want) and len(rec) == len(want) == 3
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "same" in done.stdout, done.stderr[-2000:]


def test_a_reduction_that_writes_is_refused(pipe):
    def zeroed(value):
        value.tensor.zero_()
        return value

    with pytest.raises(InstrumentError, match="wrote into the value of 'single.0.x'"):
        with fe.record("single.0.x", reduce=zeroed):
            draw(pipe)


def test_what_is_never_recorded_is_said(pipe):
    with pytest.warns(UserWarning, match=r"nothing was recorded at vec: the run has 3 steps.*steps=\[10\]"):
        with fe.record("vec", steps=[10]):
            draw(pipe)
    with pytest.warns(UserWarning, match="there was no negative pass"), fe.record(MAP, passes="negative") as rec:
        draw(pipe)
    assert len(rec) == 0


def test_a_word_that_was_missing_does_not_keep_the_pipeline(make_pipe):
    pipe = make_pipe()
    gone, kept = weakref.ref(pipe), fe.record("t5.states", tokens=["star"])
    with kept:
        pipe(["a red circle", "a green star"], steps=1, progress=False)
    del pipe
    gc.collect()
    assert gone() is None and kept["t5.states"].sizes["text"] == 1


def test_a_damaged_recording_is_named(pipe, tmp_path):
    with fe.record("vec", to=tmp_path / "run"):
        draw(pipe)
    path = sorted((tmp_path / "run").iterdir())[0]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InstrumentError, match=f"{path.name} is damaged"):
        open_recording(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InstrumentError, match="cannot be made"):
        fe.record("vec", to=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: fe.record(MAP, tokens=["red"], reduce=reductions.columns([0])), "tokens= has chosen the keys"),
        (lambda: fe.record("vec", reduce="entropy"), "only shares have an entropy"),
        (lambda: fe.record(MAP, reduce=lambda v: v.made().tensor), "a reduction gives a Named or None, not Tensor"),
    ],
)
def test_reductions_that_do_not_fit(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says):
        with wrong():
            draw(pipe)


def test_a_mean_over_steps_of_other_shapes_is_refused(plain_pipe):
    """Guidance in an interval: two passes, then one."""
    asked = {"guidance": 3.0, "negative_prompt": "a star", "guidance_interval": (0.7, 1.0), "steps": 6}
    with pytest.raises(InstrumentError, match="values of one shape.*passes='prompted'"):
        with fe.record("vec", reduce="step-mean"):
            draw(plain_pipe, **asked)
    with fe.record("vec", reduce="step-mean", passes="prompted") as mean, fe.record("vec", passes="prompted") as rec:
        draw(plain_pipe, **asked)
    by_hand = torch.stack([v.tensor for _, v in rec.entries("vec")]).mean(0)
    assert off(mean["vec"].tensor, by_hand) < 1e-6


def test_two_recorders_do_not_share_a_folder(pipe, tmp_path):
    with pytest.raises(InstrumentError, match="record into a new folder"):
        with fe.record("vec", to=tmp_path / "run"), fe.record("single.0.x", to=tmp_path / "run"):
            draw(pipe)
