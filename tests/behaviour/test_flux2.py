"""Every instrument, lens and plot works on FLUX.2, under the names of FLUX.1."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from flux2_sizes import TINY_FLUX2, make_flux2_pipe
from safetensors.torch import save_file as save_tensors
from torch import nn

import fluxedu as fe
from fluxedu import plots, probe, trace, widgets
from fluxedu.checkpoints import convert_file, load_model, save_file, save_folder
from fluxedu.errors import CheckpointError, InstrumentError, RequestError
from fluxedu.instruments import lenses
from fluxedu.instruments.lenses.run import LENSES
from fluxedu.instruments.wiring import wiring
from fluxedu.memory.offload import decode_tiled
from fluxedu.memory.placement import Networks, Placement, activations
from fluxedu.models import Flux2, Flux2AutoEncoder, Flux2AutoEncoderConfig, Flux2Config, GatedMLP, SelfAttention
from fluxedu.models.blocks import MLP
from fluxedu.models.meta_init import meta_init
from fluxedu.nano import sizes
from fluxedu.sampling import FluxPipeline, T5Prompts
from fluxedu.sampling.flux2 import HIDDEN_STATES

PROMPT = "a red circle left of a blue square"
RUN = {"steps": 2, "height": 32, "width": 32, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    """As dev: Mistral, with a guidance input."""
    return make_flux2_pipe("mistral", guidance_embed=True, guidance=3.0)


@pytest.fixture(scope="module")
def klein():
    return make_flux2_pipe()


@pytest.fixture(scope="module")
def walked(pipe):
    """Every site that passes in a run from a picture and in a guided one, and the shape of what passes."""
    passed = {}

    def watcher(owner, name, value):
        passed[probe.site(owner, name)] = tuple(value.shape)
        return value

    probe.watch(watcher)
    try:
        pipe(PROMPT, image=torch.zeros(1, 3, 32, 32), true_cfg_scale=2.0, **{**RUN, "steps": 1})
    finally:
        probe.watch(None)
    return passed


def test_the_catalogue_is_what_passes(pipe, walked):
    sites = {site.name: site for site in fe.sites(pipe)}
    assert sites.keys() == walked.keys()
    letters = {"B": (1, 2), "L": (64,), "N": (16,), "T": (80,)}
    for name, shape in walked.items():
        assert len(sites[name].axes) == len(shape), name
        pairs = list(zip(sites[name].shape, shape, strict=True))
        assert all(
            actual in letters.get(stated, (stated if isinstance(stated, int) else actual,)) for stated, actual in pairs
        ), name


def test_the_names_are_those_of_flux1(pipe, klein):
    """But for the pooled vector, which FLUX.2 has not, and the text encoders."""
    flux1 = {site.name for site in fe.sites(fe.load().flux)}
    flux2, small = ({site.name for site in fe.sites(one.flux)} for one in (pipe, klein))
    of_first_blocks = lambda names: {n for n in names if n[:7] in ("double.", "single.") and n[7] in "01"}  # noqa: E731
    assert of_first_blocks(flux2) == of_first_blocks(flux1)
    outside = {n for n in flux1 if not n.startswith(("double.", "single."))}
    assert {n for n in flux2 if not n.startswith(("double.", "single."))} == outside - {"vec.text"}
    assert flux2 - small == {"vec.guidance"}


def test_the_official_sizes_without_their_weights():
    sites = {site.name: site for site in fe.sites("klein")}
    assert sites["double.4.attn.map"].shape == ("B", 24, "T", "T")
    assert sites["single.19.mlp_hidden"].shape == ("B", "T", 9216)
    assert sites["velocity"].shape == ("B", "N", 128)
    assert "single.47.mlp_hidden" in {site.name for site in fe.sites("flux2-dev")}


def test_record(pipe):
    plain = pipe(PROMPT, **RUN)
    with fe.record("double.1.attn.map", "single.*.contribution", "double.0.img_mod.gate1", "vec", "txt_in") as rec:
        out = pipe([PROMPT, "one"], seed=[0, 1], **RUN)
    assert torch.equal(out.latents[:1], pipe([PROMPT, "one"], seed=[0, 1], **RUN).latents[:1])
    assert torch.allclose(plain.latents, out.latents[:1], atol=1e-4)
    weights = rec["double.1.attn.map"].tensor
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert rec["vec"].tensor.shape[-1] == 48


def test_shared_modulation_is_the_same_in_all_blocks_and_can_be_changed_in_one(pipe):
    names = ("double.0.img_mod.gate1", "double.1.img_mod.gate1")

    def gates():
        with fe.record(*names, "double.0.img_attn_contribution", "double.1.img_attn_contribution") as rec:
            pipe(PROMPT, **RUN)
        return [rec[name].tensor for name in names], rec["double.1.img_attn_contribution"].tensor

    (first, second), plain = gates()
    assert torch.equal(first, second)
    with fe.intervene("double.1.img_mod.gate1", lambda gate, ctx: 0 * gate):
        (first, second), changed = gates()
    assert first.abs().max() > 0
    assert second.abs().max() == 0 == changed.abs().max()
    assert plain.abs().max() > 0


@pytest.mark.parametrize("block", ["double.0", "double.1", "single.0", "single.1"])
def test_ablating_a_block_leaves_its_input(pipe, block):
    with fe.ablate(block), fe.record(f"{block}.x", f"{block}.out") as rec:
        pipe(PROMPT, **RUN)
    assert torch.equal(rec[f"{block}.x"].tensor, rec[f"{block}.out"].tensor)


def test_ablating_heads_words_and_modulation_changes_the_image(pipe):
    plain = pipe(PROMPT, **RUN).latents
    for change in (
        fe.ablate("single.1.heads", heads=[0]),
        fe.ablate("*.attn.map", tokens=["red"], queries="img"),
        fe.ablate("double.*.txt_mod.*"),
        fe.ablate("single.0.mlp_hidden"),
        fe.intervene("*.attn.rope", lambda rope, ctx: torch.ones_like(rope)),
    ):
        with change:
            assert not torch.allclose(pipe(PROMPT, **RUN).latents, plain, atol=1e-4)
    assert torch.equal(pipe(PROMPT, **RUN).latents, plain)


def test_the_terms_of_a_sum_add_up(pipe):
    """Each head's contribution, and attention and MLP in single blocks, which have no bias here."""
    with fe.record("double.0.img_head_contribution", "double.0.img_attn_contribution", "single.0.*contribution") as rec:
        pipe(PROMPT, **RUN)
    heads = rec["double.0.img_head_contribution"].tensor.sum(-3)
    assert torch.allclose(heads, rec["double.0.img_attn_contribution"].tensor, atol=1e-5)
    parts = rec["single.0.attn_contribution"].tensor + rec["single.0.mlp_contribution"].tensor
    assert torch.allclose(parts, rec["single.0.contribution"].tensor, atol=1e-5)


def test_patching(pipe):
    """All tokens of the last block from another run: the velocity of that run, and so its image."""
    run = {**RUN, "steps": 1}
    other = pipe("a green triangle", **run)
    with fe.record("single.1.out") as rec:
        pipe("a green triangle", **run)
    with fe.patch("single.1.out", rec):
        patched = pipe(PROMPT, **run)
    assert torch.allclose(patched.latents, other.latents, atol=1e-6)


class OwnAttention(SelfAttention):
    pass


class OwnMLP(nn.Module):
    """SwiGLU as in the lecture: two matrices side by side."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.add_module("0", nn.Linear(dim, 2 * hidden, bias=False))
        self.add_module("2", nn.Linear(hidden, dim, bias=False))

    def forward(self, x):
        gate, value = self._modules["0"](x).chunk(2, dim=-1)
        return self._modules["2"](gate * gate.sigmoid() * value)


def test_swapping(pipe):
    plain = pipe(PROMPT, **RUN).latents
    with fe.swap("double.*.img_attn", OwnAttention, pipe), fe.swap("double.*.txt_mlp", OwnMLP, pipe):
        assert torch.allclose(pipe(PROMPT, **RUN).latents, plain, atol=1e-4)
    for path in ("time_in", "final_layer", "double.0", "single.1", "double.0.img_mlp"):
        kind = type(
            pipe.flux.get_submodule(path.replace("double.", "double_blocks.").replace("single.", "single_blocks."))
        )
        with fe.swap(path, kind, pipe):
            assert torch.allclose(pipe(PROMPT, **RUN).latents, plain, atol=1e-4)
    assert torch.equal(pipe(PROMPT, **RUN).latents, plain)
    assert isinstance(pipe.flux.double_blocks[0].txt_mlp, GatedMLP)
    assert issubclass(GatedMLP, MLP)


# --- lenses and plots -----------------------------------------------------------------------------

ARGUMENTS = {
    "word_maps": {"words": ["red", "square"]},
    "head_gallery": {"query": "circle"},
    "concept_maps": {"words": ["circle", "sky"]},
    "divergence": {"probes": 1},
    "velocity_field": {"size": 2},
    "modulation": {},
}


@pytest.mark.parametrize("name", LENSES)
def test_every_lens(pipe, name):
    run = dict(RUN)
    if name in ("straightness", "curvature"):
        found = LENSES[name](pipe(PROMPT, **run).trajectory)
    elif name == "modulation":
        found = LENSES[name](pipe, PROMPT)
    else:
        found = LENSES[name](pipe, PROMPT, **ARGUMENTS.get(name, {}), **run)
    assert found.tensor.numel() > 0
    assert torch.isfinite(found.tensor).all()


def test_word_maps_are_columns_of_the_attention_map(pipe):
    """The word's own tokens are found behind the padding on the left and the system message."""
    tokenizer = pipe.prompt_encoder.tokenizer
    indices = [i for i, (start, end) in enumerate(tokenizer.spans(PROMPT)) if PROMPT[start:end].strip() == "red"]
    assert len(indices) == 1
    assert tokenizer.pieces(PROMPT)[indices[0]].endswith("red")
    found = lenses.word_maps(pipe, PROMPT, ["red"], **RUN)
    with fe.record("double.1.attn.map") as rec:
        pipe(PROMPT, **RUN)
    weights = rec["double.1.attn.map"].tensor.mean(-3)  # over heads
    column = weights.reshape(-1, *weights.shape[-2:])[:, 64:, indices[0]].mean(0)
    assert torch.allclose(found.tensor[found.coords["block"].index("double.1")].flatten(), column, atol=1e-6)


def test_plots(pipe):
    maps = lenses.word_maps(pipe, PROMPT, ["red", "square"], **RUN)
    figures = [
        plots.modulation(lenses.modulation(pipe, PROMPT)),
        plots.word_maps(maps, maps.images[0]),
    ]
    assert all(figures)
    plt.close("all")


# --- the pipeline ---------------------------------------------------------------------------------


def test_the_tokens_of_a_chat(pipe, klein):
    for one, side in ((pipe, "left"), (klein, "right")):
        tokenizer = one.prompt_encoder.tokenizer
        spans, pieces, padding = tokenizer.spans(PROMPT), tokenizer.pieces(PROMPT), tokenizer.padding(PROMPT)
        assert "".join(PROMPT[start:end] for start, end in spans) == PROMPT
        assert padding
        assert all(spans[i] == (0, 0) for i in padding)
        assert (padding[0] == 0) == (side == "left")
        assert len(spans) == 64 == len(pieces) + (len(padding) if side == "right" else 0)
    assert "<think>" in klein.prompt_encoder.tokenizer.chat(PROMPT)


def test_word_order_reaches_the_transformer(pipe):
    """The transformer itself: with its text tokens in another order, it predicts another velocity; FLUX.1 does not."""

    def change(pipe, order):
        with fe.intervene("sample.txt", lambda txt, ctx: txt[:, order]):
            return pipe(PROMPT, **RUN).latents

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(change(pipe, order), pipe(PROMPT, **RUN).latents, atol=1e-3)
    nano = fe.load()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(change(nano, order), nano(PROMPT, **RUN).latents, atol=1e-3)
    text, names = (Path(__file__).parents[2] / "docs" / "flux2.md").read_text(), {"torch": torch, "fe": fe}
    exec(re.search(r"```python\n(def change_of_order.*?)```", text, re.DOTALL)[1], names)  # the page's own code
    assert names["change_of_order"](nano, PROMPT, **RUN) < 1e-4 < 1e-2 < names["change_of_order"](pipe, PROMPT, **RUN)


def test_gradients(pipe):
    with fe.gradients():
        out = pipe(PROMPT, **RUN)
        out.latents.square().sum().backward()
    assert all(p.grad is not None for p in pipe.flux.parameters())
    pipe.flux.zero_grad()


def test_a_missing_guidance_scale_and_other_networks_are_refused(pipe, klein):
    x = torch.zeros(1, 4, 16), torch.zeros(4, 4), torch.zeros(1, 3, 36), torch.zeros(3, 4), torch.ones(1)
    with pytest.raises(RequestError, match="guidance"):
        pipe.flux(*x)
    assert klein.flux(*x).shape == (1, 4, 16)
    with pytest.raises(RequestError, match="ids must have one position id per entry"):
        klein.flux(x[0], torch.zeros(4, 3), x[2], torch.zeros(3, 3), x[4])
    with pytest.raises(RequestError, match="the language model's width is 36, not 24"):
        type(pipe)(pipe.prompt_encoder, Flux2(TINY_FLUX2.with_(context_in_dim=24)), pipe.autoencoder, pipe.defaults, 64)


# --- loading --------------------------------------------------------------------------------------


def write_folder(folder, pipe, distilled):
    """As on the hub."""
    for part, network in (("transformer", pipe.flux), ("vae", pipe.autoencoder)):
        save_folder(network.state_dict(), folder / part, config=network.config)
    pipe.whole_language_model.save_pretrained(folder / "text_encoder")
    pipe.prompt_encoder.tokenizer.fast.save_pretrained(folder / "tokenizer")
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def few_layers(monkeypatch):
    """The layers that are read, for language models of four."""
    for kind in HIDDEN_STATES:
        monkeypatch.setitem(HIDDEN_STATES, kind, (1, 2, 3))


@pytest.mark.parametrize("distilled", [True, False])
def test_loading_klein(tmp_path, few_layers, klein, distilled):
    """In every memory mode the same image to the last bit, which is the one of the networks that were saved."""
    folder = write_folder(tmp_path / "klein", klein, distilled)
    run = {"steps": 2, "height": 32, "width": 32, "progress": False}
    loaded = fe.load(folder)
    assert (loaded.defaults.steps, loaded.defaults.guidance) == ((4, 1.0) if distilled else (50, 4.0))
    expected = loaded(PROMPT, **run).latents
    whole = type(loaded)(loaded.prompt_encoder, klein.flux, klein.autoencoder, loaded.defaults, 64)
    assert torch.equal(whole(PROMPT, **run).latents, expected)
    if distilled:
        for memory in ("full", "no-modulations", "stream"):
            assert torch.equal(fe.load(folder, memory=memory)(PROMPT, **run).latents, expected)
        assert fe.load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_loading_the_transformers_file(tmp_path, few_layers, klein, monkeypatch):
    """The other parts come from beside it, or from a repository in the cache whose language model fits."""
    folder = write_folder(tmp_path / "klein", klein, True)
    expected = fe.load(folder)(PROMPT, **RUN).latents
    beside = save_file(klein.flux.state_dict(), folder / "flux-2-klein-4b.safetensors", config=klein.flux.config)
    loaded = fe.load(beside)
    assert loaded.defaults.steps == 4
    assert torch.equal(loaded(PROMPT, **RUN).latents, expected)
    alone = tmp_path / "my-tune.safetensors"
    shutil.move(beside, alone)
    monkeypatch.setattr("fluxedu.checkpoints.official.snapshot", lambda repository, revision=None: None)
    with pytest.raises(CheckpointError, match=r"lacks vae/\*, text_encoder/\*, tokenizer/\*"):
        fe.load(alone)
    found = lambda repository, revision=None: folder if repository.endswith("klein-4B") else None  # noqa: E731
    monkeypatch.setattr("fluxedu.checkpoints.official.snapshot", found)
    with pytest.raises(RequestError, match="like='klein' or like='klein-base'"):
        fe.load(alone)
    assert fe.load(alone, like="klein-base").defaults.steps == 50
    assert torch.equal(fe.load(alone, like="klein")(PROMPT, **RUN).latents, expected)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    with pytest.raises(CheckpointError, match=r"lacks text_encoder/\*, tokenizer/\*"):
        fe.load(alone)


def test_loading_with_a_lora(tmp_path, few_layers, klein):
    """Merged while it is loaded, the same as merged afterwards; unmerged, the transformer of the folder."""
    folder, generator = write_folder(tmp_path / "klein", klein, True), torch.Generator().manual_seed(0)
    layer = "double_stream_modulation_img.lin"
    lora = {f"{layer}.lora_A.weight": torch.randn(2, 48, generator=generator)}
    lora[f"{layer}.lora_B.weight"] = torch.randn(288, 2, generator=generator)
    file = save_tensors(lora, tmp_path / "lora.safetensors") or tmp_path / "lora.safetensors"
    loaded = fe.load(folder, lora=file, lora_scale=0.5)
    expected = (
        klein.flux.double_stream_modulation_img.lin.weight
        + 0.5 * lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
    )
    assert torch.allclose(loaded.flux.double_stream_modulation_img.lin.weight, expected, atol=1e-5)
    loaded.lora.unmerge()
    assert all(torch.equal(p, q) for p, q in zip(loaded.flux.parameters(), klein.flux.parameters(), strict=True))


def test_files_in_both_layouts(tmp_path, klein):
    """To one file with the official names, to diffusers' folder, and back: the same bits, whole numbers too."""
    for network in (klein.flux, klein.autoencoder):
        state, name = network.state_dict(), type(network).__name__
        official = save_file(state, tmp_path / f"{name}.safetensors", config=network.config)
        folder = convert_file(official, tmp_path / name, to="diffusers")
        again = convert_file(folder, tmp_path / f"{name}-again.safetensors", to="bfl")
        for path in (official, folder, again):
            found = load_model(path)
            assert type(found) is type(network) and found.config == network.config
            assert all(torch.equal(t, state[n]) and t.dtype == state[n].dtype for n, t in found.state_dict().items())
        half = load_model(official, dtype=torch.bfloat16).state_dict()
        assert {t.dtype for n, t in half.items() if n != "bn.num_batches_tracked"} == {torch.bfloat16}
        assert half.get("bn.num_batches_tracked", torch.tensor(0)).dtype == torch.int64


def test_loading_dev(tmp_path, few_layers, pipe):
    folder = write_folder(tmp_path / "dev", pipe, False)
    loaded = fe.load(folder)
    assert loaded.prompt_encoder.tokenizer.kind == "mistral"
    assert loaded(PROMPT, **RUN).latents.shape == (1, 4, 8, 8)


def test_what_is_missing_is_named(tmp_path, klein, few_layers, monkeypatch):
    folder = write_folder(tmp_path / "klein", klein, True)
    with pytest.raises(CheckpointError, match="which this model does not have|here takes"):
        fe.load(folder, lora="hollow")  # FLUX.1's
    with pytest.raises(CheckpointError, match="revision= is for repositories"):
        fe.load(folder, revision="main")
    shutil.rmtree(folder / "vae")
    with pytest.raises(
        CheckpointError, match=r"lacks vae/\*; get them with `hf download black-forest-labs/FLUX.2-klein-4B"
    ):
        fe.load(folder)
    monkeypatch.setattr("fluxedu.checkpoints.official.snapshot", lambda repository, revision: None)
    with pytest.raises(CheckpointError, match="'klein' lacks transformer"):
        fe.load("klein")


def test_parts_of_the_official_sizes_fit_on_their_cards():
    """Counted, not measured: what each memory mode needs for klein without its language model."""
    with meta_init():
        networks = Networks(Flux2(Flux2Config.variant("klein-4b")), Flux2AutoEncoder(), language_model=nn.Module())
    need = networks.need(Placement(), 1024, 1024, 512)
    assert 7.9e9 < need.resident < 8.0e9  # 3.88 + 0.084 G weights in bfloat16
    streamed = networks.need(Placement("stream", 25), 1024, 1024, 512)
    assert streamed.resident < 0.5e9
    assert activations(Flux2Config(), Flux2AutoEncoderConfig(), 1024, 1024, 512, torch.bfloat16, False)[0] < 4e9


def test_tiles(klein):
    """A tile as large as the latent is the whole image; smaller ones differ at the seams only."""
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = klein.autoencoder.decode(latent)
        assert torch.allclose(decode_tiled(klein.autoencoder, latent, 16, 4), whole, atol=1e-5)
        tiled = decode_tiled(klein.autoencoder, latent, 11, 4)
    assert torch.nn.functional.cosine_similarity(tiled.flatten(), whole.flatten(), dim=0) > 0.9


# --- explorers and the trace ------------------------------------------------------------------------

OF_TEXT_ENCODERS = {"similarity": "CLIP", "tokens": "T5"}


@pytest.mark.parametrize("name", widgets.explorers())
def test_every_explorer(klein, name):
    """The example of each; those of CLIP and of T5 say in a sentence what FLUX.2 reads instead."""
    example = widgets.explorers()[name].example
    if name in OF_TEXT_ENCODERS:
        expected = f"this shows {OF_TEXT_ENCODERS[name]}, but this FLUX.2 reads prompts with a language model"
        with pytest.raises(InstrumentError, match=expected):
            example(klein)
    else:
        assert example(klein).view["panels"]


def test_positions_shows_the_rows_and_columns_of_four_axes(klein):
    """The score of two vectors of ones: the sum of cosines of their offset times RoPE's frequencies."""
    shown = widgets.positions(klein, side=4, block="single.0").view["text"]
    dims, theta = TINY_FLUX2.axes_dim, TINY_FLUX2.theta
    offset, score = (0, 3 - 2), 0.0  # from the query in the middle to the key
    for axis, at in enumerate((0, *offset, 0)):
        frequencies = theta ** -(torch.arange(0, dims[axis], 2, dtype=torch.float64) / dims[axis])
        score += float(2 * torch.cos(at * frequencies).sum())
    assert f"their score {score / sum(dims) ** 0.5:.2f}" in shown


def test_the_trace_has_a_language_model_and_all_sites(pipe):
    _, stages = trace.stages(pipe, "a red circle", **RUN)
    titles = [stage.part.title for stage in stages]
    assert titles[:3] == ["Language model", "Noise", "Time + guidance"]
    assert "a Ġred Ġcircle" in stages[0].text and "padding tokens" in stages[0].text
    shown = {site.name for stage in stages for site in stage.sites}
    unused = ("sample.negative", "sample.prompted", "ae.encoder.", "ae.latent")  # of guidance, and of a picture
    assert shown == {s.name for s in fe.sites(pipe) if not s.name.startswith(unused)}
    assert '"single.1.attn.map"' in trace.map_data(stages)


def test_a_flux2_that_reads_t5_alone():
    """As the miniature FLUX.2: the map shows T5 and its tokenizer, and neither CLIP nor a language model."""
    nano = fe.load()
    texts = T5Prompts(nano.prompt_encoder.t5_tokenizer, nano.prompt_encoder.t5)
    pipe = FluxPipeline(texts, Flux2(sizes.FLUX2), nano.autoencoder, nano.defaults, 128)
    boxes = {box["id"] for box in wiring(pipe)["boxes"]}
    assert {"t5_tokenizer", "t5"} <= boxes
    assert not boxes & {"clip_tokenizer", "clip", "tokenizer", "language_model"}
    with pytest.raises(InstrumentError, match="this FLUX.2 reads prompts with T5 alone"):
        widgets.similarity(pipe)
    assert widgets.tokens(pipe, "a red circle").view["panels"]


# --- reference pictures -------------------------------------------------------------------------------


def test_reference_pictures(klein):
    """Their order matters, since it is in their ids; the first decides the size; positions() knows them all."""
    pictures = [torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) for size in ((32, 48), (24, 32))]
    run = {"steps": 1, "progress": False}
    out = klein(PROMPT, reference=pictures, **run).latents
    assert out.shape[-2:] == (8, 12)
    assert torch.equal(klein(PROMPT, reference=tuple(pictures), **run).latents, out)
    swapped = klein(PROMPT, reference=pictures[::-1], height=32, width=48, **run).latents
    assert not torch.allclose(swapped, out, atol=1e-4)
    same = fe.instruments.interventions.positions(lambda ids: ids)
    with fe.intervene("*.attn.rope", same):
        assert torch.equal(klein(PROMPT, reference=pictures, **run).latents, out)
    frames = []
    with fe.intervene(
        "double.0.attn.rope", fe.instruments.interventions.positions(lambda ids: frames.append(ids) or ids)
    ):
        klein(PROMPT, reference=pictures, **run)
    assert frames[0][:, 0].tolist() == [0] * 24 + [10] * 24 + [20] * 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": []}, "reference= must be a picture, not"),
        ({"reference": [torch.zeros(3, 32, 32), "b.png"]}, "must be a PIL image"),
        ({"image": [torch.zeros(3, 32, 32)] * 2}, r"image= must be a picture, .*reference=\[a, b\]"),
        ({"reference": [torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 32, 32)]}, "reference has 2 entries for 1 images"),
    ],
)
def test_pictures_that_are_refused(klein, arguments, message):
    with pytest.raises(RequestError, match=message):
        klein(PROMPT, **arguments, **RUN)


def test_flux1_reads_one_reference_picture():
    picture = torch.zeros(3, 32, 32)
    with pytest.raises(RequestError, match="reference= must be one picture, not 2; only FLUX.2 reads several"):
        fe.load("nano-kontext")("make the circle green", reference=[picture, picture], **RUN)
