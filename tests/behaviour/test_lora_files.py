"""LoRA files by hand, as trainers write them, against W + scale * alpha / rank * B A; and ``fe.load(lora=...)``."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.checkpoints import merge, read
from fluxedu.cli import app
from fluxedu.errors import CheckpointError, RequestError
from fluxedu.memory.quantised import quantise

PROMPT = {"prompt": "a red circle", "seed": 1, "steps": 2, "progress": False}


def draw(*shape, seed=[100]):  # noqa: B006  (a counter)
    seed[0] += 1
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed[0])) / shape[-1] ** 0.5


@pytest.fixture(scope="module")
def plain():
    """The miniature's weights, by network."""
    pipe = fe.load()
    networks = {"flux": pipe.flux, "clip": pipe.prompt_encoder.clip, "t5": pipe.prompt_encoder.t5}
    return {name: {n: t.clone() for n, t in network.state_dict().items()} for name, network in networks.items()}


def weights(pipe):
    networks = {"flux": pipe.flux, "clip": pipe.prompt_encoder.clip, "t5": pipe.prompt_encoder.t5}
    return {name: network.state_dict() for name, network in networks.items()}


def save(folder, tensors, metadata=None, name="lora.safetensors"):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name, metadata)
    return folder / name


def factors(plain, network, weight, rank=4, rows=slice(None)):
    rows, columns = plain[network][weight][rows].shape
    return draw(rank, columns), draw(rows, rank)


def check(pipe, plain, network, weight, delta, rows=slice(None)):
    """Only these rows of this weight have changed, by ``delta``."""
    for name, tensors in weights(pipe).items():
        for key, tensor in tensors.items():
            expected = plain[name][key].clone()
            if (name, key) == (network, weight):
                expected[rows] += delta
                assert not torch.equal(expected, plain[name][key])
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6, msg=f"{name}.{key}")


CLIP = "text_model.encoder.layers.0.mlp.fc1"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
QKV, LINEAR1 = "double_blocks.0.txt_attn.qkv", "single_blocks.1.linear1"
SPELLINGS = {
    "official": ("flux", LINEAR1, f"{LINEAR1}.lora_A.weight"),
    "ComfyUI": ("flux", LINEAR1, f"diffusion_model.{LINEAR1}.lora_A.weight"),
    "all-in-one": ("flux", LINEAR1, f"model.diffusion_model.{LINEAR1}.lora_down.weight"),
    "kohya": ("flux", LINEAR1, "lora_unet_single_blocks_1_linear1.lora_down.weight"),
    "PEFT": ("flux", QKV, f"base_model.model.{QKV}.lora_A.weight"),
    "PEFT with an adapter's name": ("flux", QKV, f"base_model.model.{QKV}.lora_A.my-style_2.weight"),
    "compiled": ("flux", QKV, f"transformer._orig_mod.{QKV}.lora_A.default.weight"),
    "LyCORIS": ("flux", QKV, "lycoris_double_blocks_0_txt_attn_qkv.lora_down.weight"),
    "fused by diffusers": ("flux", QKV, "transformer.transformer_blocks.0.attn.to_added_qkv.lora_A.weight"),
    "XLabs": ("flux", QKV, "double_blocks.0.processor.qkv_lora2.down.weight"),
    "diffusers, CLIP": ("clip", CLIP, f"text_encoder.{CLIP}.lora_A.weight"),
    "transformers 5, CLIP": ("clip", CLIP, f"text_encoder.{CLIP.removeprefix('text_model.')}.lora_A.weight"),
    "older diffusers, CLIP": ("clip", CLIP, f"text_encoder.{CLIP}.lora_linear_layer.down.weight"),
    "kohya, CLIP": ("clip", CLIP, f"lora_te1_{CLIP.replace('.', '_')}.lora_down.weight"),
    "kohya, CLIP alone": ("clip", CLIP, f"lora_te_{CLIP.replace('.', '_')}.lora_down.weight"),
    "ComfyUI, CLIP": ("clip", CLIP, f"text_encoders.clip_l.transformer.{CLIP}.lora_down.weight"),
    "diffusers, T5": ("t5", T5, f"text_encoder_2.{T5}.lora_A.weight"),
    "kohya, T5": ("t5", T5, f"lora_te3_{T5.replace('.', '_')}.lora_down.weight"),
    "OneTrainer, T5": ("t5", T5, f"lora_te2_{T5.replace('.', '_')}.lora_down.weight"),
    "ComfyUI, T5": ("t5", T5, f"text_encoders.t5xxl.transformer.{T5}.lora_A.weight"),
}
UP = {"lora_A": "lora_B", "lora_down": "lora_up", ".down.": ".up."}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [None, 1.0, torch.tensor([2.0]), torch.tensor(8, dtype=torch.int64)])
def test_every_name_and_alpha(spelling, alpha, plain, tmp_path):
    network, layer, down = SPELLINGS[spelling]
    A, B = factors(plain, network, f"{layer}.weight")
    up = next(down.replace(a, b) for a, b in UP.items() if a in down)
    tensors = {down: A, up: B}
    if alpha is not None:
        stem = re.sub(r"\.(lora_A|lora_down|lora_linear_layer\.down|down)\..*", "", down)
        tensors[f"{stem}.alpha"] = torch.as_tensor(alpha)
    pipe = fe.load(lora=save(tmp_path, tensors), lora_scale=0.5)
    strength = 0.5 * (1.0 if alpha is None else float(alpha) / 4)
    check(pipe, plain, network, f"{layer}.weight", strength * B @ A)


def test_xlabs_single_blocks_change_queries_keys_and_values(plain, tmp_path):
    width = plain["flux"]["img_in.weight"].shape[0]
    A, B = factors(plain, "flux", "single_blocks.0.linear1.weight", rows=slice(3 * width))
    names = [f"single_blocks.0.processor.qkv_lora.{x}.weight" for x in ("down", "up")]
    pipe = fe.load(lora=save(tmp_path, dict(zip(names, (A, B), strict=True))))
    check(pipe, plain, "flux", "single_blocks.0.linear1.weight", B @ A, slice(3 * width))


def metadata(**values):
    return {"lora_adapter_metadata": json.dumps(values)}


@pytest.mark.parametrize(
    ("values", "strength"),
    [
        (metadata(**{"transformer.lora_alpha": 1, "transformer.r": 4}), 0.25),
        (metadata(**{"transformer.lora_alpha": 16, "transformer.r": 4, "text_encoder.lora_alpha": 99}), 4.0),
        (metadata(**{"transformer.lora_alpha": 6, "transformer.use_rslora": True}), 3.0),
        (metadata(**{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"to_q": 9, "attn.to_k": 2}}), 0.5),
        (metadata(**{"text_encoder.lora_alpha": 1, "text_encoder.r": 4}), 1.0),
        (metadata(lora_alpha=2, r=4), 0.5),
        ({"lora_alpha": "2", "r": "4"}, 0.5),
        ({"ss_network_alpha": "1", "ss_network_dim": "4"}, 1.0),  # a converter's, which has applied it
    ],
)
def test_alpha_in_the_metadata(values, strength, plain, tmp_path):
    width = plain["flux"]["img_in.weight"].shape[0]
    rows = slice(width, 2 * width)
    A, B = factors(plain, "flux", f"{QKV}.weight", rows=rows)
    layer = "transformer.transformer_blocks.0.attn.add_k_proj"
    if "to_k" in str(values):
        layer = "transformer.transformer_blocks.0.attn.to_k"
    file = save(tmp_path, {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}, values)
    weight = f"{QKV.replace('txt', 'img') if 'to_k' in layer else QKV}.weight"
    check(fe.load(lora=file), plain, "flux", weight, strength * B @ A, rows)


def test_kohyas_metadata_counts_where_a_layer_has_no_alpha(plain, tmp_path):
    A, B = factors(plain, "flux", f"{LINEAR1}.weight")
    layer = f"lora_unet_{LINEAR1.replace('.', '_')}"
    file = save(tmp_path, {f"{layer}.lora_down.weight": A, f"{layer}.lora_up.weight": B}, {"ss_network_alpha": "1.0"})
    check(fe.load(lora=file), plain, "flux", f"{LINEAR1}.weight", 0.25 * B @ A)


@pytest.mark.parametrize("name", ["lora.safetensors", "adapter_model.safetensors"])
def test_an_adapter_config_beside_the_file(name, plain, tmp_path):
    A, B = factors(plain, "flux", f"{QKV}.weight")
    file = save(tmp_path, {f"base_model.model.{QKV}.lora_A.weight": A, f"base_model.model.{QKV}.lora_B.weight": B})
    file = file.rename(tmp_path / name)
    with pytest.warns(UserWarning, match=f"{name} has no adapter_config.json beside it"):
        check(fe.load(lora=file), plain, "flux", f"{QKV}.weight", B @ A)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 1}))
    for path in (file, tmp_path):
        check(fe.load(lora=path), plain, "flux", f"{QKV}.weight", 0.25 * B @ A)


def test_a_configuration_for_tensors_in_memory(plain):
    A, B = factors(plain, "flux", f"{QKV}.weight")
    pipe, lora = fe.load(), {f"{QKV}.lora_A.weight": A, f"{QKV}.lora_B.weight": B}
    merged = merge(pipe.flux, lora, config={"r": 4, "lora_alpha": 1})
    check(pipe, plain, "flux", f"{QKV}.weight", 0.25 * B @ A)
    merged.unmerge()
    with pytest.raises(CheckpointError, match="every alpha of a LoRA must be a number"):
        merge(pipe.flux, lora, config={"lora_alpha": "1"})


@pytest.mark.parametrize(
    ("key", "network", "parameter"),
    [
        (f"{QKV}.diff_b", "flux", f"{QKV}.bias"),
        (f"lora_unet_{LINEAR1.replace('.', '_')}.diff_b", "flux", f"{LINEAR1}.bias"),
        (f"diffusion_model.{QKV}.diff", "flux", f"{QKV}.weight"),
        ("lora_unet_double_blocks_0_img_attn_norm_key_norm.w_norm", "flux",
         "double_blocks.0.img_attn.norm.key_norm.scale"),
        ("lora_te1_text_model_final_layer_norm.b_norm", "clip", "text_model.final_layer_norm.bias"),
        ("lora_te3_encoder_final_layer_norm.w_norm", "t5", "encoder.final_layer_norm.weight"),
    ],
)  # fmt: skip
def test_differences_are_added(key, network, parameter, plain, tmp_path):
    change = draw(*plain[network][parameter].shape)
    check(fe.load(lora=save(tmp_path, {key: change}), lora_scale=2), plain, network, parameter, 2 * change)


def test_norm_scales_are_replaced_and_a_bias_of_b_is_scaled(plain, tmp_path):
    A, B = factors(plain, "flux", f"{QKV}.weight")
    bias, scale = draw(len(B)), draw(*plain["flux"]["single_blocks.0.norm.key_norm.scale"].shape)
    tensors = {f"{QKV}.lora_A.weight": A, f"{QKV}.lora_B.weight": B, f"{QKV}.lora_B.bias": bias}
    tensors |= {"single_blocks.0.norm.key_norm.scale": scale, f"{QKV}.alpha": torch.tensor(2.0)}
    state = fe.load(lora=save(tmp_path, tensors), lora_scale=0.5).flux.state_dict()
    assert torch.equal(state["single_blocks.0.norm.key_norm.scale"], scale)
    torch.testing.assert_close(state[f"{QKV}.bias"], plain["flux"][f"{QKV}.bias"] + 0.25 * bias)
    torch.testing.assert_close(state[f"{QKV}.weight"], plain["flux"][f"{QKV}.weight"] + 0.25 * B @ A)


PAIR = {f"{QKV}.lora_A.weight": (2, 160), f"{QKV}.lora_B.weight": (480, 2)}


MOD = "double_blocks_0_img_mod_lin"
K_PROJ = "transformer.transformer_blocks.0.attn.add_k_proj"
KOHYAS_QKV = f"lora_unet_{QKV.replace('.', '_')}"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ([f"lora_unet_{MOD}.lokr_w1"], f"is a LoKr (it has 'lora_unet_{MOD}.lokr_w1'), which cannot be merged"),
        ([f"lycoris_{MOD}.hada_w1_a"], "is a LoHa"),
        ([f"lora_unet_{MOD}.oft_blocks"], "is an OFT"),
        (["x.oft_diag", "x.alpha"], "is an OFT"),
        (["transformer.x.lora_magnitude_vector.weight"], "is a DoRA"),
        (["lora_unet_x.dora_scale"], "is a DoRA"),
        (["x.lora_mid.weight"], "is a LoRA of convolutions"),
        (["text_encoder.text_model.embeddings.token_embedding.lora_embedding_A"], "is a LoRA of embeddings"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "is an IP-Adapter"),
        (["bundle_emb.word.clip_l"], "is a textual inversion"),
        (
            [f"lora_unet_double_blocks_99_img_mod_lin.lora_{factor}.weight" for factor in ("down", "up")],
            "changes 'lora_unet_double_blocks_99_img_mod_lin', which this model does not have",
        ),
        (
            [f"{QKV}.lora_C.weight", "x.y"],
            f"changes '{QKV}.lora_C.weight' (and 1 more), which this model does not have",
        ),
        ([f"{QKV}.scalar"], f"changes '{QKV}.scalar', which this model does not have"),
        (["img_in.lora_A.first.weight", "img_in.lora_A.second.weight"], "holds several adapters"),
        (
            [f"{KOHYAS_QKV}.lora_down.weight", f"{KOHYAS_QKV}.lora_up.weight"],
            f"changes the same weights twice, as '{QKV}' and '{KOHYAS_QKV}'",
        ),
        ([f"{K_PROJ}.lora_A.weight", f"{K_PROJ}.lora_B.weight"], "changes the same weights twice"),
        (["img_in.alpha"], "lacks the lora_A of 'img_in'"),
    ],
)
def test_nothing_is_ignored(keys, sentence, tmp_path):
    """Beside a LoRA that could be merged."""
    shapes = {key: (2, 160) if re.search("down|_A", key) else (160 if "k_proj" in key else 480, 2) for key in keys}
    tensors = {name: draw(*shape) for name, shape in (PAIR | shapes).items()}
    tensors = {name: tensor.sum() if name.endswith("alpha") else tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=f"^lora.safetensors {re.escape(sentence)}"):
        fe.load(lora=save(tmp_path, tensors))


def test_a_change_of_clips_projection_has_no_effect_and_is_mentioned(plain, tmp_path):
    tensors = {name: draw(*shape) for name, shape in PAIR.items()}
    tensors |= {
        "lora_te1_text_projection.lora_down.weight": draw(2, 8),
        "lora_te1_text_projection.lora_up.weight": draw(8, 2),
    }
    with pytest.warns(UserWarning, match="also changes 'lora_te1_text_projection', which FLUX does not use"):
        pipe = fe.load(lora=save(tmp_path, tensors))
    check(pipe, plain, "flux", f"{QKV}.weight", tensors[f"{QKV}.lora_B.weight"] @ tensors[f"{QKV}.lora_A.weight"])


# ---------------------------------------------------------------- fe.load


@pytest.fixture
def mixed(plain, tmp_path):
    """Two files that change the flow, CLIP and T5, one of them in bfloat16."""
    files = []
    for number, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        tensors = {}
        for network, layer, down in (SPELLINGS[name] for name in ("kohya", "kohya, CLIP", "kohya, T5")):
            A, B = factors(plain, network, f"{layer}.weight", rank=number)
            tensors |= {down: A.to(dtype), down.replace("lora_down", "lora_up"): B.to(dtype)}
        files.append(save(tmp_path, tensors, name=f"{number}.safetensors"))
    return files


@pytest.mark.parametrize(
    "request_of",
    [
        lambda a, b: ([a, (b, -0.5)], 2.0),
        lambda a, b: ([a, str(b)], [2, -0.5]),
        lambda a, b: ([(a, 2.0), (b, -0.5)], 1.0),
    ],
)
def test_several_files_with_scales(request_of, mixed, plain):
    lora, scale = request_of(*mixed)
    pipe, expected = fe.load(lora=lora, lora_scale=scale), {name: dict(tensors) for name, tensors in plain.items()}
    for file, factor in zip(mixed, (2.0, -0.5), strict=True):
        tensors = read(file)
        for network, layer, down in (SPELLINGS[name] for name in ("kohya", "kohya, CLIP", "kohya, T5")):
            product = tensors[down.replace("lora_down", "lora_up")].float() @ tensors[down].float()
            expected[network][f"{layer}.weight"] = expected[network][f"{layer}.weight"] + factor * product
    for network, tensors in weights(pipe).items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[network][name], rtol=1e-6, atol=1e-6, msg=name)
    pipe.lora.unmerge()
    for network, tensors in weights(pipe).items():
        assert all(torch.equal(tensor, plain[network][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", ["no-modulations", "stream"])
def test_streamed_weights_are_merged_before_they_are_placed(memory, dtype, mixed):
    plain = fe.load(dtype=dtype)(**PROMPT).latents
    expected = fe.load(lora=mixed, dtype=dtype)(**PROMPT).latents
    pipe = fe.load(lora=mixed, memory=memory, dtype=dtype)
    assert torch.equal(pipe(**PROMPT).latents, expected) and not torch.equal(expected, plain)
    pipe.lora.unmerge()
    assert torch.equal(pipe(**PROMPT).latents, plain) and pipe.lora.nbytes == 0


def test_weights_are_quantised_after_merging(mixed):
    pytest.importorskip("torchao")
    pipe, merged = fe.load(lora=mixed, quantise="int8"), fe.load(lora=mixed)
    quantise(merged.flux, "int8")
    assert torch.equal(pipe(**PROMPT).latents, merged(**PROMPT).latents)
    assert not torch.equal(pipe(**PROMPT).latents, fe.load(quantise="int8")(**PROMPT).latents)
    with pytest.raises(CheckpointError, match="cannot be taken out of quantised weights; load again without lora="):
        pipe.lora.unmerge()
    with pytest.raises(CheckpointError, match="cannot be merged into quantised weights; merge it before they are"):
        merge(pipe.flux, read(mixed[0]))


def test_the_text_encoders_can_be_given_to_merge(mixed, plain):
    pipe = fe.load()
    with pytest.raises(CheckpointError, match=re.escape("merge([flux, clip, t5], lora) also merges what is for")):
        merge(pipe.flux, read(mixed[0]))
    merged = merge([pipe.flux, pipe.prompt_encoder.clip, pipe.prompt_encoder.t5], read(mixed[0]))
    for network, tensors in weights(fe.load(lora=mixed[0])).items():
        assert all(torch.equal(tensor, weights(pipe)[network][name]) for name, tensor in tensors.items())
    merged.unmerge()
    assert all(torch.equal(t, plain["clip"][n]) for n, t in pipe.prompt_encoder.clip.state_dict().items())


def test_a_member_that_is_a_lora_is_streamed_too_and_keeps_its_own_change(mixed):
    pipe, plain = fe.load("nano-canny", memory="stream", lora=mixed), fe.load("nano-canny")
    assert not torch.equal(pipe.flux.single_blocks[1].linear1.weight, plain.flux.single_blocks[1].linear1.weight)
    pipe.lora.unmerge()
    assert all(torch.equal(t, pipe.flux.state_dict()[n]) for n, t in plain.flux.state_dict().items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora": ["hollow", "hollow"], "lora_scale": [1.0]}, "lora_scale must be one number or one for each of the 2"),
        ({"lora": ["hollow", 3]}, "lora must be a file or one of hollow, not 3."),
        ({"lora": [("hollow", "much")]}, "lora_scale must be a number, 1 for the change as trained, not 'much'."),
        ({"lora": [], "lora_scale": [0.5]}, "lora_scale must be one number or one for each of the 0"),
    ],
)
def test_requests_that_are_errors(options, sentence):
    with pytest.raises(RequestError, match=re.escape(sentence)):
        fe.load(**options)


def test_no_lora_in_the_list():
    assert fe.load(lora=[]).lora is None


def test_the_command_line_takes_several(mixed, tmp_path):
    files = [str(file) for file in mixed]
    arguments = ["sample", "a red circle", "--steps", "1", "-o", str(tmp_path / "out.png"), "--lora", files[0]]
    arguments += ["--lora", files[1], "--lora-scale", "2", "--lora-scale", "-0.5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    image = fe.load(lora=files, lora_scale=[2, -0.5])("a red circle", steps=1, progress=False).images[0]
    from PIL import Image, ImageChops

    assert ImageChops.difference(Image.open(tmp_path / "out.png"), image).getbbox() is None
    result = CliRunner().invoke(app, [*arguments, "--overwrite", "--lora-scale", "3"])
    assert result.exit_code and "one for each of the 2 LoRAs" in result.output
