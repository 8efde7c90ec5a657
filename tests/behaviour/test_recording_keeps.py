"""What a recorder keeps: within a budget, in a folder, and when a run breaks."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from runs import MAP, PROMPT, draw

import fluxedu as fe
from fluxedu.errors import BudgetError, InstrumentError
from fluxedu.instruments.recording import open_recording

pytestmark = pytest.mark.usefixtures("nothing_stays")


def test_the_budget_refuses_before_anything_is_made(pipe, monkeypatch):
    monkeypatch.setattr("fluxedu.attention_map.AttentionMap.rows", None)
    monkeypatch.setattr("fluxedu.attention_map.AttentionMap.columns", None)
    need = 4 * 2 * 36 * 36 * 3  # float32, heads, queries, keys, steps
    with pytest.raises(BudgetError, match=rf"needs at least {need:,} bytes.*reduce='head-mean'"):
        with fe.record(MAP, budget=need - 1) as rec:
            draw(pipe)
    assert len(rec) == 0


@pytest.mark.parametrize(("options", "times"), [({}, 3), ({"solver": "heun"}, 6), ({"seed": [1, 2]}, 6)])
def test_the_refusal_says_how_much_would_do(pipe, options, times):
    need = 4 * 2 * 36 * 36 * times
    with fe.record(MAP, budget=need) as rec:
        draw(pipe, **options)
    assert rec.nbytes == rec[MAP].tensor.nbytes == need
    with pytest.raises(BudgetError, match=f"{need:,} bytes"), fe.record(MAP, budget=need - 1) as rec:
        draw(pipe, **options)
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
    with pytest.raises(InstrumentError, match="exists already"):
        fe.record("vec", to=tmp_path)
    with pytest.raises(InstrumentError, match="contains no recording"):
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


def test_the_refusal_knows_what_a_whole_step_needs(pipe):
    """It comes when the first step has gone by, names what the run would have held, and that would do."""
    options = {"passes": None, "reduce": None}
    globs = ("double.*.attn.map", "single.*.out", "vec")
    with pytest.raises(BudgetError) as refused, fe.record(*globs, budget=1000, **options) as rec:
        draw(pipe)
    with fe.record(*globs) as full:
        draw(pipe)
    assert f"recording at least {len(full)} sites needs at least {full.nbytes:,} bytes" in str(refused.value)
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


def test_a_damaged_recording_is_named(pipe, tmp_path):
    with fe.record("vec", to=tmp_path / "run"):
        draw(pipe)
    path = sorted((tmp_path / "run").iterdir())[0]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InstrumentError, match=f"{path.name} is damaged"):
        open_recording(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InstrumentError, match="cannot be created"):
        fe.record("vec", to=tmp_path / "file" / "run")


def test_two_recorders_do_not_share_a_folder(pipe, tmp_path):
    with pytest.raises(InstrumentError, match="must be a new folder"):
        with fe.record("vec", to=tmp_path / "run"), fe.record("single.0.x", to=tmp_path / "run"):
            draw(pipe)
