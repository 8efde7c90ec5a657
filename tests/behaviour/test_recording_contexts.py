"""Recorders in every context: threads, generators, compilers, errors; and invalid arguments."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from runs import MAP, draw

import fluxedu as fe
from fluxedu import probe
from fluxedu.errors import InstrumentError
from fluxedu.instruments import reductions
from fluxedu.instruments.catalogue import EVERYTHING

pytestmark = pytest.mark.usefixtures("nothing_stays")


def test_a_recorder_that_is_done_lets_the_pipeline_go():
    pipe = fe.load()
    with fe.record("vec") as rec:
        draw(pipe)
    gone = weakref.ref(pipe.flux)
    del pipe
    gc.collect()
    assert gone() is None and len(rec) == 1


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
        with fe.record(*EVERYTHING):
            raise ZeroDivisionError
    assert not probe.is_watching()


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
        with fe.record(*EVERYTHING, steps=0) as rec:
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


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: fe.record(), "name at least one site"),
        (lambda: fe.record("doubel.*.attn.map"), "did you mean"),
        (lambda: fe.record(MAP, reduce="head-meen"), "reduce must be one of"),
        (lambda: fe.record(MAP, passes="all"), "passes must be"),
        (lambda: fe.record(MAP, tokens=["green"]), "does not contain 'green'"),
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
    with pytest.raises(InstrumentError, match="has already recorded"):
        rec.__enter__()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: fe.record(MAP, tokens=[-1]), "no token -1"),
        (lambda: fe.record(MAP, tokens=[36]), "no token 36"),
        (lambda: fe.record(MAP, reduce=reductions.rows([999])), "no index 999"),
        (lambda: fe.record(MAP, heads=[]), "heads must not be empty"),
        (lambda: fe.record(MAP, tokens=[]), "words or token indices"),
        (lambda: fe.record(MAP, steps="all"), "a number, a list"),
        (lambda: fe.record(MAP, to=None), "'memory' or a new folder"),
        (lambda: fe.record("double.0.attn.rope", reduce="cosine"), "complex"),
        (lambda: fe.record("*.attn.map", reduce="norm", budget=4 * 36 * 36), "this part of the map needs"),
    ],
)
def test_more_errors_of_one_sentence(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says):
        with wrong():
            draw(pipe)


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

    with pytest.raises(InstrumentError, match="changed the value of 'single.0.x' in place"):
        with fe.record("single.0.x", reduce=zeroed):
            draw(pipe)


def test_sites_that_are_never_recorded_are_reported(pipe):
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


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: fe.record(MAP, tokens=["red"], reduce=reductions.columns([0])), "tokens= selects the keys"),
        (lambda: fe.record("vec", reduce="entropy"), "entropy needs non-negative values"),
        (
            lambda: fe.record(MAP, reduce=lambda v: v.to_named().tensor),
            "a reduction must return a Named or None, not Tensor",
        ),
    ],
)
def test_reductions_that_do_not_fit(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says):
        with wrong():
            draw(pipe)
