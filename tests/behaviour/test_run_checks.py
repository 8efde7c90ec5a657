"""NaN and infinity in a run: one warning, with the step and the first site; without them, nothing."""

import copy
import time
import warnings

import pytest
import torch
from runs import PROMPT, draw, latents

import fluxedu as fe
from fluxedu import probe
from fluxedu.sampling.checks import check_finite

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def pipe(make_pipe, nothing_stays):
    """One of its own for each test, which may damage it."""
    return make_pipe()


def warnings_of(run):
    """The messages of the warnings during ``run()``, and the file of the last."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught], caught[-1].filename if caught else None


POISONED = {
    # a parameter, the site that its layer's output passes first
    "flux.img_in.bias": "img_in",
    "flux.time_in.out_layer.bias": "vec.time",
    "flux.double_blocks.0.img_mod.lin.bias": "double.0.img_mod.shift1",
    "flux.double_blocks.1.txt_attn.qkv.weight": "double.1.txt_attn.q",
    "flux.double_blocks.1.img_attn.norm.query_norm.scale": "double.1.img_attn.q_norm",
    "flux.double_blocks.1.img_mlp.0.weight": "double.1.img_mlp.hidden",
    "flux.double_blocks.1.img_mlp.2.weight": "double.1.img_mlp_out",
    "flux.single_blocks.0.linear2.bias": "single.0.added",
    "flux.final_layer.linear.weight": "velocity",
}


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("parameter", POISONED)
def test_the_warning_names_the_site_that_a_poisoned_weight_reaches_first(pipe, parameter, value):
    with torch.no_grad():
        weight = pipe.flux.get_parameter(parameter.removeprefix("flux."))
        weight.view(-1)[0] = value
    (message,), file = warnings_of(lambda: draw(pipe, [PROMPT, "a green star"]))
    assert (
        message
        == f"the latents are not finite after step 0: {POISONED[parameter]} is the first site with NaN or infinity."
    )
    assert file == draw.__code__.co_filename  # where the pipeline was called


def test_a_state_that_is_not_finite_already(pipe):
    cell = torch.arange(16 * 4 * 4).reshape(1, 16, 4, 4) == 7
    with fe.intervene("sample.noise", lambda x, ctx: x.masked_fill(cell, NAN)):  # latents= with NaN are refused
        (message,), _ = warnings_of(lambda: draw(pipe, height=32, width=32))
    assert message.startswith("the latents are not finite after step 0: sample.x is the first site")
    with fe.intervene("sample.x", lambda x, ctx: x / 0, steps=2):
        (message,), _ = warnings_of(lambda: draw(pipe, steps=3))
    assert message.startswith("the latents are not finite after step 2: sample.x is the first site")


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
def test_the_warning_names_the_step_and_an_intervention_that_causes_it(pipe, solver):
    with fe.intervene("single.1.mlp_hidden", lambda x, ctx: x / 0, steps=1):
        (message,), _ = warnings_of(lambda: draw(pipe, solver=solver, steps=3))
    assert message.startswith("the latents are not finite after step 1: single.1.mlp_hidden is the first site")


def test_a_later_stage_of_a_step_can_be_the_first(pipe):
    """Heun evaluates the model at both ends of a step; here only the second evaluation fails."""
    late = lambda x, ctx: x * NAN if ctx.step_context.stage == 1 else x  # noqa: E731
    with fe.intervene("double.0.txt_mlp_out", late):
        (message,), _ = warnings_of(lambda: draw(pipe, solver="heun"))
    assert "after step 0: double.0.txt_mlp_out is" in message


def test_each_run_warns_once_and_the_recorder_sees_each_value_once(pipe):
    with fe.record("single.1.out") as healthy:
        draw(pipe, steps=3)
    with fe.record("single.1.out") as rec, fe.intervene("double.0.img", lambda x, ctx: x * NAN):
        messages, _ = warnings_of(lambda: [draw(pipe, seed=[0, 1], steps=3), draw(pipe, steps=3)])
    assert len(messages) == 2
    assert len(rec.entries("single.1.out")) == 3 * len(healthy.entries("single.1.out")) == 9


def test_an_intervention_that_cannot_be_called_again_does_not_end_the_run(pipe):
    seen = set()

    def once_per_step(x, ctx):
        assert ctx.step not in seen
        seen.add(ctx.step)
        return x * NAN

    with fe.intervene("double.1.img", once_per_step):
        (message,), _ = warnings_of(lambda: draw(pipe, steps=3))
    assert message.startswith("the latents are not finite after step 0")


@pytest.mark.parametrize("which", ["t5", "clip"])
def test_text_encoders_that_overflow_in_float16(pipe, which):
    """The last MLP's output is beyond 65504, where float16 ends; the same network in bfloat16 is fine."""
    encoder = getattr(pipe.prompt_encoder, which)
    with torch.no_grad():
        last = (
            encoder.encoder.block[-1].layer[1].DenseReluDense.wo
            if which == "t5"
            else encoder.text_model.encoder.layers[-1].mlp.fc2
        )
        last.weight *= 1e7
    site = "t5.encoder.block.1.mlp_out" if which == "t5" else "clip.text_model.encoder.layers.1.mlp_out"
    setattr(pipe.prompt_encoder, which, copy.deepcopy(encoder).to(torch.bfloat16))
    assert warnings_of(lambda: pipe.prompt_encoder([PROMPT]))[0] == []
    setattr(pipe.prompt_encoder, which, copy.deepcopy(encoder).half())
    (message,), _ = warnings_of(lambda: pipe.prompt_encoder([PROMPT]))
    assert "are not finite" in message and f"{site} is the first site" in message
    assert message.endswith("float16 has no numbers above 65504, so load the pipeline with dtype='bfloat16'.")
    messages, _ = warnings_of(lambda: draw(pipe.to(torch.float16)))
    assert messages == [message]  # the latents are not finite either, but the text comes first


def test_a_decoder_that_overflows(pipe):
    with torch.no_grad():
        pipe.autoencoder.decoder.conv_out.bias[0] = INF
    (message,), _ = warnings_of(lambda: draw(pipe))
    assert message.startswith("the pixels are not finite")


def test_a_finite_run_is_unchanged_and_does_not_warn(pipe):
    run = latents(pipe)
    assert warnings_of(lambda: draw(pipe))[0] == []
    with fe.record("*.x"):
        assert torch.equal(latents(pipe), run)
    assert not probe.is_watching()


def test_the_check_costs_less_than_a_hundredth_of_a_step():
    """Of the smallest model that ships, where a step is shortest."""
    pipe, x = fe.load("nano"), torch.randn(1, 16, 16, 16)

    def seconds(function, count):
        begin = time.perf_counter()
        for _ in range(count):
            function()
        return (time.perf_counter() - begin) / count

    run = min(seconds(lambda: pipe(PROMPT, steps=4, decode=False, progress=False), 1) for _ in range(5))
    check = min(seconds(lambda: check_finite("the latents", x, None), 50) for _ in range(5))
    assert check < 0.01 * run / 4
