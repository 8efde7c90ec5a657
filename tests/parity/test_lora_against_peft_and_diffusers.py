"""LoRA files written by PEFT and diffusers, merged by us and by them: every weight must come out the same."""

import re

import peft
import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from flux2_sizes import TINY_FLUX2
from oracle import randomise
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from sizes import TINY_CLIP, TINY_FLUX, TINY_T5
from test_flux2_against_diffusers import diffusers_flux2
from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel
from transformers import T5Config as TheirT5Config

from fluxedu.checkpoints import convert, load_into, merge, read, to_diffusers_config
from fluxedu.checkpoints.lora_files import read_lora
from fluxedu.errors import CheckpointError
from fluxedu.models import CLIPTextEncoder, Flux, Flux2, T5Encoder

OPTIONS = {
    "alpha is a quarter of the rank": {"r": 8, "lora_alpha": 2},
    "alpha is the rank": {"r": 4, "lora_alpha": 4},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"attn.to_q": 2, r"transformer_blocks\.1\.ff\.net\.2": 6},
        "alpha_pattern": {"to_k": 3, r"^transformer_blocks\.0\.attn\.to_out\.0": 16, "norm_out.linear": 1},
    },
    "patterns and rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"proj_mlp": 1}},
    "a bias of B": {"r": 4, "lora_alpha": 2, "lora_bias": True},
    "attention only": {"r": 3, "lora_alpha": 8, "target_modules": ["to_q", "to_v", "add_k_proj", "to_out.0"]},
    "saved modules": {"r": 2, "lora_alpha": 1, "target_modules": ["to_q"], "modules_to_save": ["x_embedder", "norm_q"]},
    "trained biases": {"r": 2, "lora_alpha": 1, "target_modules": ["to_q", "to_out.0"], "bias": "all"},
}


def theirs(ours):
    """diffusers' transformer with the weights of ours."""
    transformer = FluxTransformer2DModel.from_config(to_diffusers_config(ours.config))
    transformer.load_state_dict(convert(ours.state_dict(), to="diffusers"))
    return transformer


def their_clip():
    fields = TINY_CLIP.to_dict()
    return randomise(CLIPTextModel(CLIPTextConfig(**fields, bos_token_id=0, pad_token_id=1)), 1)


def their_t5():
    fields = TINY_T5.to_dict()
    return randomise(T5EncoderModel(TheirT5Config(**fields, feed_forward_proj="gated-gelu")), 2)


def networks():
    """Our flow, CLIP and T5, and diffusers' and transformers' with the same weights."""
    flux, clip, t5 = randomise(Flux(TINY_FLUX), 0), their_clip(), their_t5()
    ours = [flux, load_into(CLIPTextEncoder(TINY_CLIP), before(clip)), load_into(T5Encoder(TINY_T5), before(t5))]
    return ours, [theirs(flux), clip, t5]


def linear_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def train(model, **options):
    """``model`` with an adapter that has random values in every tensor that would be trained."""
    return randomise_trained(
        peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": linear_layers(model), **options}))
    )


def randomise_trained(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def assert_equal(ours, transformer, untouched=None):
    """Our weights are theirs; and if given, they are no longer the ones before."""
    result, expected = convert(ours.state_dict(), to="diffusers"), transformer.state_dict()
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert untouched is None or any(not torch.equal(ours.state_dict()[n], t) for n, t in untouched.items())


def before(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_peft_saves(case, tmp_path):
    """save_pretrained writes the tensors, and alpha into adapter_config.json beside them."""
    ours = randomise(Flux(TINY_FLUX), 0)
    adapted, plain = train(theirs(ours), **OPTIONS[case]), before(ours)
    adapted.save_pretrained(tmp_path)
    expected = adapted.merge_and_unload()
    merged = merge(ours, read(tmp_path / "adapter_model.safetensors"))
    assert_equal(ours, expected, plain)
    merged.unmerge()
    assert all(torch.equal(plain[name], tensor) for name, tensor in ours.state_dict().items())
    merge(ours, read_lora(tmp_path))  # the folder
    assert_equal(ours, expected)


@pytest.mark.parametrize("case", [case for case in OPTIONS if case not in ("saved modules", "trained biases")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_diffusers_saves_with_metadata(case, dtype, tmp_path):
    """save_lora_weights writes every configuration into the file, for the transformer and for CLIP each its own."""
    ours, (transformer, clip, _) = networks()
    flow, clip = (
        train(theirs(ours[0]), **OPTIONS[case]),
        train(clip, r=4, lora_alpha=1, target_modules=["q_proj", "fc1"]),
    )
    for parameter in (*flow.parameters(), *clip.parameters()):
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).float()
    save_with_diffusers(tmp_path, dtype, flow, clip)
    plain = before(ours[0]), before(ours[1])
    merge(ours, read(tmp_path / "pytorch_lora_weights.safetensors"), scale=0.7)
    assert_equal(ours[0], loaded_by_diffusers(tmp_path, transformer, 0.7), plain[0])
    assert_equal_encoder(ours[1], clip.merge_and_unload(), plain[1], 0.7)


def save_with_diffusers(folder, dtype, flow, clip):
    layers = []
    for adapted in (flow, clip):
        tensors = get_peft_model_state_dict(adapted)
        layers.append({name.removeprefix("base_model.model."): tensor.to(dtype) for name, tensor in tensors.items()})
    FluxPipeline.save_lora_weights(
        folder, *layers,
        transformer_lora_adapter_metadata=plain_config(flow), text_encoder_lora_adapter_metadata=plain_config(clip),
    )  # fmt: skip


def loaded_by_diffusers(source, transformer, scale=1.0):
    """``transformer`` with a LoRA that diffusers reads, converts and fuses."""
    state, alphas, metadata = FluxPipeline.lora_state_dict(source, return_alphas=True, return_lora_metadata=True)
    for name in [name for name in state if not name.startswith(("transformer.", "text_encoder."))]:
        state[f"transformer.{name}"] = state.pop(name)  # it converts these layers of kohya's, and then ignores them
    norms = {
        name: state.pop(name)
        for name in list(state)
        if ".norm_" in name and "lora" not in name and name.startswith("transformer.")
    }
    FluxPipeline.load_lora_into_transformer(state, alphas, transformer, metadata=metadata)
    FluxPipeline._load_norm_into_transformer(norms, transformer)
    transformer.fuse_lora(lora_scale=scale)
    transformer.unload_lora()
    return transformer


def plain_config(adapted):
    config = adapted.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def assert_equal_encoder(ours, theirs, plain, scale=1.0):
    """Our encoder is theirs, whose change was merged at scale 1, at another scale of the change."""
    full = load_into(type(ours)(ours.config), before(theirs)).state_dict()
    for name, tensor in full.items():
        expected = plain[name] + scale * (tensor - plain[name])
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=1e-5, atol=2e-6, msg=name)
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in full.items())


# ---------------------------------------------------------------- other trainers' names, converted by diffusers


def draw(*shape, seed=[0]):  # noqa: B006  (a counter)
    seed[0] += 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed[0])) / shape[-1] ** 0.5


def pairs(layers, down, up, alpha=None, rank=lambda i: 2 + i % 3):
    """Factors for every layer (name -> out, in), of mixed ranks, under names as ``down`` and ``up`` format them."""
    tensors = {}
    for i, (name, (rows, columns)) in enumerate(layers.items()):
        tensors[down.format(name)] = draw(rank(i), columns)
        tensors[up.format(name)] = draw(rows, rank(i))
        if alpha and i % 4:  # some have none
            tensors[alpha.format(name)] = torch.tensor(float(1 + i % 5)).reshape([] if i % 2 else [1])
    return tensors


def shapes_of_linears(model, pattern=".*"):
    return {
        n: tuple(m.weight.shape)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and re.fullmatch(pattern, n)
    }


def in_xlabs():
    flux, layers = Flux(TINY_FLUX), {}
    for i in range(TINY_FLUX.depth):
        for number, stream in ((1, "img"), (2, "txt")):
            for layer in ("qkv", "proj"):
                weight = flux.get_parameter(f"double_blocks.{i}.{stream}_attn.{layer}.weight")
                layers[f"double_blocks.{i}.processor.{layer}_lora{number}"] = tuple(weight.shape)
    for i in range(TINY_FLUX.depth_single_blocks):
        dim = TINY_FLUX.hidden_size
        layers[f"single_blocks.{i}.processor.qkv_lora"] = (3 * dim, dim)
        layers[f"single_blocks.{i}.processor.proj_lora"] = tuple(flux.single_blocks[i].linear2.weight.shape)
    return layers


def underscored(layers):
    return {name.replace(".", "_"): shape for name, shape in layers.items()}


def files():
    """Files under the names of several trainers; all that diffusers can convert at this size."""
    flux, transformer = Flux(TINY_FLUX), FluxTransformer2DModel.from_config(to_diffusers_config(TINY_FLUX))
    theirs, blocks = shapes_of_linears(transformer), r"double_blocks.*|.*(linear2|modulation\.lin|_in|_layer)"
    official = underscored(shapes_of_linears(flux, blocks))  # diffusers hard-codes 3072 for linear1
    attention = underscored(shapes_of_linears(transformer, r".*attn\..*|context_embedder|.*timestep_embedder.*"))
    clip = underscored(shapes_of_linears(CLIPTextEncoder(TINY_CLIP)))
    kohya = ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha")
    peft_names = ("{}.lora_A.weight", "{}.lora_B.weight")
    with_prefix = [
        tuple(prefix + name for name in kohya) for prefix in ("lora_unet_", "lora_te1_", "lora_transformer_")
    ]
    return {
        "kohya": pairs(official, *with_prefix[0]),
        "kohya with CLIP": pairs(official, *with_prefix[0]) | pairs(clip, *with_prefix[1]),
        "OneTrainer": {
            name: tensor
            for name, tensor in pairs(attention, *with_prefix[2], rank=lambda i: 4).items()
        } | {f"lora_transformer_{name}.alpha": torch.tensor(3.0) for name in attention},
        "XLabs": pairs(in_xlabs(), "{}.down.weight", "{}.up.weight"),
        "XLabs in ComfyUI": pairs(in_xlabs(), "diffusion_model.{}.down.weight", "diffusion_model.{}.up.weight"),
        "ComfyUI": pairs(shapes_of_linears(flux, "double_blocks.*"), *[f"diffusion_model.{name}" for name in kohya]),
        "old diffusers": pairs(theirs, "transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"),
        "no alpha, mixed ranks": pairs(theirs, *[f"transformer.{name}" for name in peft_names]),
        "alpha tensors": pairs(theirs, *[f"transformer.{name}" for name in (*peft_names, "{}.alpha")]),
    }  # fmt: skip


@pytest.mark.parametrize("case", files())
def test_other_names(case, tmp_path):
    tensors = files()[case]
    if case == "alpha tensors":  # diffusers needs one for each layer, without a dimension
        tensors |= {re.sub(r"lora_A.weight$", "alpha", n): torch.tensor(1.5) for n in tensors if n.endswith("A.weight")}
    save_file(tensors, tmp_path / "lora.safetensors")
    ours, (transformer, clip, _) = networks()
    plain = before(ours[0])
    merge(ours[: 2 if "CLIP" in case else 1], read(tmp_path / "lora.safetensors"))
    assert_equal(ours[0], loaded_by_diffusers(tmp_path / "lora.safetensors", transformer), plain)
    if "CLIP" in case:
        state = FluxPipeline.lora_state_dict(tmp_path / "lora.safetensors")
        own = {name: tensor for name, tensor in state.items() if name.startswith("text_encoder.")}
        state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        for name in [name for name in state if ".lora_A." in name]:
            layer = name.removeprefix("text_encoder.text_model.").removesuffix(".lora_A.weight")
            clip.get_submodule(layer).weight.data += state[name.replace(".lora_A.", ".lora_B.")] @ state[name]
        again = load_into(CLIPTextEncoder(TINY_CLIP), before(clip)).state_dict()
        for name, tensor in again.items():
            torch.testing.assert_close(ours[1].state_dict()[name], tensor, rtol=1e-5, atol=2e-6, msg=name)
        _, (_, plain_clip, _) = networks()
        of_old_diffusers = load_into(CLIPTextEncoder(TINY_CLIP), before(plain_clip))
        merge(of_old_diffusers, own)  # to_q_lora, and lora_linear_layer in the MLP
        for name, tensor in again.items():
            torch.testing.assert_close(of_old_diffusers.state_dict()[name], tensor, rtol=1e-5, atol=2e-6, msg=name)


# ---------------------------------------------------------------- what is refused


KINDS = {
    "LoKr": peft.LoKrConfig(target_modules=["to_q"], r=2),
    "LoHa": peft.LoHaConfig(target_modules=["to_q"], r=2),
    "OFT": peft.OFTConfig(target_modules=["to_q"], oft_block_size=4, r=0),
    "BOFT": peft.BOFTConfig(target_modules=["to_q"], boft_block_size=4),
    "IA3": peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]),
    "VeRA": peft.VeraConfig(target_modules=["to_q"], r=2),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["to_q"], total_step=10),
    "DoRA": peft.LoraConfig(target_modules=["to_q"], use_dora=True),
    "MISS": peft.MissConfig(target_modules=["to_q"], r=4),
    "FOURIERFT": peft.FourierFTConfig(target_modules=["to_q"], n_frequency=10),
    "pissa": peft.LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"),
    "olora": peft.LoraConfig(target_modules=["to_q"], init_lora_weights="olora"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_peft_are_refused_by_name(kind, tmp_path):
    ours = randomise(Flux(TINY_FLUX), 0)
    plain = before(ours)
    peft.get_peft_model(theirs(ours), KINDS[kind]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"^adapter_model.safetensors .*\b{kind}\b"):
        merge(ours, read(tmp_path / "adapter_model.safetensors"))
    assert all(torch.equal(plain[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_converted_pissa_is_a_lora(tmp_path):
    """PEFT turns it into the difference from the model's own weights."""
    ours = randomise(Flux(TINY_FLUX), 0)
    adapted = peft.get_peft_model(theirs(ours), peft.LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"))
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    randomise_trained(adapted)
    adapted.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start")
    merge(ours, read_lora(tmp_path / "lora"))
    assert_equal(ours, adapted.merge_and_unload())


def test_flux2_from_peft(tmp_path):
    """Every linear layer, the shared modulation and the last layer's, whose halves diffusers exchanges, included."""
    ours = randomise(Flux2(TINY_FLUX2), 0)
    plain = before(ours)
    adapted = train(diffusers_flux2(ours.config, before(ours)), r=4, lora_alpha=2)
    adapted.save_pretrained(tmp_path)
    merged = merge(ours, read(tmp_path / "adapter_model.safetensors"))
    assert_equal(ours, adapted.merge_and_unload(), plain)
    merged.unmerge()
    assert all(torch.equal(plain[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("trainer", ["official names", "kohya"])
def test_flux2_from_other_trainers(trainer):
    """diffusers renames these, so its own transformer with such a LoRA is the reference; but for the last modulation.

    Its halves are shift and scale in the official layout, scale and shift in diffusers'. diffusers 0.42 exchanges them
    in a FLUX.2 checkpoint and in a LoRA of FLUX.1, but forgets it in a LoRA of FLUX.2.
    """
    ours = randomise(Flux2(TINY_FLUX2), 0)
    theirs, plain, lora = diffusers_flux2(ours.config, before(ours)), before(ours), {}
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, torch.nn.Linear)}
    del layers["final_layer.adaLN_modulation.1"]
    generator = torch.Generator().manual_seed(3)
    for name, layer in layers.items():
        A, B = (torch.randn(*size, generator=generator) for size in ((3, layer.in_features), (layer.out_features, 3)))
        if trainer == "official names":
            lora |= {f"diffusion_model.{name}.lora_A.weight": A, f"diffusion_model.{name}.lora_B.weight": B}
        elif "blocks" in name:
            name = f"lora_unet_{name.replace('.', '_')}"
            lora |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(1.5)}
    renamed = Flux2KleinPipeline.lora_state_dict(dict(lora))
    theirs.load_lora_adapter(renamed, prefix="transformer")
    theirs.fuse_lora()
    theirs.unload_lora()
    merge(ours, lora)
    assert_equal(ours, theirs, plain)
