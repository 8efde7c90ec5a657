"""Selection: the same arguments select the same part of a value on record, intervene, ablate and patch."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from runs import MAP, PROMPT, draw, off, relative, under
from runs import latents as draw_latents
from torch.utils._python_dispatch import TorchDispatchMode

import fluxedu as fe
from fluxedu.attention_map import AttentionMap
from fluxedu.errors import GradientError, InstrumentError

pytestmark = pytest.mark.usefixtures("everything_is_restored")
TXT, ALL = 32, 36  # text tokens, all tokens: the image has 2 x 2
LEFT = fe.region(box=(0, 0, 0.5, 1))  # patches 0 and 2
CFG = {"guidance": 3.0, "negative_prompt": "a big green star"}
RED, CIRCLE = 1, 2  # their tokens in the prompt


# --- regions of the image -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_box_contains_the_tokens_whose_area_is_half_inside(seed):
    chance = np.random.default_rng(seed)
    rows, columns = chance.integers(1, 9, 2)
    left, right = sorted(chance.random(2))
    top, bottom = sorted(chance.random(2))
    expected = []
    for i in range(rows):
        for j in range(columns):
            width = min(right, (j + 1) / columns) - max(left, j / columns)
            height = min(bottom, (i + 1) / rows) - max(top, i / rows)
            if max(width, 0) * max(height, 0) * rows * columns >= 0.5:
                expected.append(i * columns + j)
    assert fe.region(box=(left, top, right, bottom)).tokens((2 * rows, 2 * columns)) == expected


@pytest.mark.parametrize("sides", [(4, 6, 8, 12), (3, 5, 4, 2), (6, 6, 3, 5), (1, 1, 4, 4)])
def test_a_mask_of_any_size_is_averaged_over_each_token(sides):
    rows, columns, height, width = sides
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(0)) > 0.5
    fine = mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)  # rows * height by columns * width
    covered = fine.double().unflatten(1, (columns, width)).unflatten(0, (rows, height)).mean((1, 3))
    expected = (covered >= 0.5).flatten().nonzero().flatten().tolist()
    pixels = (mask * 255).byte().numpy()
    for given in (mask, mask.numpy(), pixels, Image.fromarray(pixels)):
        assert fe.region(mask=given).tokens((2 * rows, 2 * columns)) == expected


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "one of the two"),
        ({"box": (0, 0, 1, 1), "mask": torch.ones(2, 2)}, "one of the two"),
        ({"box": (0.5, 0, 0.5, 1)}, "box must be"),
        ({"box": (0, 0, 128, 128)}, "within 0 to 1"),
        ({"box": "left"}, "box must be"),
        ({"mask": torch.full((2, 2), 2.0)}, "a mask must have numbers from 0"),
    ],
)
def test_what_is_no_region(wrong, says):
    with pytest.raises(InstrumentError, match=says):
        fe.region(**wrong)


# --- the same part for all instruments ------------------------------------------------------------

SELECTIONS = [  # arguments, and the joint tokens that they select
    ({"streams": "img"}, [32, 33, 34, 35]),
    ({"streams": "txt"}, list(range(32))),
    ({"streams": ("txt", "img"), "tokens": [33]}, [33]),
    ({"tokens": ["red", "circle"]}, [RED, CIRCLE]),
    ({"tokens": [0, 35]}, [0, 35]),
    ({"streams": "img", "tokens": [0, 3]}, [32, 35]),
    ({"streams": "txt", "tokens": [3]}, [3]),
    ({"tokens": LEFT}, [32, 34]),
    ({"tokens": ["red", LEFT, 35]}, [RED, 32, 34, 35]),
    ({"streams": "img", "tokens": ["red", LEFT]}, [32, 34]),
]


@pytest.mark.parametrize(("selection", "tokens"), SELECTIONS, ids=str)
def test_it_selects_the_same_tokens_everywhere(pipe, selection, tokens):
    site, others = "single.0.x", [i for i in range(ALL) if i not in tokens]
    with fe.record(site) as rec:
        draw(pipe, steps=1)
    whole, seen = rec[site].tensor[0], []
    with fe.record(site, **selection) as part:
        draw(pipe, steps=1)
    assert torch.equal(part[site].tensor[0], whole[tokens])

    def change(x, ctx):
        seen.append(x.shape)
        return x + 1

    other = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    for instrument, expected in (
        (fe.intervene(site, change, **selection), whole + 1),
        (fe.ablate(site, **selection), 0 * whole),
        (fe.ablate(site, to="mean", **selection), whole.mean(0).expand(whole.shape)),
        (fe.patch(site, other, **selection), other),
    ):
        with instrument, fe.record(site) as rec:
            draw(pipe, steps=1)
        changed = rec[site].tensor[0]
        assert torch.equal(changed[others], whole[others])  # to the bit
        assert off(changed[tokens], expected[tokens]) <= 1e-6
    assert seen == [(1, ALL, 48)]  # the change receives the complete value


@pytest.mark.parametrize(
    ("site", "selection", "index"),
    [
        ("double.1.img_out", {"tokens": LEFT}, ([0, 2],)),
        ("double.1.img_out", {"streams": "img", "tokens": [3]}, ([3],)),
        ("double.1.img_out", {"tokens": [3]}, ([3],)),
        ("double.1.txt_out", {"tokens": ["red", LEFT]}, ([RED],)),
        ("double.0.img_attn.q", {"heads": -1, "tokens": LEFT}, ([1], [0, 2])),
        ("single.0.heads", {"heads": [1, 0], "streams": "img"}, ([1, 0], [32, 33, 34, 35])),
        ("double.0.attn.rope", {"streams": "img"}, ([32, 33, 34, 35],)),
    ],
)
def test_sites_of_one_stream_and_sites_with_heads(pipe, site, selection, index):
    with fe.record(site) as full, fe.record(site, **selection) as rec:
        draw(pipe)
    expected = full[site].tensor
    for axis, chosen in enumerate(index, 1):
        expected = expected.index_select(axis, torch.tensor(chosen))
    assert torch.equal(rec[site].tensor, expected)


def test_a_selection_of_the_other_stream_selects_nothing(pipe):
    with fe.record("double.0.*_out", streams="img") as rec:
        draw(pipe)
    assert set(rec) == {"double.0.img_out", "double.0.img_attn_out", "double.0.img_mlp_out"}
    plain = draw_latents(pipe)
    with pytest.warns(UserWarning, match="nothing was changed at double.0.txt: they have no tokens of streams"):
        assert torch.equal(under(pipe, fe.ablate("double.0.txt", streams="img")), plain)


@pytest.mark.parametrize(
    ("selection", "queries", "keys"),
    [
        ({"tokens": "red"}, range(32, 36), [RED]),
        ({"tokens": "red", "queries": "txt"}, range(32), [RED]),
        ({"tokens": ["red", LEFT], "queries": ["circle", LEFT, 35]}, [CIRCLE, 32, 34, 35], [RED, 32, 34]),
        ({"streams": "img", "tokens": [1]}, range(32, 36), [33]),
        ({"streams": "img"}, range(36), range(32, 36)),
        ({"queries": "img"}, range(32, 36), range(36)),
    ],
)
def test_keys_and_queries_of_a_map(pipe, selection, queries, keys):
    with fe.record(MAP) as full, fe.record(MAP, heads=[1], **selection) as rec:
        draw(pipe)
    assert off(rec[MAP].tensor, full[MAP].tensor[:, [1]][:, :, list(queries)][..., list(keys)]) <= 1e-6


def test_labels_of_keys_are_pieces_of_text_and_patches(pipe):
    with fe.record(MAP, tokens=["red", 30, LEFT]) as rec:
        draw(pipe, steps=1)
    assert rec[MAP].coords["key"] == ["▁red", "<pad>", "patch 0", "patch 2"]


def test_steps_and_times_of_a_recording(pipe):
    with fe.record("vec", "t5.states") as full:
        draw(pipe, steps=4)
    times = full["vec"].coords["step"]
    with (
        fe.record("vec", "t5.states", times=(times[1], times[2])) as by_time,
        fe.record("vec", steps=[1, 2]) as by_step,
    ):
        draw(pipe, steps=4)
    assert torch.equal(by_time["vec"].tensor, full["vec"].tensor[1:3])
    assert torch.equal(by_step["vec"].tensor, full["vec"].tensor[1:3])
    assert "t5.states" in by_time  # outside of the steps
    need = 4 * full["vec"].tensor[0].numel()
    with fe.record("vec", times=(times[2], times[1]), budget=2 * need) as within:  # of two steps, not of four
        draw(pipe, steps=4)
    assert torch.equal(within["vec"].tensor, by_step["vec"].tensor)
    with pytest.raises(InstrumentError, match="times= is known only while a pipeline runs"):
        with fe.record("t5.states", times=(0, 1)):
            pipe.prompt_encoder.t5(pipe.prompt_encoder.t5_tokenizer(["a star"]))


def test_image_tokens_of_some_steps_are_patched(pipe):
    """One line: the residual stream of the image tokens in two of four steps."""
    with fe.record("single.1.x") as source:
        draw(pipe, "a big green triangle", steps=4)
    with fe.record("single.1.x") as plain:
        draw(pipe, steps=4)
    with fe.patch("single.1.x", source, streams="img", steps=slice(1, 3)), fe.record("single.1.x") as rec:
        draw(pipe, steps=4)
    x, before, other = (r["single.1.x"].tensor for r in (rec, plain, source))
    assert torch.equal(x[:2, :TXT], before[:2, :TXT])  # the text of the first patched step, too
    assert torch.equal(x[0], before[0]) and torch.equal(x[1:3, TXT:], other[1:3, TXT:])
    assert not torch.equal(x[3], before[3]) and not torch.equal(x[3, TXT:], other[3, TXT:])


def test_what_is_not_selected_keeps_its_gradient(pipe):
    detach = fe.intervene("single.0.x", lambda x, ctx: x.detach(), streams="img")
    with fe.gradients(), detach, fe.record("double.1.txt_out", "double.1.img_out", detach=False) as rec:
        loss = draw(pipe, steps=1).latents.square().mean()
    loss.backward()
    assert float(rec.grad("double.1.txt_out").tensor.abs().max()) > 0
    try:
        assert not rec.grad("double.1.img_out").tensor.any()
    except GradientError:
        pass  # autograd saw that no gradient arrives


# --- hidden from attention ------------------------------------------------------------------------

HIDDEN = [  # arguments of ablate, hidden queries and keys
    ({"tokens": ["red"]}, range(36), [RED]),
    ({"tokens": ["red"], "queries": "img"}, range(32, 36), [RED]),
    ({"streams": "txt", "queries": "img"}, range(32, 36), range(32)),
    ({"streams": "img", "queries": ["red", LEFT]}, [RED, 32, 34], range(32, 36)),
    ({"tokens": ["red", LEFT], "heads": [1], "queries": "img"}, range(32, 36), [RED, 32, 34]),
    ({"tokens": [5, 35], "heads": [0]}, range(36), [5, 35]),
]


def hand_written(rec, block, hidden):
    """softmax(q k^T / sqrt(d) - inf where hidden) v, in float64."""
    q, k = (rec[f"{block}.attn.{name}"].tensor.double() for name in "qk")
    v = [f"{block}.{name}" for name in ("txt_attn.v", "img_attn.v", "v")]
    v = torch.cat([rec[name].tensor for name in v if name in rec], dim=-2).double()
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("block", ["double.1", "single.0"])
@pytest.mark.parametrize(("selection", "queries", "keys"), HIDDEN, ids=lambda x: str(x)[:40])
def test_hidden_entries_have_scores_of_minus_infinity(pipe, block, selection, queries, keys):
    hidden = torch.zeros(2, ALL, ALL, dtype=torch.bool)
    for head in selection.get("heads", [0, 1]):
        hidden[head, torch.tensor(list(queries))[:, None], torch.tensor(list(keys))] = True
    with fe.ablate(f"{block}.attn.map", **selection), fe.record(f"{block}.*") as rec:
        draw(pipe, steps=2)
    assert relative(rec[f"{block}.heads"].tensor, hand_written(rec, block, hidden).float()) <= 1e-6
    weights = rec[f"{block}.attn.map"].tensor
    assert not weights[:, hidden].any() and off(weights.sum(-1), torch.ones(weights.shape[:-1])) <= 1e-5
    with fe.ablate(f"{block}.attn.map", **selection), fe.record(f"{block}.attn.map", reduce="entropy") as entropy:
        draw(pipe, steps=2)
    assert off(entropy[f"{block}.attn.map"].tensor, torch.special.entr(weights).sum(-1)) <= 1e-5


def test_ablations_of_a_map_add_up(pipe):
    cut = [{"tokens": ["red"], "queries": "img"}, {"tokens": LEFT, "heads": [1]}, {"tokens": ["blue"]}]
    hidden = torch.zeros(2, ALL, ALL, dtype=torch.bool)
    hidden[:, 32:, RED] = hidden[1, :, [32, 34]] = hidden[:, :, 6] = True
    with fe.record("single.0.*") as rec:
        under(pipe, *(fe.ablate("single.0.attn.map", **selection) for selection in cut), steps=1)
    assert relative(rec["single.0.heads"].tensor, hand_written(rec, "single.0", hidden).float()) <= 1e-6
    everything = [fe.ablate("single.0.attn.map", streams=stream, queries="img") for stream in ("txt", "img")]
    with pytest.raises(InstrumentError, match="every token would be hidden, and a row must attend to something"):
        under(pipe, *everything)


@pytest.mark.parametrize("network", ["t5", "clip"])
def test_keys_of_a_text_encoder_are_hidden(pipe, network):
    """T5 adds a bias to its scores, and CLIP's are causal; both stay."""
    glob = f"{network}.*map"
    with fe.ablate(glob, tokens="red", queries="circle"), fe.record(f"{network}.*") as rec:
        draw(pipe, steps=1)
    names = [name for name in rec if name.endswith("map")]
    start = 1 if network == "clip" else 0  # CLIP begins with a mark
    for name in names:
        weights, path = rec[name].tensor, name.removesuffix("map")
        assert not weights[:, start + CIRCLE, start + RED].any() and weights[:, start + CIRCLE + 1, start + RED].all()
        assert relative(rec[f"{path}heads"].tensor, weights @ rec[f"{path}v"].tensor) <= 1e-6
        q, k = rec[f"{path}q"].tensor, rec[f"{path}k"].tensor
        scores = q @ k.transpose(-1, -2) * (1 if network == "t5" else q.shape[-1] ** -0.5)
        if network == "t5":
            scores = scores + rec["t5.encoder.block.0.layer.0.SelfAttention.bias"].tensor
        else:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        scores[:, start + CIRCLE, start + RED] = -torch.inf
        assert off(weights, scores.softmax(-1)) <= 1e-6
    assert names


class LargestMap(TorchDispatchMode):
    """The most numbers in a tensor ``[..., T, T]`` that was made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.shape[-2:] == (ALL, ALL):
                self.most = max(self.most, x.numel())
        return out


@pytest.mark.parametrize("selection", [selection for selection, *_ in HIDDEN], ids=lambda x: str(x)[:40])
def test_no_ablation_computes_the_maps_of_all_heads(pipe, selection, monkeypatch):
    for method in ("weights", "rows", "all_scores"):
        monkeypatch.setattr(AttentionMap, method, None)
    with fe.ablate("*.attn.map", **selection), LargestMap() as largest:
        draw(pipe, steps=1, decode=False)
    assert largest.most <= ALL * ALL  # of two heads


@pytest.mark.parametrize(
    ("ablation", "says"),
    [
        (lambda: fe.ablate(MAP), "say which tokens are hidden"),
        (lambda: fe.ablate(MAP, queries="img"), "say which tokens are hidden"),
        (lambda: fe.ablate(MAP, tokens="red", to=1.0), "without to="),
        (lambda: fe.ablate("vec", streams="img"), "'vec' has no tokens"),
        (lambda: fe.ablate("sample.x", tokens=LEFT), "'sample.x' has no tokens"),
        (lambda: fe.ablate("single.0.x", queries="img"), "'single.0.x' has no queries"),
        (lambda: fe.ablate("single.0.x", heads=0), "no axis 'head'"),
        (lambda: fe.ablate("single.0.heads", heads=2), "has 2 heads, so there is no head 2"),
        (lambda: fe.ablate("single.0.x", tokens=36), "has 36 tokens, so there is no token 36"),
        (lambda: fe.ablate("single.0.x", streams="img", tokens=4), "has 4 tokens, so there is no token 4"),
        (lambda: fe.ablate("single.0.x", streams="img", tokens="red"), "tokens='red' and streams"),
        (lambda: fe.ablate("double.0.txt", tokens=LEFT), "has no image tokens"),
        (lambda: fe.ablate("double.0.img", tokens="red"), "has no text tokens"),
        (lambda: fe.ablate("single.0.x", tokens=fe.region(box=(0.4, 0.4, 0.6, 0.6))), "no image token.* has 2 x 2"),
        (lambda: fe.ablate("single.0.x", streams="image"), "streams must be 'txt', 'img' or both, not 'image'"),
        (lambda: fe.ablate("single.0.x", queries=[]), "queries must be words"),
        (lambda: fe.ablate("single.0.x", passes="all"), "passes must be 'prompted', 'negative' or 'both'"),
        (lambda: fe.intervene("single.0.x", lambda x, ctx: x[:, :3], streams="img"), r"it must be \[1, 36, 48\]"),
    ],
)
def test_a_selection_that_a_site_does_not_have(pipe, ablation, says):
    with pytest.raises(InstrumentError, match=says), ablation():
        draw(pipe)


# --- the passes of classifier-free guidance -------------------------------------------------------


@pytest.mark.parametrize(("passes", "changed"), [(None, [1]), ("prompted", [1]), ("negative", [0]), ("both", [0, 1])])
@pytest.mark.parametrize("site", ["txt_in", "t5.states", "single.0.x", "sample.txt"])
def test_the_negative_prompt_is_changed_only_if_selected(plain_pipe, site, passes, changed):
    read = "sample.txt" if site == "t5.states" else site
    with fe.record(read) as rec:
        draw(plain_pipe, steps=1, **CFG)
    before = rec[read].tensor
    seen = []
    with fe.intervene(site, lambda x, ctx: seen.append(ctx.passes) or 0 * x, passes=passes), fe.record(read) as rec:
        draw(plain_pipe, steps=1, **CFG)
    after = rec[read].tensor
    before, after = (x.reshape(2, *x.shape[-2:]) for x in (before, after))
    for i in range(2):
        assert not after[i].any() if i in changed else torch.equal(after[i], before[i])
    names = ("negative", "prompted")
    assert seen == ([(names[i],) for i in changed] if site == "t5.states" else [names])


def test_a_pass_is_named_by_its_site(plain_pipe):
    """At the sites of one pass, and where guidance is off for a while."""
    seen = []
    note = lambda x, ctx: seen.append((ctx.site, ctx.passes)) or x  # noqa: E731
    with fe.intervene("sample.negative", note), fe.intervene("sample.*", "vec", "double.0.attn.rope", note):
        draw(plain_pipe, steps=2, guidance_interval=(0.8, 1.0), **CFG)
    expected = {
        "sample.negative": ("negative",),
        "sample.prompted": ("prompted",),
        "sample.x": (),
        "sample.velocity": (),
        "double.0.attn.rope": (),
        "sample.txt": ("negative", "prompted"),
    }
    assert expected.items() <= dict(seen).items()
    assert {passes for site, passes in seen if site == "vec"} == {("negative", "prompted"), ("prompted",)}
    assert sum(site == "sample.negative" for site, _ in seen) == 1  # by its name, and not by sample.*


def test_each_pass_has_words_of_its_own(plain_pipe):
    with fe.record("sample.txt") as rec:
        draw(plain_pipe, steps=1, **CFG)
    before = rec["sample.txt"].tensor
    changes = [fe.ablate("sample.txt", tokens=word, passes="both") for word in ("a", "red", "star")]
    with fe.record("sample.txt") as rec:
        under(plain_pipe, *changes, steps=1, **CFG)
    zero = (rec["sample.txt"].tensor == 0).all(-1)
    assert zero.nonzero().tolist() == [[0, 0], [0, 3], [1, 0], [1, RED], [1, 5]]  # a ... star; a red ... a
    assert torch.equal(rec["sample.txt"].tensor[~zero], before[~zero])
    with pytest.raises(InstrumentError, match="does not contain 'ring'"):
        under(plain_pipe, fe.ablate("sample.txt", tokens="ring", passes="both"), **CFG)


def test_a_word_is_hidden_in_the_prompted_pass_alone(plain_pipe):
    with fe.ablate(MAP, tokens="red", queries="img"), fe.record("double.1.*", passes="both") as rec:
        draw(plain_pipe, steps=1, **CFG)
    hidden = torch.zeros(2, 1, ALL, ALL, dtype=torch.bool)
    hidden[1, :, 32:, RED] = True
    assert relative(rec["double.1.heads"].tensor, hand_written(rec, "double.1", hidden).float()) <= 1e-6


def test_a_run_without_guidance_is_patched_into_the_prompted_pass(plain_pipe):
    sites = ("single.0.x", "t5.states", "clip.pooled")
    with fe.record(*sites, "sample.txt", "sample.pooled") as source:
        draw(plain_pipe, "a big green triangle", guidance=0.0)
    with fe.record("sample.txt", "sample.pooled", "single.0.x") as plain:
        draw(plain_pipe, **CFG)
    with fe.record("sample.txt", "sample.pooled", "single.0.x") as rec:
        under(plain_pipe, *(fe.patch(site, source) for site in sites), **CFG)
    for site in ("sample.txt", "sample.pooled"):
        assert torch.equal(rec[site].tensor, torch.stack([plain[site].tensor[0], source[site].tensor]))
    assert torch.equal(rec["single.0.x"].tensor[:, 1], source["single.0.x"].tensor)
    assert torch.equal(rec["single.0.x"].tensor[0, 0], plain["single.0.x"].tensor[0, 0])


def test_passes_of_a_recording(plain_pipe):
    with fe.record("t5.states", "txt_in") as both, fe.record("t5.states", "txt_in", passes="both") as named:
        draw(plain_pipe, **CFG)
    assert torch.equal(both["t5.states"].tensor, named["t5.states"].tensor) and len(both["t5.states"].tensor) == 2
    for i, one in enumerate(("negative", "prompted")):
        with fe.record("t5.states", "txt_in", passes=one) as rec:
            draw(plain_pipe, **CFG)
        assert torch.equal(rec["t5.states"].tensor, both["t5.states"].tensor[i])
        assert torch.equal(rec["txt_in"].tensor, both["txt_in"].tensor[:, i])


# --- globs ----------------------------------------------------------------------------------------


def test_a_glob_without_a_network_means_the_transformer(pipe):
    with fe.record("*") as everything, fe.record("*.heads") as heads, fe.record("*x") as x, fe.record("*heads") as all_:
        draw(pipe, steps=1)
    own = {site.name for site in fe.sites(pipe.flux)}
    assert set(everything) == own and len(own) > 100
    assert set(heads) == {f"{kind}.{i}.heads" for kind in ("double", "single") for i in range(2)}
    assert {"t5.encoder.block.0.layer.0.SelfAttention.heads"} < set(all_)
    assert "sample.x" in x  # the first component is not only an asterisk
    with fe.record("clip.*") as clip, fe.record("t5.states") as states:
        pipe(PROMPT, steps=1, progress=False, stop_after="*.heads")  # T5 and CLIP have such sites
    assert len(clip) > 5 and "t5.states" in states


OTHER_NAMES = [
    ("blocks.0.hook_resid_pre", "double.0.x or single.0.x"),
    ("*.hook_resid_post", "double.*.out or single.*.out"),
    ("resid_mid", "double.*.img plus img_attn_contribution or single.*.x plus attn_contribution"),
    ("blocks.1.attn.hook_pattern", "double.1.attn.map or single.1.attn.map"),
    ("blocks.1.attn.hook_attn_scores", "double.1.attn.scores or single.1.attn.scores"),
    ("blocks.*.attn.hook_z", "double.*.heads or single.*.heads"),
    ("blocks.1.hook_mlp_out", "double.1.img_mlp_contribution or single.1.mlp_contribution"),
    ("transformer_blocks.0", "double.0.out"),
    ("transformer.transformer_blocks.1.attn.to_q", "double.1.img_attn.q"),
    ("transformer_blocks.1.attn.add_k_proj", "double.1.txt_attn.k"),
    ("transformer_blocks.*.ff.net.0", "double.*.img_mlp_out"),
    ("transformer_blocks.0.norm1_context", "double.0.txt_modulated1"),
    ("single_transformer_blocks.1.proj_out", "single.1.added"),
    ("single_transformer_blocks.1.attn.to_v", "single.1.v"),
    ("double_blocks.0.img_attn.qkv", "double.0.img_attn.q, img_attn.k and img_attn.v"),
    ("double_blocks.0.txt_mlp", "double.0.txt_mlp_out"),
    ("single_blocks.1.linear2", "single.1.added"),
    ("x_embedder", "img_in"),
    ("transformer.proj_out", "velocity"),
    ("time_in", "vec.time"),
]


@pytest.mark.parametrize(("name", "here"), OTHER_NAMES)
def test_names_of_other_tools_are_translated(pipe, name, here):
    with pytest.raises(InstrumentError) as error, fe.record(name):
        pass
    assert str(error.value) == f"no site of a loaded model is called {name!r}; here it is {here}."


def test_every_translation_is_a_site(pipe):
    from fluxedu import probe
    from fluxedu.instruments import aliases

    names = {site.name for site in fe.sites(pipe)}
    for sites in aliases._INSIDE.values():
        for kind, site in zip(("double", "single"), sites, strict=True):
            for part in filter(None, site.replace(",", " and").replace(" plus ", " and ").split(" and ")):
                glob = f"{kind}.0.{part.strip()}"
                assert any(probe.matches(name, glob) for name in names), glob
    assert set(aliases._OUTSIDE.values()) - {"vec.guidance"} <= names
