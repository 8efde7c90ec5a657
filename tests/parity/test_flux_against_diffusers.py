"""Flux computes what diffusers' FluxTransformer2DModel computes, and these tests fail if it does not.

Every bound is derived from the case itself: see rounding.py.
"""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from oracle import (
    REGIMES,
    Case,
    cases,
    cast,
    diffusers_flux,
    examples,
    float64_flux,
    gradients,
    last_layer_takes_scale_first,
    layer_norm_eps,
    rms_norm_eps,
    run_ours,
    run_theirs,
    to_diffusers,
    worst_gradient,
)
from rounding import Exact, exact_value, relative_error

from fluxedu.models import FluxConfig, attention
from fluxedu.models import flux as flux_module


@torch.no_grad()
def check_velocity(case):
    """Our velocity in float32 and in float64, and diffusers' in float32, are the exact one up to rounding."""
    ours, x, x64 = case.model(), case.inputs(), cast(case.inputs(), torch.float64)
    state = ours.state_dict()
    theirs, reference = diffusers_flux(case.config, state), float64_flux(case.config, state)
    exact = Exact(lambda: run_theirs(reference, x64))
    exact.check(run_theirs(theirs, x), torch.float32)
    exact.check(run_ours(ours, x), torch.float32)
    exact.check(run_ours(ours.double(), x64), torch.float64)
    return exact


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
def test_velocity(regime):
    @examples(25)
    @given(cases(regime=regime))
    def check(case):
        check_velocity(case)

    check()


def test_an_ill_conditioned_case_has_a_wide_bound():
    """A single number behind three norms of almost nothing: float32 keeps four digits of it."""
    config = FluxConfig(
        in_channels=1, out_channels=1, vec_in_dim=6, context_in_dim=1, hidden_size=6, num_heads=1, depth=3,
        depth_single_blocks=0, axes_dim=(2, 2, 2), guidance_embed=False,
    )  # fmt: skip
    case = Case(config, batch=1, grid=(1, 1), txt_len=1, seed=65793)
    ill, well = (check_velocity(replace(case, regime=regime)) for regime in ("small", "unit"))
    with torch.no_grad():
        ill.measure(tries=12)
        well.measure(tries=12)
    assert ill.noise > 30 * well.noise


def test_velocity_wide():
    config = FluxConfig(
        in_channels=64, context_in_dim=512, hidden_size=1024, num_heads=8, depth=1, depth_single_blocks=2
    )
    check_velocity(Case(config, grid=(6, 8), txt_len=12))


INPUTS = ("img", "txt", "y")  # those that training or a lens differentiates by


def gradients_of(model, run, x, seed):
    """The gradient of a random weighting of the velocity, by every parameter and input."""
    x = {n: v.clone().requires_grad_(n in INPUTS) for n, v in x.items()}
    velocity = run(model, x)
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    model.zero_grad()
    (velocity * weights.to(velocity.dtype)).sum().backward()
    return gradients(model.named_parameters()), gradients((n, x[n]) for n in INPUTS)


@pytest.mark.parametrize("regime", REGIMES)
def test_gradients(regime):
    @examples(8)
    @given(cases(qkv_bias=True, regime=regime))
    def check(case):
        ours, x, x64 = case.model(), case.inputs(), cast(case.inputs(), torch.float64)
        state = ours.state_dict()
        theirs, reference = diffusers_flux(case.config, state), float64_flux(case.config, state)

        def our_gradients(model, x):
            of_weights, of_inputs = gradients_of(model, run_ours, x, case.seed + 2)
            return {**to_diffusers(of_weights, case.config), **of_inputs}

        def their_gradients(model, x):
            of_weights, of_inputs = gradients_of(model, run_theirs, x, case.seed + 2)
            return {**of_weights, **of_inputs}

        exact = Exact(lambda: their_gradients(reference, x64), worst_gradient)
        exact.check(their_gradients(theirs, x), torch.float32)
        exact.check(our_gradients(ours, x), torch.float32)
        exact.check(our_gradients(ours.double(), x64), torch.float64)

    check()


@torch.no_grad()
def bfloat16_velocities(case):
    """Ours, diffusers', and a function that computes the exact one."""
    ours, x = case.model().bfloat16(), cast(case.inputs(), torch.bfloat16)
    state = ours.state_dict()
    theirs, reference = diffusers_flux(case.config, state), float64_flux(case.config, state)
    return run_ours(ours, x), run_theirs(theirs, x), lambda: run_theirs(reference, cast(x, torch.float64))


@torch.no_grad()
def bfloat16_log_ratio(case):
    """The logarithm of our error divided by diffusers'."""
    ours, theirs, compute = bfloat16_velocities(case)
    exact = exact_value(compute)
    return math.log(relative_error(ours, exact) / relative_error(theirs, exact))


def test_velocity_in_bfloat16():
    @examples(60)
    @given(cases(bf16_times=True))
    @torch.no_grad()
    def check(case):
        ours, theirs, compute = bfloat16_velocities(case)
        exact = Exact(compute)
        exact.check(ours, torch.bfloat16)
        exact.check(theirs, torch.bfloat16)

    check()


def test_bfloat16_is_no_less_exact_than_diffusers():
    """Over many cases our error is no larger than diffusers', as far as the number of cases can tell.

    A single case says little, because two roundings of the same number are a coin toss: with any other kernel the
    ratio of the errors is another. Its mean logarithm may exceed 0 by two standard errors, that is by 0.03. All times
    here are exact in bfloat16, so that only the network is compared.
    """
    log_ratios = []

    @examples(200)
    @given(cases(bf16_times=True))
    def check(case):
        log_ratios.append(bfloat16_log_ratio(case))

    check()
    ratios = torch.tensor(log_ratios)
    standard_error = ratios.std() / len(ratios) ** 0.5
    assert ratios.mean() <= 2 * standard_error < 0.05


def test_bfloat16_keeps_the_time():
    """At any other time diffusers rounds ``1000 t`` to bfloat16, and its error is several times ours."""
    log_ratios = []

    @examples(40)
    @given(cases())
    @torch.no_grad()
    def check(case):
        ours, _, compute = bfloat16_velocities(case)
        exact = Exact(compute)
        exact.check(ours, torch.bfloat16)
        log_ratios.append(bfloat16_log_ratio(case))

    check()
    assert math.exp(sum(log_ratios) / len(log_ratios)) < 0.5  # the geometric mean of the ratios


# --- the same comparison reveals these mistakes ---------------------------------------------------

TINY = FluxConfig(
    in_channels=12,
    out_channels=20,
    vec_in_dim=10,
    context_in_dim=18,
    hidden_size=48,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 8, 12),
)


@cache
def unbroken(regime, seed, dtype):
    """Model, input and the exact velocity, computed before anything is broken (the mistakes may be global)."""
    case = Case(TINY, batch=2, txt_len=6, regime=regime, seed=seed)
    model, x = case.model().to(dtype), cast(case.inputs(), dtype)
    reference, x64 = float64_flux(TINY, case.model().state_dict()), cast(case.inputs(), torch.float64)
    with torch.no_grad():
        return model, x, Exact(lambda: run_theirs(reference, x64))


def erf_gelu(patch, model):
    gelu = F.gelu
    patch.setattr(F, "gelu", lambda x, approximate="none": gelu(x))


def erf_gelu_in_single_blocks(patch, model):
    model_gelu = F.gelu
    for block in model.double_blocks:  # these go on as they were
        for mlp in (block.img_mlp, block.txt_mlp):
            patch.setattr(mlp[1], "forward", lambda x: model_gelu(x, approximate="tanh"))
    erf_gelu(patch, model)


def rope_by_halves(patch, model):
    def rotate(x, table):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * table.real - b * table.imag, a * table.imag + b * table.real], dim=-1)

    patch.setattr(attention, "rotate", rotate)


def no_pooled_text(patch, model):
    text = model.vector_in.forward
    patch.setattr(model.vector_in, "forward", lambda y: torch.zeros_like(text(y)))


def image_ids_first(patch, model):
    rope = model.rope
    patch.setattr(model, "rope", lambda img_ids, txt_ids: rope(txt_ids, img_ids))


def rows_for_columns(patch, model):
    rope = model.rope
    patch.setattr(model, "rope", lambda img_ids, txt_ids: rope(img_ids[..., [0, 2, 1]], txt_ids))


def sines_first(patch, model):
    waves = flux_module.timestep_embedding
    patch.setattr(flux_module, "timestep_embedding", lambda t: waves(t).roll(128, dims=-1))


def time_as_step_index(patch, model):
    waves = flux_module.timestep_embedding
    patch.setattr(flux_module, "timestep_embedding", lambda t: waves((t * 1000).floor() / 1000))


def no_qk_norm_scale(patch, model):
    patch.setattr(attention.RMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], None, 1e-6))


MISTAKES = {  # and the regime in which each shows
    erf_gelu: "unit",
    erf_gelu_in_single_blocks: "unit",
    layer_norm_eps: "small",
    rms_norm_eps: "small",
    last_layer_takes_scale_first: "unit",
    rope_by_halves: "unit",
    no_pooled_text: "unit",
    image_ids_first: "unit",
    rows_for_columns: "unit",
    sines_first: "unit",
    time_as_step_index: "unit",
    no_qk_norm_scale: "unit",
}
CLEARLY = 10  # times the bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_a_mistake_is_found(mistake, seed, dtype, monkeypatch):
    model, x, exact = unbroken(MISTAKES[mistake], seed, dtype)
    with torch.no_grad():
        exact.check(run_ours(model, x), dtype)
        with monkeypatch.context() as patch:
            mistake(patch, model)
            assert exact.error_of(run_ours(model, x)) > CLEARLY * exact.bound(dtype)
        exact.check(run_ours(model, x), dtype)  # the mistake is undone
