"""Sites of the residual stream, of the terms that are added to it, and of the scores: equal to hand-written PyTorch."""

import pytest
import torch
from runs import draw, off, relative, under
from runs import latents as draw_latents

import fluxedu as fe
from fluxedu.models.terms import linear_share

pytestmark = pytest.mark.usefixtures("everything_is_restored")
TXT, H, D = 32, 2, 48
BLOCKS = ["double.0", "double.1", "single.0", "single.1"]


def module(pipe, block):
    kind, i = block.split(".")
    return pipe.flux.get_submodule(f"{kind}_blocks.{i}")


@pytest.fixture
def everything(pipe):
    """All values of the blocks in a run of two steps."""
    with fe.record("double.*", "single.*") as rec:
        draw(pipe, steps=2)
    return {name: rec[name].tensor for name in rec}


# --- the residual stream --------------------------------------------------------------------------


def test_the_residual_stream_has_one_name_in_all_blocks(everything):
    for i in range(2):
        for joint, stream in (("x", ""), ("out", "_out")):
            streams = [everything[f"double.{i}.{name}{stream}"] for name in ("txt", "img")]
            assert torch.equal(everything[f"double.{i}.{joint}"], torch.cat(streams, dim=1))
    for before, after in zip(BLOCKS, BLOCKS[1:], strict=False):
        assert torch.equal(everything[f"{before}.out"], everything[f"{after}.x"])


@pytest.mark.parametrize(("joint", "stream"), [("x", "img"), ("out", "img_out"), ("x", "txt"), ("out", "txt_out")])
def test_a_change_of_the_joint_stream_is_a_change_of_the_stream(pipe, joint, stream):
    change = lambda x, ctx: 2 * x + 1  # noqa: E731
    by_joint = under(pipe, fe.intervene(f"double.1.{joint}", change, streams=stream[:3]))
    assert torch.equal(by_joint, under(pipe, fe.intervene(f"double.1.{stream}", change)))
    assert not torch.equal(by_joint, draw_latents(pipe))


# --- the terms of what a block adds ---------------------------------------------------------------


def heads_by_hand(heads, weight, gate):
    """``[S, H, N, d]`` and the projection's columns of the attention -> what each head adds, ``[S, H, N, D]``."""
    columns = weight[:, :D].unflatten(1, (H, D // H))  # [D, H, d]
    return torch.einsum("shnd,ohd->shno", heads, columns) * gate[:, None, None]


@torch.no_grad()
def test_shares_of_a_single_block(pipe, everything):
    for block in ("single.0", "single.1"):
        value = {name.removeprefix(f"{block}."): x for name, x in everything.items() if name.startswith(block)}
        linear, gate = module(pipe, block).linear2, value["gate"]
        attn = value["heads"].transpose(1, 2).flatten(2) @ linear.weight[:, :D].T
        mlp = value["mlp_hidden"] @ linear.weight[:, D:].T
        assert relative(value["attn_out"], attn) <= 1e-6
        assert relative(value["mlp_out"], mlp) <= 1e-6
        assert relative(value["added"], attn + mlp + linear.bias) <= 1e-6
        assert relative(value["attn_contribution"], gate[:, None] * attn) <= 1e-6
        assert relative(value["mlp_contribution"], gate[:, None] * mlp) <= 1e-6
        heads = heads_by_hand(value["heads"], linear.weight, gate)
        assert relative(value["head_contribution"], heads) <= 1e-6
        out = value["x"] + heads.sum(1) + value["mlp_contribution"] + gate[:, None] * linear.bias
        assert relative(value["out"], out) <= 1e-6


@torch.no_grad()
def test_heads_of_a_double_block(pipe, everything):
    for block in ("double.0", "double.1"):
        for stream, tokens in (("txt", slice(0, TXT)), ("img", slice(TXT, None))):
            linear, gate = (
                getattr(module(pipe, block), f"{stream}_attn").proj,
                everything[f"{block}.{stream}_mod.gate1"],
            )
            heads = heads_by_hand(everything[f"{block}.heads"][:, :, tokens], linear.weight, gate)
            assert relative(everything[f"{block}.{stream}_head_contribution"], heads) <= 1e-6
            added = heads.sum(1) + gate[:, None] * linear.bias
            assert relative(everything[f"{block}.{stream}_attn_contribution"], added) <= 1e-6


@pytest.mark.parametrize("term", ["attn", "mlp"])
@pytest.mark.parametrize("site", ["out", "contribution"])
def test_a_term_without_the_other_is_its_columns_alone(make_pipe, pipe, term, site):
    cut = make_pipe()
    with torch.no_grad():
        module(cut, "single.0").linear2.weight[:, slice(0, D) if term == "attn" else slice(D, None)] = 0
    assert relative(under(pipe, fe.ablate(f"single.0.{term}_{site}")), draw_latents(cut)) <= 1e-6
    assert relative(draw_latents(cut), draw_latents(pipe)) > 1e-3


@pytest.mark.parametrize("block", ["double.1", "single.0"])
def test_a_head_that_writes_nothing_is_an_ablated_head(pipe, block):
    written = under(pipe, fe.ablate(f"{block}.*head_contribution", heads=1))
    assert relative(written, under(pipe, fe.ablate(f"{block}.heads", heads=1))) <= 1e-6
    one_stream = under(pipe, fe.ablate(f"{block}.*head_contribution", heads=1, streams="img"))
    assert relative(one_stream, under(pipe, fe.ablate(f"{block}.heads", heads=1, streams="img"))) <= 1e-6
    assert relative(one_stream, written) > 1e-4


@pytest.mark.parametrize("block", ["double.1", "single.0"])
def test_a_change_of_a_term_is_part_of_the_next_sum(pipe, block):
    """Terms of terms: whatever is doubled on the way, the whole contribution can still be taken out."""
    doubled = [fe.intervene(f"{block}.*{term}", lambda x, ctx: 2 * x) for term in ("head_contribution", "attn_out")]
    plain = under(pipe, fe.ablate(block))
    assert torch.equal(under(pipe, *doubled, fe.ablate(block)), plain)
    names = [f"{block}.*head_contribution", f"{block}.*attn_contribution"]
    with fe.record(*names) as before:
        draw(pipe, steps=1)
    with doubled[0], fe.record(*names) as rec:
        draw(pipe, steps=1)
    for name in (name for name in rec if name.endswith("attn_contribution")):
        heads = before[name.replace("attn_", "head_")].tensor.sum(1)
        assert relative(rec[name].tensor, before[name].tensor + heads) <= 1e-6


SITES = ["double.0.x", "double.1.out", "double.0.img_head_contribution", "single.0.head_contribution",
         "single.1.attn_out", "single.0.mlp_out", "single.0.attn_contribution", "single.1.mlp_contribution",
         "double.1.attn.scores"]  # fmt: skip


@pytest.mark.parametrize("site", SITES)
def test_recorded_gradients_predict_a_change(make_pipe, site):
    pipe = make_pipe().to(torch.float64)

    def loss():
        return draw(pipe, steps=2).latents.square().mean()

    with fe.gradients(), fe.record(site, detach=False) as rec:
        value = loss()
    value.backward()
    h, recorded = 1e-6, rec[site]
    direction = torch.randn(recorded.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with fe.intervene(site, lambda x, ctx: x + h * direction[ctx.step]):
        changed = loss()
    predicted = h * float((rec.grad(site).tensor * direction).sum())
    assert float(changed - value.detach()) == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize("site", SITES)
def test_recording_a_term_changes_no_bit_and_no_gradient(pipe, site):
    found = []
    for recorders in ([], [fe.record(site, detach=False)]):
        noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with fe.gradients():
            latents = under(pipe, *recorders, latents=noise, steps=1)
        (gradient,) = torch.autograd.grad(latents.square().mean(), noise)
        found.append((latents.detach(), gradient))
    assert off(found[0][0], found[1][0]) <= 1e-6 and relative(found[0][1], found[1][1]) <= 1e-5
    with fe.record(site):
        assert torch.equal(draw_latents(pipe), draw_latents(pipe))


@torch.no_grad()
def test_shares_of_a_layer_whose_weight_is_no_plain_tensor():
    """Quantised weights have no columns to take; the layer itself is called."""

    class Quantised(torch.nn.Parameter):
        pass

    layer = torch.nn.Linear(12, 5).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = x @ layer.weight[:, 6:10].T
    layer.weight = Quantised(layer.weight.detach())
    assert relative(linear_share(layer, x, 6), expected) <= 1e-12
    layer.bias = None
    assert relative(linear_share(layer, x, 6), expected) <= 1e-12


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["double.1", "single.0"])
def test_scores_are_before_the_softmax(everything, block):
    q, k, scores = (everything[f"{block}.attn.{name}"] for name in ("q", "k", "scores"))
    assert off(scores, q @ k.transpose(-1, -2) / (D // H) ** 0.5) <= 1e-5
    assert off(everything[f"{block}.attn.map"], scores.softmax(-1)) <= 1e-6


@pytest.mark.parametrize("block", ["double.1", "single.0"])
def test_changed_scores_are_the_maps(pipe, block):
    temperature = lambda x, ctx: x / 2  # noqa: E731
    with fe.intervene(f"{block}.attn.scores", temperature), fe.record(f"{block}.*") as rec:
        changed = draw_latents(pipe)
    q, k, heads = (rec[f"{block}.{name}"].tensor for name in ("attn.q", "attn.k", "heads"))
    v = torch.cat(
        [rec[f"{block}.{n}"].tensor for n in ("txt_attn.v", "img_attn.v", "v") if f"{block}.{n}" in rec], dim=2
    )
    weights = (q @ k.transpose(-1, -2) / (D // H) ** 0.5 / 2).softmax(-1)
    assert relative(heads, weights @ v) <= 1e-6
    assert off(rec[f"{block}.attn.map"].tensor, weights) <= 1e-6
    assert relative(changed, under(pipe, fe.intervene(f"{block}.attn.q", temperature))) <= 1e-5
    minus_infinity = fe.ablate(f"{block}.attn.scores", tokens="red", queries="img", to=float("-inf"))
    hidden = under(pipe, fe.ablate(f"{block}.attn.map", tokens="red", queries="img"))
    assert relative(under(pipe, minus_infinity), hidden) <= 1e-6
    both = fe.ablate(f"{block}.attn.map", tokens="blue")
    assert relative(under(pipe, minus_infinity, both), under(pipe, both, minus_infinity)) <= 1e-6


def test_scores_and_terms_are_computed_only_if_watched(pipe, monkeypatch):
    def never(*_):
        raise AssertionError

    for name in (
        "attention_map.AttentionMap.all_scores",
        "models.blocks.linear_share",
        "models.terms.linear_share",
    ):
        monkeypatch.setattr(f"fluxedu.{name}", never)
    with fe.record("*.attn.map", "*.heads", "*.contribution", "double.*.*_attn_contribution", reduce="rms"):
        draw(pipe, steps=1)
