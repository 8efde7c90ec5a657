"""Gradients through a run: held against finite differences, and against a run of the network written by hand."""

import pytest
import torch

import fluxedu as fe
from fluxedu.errors import GradientError, InstrumentError
from fluxedu.sampling.latents import image_ids, pack, text_ids, unpack

PROMPT = "a red circle left of a blue square"
OPTIONS = {"steps": 3, "height": 32, "width": 32, "progress": False}


@pytest.fixture(scope="module")
def precise():
    return fe.load("nano", dtype="float64")


def run(pipe, noise=None, txt=None, **options):
    """A run in which noise or text tokens are replaced."""
    changes = {"sample.noise": noise, "sample.txt": txt}
    changes = [fe.intervene(site, lambda x, ctx, new=new: new) for site, new in changes.items() if new is not None]
    for change in changes:
        change.__enter__()
    try:
        return pipe(PROMPT, **(OPTIONS | options))
    finally:
        for change in changes:
            change.__exit__(None, None, None)


def inputs(pipe):
    with fe.record("sample.noise", "sample.txt") as rec:
        pipe(PROMPT, **OPTIONS)
    return rec["sample.noise"].tensor.unsqueeze(0), rec["sample.txt"].tensor.unsqueeze(0)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("which", ["noise", "txt"])
def test_gradients_of_a_whole_run_agree_with_finite_differences(precise, which, solver):
    start = dict(zip(("noise", "txt"), inputs(precise), strict=True))[which]
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=start.dtype)
    x = start.clone().requires_grad_()
    with fe.gradients():
        loss = run(precise, **{which: x}, solver=solver).latents.square().mean()
    loss.backward()
    h = 1e-5
    ends = [
        float(run(precise, **{which: start + s * h * direction}, solver=solver).latents.square().mean())
        for s in (1, -1)
    ]
    assert float((x.grad * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


def test_gradients_agree_with_a_step_written_by_hand(precise):
    noise, txt = inputs(precise)
    with fe.record("sample.pooled") as rec:
        precise(PROMPT, **OPTIONS)
    flux, x = precise.flux, noise.clone().requires_grad_()
    guidance = torch.tensor([precise.defaults.guidance], dtype=torch.float64)
    v = flux(
        pack(x),
        image_ids(4, 4),
        txt,
        text_ids(txt.shape[1]),
        torch.tensor([1.0]),
        rec["sample.pooled"].tensor[None],
        guidance,
    )
    (expected,) = torch.autograd.grad((x - unpack(v, 4, 4)).square().mean(), x)
    y = noise.clone().requires_grad_()
    with fe.gradients(steps=0):
        x0 = run(precise, noise=y).trajectory.x0[0]
    x0.square().mean().backward()
    assert torch.allclose(y.grad, expected, rtol=1e-9, atol=1e-15)


def test_the_image_in_gradient_mode_is_the_same(pipe):
    plain = pipe(PROMPT, **OPTIONS)
    with fe.gradients():
        graph = pipe(PROMPT, **OPTIONS)
    assert graph.latents.requires_grad and not plain.latents.requires_grad
    assert torch.allclose(graph.latents, plain.latents, atol=1e-5)
    assert not torch.is_inference_mode_enabled() and pipe(PROMPT, **OPTIONS).latents.grad_fn is None


def test_in_a_step_that_is_not_selected_the_velocity_is_a_constant(precise):
    """Then the latent of the next step depends on the noise by the identity alone."""
    noise, _ = inputs(precise)
    x = noise.clone().requires_grad_()
    with fe.gradients(steps=[]):
        out = run(precise, noise=x)
    out.latents.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("make", [lambda v: v + torch.zeros(v.shape[-1], requires_grad=True), torch.Tensor.detach])
def test_a_change_that_changes_no_number_still_changes_the_graph(pipe, make):
    """A zero steering vector is trained from 0; a detached value passes no gradient on."""
    seen = []

    def change(value, ctx):
        seen.append(make(value))
        return seen[-1]

    with fe.gradients(), fe.intervene("single.0.out", change), fe.record("single.0.x", detach=False) as rec:
        loss = pipe(PROMPT, **OPTIONS | {"steps": 1}).latents.square().mean()
    loss.backward() if loss.requires_grad else None
    if make is torch.Tensor.detach:
        with pytest.raises(GradientError, match="has no gradient"):
            rec.grad("single.0.x")
    else:
        assert float(rec.grad("single.0.x").tensor.abs().max()) > 0
        assert seen[0].requires_grad


def test_a_steering_vector_is_trained(pipe):
    steering = torch.zeros(pipe.flux.config.hidden_size, requires_grad=True)
    target, losses = torch.zeros(1, 16, 4, 4), []
    for _ in range(4):
        with fe.gradients(), fe.intervene("double.1.img_out", lambda x, ctx, steering=steering: x + steering):
            loss = (pipe(PROMPT, **OPTIONS).latents - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, steering)
        steering = (steering - 0.3 * gradient / gradient.norm()).detach().requires_grad_()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize("site", ["double.0.img_attn_contribution", "single.1.contribution", "vec", "double.1.heads"])
def test_recorded_gradients_predict_an_ablation(precise, site):
    """Attribution patching (arXiv 2310.10348): the gradient times a small change of a value is that of the loss."""
    with fe.gradients(), fe.record(site, detach=False) as rec:
        loss = precise(PROMPT, **OPTIONS).latents.square().mean()
    loss.backward()
    value, gradient = rec[site], rec.grad(site)
    assert gradient.axes == value.axes and gradient.shape == value.shape
    h = 1e-6
    with fe.intervene(site, lambda x, ctx: (1 + h) * x):
        changed = precise(PROMPT, **OPTIONS).latents.square().mean()
    predicted = h * float((gradient.tensor * value.tensor).sum())
    assert float(changed - loss.detach()) == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize("cfg", [False, True])
def test_checkpointing_gives_the_same_gradients_from_less_memory(plain_pipe, pipe, cfg):
    pipe, found, options = plain_pipe if cfg else pipe, [], {"guidance": 4.0} if cfg else {}
    held = []
    for checkpointing in (False, True):
        noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        saved = []
        with (
            fe.gradients(checkpointing=checkpointing),
            fe.intervene("sample.noise", lambda x, ctx, noise=noise: noise),
            fe.intervene("double.0.img_out", lambda x, ctx: 1.1 * x),
            fe.record("double.0.img_out", detach=False) as rec,
            torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x),
        ):
            loss = pipe(PROMPT, **(OPTIONS | options)).latents.square().mean()
        loss.backward()  # after the interventions ended: they are applied again all the same
        found.append(noise.grad)
        held.append(sum(x.nbytes for x in saved if not x.is_leaf))
        assert len(rec.entries("double.0.img_out")) == OPTIONS["steps"]  # nothing is recorded twice
    assert torch.allclose(*found, rtol=1e-4, atol=1e-7)
    assert held[1] < 0.4 * held[0]  # of a small transformer; what the autoencoder's decoder holds is in both


def test_attend_and_excite_on_a_live_map(pipe):
    """The latent moves to where the image attends more to a word (arXiv 2301.13826)."""

    def attention_to_circle(noise):
        with fe.gradients(steps=0), fe.intervene("sample.noise", lambda x, ctx: noise):
            with fe.record("double.1.attn.map", tokens=["circle"], steps=0, detach=False) as rec:
                pipe(PROMPT, **OPTIONS)
        return rec["double.1.attn.map"].tensor.mean()

    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = attention_to_circle(noise)
    (gradient,) = torch.autograd.grad(before, noise)
    after = attention_to_circle((noise + 0.5 * gradient / gradient.norm()).detach())
    assert float(after.detach()) > float(before.detach())


def test_where_no_gradient_flows_it_is_said(pipe, tmp_path):
    with pytest.raises(GradientError, match=r"no gradient flows through 'vec' here: call the pipeline inside"):
        with fe.record("vec", detach=False):
            pipe(PROMPT, **OPTIONS)
    with pytest.raises(GradientError, match="no gradient flows through 't5"):
        with fe.gradients(), fe.record("t5.*.attn_out", detach=False):
            pipe(PROMPT, **OPTIONS)
    with pytest.raises(GradientError, match="select this step with its steps="):
        with fe.gradients(steps=0), fe.record("vec", detach=False):
            pipe(PROMPT, **OPTIONS)
    with pytest.raises(InstrumentError, match="to='memory'"):
        fe.record("vec", detach=False, to=tmp_path / "new")
    with fe.gradients(), fe.record("vec", detach=False) as rec:
        pipe(PROMPT, **OPTIONS)
    with pytest.raises(GradientError, match=r"'vec' has no gradient: .* call backward\(\)"):
        rec.grad("vec")
    with fe.gradients(), fe.record("double.*.heads", detach=False, reduce="norm") as rec:
        pipe(PROMPT, **OPTIONS).latents.sum().backward()
    with pytest.raises(GradientError, match="was reduced, and only complete values have a gradient"):
        rec.grad("double.0.heads")
    with pytest.raises(InstrumentError, match="steps must be"):
        with fe.gradients(steps="first"):
            pass
    assert fe.sampling.gradients.gradient_mode() is None


def test_streamed_weights_refuse_gradients():
    pipe = fe.load("nano", memory="stream")
    with pytest.raises(GradientError, match="memory='full'"), fe.gradients():
        pipe(PROMPT, **OPTIONS)
