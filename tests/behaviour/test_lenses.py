"""Lenses on cases whose answer is known."""

import math

import pytest
import torch
from PIL import Image

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.instruments import lenses
from fluxedu.instruments.lenses.attention import look_at_heads
from fluxedu.instruments.lenses.layers import look_at_contributions
from fluxedu.instruments.lenses.run import together
from fluxedu.instruments.lenses.words import attention_to_words
from fluxedu.models.modulation import Modulation
from fluxedu.sampling.latents import pack

PROMPT = "a red circle left of a blue square"
BLOCKS = ["double.0", "double.1", "single.0", "single.1"]
few = {"steps": 3, "progress": False}


@pytest.fixture
def closed(make_pipe):
    """A pipeline whose block ``single.1`` does nothing: its gate is shut."""
    pipe = make_pipe()
    (m,) = (m for m in pipe.flux.single_blocks[1].modules() if isinstance(m, Modulation))
    with torch.no_grad():
        m.lin.weight[96:] = 0
        m.lin.bias[96:] = 0
    return pipe


def uniform(pipe):
    """While this lasts, every query looks at all tokens alike."""
    return fe.intervene("*.attn.q", lambda x, ctx: 0 * x)


# --- attention ------------------------------------------------------------------------------------


def test_word_maps_are_the_maps(pipe):
    with fe.record("double.1.attn.map") as rec:
        out = pipe(PROMPT, **few)
    found = lenses.word_maps(pipe, PROMPT, ["red", "left of"], **few)
    assert found.axes == ("block", "word", "row", "column")
    assert found.shape == (4, 2, 2, 2)
    assert found.coords == {"block": BLOCKS, "word": ["red", "left of"]}
    whole = rec["double.1.attn.map"].tensor.mean((0, 1))[32:]  # [image, key]
    by_hand = torch.stack([whole[:, 1], whole[:, [3, 4]].sum(-1)]).reshape(2, 2, 2)
    assert torch.allclose(found.at(block=1).tensor, by_hand, atol=1e-6)
    assert out.latents.shape[-2:] == (4, 4)


def test_uniform_attention_is_told_as_such(pipe):
    """36 tokens, 32 of them text, 10 of these words and the end mark's."""
    with uniform(pipe):
        words = lenses.word_maps(pipe, PROMPT, ["red"], **few)
        balance = lenses.attention_balance(pipe, PROMPT, **few)
        padding = lenses.padding_mass(pipe, PROMPT, **few)
        gallery = lenses.head_gallery(pipe, PROMPT, (1, 0), **few)
    assert torch.allclose(words.tensor, torch.tensor(1 / 36), atol=1e-6)
    assert balance.shape == padding.shape == (4, 3)
    assert torch.allclose(balance.tensor, torch.tensor(32 / 36), atol=1e-5)
    said = len(pipe.prompt_encoder.t5_tokenizer.pieces(PROMPT))
    assert torch.allclose(padding.tensor, torch.tensor((32 - said) / 36), atol=1e-5)
    assert gallery.shape == (4, 2, 2, 2)
    assert torch.allclose(gallery.tensor, torch.tensor(1 / 36), atol=1e-6)


def test_a_heads_gallery_is_its_row(pipe):
    with fe.record("single.0.attn.map") as rec:
        pipe(PROMPT, **few)
    last = rec["single.0.attn.map"].tensor[-1]
    patch, word = lenses.head_gallery(pipe, PROMPT, (1, 0), **few), lenses.head_gallery(pipe, PROMPT, "blue", **few)
    assert torch.allclose(patch.at(block=2).tensor.flatten(1), last[:, 32 + 2, 32:], atol=1e-6)
    assert torch.allclose(word.at(block=2).tensor.flatten(1), last[:, 6, 32:], atol=1e-6)


def test_concepts_share_a_patch(pipe):
    found = lenses.concept_maps(pipe, PROMPT, ["circle", "square"], **few)
    assert found.shape == (4, 2, 2, 2)
    assert torch.allclose(found.tensor.sum(1), torch.ones(4, 2, 2), atol=1e-6)


def test_a_patch_that_says_what_a_word_says_is_the_words(pipe):
    """The word's own output, put into a patch, makes the patch the word's."""

    def copy(x, ctx):
        x, told = x.clone(), torch.randn(2, 2, 24, generator=torch.Generator().manual_seed(0))
        x[0, :, [2, 32 + 3]] = told[0, :, None]  # "circle" and the last patch hear one thing
        x[0, :, [7, 32 + 0]] = told[1, :, None]  # "square" and the first patch another
        return x

    with fe.intervene("single.0.heads", copy):
        found = lenses.concept_maps(pipe, PROMPT, ["circle", "square"], **few)
    ours = found.at(block=2, word=0).tensor
    assert ours[1, 1] > 0.99
    assert ours[0, 0] < 0.01


# --- blocks ---------------------------------------------------------------------------------------


def test_a_closed_block_does_nothing_by_every_lens(closed):
    for found in (
        lenses.contributions(closed, PROMPT, **few).mean("step"),
        lenses.vital_layers(closed, PROMPT, **few),
        lenses.position_dependence(closed, PROMPT, **few),
    ):
        assert found.axes == ("block",)
        assert found.coords["block"] == BLOCKS
        assert found.tensor[3] == 0
        assert (found.tensor[:3] > 1e-4).all()


def test_the_last_block_foresees_what_the_run_foresees(pipe):
    with fe.record("sample.x0") as rec:
        pipe(PROMPT, **few)
    found = lenses.x0_by_block(pipe, PROMPT, **few)
    assert found.axes == ("block", "step", "channel", "row", "column")
    assert torch.allclose(found.tensor[-1], rec["sample.x0"].tensor, atol=1e-5)
    assert not torch.allclose(found.tensor[0], rec["sample.x0"].tensor, atol=1e-2)
    pixels = lenses.x0_by_block(
        pipe,
        PROMPT,
        decoded=True,
        **few,
    )
    assert pixels.shape == (4, 3, 3, 32, 32)


def test_places_that_are_no_others_do_not_matter(pipe):
    found = lenses.position_dependence(pipe, PROMPT, edit=lambda ids: ids, **few)
    assert not found.tensor.any()


def test_a_planted_giant_is_found(pipe):
    def plant(x, ctx):
        x = x.clone()
        x[:, 2, 7] = 1e4
        return x

    with fe.intervene("double.0.img_out", plant):
        found = lenses.massive_activations(pipe, PROMPT, **few)
    largest, median, token, channel = found.at(block=0).tensor.tolist()
    assert (largest, token, channel) == (1e4, 2, 7)
    assert median < 10


def test_modulation_is_what_the_sites_say(pipe):
    globs = ("double.0.img_mod.gate2", "double.1.txt_mod.shift1", "single.1.scale")
    with fe.record(*globs, reduce="rms") as rec:
        times = pipe(PROMPT, **few).trajectory.times[:-1]
    found = lenses.modulation(pipe, PROMPT, times=times)
    assert found.axes == ("time", "layer", "kind")
    place = found.coords["layer"].index
    for site, layer, kind in zip(
        globs, ("double.0.img_mlp", "double.1.txt_attn", "single.1"), ("gate", "shift", "scale"), strict=True
    ):
        column = found.tensor[:, place(layer), found.coords["kind"].index(kind)]
        assert torch.allclose(column, rec[site].tensor, rtol=1e-5)


# --- the flow -------------------------------------------------------------------------------------


def field_of(pipe, monkeypatch, field):
    """Let the pipeline's velocity be ``field(latent tokens, t)``."""
    monkeypatch.setattr(pipe, "velocity_field", lambda *run: field)


def test_a_field_that_knows_its_picture_is_straight(pipe, monkeypatch):
    picture = pack(torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5)))
    field_of(pipe, monkeypatch, lambda x, t: (x - picture) / t)
    path = pipe(PROMPT, steps=5, progress=False).trajectory
    assert float(lenses.straightness(path).tensor) <= 1e-10
    assert float(lenses.curvature(path).tensor.max()) <= 0.2  # degrees: acos near 1 keeps half of the digits
    field = lenses.velocity_field(pipe, PROMPT, size=3, **few)
    assert field.axes == ("up", "across", "what")
    a, b, across, up = field.tensor.unbind(-1)
    assert torch.allclose(across, 1 - a, atol=1e-4)  # from everywhere to the picture
    assert torch.allclose(up, -b, atol=1e-4)


def test_a_turning_field_turns(pipe, monkeypatch):
    """v turns a quarter over the run: 90 degrees per unit of time."""
    first, second = torch.randn(2, 1, 4, 64, generator=torch.Generator().manual_seed(6)).unbind(0)
    first, second = first / first.norm(), second - (second * first).sum() * first / first.norm() ** 2
    second = second / second.norm()

    def turning(x, t):
        return math.cos(math.pi / 2 * t) * first + math.sin(math.pi / 2 * t) * second

    field_of(pipe, monkeypatch, turning)
    path = pipe(PROMPT, steps=8, progress=False).trajectory
    assert torch.allclose(lenses.curvature(path).tensor, torch.tensor(90.0), rtol=1e-3)
    assert float(lenses.straightness(path).tensor) > 0.05


@pytest.mark.parametrize("a", [2.0, -0.5])
def test_a_linear_field_spreads_by_its_trace(pipe, monkeypatch, a):
    field_of(pipe, monkeypatch, lambda x, t: a * x)
    assert torch.allclose(lenses.divergence(pipe, PROMPT, probes=2, **few).tensor, torch.tensor(a), rtol=1e-3)


# --- what outsiders may get wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda p: lenses.word_maps(p, PROMPT, ["green"]), "does not say 'green'"),
        (lambda p: lenses.word_maps(p, [PROMPT, PROMPT], ["red"]), "one prompt"),
        (lambda p: lenses.contributions(p, PROMPT, seed=[1, 2], **few), "one picture at a time"),
        (lambda p: lenses.head_gallery(p, PROMPT, (2, 0)), "2 x 2 patches"),
        (lambda p: lenses.head_gallery(p, PROMPT, "green"), "does not say 'green'"),
    ],
)
def test_errors_are_one_sentence(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says) as error:
        wrong(pipe)
    assert "\n" not in str(error.value)


def test_lenses_look_at_one_run_together_and_find_the_same(pipe):
    prompt, asked = "a red circle left of a blue square", {"steps": 3, "progress": False}
    looks = [
        look_at_contributions(pipe),
        attention_to_words(pipe, prompt, ["circle"]),
        look_at_heads(pipe, prompt, "red"),
    ]
    _, found = together(pipe, prompt, looks, asked)
    apart = [
        lenses.contributions(pipe, prompt, **asked),
        lenses.word_maps(pipe, prompt, ["circle"], **asked),
        lenses.head_gallery(pipe, prompt, "red", **asked),
    ]
    for both, one in zip(found, apart, strict=True):
        assert both.axes == one.axes and both.coords == one.coords and torch.equal(both.tensor, one.tensor)


@pytest.mark.parametrize(("member", "given"), [("nano-kontext", "reference"), ("nano-redux", "image_prompt")])
def test_lenses_know_which_tokens_are_the_pictures_own(member, given):
    """A reference's tokens stand behind the picture's, Redux's behind the words."""
    pipe, prompt = fe.load(member), "a red circle"
    asked = {given: Image.new("RGB", (128, 128), "red"), "steps": 2, "progress": False}
    for lens in (lenses.word_maps, lenses.concept_maps):
        assert lens(pipe, prompt, ["circle"], **asked).sizes["row"] == 8
    assert lenses.head_gallery(pipe, prompt, "circle", **asked).sizes["column"] == 8
    sites = ("single.0.x", "single.0.out", "sample.x0")
    with fe.record(*sites) as rec:
        pipe(prompt, **asked)
    words = 32 + (64 if member == "nano-redux" else 0)
    x, out = (rec[site].tensor[:, words : words + 64] for site in sites[:2])
    wanted = (out - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    found = lenses.contributions(pipe, prompt, **asked)
    torch.testing.assert_close(found.tensor[found.coords["block"].index("single.0")], wanted)
    foreseen = lenses.x0_by_block(pipe, prompt, **asked).tensor[-1]
    torch.testing.assert_close(foreseen, rec["sample.x0"].tensor, atol=1e-4, rtol=1e-4)
    assert fe.sites(pipe)


@pytest.mark.parametrize("name", lenses.__all__)
def test_every_lens_says_whose_question_it_is(name):
    assert "arXiv" in getattr(lenses, name).__doc__


@pytest.mark.parametrize(("member", "given"), [("nano-kontext", "reference"), ("nano-redux", "image_prompt")])
def test_whose_attention_is_shared_out(member, given):
    """The picture's own patches look, not a reference's; what Redux says is text. By hand, from the whole map."""
    pipe, prompt, pads = fe.load(member), "a red circle", slice(4, 32)  # three pieces and the end mark
    asked = {given: Image.new("RGB", (128, 128), "red"), "steps": 2, "progress": False}
    with fe.record("single.1.attn.map", steps=0) as rec:
        pipe(prompt, **asked)
    words = 96 if member == "nano-redux" else 32
    own = rec["single.1.attn.map"].tensor[0][:, words : words + 64]  # [head, patch, key]
    for lens, keys in ((lenses.attention_balance, slice(words)), (lenses.padding_mass, pads)):
        found = lens(pipe, prompt, at_steps=0, **asked)
        by_hand = own[..., keys].sum(-1).mean()
        torch.testing.assert_close(found.tensor[found.coords["block"].index("single.1"), 0], by_hand)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda pipe: lenses.head_gallery(pipe, PROMPT, 3), "a query is a word or a patch"),
        (lambda pipe: lenses.head_gallery(pipe, PROMPT, "red", at_step=[0, 1]), "at_step is one step"),
        (lambda pipe: lenses.velocity_field(pipe, PROMPT, at_step=99, steps=2), "there is no step 99"),
        (lambda pipe: lenses.divergence(pipe, PROMPT, probes=0), "probes is how many"),
        (lambda pipe: lenses.straightness(None), "a path is a run's trajectory"),
        (lambda pipe: lenses.curvature(None), "a path is a run's trajectory"),
    ],
)
def test_more_errors_of_one_sentence(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says):
        wrong(pipe)
