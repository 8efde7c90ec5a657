"""torch.compile as one argument: the same picture, the same records, and a sentence where it cannot be had."""

import pytest
import torch

import fluxedu as fe

RUN = {"prompt": "a red circle left of a blue square", "seed": 1, "steps": 3, "progress": False}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("memory", ["full", "no-modulations"])
def test_it_draws_the_same(backend, memory):
    plain, compiled = fe.load(), fe.load(compile=backend, memory=memory)
    expected = plain(**RUN).latents
    torch.testing.assert_close(compiled(**RUN).latents, expected, rtol=0, atol=1e-4)
    with fe.record("double.1.attn.map", "single.0.gate", "velocity") as rec, fe.ablate("double.0.heads", heads=[1]):
        seen = compiled(**RUN).latents
    with fe.record("double.1.attn.map", "single.0.gate", "velocity") as by_hand, fe.ablate("double.0.heads", heads=[1]):
        assert torch.equal(plain(**RUN).latents, seen)
    assert all(torch.equal(rec[name].tensor, by_hand[name].tensor) for name in by_hand)


def test_the_blocks_are_compiled():
    """Each kind of block becomes a graph, of everything in it, for either shape of picture."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    torch.compiler.list_backends()
    torch._dynamo.register_backend(backend, "counting")
    try:
        fe.load(compile="counting")(**RUN)
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("counting", None)
    assert len(graphs) == 1 + 2 and min(graphs[1:]) > 30  # one to try it, a double block, a single one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "x"}, "compile must be True or one of eager, aot_eager, .*inductor.*, not 'x'"),
        ({"compile": 1}, "compile must be True or one of .*, not 1"),
        ({"compile": "eager", "memory": "stream"}, "streamed blocks cannot be compiled"),
    ],
)
def test_unsupported_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        fe.load(**options)


def test_a_compiler_that_does_not_work_raises(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler was found.\nand much more")

    torch._dynamo.reset()
    torch._dynamo.register_backend(broken, "broken")
    try:
        with pytest.raises(
            ValueError, match=r"torch.compile does not work here \(.*no C\+\+ compiler.*\); load without"
        ):
            fe.load(compile="broken")
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("broken", None)
