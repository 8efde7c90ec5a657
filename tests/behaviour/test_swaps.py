"""Modules swapped for others, and invalid arguments of swaps, changes and patches."""

import threading
from weakref import WeakSet

import pytest
import torch
from runs import PROMPT, relative, under
from runs import latents as draw
from torch import nn

import fluxedu as fe
from fluxedu import probe
from fluxedu.errors import InstrumentError
from fluxedu.instruments.interventions import positions
from fluxedu.models.attention import SelfAttention
from fluxedu.models.blocks import MLP, DoubleStreamBlock, SingleStreamBlock

pytestmark = pytest.mark.usefixtures("everything_is_restored")


class ByHand(SelfAttention):
    """The same, with the matrix product written out."""

    def forward(self, x):
        q, k, v = (x @ self.qkv.weight.T + self.qkv.bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm(q, k)
        return q, k, v


def test_a_module_written_again_does_the_same(pipe):
    assert relative(under(pipe, fe.swap("double.*.img_attn", ByHand)), draw(pipe)) <= 1e-6
    assert torch.equal(under(pipe, fe.swap("double.*.txt_attn", SelfAttention)), draw(pipe))


def test_a_module_that_is_otherwise_does_otherwise(pipe, plain_pipe):
    class Silent(MLP):
        def forward(self, x):
            return 0 * super().forward(x)

    with fe.swap("double.*.img_mlp", Silent, pipe=pipe), fe.record("double.0.img_mlp_out") as rec:
        draw(pipe)
        assert not any(isinstance(m, Silent) for m in plain_pipe.flux.modules())
    assert not rec["double.0.img_mlp_out"].tensor.any()
    assert isinstance(pipe.flux.double_blocks[0].img_mlp, MLP)
    assert not any(isinstance(m, Silent) for m in pipe.flux.modules())


def test_a_function_of_the_old_module(pipe):
    class Louder(nn.Module):
        def __init__(self, old, by):
            super().__init__()
            self.old, self.by = [old], by  # in a list: not a part of this module

        def forward(self, x):
            return self.by * self.old[0](x)

    gates = lambda old: Louder(old, 0.0)  # noqa: E731
    with pytest.raises(InstrumentError, match="has no tensor"):
        under(pipe, fe.swap("double.0.img_mlp", gates))
    silent = Louder(pipe.flux.double_blocks[0].img_mlp, 0.0)
    with fe.swap("double.0.img_mlp", silent, pipe=pipe), fe.record("double.0.img_mlp_out") as rec:
        draw(pipe)
    assert not rec["double.0.img_mlp_out"].tensor.any()


def test_swapped_sites_keep_their_names(pipe):
    with fe.swap("double.1.img_attn", SelfAttention, pipe=pipe), fe.record("double.1.img_attn.q") as rec:
        draw(pipe)
    assert rec["double.1.img_attn.q"].shape == (3, 2, 4, 24)


class TooWide(SelfAttention):
    def __init__(self, dim, heads, bias):
        super().__init__(dim + heads, heads, bias)


class TwoArguments(SelfAttention):
    def forward(self, x, rope):
        return super().forward(x)


class TwoResults(SelfAttention):
    def forward(self, x):
        return super().forward(x)[:2]


class OneMore(SelfAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(1))


def test_swaps_left_in_any_order(pipe):
    class Mine(SelfAttention):
        pass

    old = pipe.flux.double_blocks[0].img_attn
    first, second = (fe.swap("double.0.img_attn", kind, pipe=pipe) for kind in (ByHand, Mine))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert isinstance(pipe.flux.double_blocks[0].img_attn, Mine)
    second.__exit__(None, None, None)
    assert pipe.flux.double_blocks[0].img_attn is old


def test_a_learners_own_site(pipe):
    class Seen(SelfAttention):
        def forward(self, x):
            return super().forward(self.probe("mine", x))

    with fe.swap("double.0.img_attn", Seen, pipe=pipe), fe.record("double.0.img_attn.mine") as rec:
        draw(pipe)
    assert rec.entries("double.0.img_attn.mine")[0][1].tensor.numel() == 4 * 48


def test_a_swapped_block_has_the_sites_of_the_one_before(pipe):
    config = pipe.flux.config
    for path, kind in (("single.0", SingleStreamBlock), ("double.0", DoubleStreamBlock)):
        with fe.record(f"{path}.*") as before:
            pipe("a red circle", steps=1, progress=False)
        with fe.swap(path, lambda old, kind=kind: kind(config), pipe=pipe), fe.record(f"{path}.*") as swapped:
            pipe("a red circle", steps=1, progress=False)
        assert set(swapped.keys()) == set(before.keys())
    plain = pipe("a red circle", steps=1, progress=False).latents
    with fe.ablate("single.0.gate"), fe.swap("single.0", lambda old: SingleStreamBlock(config), pipe=pipe):
        assert not torch.equal(pipe("a red circle", steps=1, progress=False).latents, plain)


def test_what_was_swapped_in_comes_back_as_it_was(pipe):
    there = pipe.flux.single_blocks[0].training
    mine = SingleStreamBlock(pipe.flux.config).train(not there)
    mine.site_path = "my own"
    with fe.swap("single.0", mine, pipe=pipe):
        assert mine.training == there and mine.site_path == "single.0"
    assert mine.training != there and mine.site_path == "my own" and not mine._forward_hooks


def test_swapping_leaves_the_callers_random_numbers(pipe):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with fe.swap("double.0.img_attn", SelfAttention, pipe):
        assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("path, block", [("double.*", DoubleStreamBlock), ("single.*", SingleStreamBlock)])
def test_whole_blocks_are_made_as_they_were(pipe, path, block):
    class Mine(block):
        pass

    reference = draw(pipe)
    assert torch.equal(under(pipe, fe.swap(path, Mine, pipe)), reference)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            lambda: fe.intervene("sample.noise", lambda x, ctx: 0 * x, times=(0, 1)),
            "computed outside the steps of a run",
        ),
        (lambda: fe.intervene("vec", lambda x, ctx: 0 * x, times=0.5), "a pair"),
        (lambda: fe.ablate("single.0.attn.map", tokens="red", to=1.0), "say which tokens are hidden, .* without to="),
        (lambda: fe.patch("sample.noise", torch.zeros(4, 4, 16)), "but the source is"),
        (lambda: fe.patch("vec", None), "not NoneType"),
        (lambda: fe.swap("double.0.img_attn", "mine"), "a module, a class or a function"),
        (lambda: fe.intervene("single.0.gate"), "must be a function"),
        (lambda: fe.intervene("single.9.gate", lambda x, ctx: x), "did you mean single"),
        (lambda: fe.intervene("single.0.gate", lambda x, ctx: x[0]), r"must be \[1, 1, 48\]"),
        (lambda: fe.intervene("single.0.gate", lambda x, ctx: None), "returned NoneType"),
        (lambda: fe.intervene("single.0.gate", lambda x, ctx: x.double()), "returned torch.float64"),
        (lambda: fe.ablate("double.1.heads", heads=[2]), "no head 2"),
        (lambda: fe.ablate("vec", heads=[0]), "no axis 'head'"),
        (lambda: fe.ablate("single.0.x", tokens=["green"]), "does not contain 'green'"),
        (lambda: fe.ablate("single.0.attn.map"), "say which tokens"),
        (lambda: fe.ablate("single.0.x", streams="text"), "'txt', 'img' or both"),
        (lambda: fe.ablate("single.0.x", to="median"), "number or 'mean'"),
        (lambda: fe.ablate("vec", to="mean"), "no tokens"),
        (lambda: fe.patch("vec", torch.zeros(3)), r"the source is \[3\]"),
        (lambda: fe.swap("double.*.imgattn", ByHand), "no module"),
        (lambda: fe.swap("double.*.img_attn", TooWide), r"'qkv.weight' is \[150, 50\]"),
        (lambda: fe.swap("double.*.img_attn", TwoArguments), r"takes \(x, rope\)"),
        (lambda: fe.swap("double.*.img_attn", TwoResults), "it must return"),
        (lambda: fe.swap("double.*.img_attn", OneMore), "'extra'"),
        (lambda: fe.swap("img_in", ByHand), "pass a function"),
        (lambda: fe.swap("double.*.img_attn", lambda old: 3), "must be a torch.nn.Module"),
    ],
)
def test_errors_are_one_sentence(pipe, wrong, says, monkeypatch):
    monkeypatch.setattr(probe, "networks", WeakSet(pipe.networks().values()))  # whatever else is alive
    with pytest.raises(InstrumentError, match=says) as error:
        under(pipe, wrong())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: fe.intervene("vec", lambda x: x), "must take two arguments"),
        (lambda: fe.swap("double.0.img_attn", lambda: 3), "must take the old module"),
        (lambda: fe.ablate("double.1", streams=[]), "streams must be 'txt', 'img'"),
        (lambda: fe.intervene("double.0.attn.rope", positions(lambda ids: None)), "edit must return the ids"),
    ],
)
def test_more_errors_of_one_sentence(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says):
        with wrong():
            draw(pipe)


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ({"steps": [30]}, r"the run has 3 steps, and none of them is in steps=\[30\]"),
        ({"times": (0.01, 0.02)}, "has 3 steps, and none of them is in times=\\(0.01, 0.02\\)"),
        ({"times": (0.9, 1.0), "steps": 2}, "none of them is in steps=2 and times=\\(0.9, 1\\)"),
    ],
)
def test_a_change_that_never_comes_to_pass_says_so(pipe, when, says):
    with pytest.warns(UserWarning, match=says), fe.intervene("vec", lambda x, ctx: 2 * x, **when):
        pipe(PROMPT, steps=3, progress=False)


def test_an_instrument_that_nothing_passes_says_so(pipe):
    with pytest.warns(UserWarning, match="no value passed ae.encoder.mid, so"), fe.ablate("ae.encoder.mid"):
        draw(pipe)
    with pytest.warns(UserWarning, match="no value passed vec except in a thread"), fe.ablate("vec"):
        worker = threading.Thread(target=draw, args=(pipe,))
        worker.start()
        worker.join()
