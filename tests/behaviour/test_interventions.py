"""Interventions: each does what it says, measured by something that is not an intervention, and all restore."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from runs import OTHER, PROMPT, relative, under
from runs import latents as draw

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.instruments.catalogue import EVERYTHING
from fluxedu.instruments.interventions import positions
from fluxedu.models.modulation import Modulation
from fluxedu.sampling.latents import image_ids, text_ids

pytestmark = pytest.mark.usefixtures("everything_is_restored")


# --- nothing changed, not a bit -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"true_cfg_scale": 3.0}, {"solver": "heun"}])
def test_what_changes_nothing_leaves_every_bit(pipe, options):
    plain = draw(pipe, **options)
    assert torch.equal(under(pipe, fe.intervene(*EVERYTHING, lambda x, ctx: x), **options), plain)
    copy = lambda x, ctx: x.clone() if isinstance(x, torch.Tensor) else x  # noqa: E731
    assert torch.equal(under(pipe, fe.intervene(*EVERYTHING, copy), **options), plain)


def test_a_runs_own_values_put_back_leave_every_bit(pipe):
    with fe.record("single.0.x", "vec.text", "sample.x") as rec:
        plain = draw(pipe)
    assert torch.equal(under(pipe, *(fe.patch(site, rec) for site in rec)), plain)


def test_unchanged_positions_change_nothing(pipe):
    assert torch.equal(under(pipe, fe.intervene("*.attn.rope", positions(lambda ids: ids))), draw(pipe))


# --- ablation -------------------------------------------------------------------------------------


def test_a_head_cut_is_its_columns_of_the_projection_cut(make_pipe):
    """A head speaks through its columns of the matrix behind the attention; zero there is the head's silence."""
    pipe, cut = make_pipe(), make_pipe()
    with torch.no_grad():
        for s in ("txt", "img"):
            cut.flux.double_blocks[1].get_submodule(f"{s}_attn").proj.weight[:, 24:] = 0
        cut.flux.single_blocks[0].linear2.weight[:, :24] = 0
    ablated = under(pipe, fe.ablate("double.1.heads", heads=[1]), fe.ablate("single.0.heads", heads=0))
    assert relative(ablated, draw(cut)) <= 1e-6
    assert relative(ablated, draw(pipe)) > 1e-3


@pytest.mark.parametrize("block", ["single.1", "double.0"])
def test_a_block_cut_is_a_block_whose_gates_are_closed(make_pipe, pipe, block):
    cut = make_pipe()
    kind, i = block.split(".")
    module = cut.flux.get_submodule(f"{kind}_blocks.{i}")
    with torch.no_grad():
        for m in (m for m in module.modules() if isinstance(m, Modulation)):
            for gate in range(2, 6 if m.is_double else 3, 3):
                m.lin.weight[48 * gate : 48 * (gate + 1)] = 0
                m.lin.bias[48 * gate : 48 * (gate + 1)] = 0
    assert relative(under(pipe, fe.ablate(block)), draw(cut)) <= 1e-6


def test_one_stream_of_a_block_cut(pipe):
    with fe.ablate("double.1", streams="txt"), fe.record("double.1.*") as rec:
        draw(pipe)
    assert torch.equal(rec["double.1.txt"].tensor, rec["double.1.txt_out"].tensor)
    assert not torch.equal(rec["double.1.img"].tensor, rec["double.1.img_out"].tensor)


def test_streams_of_joint_tokens(pipe):
    with fe.ablate("single.0.contribution", streams="img"), fe.record("single.0.x", "single.0.out") as rec:
        draw(pipe)
    same = rec["single.0.x"].tensor == rec["single.0.out"].tensor
    assert same[:, 32:].all()
    assert not same[:, :32].all()


def test_a_word_not_looked_at_is_a_word_masked(pipe):
    """What torch's own attention gives when the word's keys are masked."""
    with fe.record("single.1.attn.q", "single.1.attn.k", "single.1.v", "single.1.heads") as rec:
        under(pipe, fe.ablate("single.1.attn.map", tokens=["red", "square"]), steps=1)
    q, k, v = (rec[f"single.1.{s}"].tensor for s in ("attn.q", "attn.k", "v"))
    seen = torch.ones(36, dtype=torch.bool)
    seen[[1, 7]] = False
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(36, 36))
    assert relative(rec["single.1.heads"].tensor, masked) <= 1e-6


def test_the_mean_instead(pipe):
    with fe.ablate("sample.txt", tokens=["red"], to="mean"), fe.record("sample.txt") as rec:
        draw(pipe)
    with fe.record("sample.txt") as plain:
        draw(pipe)
    contexts, was = rec["sample.txt"].tensor, plain["sample.txt"].tensor
    assert relative(contexts[1], was.mean(0)) <= 1e-6
    assert torch.equal(contexts[2:], was[2:])


def test_streams_of_a_glob_over_both(pipe):
    with fe.ablate("double.1.*_contribution", streams="txt"), fe.record("double.1.*") as rec:
        draw(pipe)
    assert torch.equal(rec["double.1.txt"].tensor, rec["double.1.txt_out"].tensor)
    assert not torch.equal(rec["double.1.img"].tensor, rec["double.1.img_out"].tensor)


def test_words_one_after_the_other_are_words_together(pipe):
    one = under(pipe, fe.ablate("*.attn.map", tokens="red"), fe.ablate("*.attn.map", tokens="blue"))
    assert relative(one, under(pipe, fe.ablate("*.attn.map", tokens=["red", "blue"]))) <= 1e-6


def test_a_word_of_the_prompt_is_not_cut_from_the_negative_one(plain_pipe):
    with fe.ablate("sample.txt", tokens="red"), fe.record("sample.txt") as rec:
        draw(plain_pipe, guidance=3.0, negative_prompt="a big green star")
    negative, prompted = rec["sample.txt"].tensor
    assert not prompted[1].any()
    assert negative[1].any()


# --- time, order, composition ---------------------------------------------------------------------


def test_only_at_some_times_or_steps(pipe):
    with fe.record("sample.x") as rec:
        draw(pipe, steps=4)
    times = rec["sample.x"].coords["step"]
    shut = lambda x, ctx: 0 * x  # noqa: E731
    by_step = under(pipe, fe.intervene("single.0.gate", shut, steps=[1, 2]), steps=4)
    by_time = under(pipe, fe.intervene("single.0.gate", shut, times=(times[2], times[1])), steps=4)
    assert torch.equal(by_step, by_time)
    assert not torch.equal(by_step, draw(pipe, steps=4))
    with pytest.warns(UserWarning, match="nothing was changed"):
        never = under(pipe, fe.intervene("single.0.gate", shut, times=(0.001, 0.002)), steps=4)
    assert torch.equal(never, draw(pipe, steps=4))


def test_they_act_in_the_order_they_came_and_recorders_see_the_end(pipe):
    add, double = (lambda x, ctx: x + 1), (lambda x, ctx: 2 * x)
    with fe.record("vec") as plain:
        draw(pipe, steps=1)
    with fe.record("vec") as rec, fe.intervene("vec", add), fe.intervene("vec", double):
        draw(pipe, steps=1)
    assert torch.equal(rec["vec"].tensor, 2 * (plain["vec"].tensor + 1))


def test_the_context_tells_where_one_is(pipe):
    contexts = []
    with fe.intervene("single.1.gate", lambda x, ctx: contexts.append((ctx.site, ctx.step, ctx.time, ctx.axes)) or x):
        draw(pipe, steps=2)
    assert [t[:2] for t in contexts] == [("single.1.gate", 0), ("single.1.gate", 1)]
    assert contexts[0][2] == 1.0
    assert contexts[0][3] == ("batch", "one", "channel")


# --- values from elsewhere ------------------------------------------------------------------------


def test_words_and_summary_of_another_prompt_make_its_picture(pipe):
    with fe.record("sample.txt", "sample.pooled") as rec:
        other = draw(pipe, OTHER)
    assert torch.equal(under(pipe, fe.patch("sample.txt", rec), fe.patch("sample.pooled", rec)), other)
    words_only = under(pipe, fe.patch("sample.txt", rec))
    assert not torch.equal(words_only, other)
    assert not torch.equal(words_only, draw(pipe))


def test_noise_of_another_seed_makes_its_picture(pipe):
    with fe.record("sample.noise") as rec:
        other = draw(pipe, seed=5)
    assert torch.equal(under(pipe, fe.patch("sample.noise", rec["sample.noise"])), other)


def test_a_map_from_another_run(pipe):
    with fe.record("double.0.attn.map", "double.0.*_attn.v", "double.0.heads") as rec:
        draw(pipe, OTHER)
    with fe.patch("double.0.attn.map", rec), fe.record("double.0.*_attn.v", "double.0.heads") as patched:
        draw(pipe)
    v = torch.cat([patched[f"double.0.{s}_attn.v"].tensor for s in ("txt", "img")], dim=2)
    assert relative(patched["double.0.heads"].tensor, rec["double.0.attn.map"].tensor @ v) <= 1e-6


def test_the_predicted_x0_of_the_last_step_is_the_image(pipe):
    """Euler's last step goes to t = 0 along the velocity, that is to x0."""
    goal = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    assert relative(under(pipe, fe.intervene("sample.x0", lambda x, ctx: goal, steps=-1)), goal) <= 1e-6


def test_heun_evaluates_at_the_end_as_well(pipe):
    zero = fe.intervene("sample.x0", lambda x, ctx: torch.zeros_like(x))
    assert under(pipe, zero, solver="heun").isfinite().all()


def test_sampling_continues_from_a_replaced_state(pipe):
    with fe.record("sample.x") as rec:
        other = draw(pipe, seed=5)
    assert torch.equal(under(pipe, fe.patch("sample.x", rec, steps=1)), other)
    path = None
    with fe.patch("sample.x", rec, steps=1):
        path = pipe(PROMPT, steps=3, progress=False).trajectory
    assert torch.equal(path.latents[1, 0], rec["sample.x"].tensor[1])


def test_positions_replaces_position_ids(pipe):
    """Setting the row coordinates to 0 equals a forward pass with such position ids."""
    edit = lambda ids: ids * torch.tensor([1.0, 0.0, 1.0])  # noqa: E731
    with fe.intervene("*.attn.rope", positions(edit)), fe.record("sample.velocity") as rec:
        draw(pipe, steps=1)
    encoded = pipe.prompt_encoder([PROMPT])
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    from fluxedu.sampling.latents import pack, unpack

    with torch.no_grad():
        v = pipe.flux(
            pack(x),
            edit(image_ids(4, 4)),
            encoded.txt,
            text_ids(32),
            torch.ones(1),
            encoded.pooled,
            torch.tensor([3.5]),
        )
    assert relative(rec["sample.velocity"].tensor, unpack(v, 4, 4)) <= 1e-6


# --- a learner's own module -----------------------------------------------------------------------


# --- what outsiders may get wrong -----------------------------------------------------------------


def test_a_patch_from_a_recording_that_lacks_the_step(pipe):
    with fe.record("vec", steps=0) as rec:
        draw(pipe)
    with pytest.raises(InstrumentError, match=r"no step 1; it has \[0\]"):
        under(pipe, fe.patch("vec", rec))


def test_a_map_that_is_given_back_as_it_is_changes_nothing(pipe):
    plain = draw(pipe)
    with fe.intervene("*.attn.map", lambda value, ctx: value.weights()):
        assert torch.equal(draw(pipe), plain)


def test_a_block_without_some_words(pipe):
    plain = draw(pipe)
    with fe.ablate("double.0", tokens=["red"]):
        assert not torch.equal(draw(pipe), plain)
    with fe.record("single.0.attn.map") as rec:
        draw(pipe)
    every = list(range(rec["single.0.attn.map"].sizes["key"]))
    with pytest.raises(InstrumentError), fe.ablate("single.0.attn.map", tokens=every):
        draw(pipe)


@pytest.mark.parametrize("times", [(0, float("nan")), (-0.5, 0.5), (0, 1.5), (float("inf"), 0)])
def test_times_are_between_0_and_1(times):
    with pytest.raises(InstrumentError, match=r"times must be a pair \(from, to\) in \[0, 1\]"):
        fe.intervene("vec", lambda x, ctx: x, times=times)


def test_places_of_a_reference_pictures_tokens():
    """Kontext: they are among the tokens that are edited, in frame 1; unchanged, not a bit of the run changes."""
    kontext, seen = fe.load("nano-kontext"), []
    options = {"reference": torch.rand(3, 64, 96) * 2 - 1, "steps": 1, "progress": False, "height": 64, "width": 64}

    def edit(ids):
        seen.append(ids)
        return ids

    reference = kontext("make the circle red", **options).latents
    with fe.intervene("double.0.attn.rope", positions(edit)):
        same = kontext("make the circle red", **options).latents
    assert torch.equal(reference, same)
    (ids,) = seen
    assert ids.shape == (4 * 4 + 4 * 6, 3) and ids[:16, 0].eq(0).all() and ids[16:, 0].eq(1).all()
    into_one = positions(lambda ids: ids * torch.tensor([0, 1, 1]))  # the reference where the picture is
    with fe.intervene("*.attn.rope", into_one):
        other = kontext("make the circle red", **options).latents
    assert relative(other, reference) > 0.05


WRITTEN = ["vec", "vec.time", "sample.x", "sample.velocity", "sample.x0", "single.0.contribution", "double.0.attn.rope",
           "single.0.gate", "double.1.img", "t5.states", "final_layer.shift"]  # fmt: skip


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("site", WRITTEN)
def test_a_change_may_write_into_its_value(pipe, site, solver):
    """Values may be shared between steps and blocks; the change's is its own."""
    written = under(pipe, fe.intervene(site, lambda x, ctx: x.mul_(1.5)), solver=solver)
    given = under(pipe, fe.intervene(site, lambda x, ctx: x * 1.5), solver=solver)
    assert torch.equal(written, given) and not torch.equal(written, draw(pipe, solver=solver))


@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "heun"}, {"true_cfg_scale": 3.0, "negative_prompt": "a star"}, {"prompt": [PROMPT, OTHER]}],
    ids=["euler", "heun", "cfg", "two prompts"],
)
def test_all_of_a_runs_values_put_back_leave_every_bit(pipe, options):
    options = {"prompt": PROMPT} | options
    with fe.record(*EVERYTHING) as rec:
        reference = draw(pipe, **options)
    assert torch.equal(under(pipe, *(fe.patch(glob, rec) for glob in EVERYTHING), **options), reference)


def test_a_patch_from_another_schedule_or_of_two_runs_is_refused(pipe):
    with fe.record("vec", "t5.states") as eight:
        draw(pipe, steps=8)
    with pytest.raises(
        InstrumentError, match=r"step 1 is at t = .* in the recording of 'vec' but at t = .* in this run"
    ):
        under(pipe, fe.patch("vec", eight))
    with fe.record("vec") as twice:
        draw(pipe), draw(pipe, OTHER)
    with pytest.raises(InstrumentError, match="holds 2 runs"):
        under(pipe, fe.patch("vec", twice))
    with pytest.raises(InstrumentError, match="has 1 encoded prompts, and this run encodes more"):
        under(pipe, fe.patch("t5.states", eight), prompt=[PROMPT, OTHER])
    assert torch.isfinite(under(pipe, fe.patch("t5.states", eight["t5.states"]), prompt=[PROMPT, OTHER])).all()
    with fe.record("double.0.attn.rope") as turns:
        draw(pipe)
    with pytest.raises(InstrumentError, match="has real values"):
        under(pipe, fe.patch("vec", turns["double.0.attn.rope"].tensor.flatten()[:48]))


def test_random_changes_are_reproducible_by_seed(pipe):
    """The same for the same seed; another for another seed, site, step or question."""
    drawn = []

    def noisy(x, ctx):
        drawn.append(torch.randn(x.shape, generator=ctx.generator))
        return x + drawn[-1].to(x)

    first = under(pipe, fe.intervene("vec", "vec.time", noisy), solver="heun")
    again = under(pipe, fe.intervene("vec", "vec.time", noisy), solver="heun")
    assert torch.equal(first, again)
    half = drawn[: len(drawn) // 2]
    assert all(not torch.equal(a, b) for i, a in enumerate(half) for b in half[:i] if a.shape == b.shape)
    assert not torch.equal(first, under(pipe, fe.intervene("vec", "vec.time", noisy), solver="heun", seed=1))


def test_patches_of_an_image_site_can_be_cut(pipe):
    """Places at a site of the image's own tokens are patches; a site at the network's door is one stream's."""
    with fe.record("double.1.img_norm1") as rec, fe.ablate("double.1.img", tokens=[0, 3], steps=0):
        draw(pipe)
    first = rec["double.1.img_norm1"].tensor[0]
    assert first[[0, 3]].eq(0).all() and not first[[1, 2]].eq(0).any()
    cut = under(pipe, fe.ablate("img_in", streams="img"))
    assert torch.equal(cut, under(pipe, fe.intervene("img_in", lambda x, ctx: 0 * x)))


def test_an_intervention_that_is_kept_lets_the_pipeline_go(make_pipe):
    pipe = make_pipe()
    kept = fe.intervene("vec", lambda x, ctx: x, steps=5)
    gone = weakref.ref(pipe)
    with pytest.warns(UserWarning, match="nothing was changed"), kept:
        draw(pipe)
    del pipe
    gc.collect()
    assert gone() is None


def test_a_patch_needs_whole_values(pipe):
    with fe.record("double.1.heads", heads=[1, 0]) as turned:
        draw(pipe)
    with pytest.raises(InstrumentError, match="record them without tokens=, heads= and reduce="):
        fe.patch("double.1.heads", turned)


def test_a_site_outside_of_steps_is_reported_beside_one_that_acted(pipe):
    with pytest.warns(UserWarning, match="t5.states is computed outside the steps of a run"):
        under(pipe, fe.intervene("t5.states", "single.0.x", lambda x, ctx: 0 * x, steps=0))
