"""Lenses on cases whose answer is known."""

import math

import pytest
import torch
from PIL import Image

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.instruments import lenses
from fluxedu.instruments.lenses import run

PROMPT = "a red circle left of a blue square"
BLOCKS = ["double.0", "double.1", "single.0", "single.1"]
FEW_STEPS = {"steps": 3, "progress": False}


@pytest.fixture
def without_effect(make_pipe):
    """A pipeline whose block ``single.1`` does nothing: its gate is 0."""
    pipe = make_pipe()
    linear = pipe.flux.single_blocks[1].modulation.lin
    with torch.no_grad():
        linear.weight[96:] = 0
        linear.bias[96:] = 0
    return pipe


def uniform(pipe):
    """Every query attends to all tokens equally."""
    return fe.intervene("*.attn.q", lambda x, ctx: 0 * x)


# --- attention ------------------------------------------------------------------------------------


def test_word_maps_are_sums_of_columns_of_the_attention_maps(pipe):
    with fe.record("double.1.attn.map") as rec:
        out = pipe(PROMPT, **FEW_STEPS)
    found = lenses.word_maps(pipe, PROMPT, ["red", "left of"], **FEW_STEPS)
    assert found.axes == ("block", "word", "row", "column")
    assert found.shape == (4, 2, 2, 2)
    assert found.coords == {"block": BLOCKS, "word": ["red", "left of"]}
    full = rec["double.1.attn.map"].tensor.mean((0, 1))[32:]  # [image, key]
    by_hand = torch.stack([full[:, 1], full[:, [3, 4]].sum(-1)]).reshape(2, 2, 2)
    assert torch.allclose(found.at(block=1).tensor, by_hand, atol=1e-6)
    assert out.latents.shape[-2:] == (4, 4)


def test_uniform_attention(pipe):
    """36 tokens; 32 of them are text tokens, of which 10 are the prompt and its end-of-text token."""
    with uniform(pipe):
        words = lenses.word_maps(pipe, PROMPT, ["red"], **FEW_STEPS)
        balance = lenses.attention_balance(pipe, PROMPT, **FEW_STEPS)
        padding = lenses.padding_mass(pipe, PROMPT, **FEW_STEPS)
        gallery = lenses.head_gallery(pipe, PROMPT, (1, 0), **FEW_STEPS)
    assert torch.allclose(words.tensor, torch.tensor(1 / 36), atol=1e-6)
    assert balance.shape == padding.shape == (4, 3)
    assert torch.allclose(balance.tensor, torch.tensor(32 / 36), atol=1e-5)
    prompt_tokens = len(pipe.prompt_encoder.t5_tokenizer.pieces(PROMPT))
    assert torch.allclose(padding.tensor, torch.tensor((32 - prompt_tokens) / 36), atol=1e-5)
    assert gallery.shape == (4, 2, 2, 2)
    assert torch.allclose(gallery.tensor, torch.tensor(1 / 36), atol=1e-6)


def test_head_gallery_is_a_row_of_the_map(pipe):
    with fe.record("single.0.attn.map") as rec:
        pipe(PROMPT, **FEW_STEPS)
    last = rec["single.0.attn.map"].tensor[-1]
    patch, word = (
        lenses.head_gallery(pipe, PROMPT, (1, 0), **FEW_STEPS),
        lenses.head_gallery(pipe, PROMPT, "blue", **FEW_STEPS),
    )
    assert torch.allclose(patch.at(block=2).tensor.flatten(1), last[:, 32 + 2, 32:], atol=1e-6)
    assert torch.allclose(word.at(block=2).tensor.flatten(1), last[:, 6, 32:], atol=1e-6)


def test_concept_maps_sum_to_one_over_the_words(pipe):
    found = lenses.concept_maps(pipe, PROMPT, ["circle", "square"], **FEW_STEPS)
    assert found.shape == (4, 2, 2, 2)
    assert torch.allclose(found.tensor.sum(1), torch.ones(4, 2, 2), atol=1e-6)


def test_a_patch_with_the_attention_output_of_a_word_resembles_that_word(pipe):
    def copy(x, ctx):
        x, outputs = x.clone(), torch.randn(2, 2, 24, generator=torch.Generator().manual_seed(0))
        x[0, :, [2, 32 + 3]] = outputs[0, :, None]  # "circle" and the last patch
        x[0, :, [7, 32 + 0]] = outputs[1, :, None]  # "square" and the first patch
        return x

    with fe.intervene("single.0.heads", copy):
        found = lenses.concept_maps(pipe, PROMPT, ["circle", "square"], **FEW_STEPS)
    circle = found.at(block=2, word=0).tensor
    assert circle[1, 1] > 0.99
    assert circle[0, 0] < 0.01


def rotated(x, ids, axes_dim):
    """RoPE with real numbers: ``x [1, H, N, d]``, ``ids [N, 3]``."""
    angles = [
        ids[:, i, None].double() * 10_000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for i, dim in enumerate(axes_dim)
    ]
    cos, sin = torch.cat(angles, 1).cos().float(), torch.cat(angles, 1).sin().float()
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def concept_attention_by_hand(pipe, rec, step, txt):
    """ConceptAttention from the state dict: the dot product of patches and concept tokens after every block.

    The image and the text start from the recorded ``img_in``, ``txt_in`` and ``vec``; ``txt [M, C]`` are the concepts.
    """
    w, heads, axes_dim = pipe.flux.state_dict(), pipe.flux.config.num_heads, pipe.flux.config.axes_dim
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))  # noqa: E731
    norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()  # noqa: E731
    rms = lambda x, name: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.scale"]  # noqa: E731
    gelu = lambda x: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())  # noqa: E731
    split = lambda x: x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # noqa: E731
    merge = lambda x: x.transpose(1, 2).flatten(2)  # noqa: E731
    attend = lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v  # noqa: E731
    img, text, vec = (rec[site].tensor[step][None] for site in ("img_in", "txt_in", "vec"))
    ids = torch.tensor([[0, row, column] for row in range(2) for column in range(2)])
    rotate = lambda x: torch.cat([x[:, :, :32], rotated(x[:, :, 32:], ids, axes_dim)], 2)  # noqa: E731
    silu = vec * vec.sigmoid()
    concepts, maps = linear(txt[None], "txt_in"), []
    for i in range(2):
        at = f"double_blocks.{i}"
        mods = {s: linear(silu, f"{at}.{s}_mod.lin")[:, None].chunk(6, -1) for s in ("img", "txt")}
        qkv = {}
        for name, stream, x in (("img", "img", img), ("txt", "txt", text), ("concept", "txt", concepts)):
            shift, scale = mods[stream][:2]
            q, k, v = split(linear((1 + scale) * norm(x) + shift, f"{at}.{stream}_attn.qkv"))
            norms = f"{at}.{stream}_attn.norm"
            qkv[name] = rms(q, f"{norms}.query_norm"), rms(k, f"{norms}.key_norm"), v
        q, k, v = (torch.cat(pair, 2) for pair in zip(qkv["txt"], qkv["img"], strict=True))
        q, k = rotate(q), rotate(k)
        joint = merge(attend(q, k, v))
        q_c, k_c, v_c = qkv["concept"]
        of_concepts = merge(attend(q_c, torch.cat([k_c, k[:, :, 32:]], 2), torch.cat([v_c, v[:, :, 32:]], 2)))
        maps.append(joint[:, 32:] @ of_concepts.mT)

        def after(x, stream, attn, at=at, mods=mods):
            _, _, gate1, shift2, scale2, gate2 = mods[stream]
            x = x + gate1 * linear(attn, f"{at}.{stream}_attn.proj")
            hidden = gelu(linear((1 + scale2) * norm(x) + shift2, f"{at}.{stream}_mlp.0"))
            return x + gate2 * linear(hidden, f"{at}.{stream}_mlp.2")

        img, text = after(img, "img", joint[:, 32:]), after(text, "txt", joint[:, :32])
        concepts = after(concepts, "txt", of_concepts)
    x = torch.cat([text, img], 1)
    for i in range(2):
        at, width = f"single_blocks.{i}", 3 * x.shape[-1]
        shift, scale, gate = linear(silu, f"{at}.modulation.lin")[:, None].chunk(3, -1)
        parts = []
        for tokens in (x, concepts):
            h = linear((1 + scale) * norm(tokens) + shift, f"{at}.linear1")
            q, k, v = split(h[..., :width])
            parts.append((rms(q, f"{at}.norm.query_norm"), rms(k, f"{at}.norm.key_norm"), v, gelu(h[..., width:])))
        (q, k, v, hidden), (q_c, k_c, v_c, hidden_c) = parts
        q, k = rotate(q), rotate(k)
        joint = merge(attend(q, k, v))
        of_concepts = merge(attend(q_c, torch.cat([k_c, k[:, :, 32:]], 2), torch.cat([v_c, v[:, :, 32:]], 2)))
        maps.append(joint[:, 32:] @ of_concepts.mT)
        x = x + gate * linear(torch.cat([joint, hidden], -1), f"{at}.linear2")
        concepts = concepts + gate * linear(torch.cat([of_concepts, hidden_c], -1), f"{at}.linear2")
    return torch.stack(maps)[:, 0]  # [block, N, M]


@pytest.mark.parametrize("options", [{}, {"true_cfg_scale": 2.0}, {"at_steps": [0, 2]}])
def test_concepts_that_the_prompt_lacks_are_those_of_concept_attention(pipe, options):
    words = ["green", "letter K", "circle"]
    steps = options.get("at_steps", [0, 1, 2])
    run_options = {name: value for name, value in options.items() if name != "at_steps"}
    with fe.record("img_in", "txt_in", "vec", passes="prompted") as rec:
        plain = pipe(PROMPT, **FEW_STEPS, **run_options)
    found = lenses.concept_maps(pipe, PROMPT, words, **FEW_STEPS, **options)
    assert found.axes == ("block", "word", "row", "column") and found.coords == {"block": BLOCKS, "word": words}
    assert found.images[0].tobytes() == plain.images[0].tobytes()

    encoded, tokens = pipe.prompt_encoder(words).txt, [[0], [0, 1], [0]]
    assert pipe.prompt_encoder.t5_tokenizer.pieces("letter K")[2] == "</s>"
    txt = torch.cat([encoded[i, indices] for i, indices in enumerate(tokens)]).detach()
    by_hand = torch.stack([concept_attention_by_hand(pipe, rec, step, txt) for step in steps]).mean(0)
    by_hand = torch.stack([by_hand[..., 0], by_hand[..., 1:3].mean(-1), by_hand[..., 3]], 1).unflatten(-1, (2, 2))
    assert float((found.tensor - by_hand).abs().max()) <= 1e-5 * float(by_hand.abs().max())


def test_adding_concepts_changes_nothing_and_is_seen_by_no_other_instrument(pipe):
    with fe.record("*") as plain:
        expected = pipe(PROMPT, **FEW_STEPS).latents
    seen = []
    with fe.intervene("double.*", "single.*", lambda x, ctx: seen.append(ctx.site) or x):
        lenses.concept_maps(pipe, PROMPT, ["green", "circle"], **FEW_STEPS)
    counts = {site: len(plain.entries(site)) for site in plain if site.startswith(("double.", "single."))}
    assert {site: seen.count(site) for site in seen if site in counts} == counts
    assert torch.equal(pipe(PROMPT, **FEW_STEPS).latents, expected)


def test_words_of_the_prompt_can_be_added_too(pipe):
    own = lenses.concept_maps(pipe, PROMPT, ["circle", "square"], **FEW_STEPS)
    added = lenses.concept_maps(pipe, PROMPT, ["circle", "square"], added=True, **FEW_STEPS)
    assert own.axes == added.axes and own.shape == added.shape
    assert not torch.allclose(own.tensor, added.tensor)
    with pytest.raises(InstrumentError, match="does not contain 'green'"):
        lenses.concept_maps(pipe, PROMPT, ["green"], added=False, **FEW_STEPS)


# --- blocks ---------------------------------------------------------------------------------------


def test_every_lens_finds_that_a_block_does_nothing(without_effect):
    for found in (
        lenses.contributions(without_effect, PROMPT, **FEW_STEPS).mean("step"),
        lenses.vital_layers(without_effect, PROMPT, **FEW_STEPS),
        lenses.position_dependence(without_effect, PROMPT, **FEW_STEPS),
    ):
        assert found.axes == ("block",)
        assert found.coords["block"] == BLOCKS
        assert found.tensor[3] == 0
        assert (found.tensor[:3] > 1e-4).all()


def test_x0_of_the_last_block_is_the_predicted_x0_of_the_run(pipe):
    with fe.record("sample.x0") as rec:
        pipe(PROMPT, **FEW_STEPS)
    found = lenses.x0_by_block(pipe, PROMPT, **FEW_STEPS)
    assert found.axes == ("block", "step", "channel", "row", "column")
    assert torch.allclose(found.tensor[-1], rec["sample.x0"].tensor, atol=1e-5)
    assert not torch.allclose(found.tensor[0], rec["sample.x0"].tensor, atol=1e-2)
    pixels = lenses.x0_by_block(pipe, PROMPT, decoded=True, **FEW_STEPS)
    assert pixels.shape == (4, 3, 3, 32, 32)


def test_unchanged_positions_change_nothing(pipe):
    found = lenses.position_dependence(pipe, PROMPT, edit=lambda ids: ids, **FEW_STEPS)
    assert not found.tensor.any()


def test_a_planted_massive_activation_is_found(pipe):
    def plant(x, ctx):
        x = x.clone()
        x[:, 2, 7] = 1e4
        return x

    with fe.intervene("double.0.img_out", plant):
        found = lenses.massive_activations(pipe, PROMPT, **FEW_STEPS)
    largest, median, token, channel = found.at(block=0).tensor.tolist()
    assert (largest, token, channel) == (1e4, 2, 7)
    assert median < 10


def test_modulation_agrees_with_the_recorded_sites(pipe):
    globs = ("double.0.img_mod.gate2", "double.1.txt_mod.shift1", "single.1.scale")
    with fe.record(*globs, reduce="rms") as rec:
        times = pipe(PROMPT, **FEW_STEPS).trajectory.times[:-1]
    found = lenses.modulation(pipe, PROMPT, times=times)
    assert found.axes == ("time", "layer", "kind")
    for site, layer, kind in (
        (globs[0], "double.0.img_mlp", "gate"),
        (globs[1], "double.1.txt_attn", "shift"),
        (globs[2], "single.1", "scale"),
    ):
        column = found.tensor[:, found.coords["layer"].index(layer), found.coords["kind"].index(kind)]
        assert torch.allclose(column, rec[site].tensor, rtol=1e-5)


# --- the flow -------------------------------------------------------------------------------------


def replace_velocity(pipe, monkeypatch, field):
    """Replace the pipeline's velocity by ``field(latent, t)``."""
    monkeypatch.setattr(pipe, "velocity_field", lambda *arguments: field)


def test_a_field_towards_one_image_has_straight_trajectories(pipe, monkeypatch):
    target = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    replace_velocity(pipe, monkeypatch, lambda x, t: (x - target) / t)
    trajectory = pipe(PROMPT, steps=5, progress=False).trajectory
    assert float(lenses.straightness(trajectory).tensor) <= 1e-10
    assert float(lenses.curvature(trajectory).tensor.max()) <= 0.2  # degrees: acos near 1 keeps half of the digits
    field = lenses.velocity_field(pipe, PROMPT, size=3, **FEW_STEPS)
    assert field.axes == ("up", "across", "what")
    a, b, across, up = field.tensor.unbind(-1)
    assert torch.allclose(across, 1 - a, atol=1e-4)  # from everywhere to the image
    assert torch.allclose(up, -b, atol=1e-4)


def test_curvature_of_a_turning_field(pipe, monkeypatch):
    """The velocity turns by 90 degrees over the run."""
    first, second = torch.randn(2, 1, 16, 4, 4, generator=torch.Generator().manual_seed(6)).unbind(0)
    first, second = first / first.norm(), second - (second * first).sum() * first / first.norm() ** 2
    second = second / second.norm()

    def turning(x, t):
        return math.cos(math.pi / 2 * t) * first + math.sin(math.pi / 2 * t) * second

    replace_velocity(pipe, monkeypatch, turning)
    trajectory = pipe(PROMPT, steps=8, progress=False).trajectory
    assert torch.allclose(lenses.curvature(trajectory).tensor, torch.tensor(90.0), rtol=1e-3)
    assert float(lenses.straightness(trajectory).tensor) > 0.05


@pytest.mark.parametrize("a", [2.0, -0.5])
def test_divergence_of_a_linear_field_is_its_trace(pipe, monkeypatch, a):
    replace_velocity(pipe, monkeypatch, lambda x, t: a * x)
    assert torch.allclose(lenses.divergence(pipe, PROMPT, probes=2, **FEW_STEPS).tensor, torch.tensor(a), rtol=1e-3)


# --- several images -------------------------------------------------------------------------------

ARGUMENTS = {
    "word_maps": (["red"],),
    "concept_maps": (["red", "left"],),
    "head_gallery": ("red",),
}
OPTIONS = {
    "modulation": {"times": 2},
    "divergence": FEW_STEPS | {"probes": 1},
    "velocity_field": FEW_STEPS | {"size": 2},
}
OF_A_PROMPT = [name for name in run.LENSES if name not in ("straightness", "curvature")]


@pytest.mark.parametrize("name", OF_A_PROMPT)
def test_several_prompts_and_seeds_give_the_results_of_single_runs(pipe, name):
    """Every lens of a prompt, with the images that the pipeline draws."""
    lens, arguments = run.LENSES[name], ARGUMENTS.get(name, ())
    options = OPTIONS.get(name, FEW_STEPS)
    takes_seed = name != "modulation"
    averages = name in ("vital_layers", "position_dependence")  # over seeds
    prompts, seeds = ["a red circle left of a star", PROMPT], [5, 6]
    for texts, chosen in ((prompts, None), (PROMPT, seeds), (prompts, seeds), ([PROMPT], 5)):
        if chosen is not None and not takes_seed or averages and isinstance(chosen, list):
            continue
        own = {} if chosen is None else {"seed": chosen}
        together = lens(pipe, texts, *arguments, **options, **own)
        count = max(len(texts) if isinstance(texts, list) else 1, len(chosen) if isinstance(chosen, list) else 1)
        texts = texts if isinstance(texts, list) else [texts] * count
        chosen = chosen if isinstance(chosen, list) else [chosen] * count
        assert together.axes[0] == "picture" and len(together.coords["picture"]) == count
        for i, (text, seed) in enumerate(zip(texts, chosen, strict=True)):
            own = {} if seed is None else {"seed": seed}
            alone = lens(pipe, text, *arguments, **options, **own)
            assert alone.axes == together.axes[1:]
            assert torch.equal(together.at(picture=i).tensor, alone.tensor)
            if takes_seed:
                (drawn,) = pipe(text, **FEW_STEPS, **own).images
                assert [alone.images[0].tobytes(), together.images[i].tobytes()] == [drawn.tobytes()] * 2
        assert len(together.images) == (count if takes_seed else 0)


def test_pictures_are_labelled_by_what_differs(pipe):
    labels = lambda *args, **kwargs: lenses.contributions(pipe, *args, **kwargs, **FEW_STEPS).coords["picture"]  # noqa: E731
    assert labels([PROMPT, "a star"], seed=3) == [PROMPT, "a star"]
    assert labels(PROMPT, seed=[3, 4]) == [3, 4]
    assert labels([PROMPT, PROMPT], seed=[3, 4]) == [f"{PROMPT}, seed 3", f"{PROMPT}, seed 4"]


def test_lenses_that_average_over_seeds_return_an_image_for_each(pipe):
    found = lenses.vital_layers(pipe, PROMPT, seeds=[3, 4], **FEW_STEPS)
    drawn = pipe(PROMPT, seed=[3, 4], **FEW_STEPS).images
    assert found.axes == ("block",)
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in drawn]


def test_a_lens_does_not_need_the_image(pipe):
    found = lenses.word_maps(pipe, PROMPT, ["red"], decode=False, **FEW_STEPS)
    assert found.images == []
    assert torch.equal(found.tensor, lenses.word_maps(pipe, PROMPT, ["red"], **FEW_STEPS).tensor)


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda p: lenses.word_maps(p, PROMPT, ["green"]), "does not contain 'green'"),
        (lambda p: lenses.word_maps(p, [PROMPT, "a green star"], ["red"], **FEW_STEPS), "does not contain 'red'"),
        (lambda p: lenses.contributions(p, [PROMPT, 3]), "the prompt must be a text, or a list of texts, not 3"),
        (lambda p: lenses.contributions(p, 3), "the prompt must be a text, or a list of texts, not 3"),
        (lambda p: lenses.contributions(p, []), "as many prompts as seeds, or one of either, not 0 and 1"),
        (lambda p: lenses.contributions(p, [PROMPT] * 2, seed=[1] * 3), "one of either, not 2 and 3"),
        (lambda p: lenses.contributions(p, PROMPT, num_images=2, **FEW_STEPS), "pass a list of prompts or of seeds"),
        (lambda p: lenses.concept_maps(p, PROMPT, []), "words must be a list of words, not"),
        (
            lambda p: lenses.concept_maps(p, PROMPT, [3, "red"], added=True),
            r"words must be of the type Sequence.str., not .3, 'red'",
        ),
        (lambda p: lenses.concept_maps(p, PROMPT, "green"), "words must be of the type Sequence.str., not 'green'"),
        (
            lambda p: lenses.concept_maps(p, PROMPT, ["green", " "]),
            "each of words must be a text with at least one token",
        ),
        (lambda p: lenses.head_gallery(p, PROMPT, (2, 0)), "2 x 2 patches"),
        (lambda p: lenses.head_gallery(p, PROMPT, "green"), "does not contain 'green'"),
    ],
)
def test_errors_are_one_sentence(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says) as error:
        wrong(pipe)
    assert "\n" not in str(error.value)


def test_lenses_that_share_a_run_find_the_same_as_alone(pipe):
    arguments = {"contributions": {}, "word_maps": {"words": ["circle"]}, "head_gallery": {"query": "red"}}
    _, shared = run.run_lenses(pipe, PROMPT, arguments, **FEW_STEPS)
    assert list(shared) == list(arguments)
    for name, together in shared.items():
        alone = getattr(lenses, name)(pipe, PROMPT, **arguments[name], **FEW_STEPS)
        assert together.axes == alone.axes and together.coords == alone.coords
        assert torch.equal(together.tensor, alone.tensor)


def test_a_new_lens_is_one_function(pipe, monkeypatch):
    """It is registered, checked and run by the decorator alone."""
    for registry in ("LENSES", "SINGLE_RUN_LENSES"):
        monkeypatch.setattr(run, registry, dict(getattr(run, registry)))

    @run.lens
    def entropies(pipe, prompt, *, at_steps=None):
        rec = fe.record("*.attn.map", steps=at_steps, reduce=["entropy", fe.instruments.reductions.mean("query")])
        yield rec
        return run.stack_blocks(rec, pipe, "attn.map")

    found = entropies(pipe, PROMPT, at_steps=1, **FEW_STEPS)
    assert found.axes == ("block", "step", "head") and found.coords["block"] == BLOCKS
    assert run.LENSES["entropies"] is entropies
    _, shared = run.run_lenses(pipe, PROMPT, {"entropies": {"at_steps": 1}, "contributions": {}}, **FEW_STEPS)
    assert torch.equal(shared["entropies"].tensor, found.tensor)
    assert entropies(pipe, [PROMPT, PROMPT], at_steps=1, **FEW_STEPS).shape == (2, *found.shape)
    with pytest.raises(InstrumentError, match="the name of a lens must be one of .*entropies"):
        run.run_lenses(pipe, PROMPT, {"vital_layers": {}})

    @run.lens
    def twice(pipe, prompt):
        yield fe.record("vec")
        yield fe.record("vec")

    with pytest.raises(InstrumentError, match="twice must yield once"):
        twice(pipe, PROMPT, **FEW_STEPS)


@pytest.mark.parametrize(("variant", "argument"), [("nano-kontext", "reference"), ("nano-redux", "image_prompt")])
def test_lenses_measure_the_images_own_tokens(variant, argument):
    """The tokens of a reference follow those of the image; Redux's follow T5's."""
    pipe, prompt = fe.load(variant), "a red circle"
    options = {argument: Image.new("RGB", (128, 128), "red"), "steps": 2, "progress": False}
    for lens in (lenses.word_maps, lenses.concept_maps):
        assert lens(pipe, prompt, ["circle"], **options).sizes["row"] == 8
    assert lenses.head_gallery(pipe, prompt, "circle", **options).sizes["column"] == 8
    sites = ("single.0.x", "single.0.out", "sample.x0")
    with fe.record(*sites) as rec:
        pipe(prompt, **options)
    txt_len = 32 + (64 if variant == "nano-redux" else 0)
    x, out = (rec[site].tensor[:, txt_len : txt_len + 64] for site in sites[:2])
    expected = (out - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    found = lenses.contributions(pipe, prompt, **options)
    torch.testing.assert_close(found.tensor[found.coords["block"].index("single.0")], expected)
    predicted_x0 = lenses.x0_by_block(pipe, prompt, **options).tensor[-1]
    torch.testing.assert_close(predicted_x0, rec["sample.x0"].tensor, atol=1e-4, rtol=1e-4)
    assert fe.sites(pipe)


@pytest.mark.parametrize("name", lenses.__all__)
def test_every_lens_cites_a_paper(name):
    assert "arXiv" in getattr(lenses, name).__doc__


@pytest.mark.parametrize(("variant", "argument"), [("nano-kontext", "reference"), ("nano-redux", "image_prompt")])
def test_attention_shares_are_of_the_images_own_patches(variant, argument):
    """Computed by hand from the whole map: patches of a reference do not count; Redux's tokens count as text."""
    pipe, prompt, pads = fe.load(variant), "a red circle", slice(4, 32)  # after three tokens and the end-of-text token
    options = {argument: Image.new("RGB", (128, 128), "red"), "steps": 2, "progress": False}
    with fe.record("single.1.attn.map", steps=0) as rec:
        pipe(prompt, **options)
    txt_len = 96 if variant == "nano-redux" else 32
    own = rec["single.1.attn.map"].tensor[0][:, txt_len : txt_len + 64]  # [head, patch, key]
    for lens, keys in ((lenses.attention_balance, slice(txt_len)), (lenses.padding_mass, pads)):
        found = lens(pipe, prompt, at_steps=0, **options)
        by_hand = own[..., keys].sum(-1).mean()
        torch.testing.assert_close(found.tensor[found.coords["block"].index("single.1"), 0], by_hand)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda pipe: lenses.head_gallery(pipe, PROMPT, 3), "query must be of the type str . tuple.int, int., not 3"),
        (
            lambda pipe: lenses.head_gallery(pipe, PROMPT, "red", at_step=[0, 1]),
            "at_step must be of the type int, not .0, 1.",
        ),
        (lambda pipe: lenses.velocity_field(pipe, PROMPT, at_step=99, steps=2), "there is no step 99"),
        (lambda pipe: lenses.divergence(pipe, PROMPT, probes=0), "probes must be a whole number from 1"),
        (lambda pipe: lenses.straightness(None), "trajectory must be of the type Trajectory, not None"),
        (lambda pipe: lenses.curvature(None), "trajectory must be of the type Trajectory, not None"),
    ],
)
def test_wrong_arguments(pipe, wrong, says):
    with pytest.raises(InstrumentError, match=says):
        wrong(pipe)
