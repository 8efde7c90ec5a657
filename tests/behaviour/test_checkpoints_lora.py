"""LoRA: merging equals computing it beside each layer, in every format; unmerging restores the weights exactly."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import fluxedu as fe
from fluxedu.checkpoints import convert, extract, load_into, lora_in_channels, merge, to_diffusers_config, widen_input
from fluxedu.errors import CheckpointError
from fluxedu.models import Flux, FluxConfig

CONFIG = FluxConfig(
    in_channels=8,
    out_channels=4,
    vec_in_dim=6,
    context_in_dim=5,
    hidden_size=32,
    num_heads=2,
    axes_dim=(4, 6, 6),
    depth=2,
    depth_single_blocks=2,
)
RANK, SCALE = 3, 0.85


def draw(*shape, seed=[0]):  # noqa: B006  (a counter)
    seed[0] += 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed[0])) / shape[-1] ** 0.5


def model(config=CONFIG, dtype=torch.float64):
    flux = Flux(config)
    for p in flux.parameters():
        p.data = draw(*p.shape)
    return flux.to(dtype).eval()


def velocity(flux):
    g = torch.Generator().manual_seed(5)
    img, txt, y = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((1, 6, 8), (1, 3, 5), (1, 6)))
    ids = torch.tensor([[0.0, i, j] for i in range(2) for j in range(3)])
    t = torch.tensor([0.3], dtype=torch.float64)
    with torch.no_grad():
        return flux(img, ids, txt, torch.zeros(3, 3), t, y, 3 * t)


def linears(flux):
    return {name: m for name, m in flux.named_modules() if isinstance(m, nn.Linear)}


def official(flux, rank=RANK):
    """As in the official files: A, B and B's bias for every linear layer, and every norm scale."""
    lora = {}
    for name, m in linears(flux).items():
        lora[f"{name}.lora_A.weight"] = draw(rank, m.in_features)
        lora[f"{name}.lora_B.weight"] = draw(m.out_features, rank)
        lora[f"{name}.lora_B.bias"] = draw(m.out_features)
    return lora | {n: draw(*p.shape) for n, p in flux.named_parameters() if n.endswith(".scale")}


def beside(flux, lora, scale):
    """The same network with the LoRA computed next to each layer and nothing merged."""
    for name, m in linears(flux).items():
        A, B, b = (lora[f"{name}.lora_{leaf}"].to(m.weight) for leaf in ("A.weight", "B.weight", "B.bias"))
        m.register_forward_hook(lambda m, x, y, A=A, B=B, b=b: y + scale * (x[0] @ A.T @ B.T + b))
    for name, p in flux.named_parameters():
        p.data = lora[name].to(p.data) if name in lora else p.data
    return flux


def bits(flux):
    return {n: t.contiguous().view(torch.uint8).clone() for n, t in flux.state_dict().items()}


def test_merging_the_official_format_equals_computing_beside():
    flux = model()
    lora = official(flux)
    assert len(lora) == 3 * len(linears(flux)) + 4 * CONFIG.depth + 2 * CONFIG.depth_single_blocks
    reference = velocity(beside(load_into(Flux(CONFIG), dict(flux.state_dict())), lora, SCALE))
    plain = velocity(flux)
    merged = merge(flux, lora, scale=SCALE)
    torch.testing.assert_close(velocity(flux), reference, rtol=1e-9, atol=1e-9)
    assert (velocity(flux) - plain).norm() > 0.1 * plain.norm()
    merged.unmerge()
    assert torch.equal(velocity(flux), plain)


def test_the_official_file_changes_314_linear_layers_of_dev():
    with torch.device("meta"):
        dev = Flux(FluxConfig.variant("canny-lora"))
    assert len(linears(dev)) == 314
    assert sum(name.endswith(".scale") for name, _ in dev.named_parameters()) == 152


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unmerging_is_exact_to_the_bit_also_for_two_loras(dtype):
    flux = model(dtype=dtype)
    original, parameters = bits(flux), list(flux.parameters())
    first, second = official(flux), official(flux)
    one = merge(flux, first, scale=0.85)
    after_one = bits(flux)
    assert one.nbytes == sum(p.nbytes for n, p in flux.named_parameters())
    two = merge(flux, second, scale=-2.0)
    with pytest.raises(CheckpointError, match="was replaced after this LoRA was merged; undo the later change first."):
        one.unmerge()
    two.unmerge()
    assert all(torch.equal(after_one[n], b) for n, b in bits(flux).items())
    one.unmerge()
    assert all(torch.equal(original[n], b) for n, b in bits(flux).items())
    assert all(a is b for a, b in zip(parameters, flux.parameters(), strict=True))  # optimisers hold the parameters
    assert one.nbytes == 0


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
def test_diffusers_names(prefix):
    """Against diffusers' own network with the change added to its own tensors."""
    flux = model()
    theirs = FluxTransformer2DModel.from_config(to_diffusers_config(CONFIG)).double()
    theirs.load_state_dict(convert(flux.state_dict(), to="diffusers"))
    lora = {}
    for name, m in linears(theirs).items():
        A, B = draw(RANK, m.in_features), draw(m.out_features, RANK)
        lora |= {f"{prefix}{name}.lora_A.weight": A, f"{prefix}{name}.lora_B.weight": B}
        m.weight.data += SCALE * (B.double() @ A.double())
    merge(flux, lora, scale=SCALE)
    for name, tensor in convert(flux.state_dict(), to="diffusers").items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-12, atol=1e-12, msg=name)


def test_kohyas_names_and_alpha():
    flux, again = model(), model()
    again.load_state_dict(flux.state_dict())
    name = "double_blocks.1.txt_attn.qkv"
    A, B = draw(4, 32), draw(96, 4)
    merge(flux, {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, scale=0.5)
    kohya = f"lora_unet_{name.replace('.', '_')}"
    lora = {f"{kohya}.lora_down.weight": A, f"{kohya}.lora_up.weight": B, f"{kohya}.alpha": torch.tensor(2.0)}
    merge(again, lora, scale=1.0)  # alpha / rank = 0.5
    assert all(torch.equal(flux.state_dict()[n], t) for n, t in again.state_dict().items())


def test_an_extracted_lora_turns_one_network_into_the_other():
    before, after = model(dtype=torch.float32), model(CONFIG.with_(in_channels=14), torch.float32)

    def wide():
        return load_into(Flux(CONFIG.with_(in_channels=14)), widen_input(before.state_dict(), 14))

    full = extract(after.state_dict(), before.state_dict(), rank=10_000)
    assert (
        lora_in_channels(full) == 14
        and lora_in_channels({"x.lora_A.weight": draw(2, 3), "x.lora_B.weight": draw(3, 2)}) is None
    )
    there = wide()
    merge(there, full)
    for name, tensor in after.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    name, near = "single_blocks.0.linear1.weight", wide()
    merge(near, extract(after.state_dict(), before.state_dict(), rank=3))
    left = torch.linalg.svdvals((near.state_dict()[name] - after.state_dict()[name]).double())
    change = torch.linalg.svdvals((wide().state_dict()[name] - after.state_dict()[name]).double())
    torch.testing.assert_close(left.norm(), change[3:].norm(), rtol=1e-3, atol=1e-5)  # no change of rank 3 comes closer
    for rank in (0, True, "3"):
        with pytest.raises(CheckpointError, match="rank must be (a whole number from 1 to|of the type int, not)"):
            extract(after.state_dict(), before.state_dict(), rank)
    with pytest.raises(CheckpointError, match="only one of these has"):
        extract({**after.state_dict(), "more": draw(1)}, before.state_dict(), 3)


def test_widening_with_zeros_gives_the_same_network():
    flux = model()
    wide = load_into(Flux(CONFIG.with_(in_channels=14)), widen_input(flux.state_dict(), 14))
    assert torch.equal(wide.img_in.weight[:, :8], flux.img_in.weight) and not wide.img_in.weight[:, 8:].any()
    merge(wide, official(wide))
    with pytest.raises(CheckpointError) as error:
        merge(flux, official(wide))
    assert str(error.value) == (
        "the change of 'img_in' is [32, 14], but 'img_in.weight' here takes [32, 8]; widen_input adds input channels."
    )
    with pytest.raises(CheckpointError, match="the state dict has 8 input channels and cannot be widened to 4."):
        widen_input(flux.state_dict(), 4)


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"txt_in.lora_A.weight": (3, 5)}, "the state dict lacks the lora_B of 'txt_in'."),
        ({"txt_in.lora_B.weight": (32, 3)}, "the state dict lacks the lora_A of 'txt_in'."),
        ({"txt_in.lora_A.weight": (3, 5), "txt_in.lora_B.weight": (32, 4)},
         "the factors of 'txt_in' do not fit each other: A is [3, 5], B is [32, 4]."),
        ({"txt_in.lora_A.weight": (3, 6), "txt_in.lora_B.weight": (32, 3)},
         "the change of 'txt_in' is [32, 6], but 'txt_in.weight' here takes [32, 5]."),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (3, 32),
          "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": (33, 3)},
         "the change of 'transformer.transformer_blocks.0.attn.to_q' is [33, 32], "
         "but 'double_blocks.0.img_attn.qkv.weight' here takes [32, 32]."),
        ({"txt_in.lora_A.weight": (3, 5), "txt_in.lora_B.weight": (32, 3), "txt_in.lora_B.bias": (31,)},
         "the change of 'txt_in.bias' is [31], but 'txt_in.bias' here takes [32]."),
        ({"single_blocks.0.norm.key_norm.scale": (15,)},
         "the change of 'single_blocks.0.norm.key_norm.scale' is [15], "
         "but 'single_blocks.0.norm.key_norm.scale' here takes [16]."),
        ({"double_blocks.7.img_mlp.0.lora_A.weight": (3, 32), "double_blocks.7.img_mlp.0.lora_B.weight": (128, 3)},
         "the state dict changes 'double_blocks.7.img_mlp.0', which this model does not have."),
        ({"text_encoder.x": (3,), "text_encoder.y": (3,)},
         "the state dict changes 'text_encoder.x' (and 1 more), which this model does not have; "
         "merge([flux, clip, t5], lora) also merges what is for the text encoders."),
        ({"txt_in.lora_A.weight": (3,), "txt_in.lora_B.weight": (32, 3)},
         "the lora_A of 'txt_in' must be a matrix, not [3]."),
        ({"txt_in.lora_A.bias": (3,)},
         "the state dict has 'txt_in.lora_A.bias', but the first factor of a LoRA has no bias."),
        ({}, "the state dict holds no LoRA."),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_fit_changes_nothing(lora, sentence):
    flux = model(dtype=torch.float32)
    before = bits(flux)
    good = {"img_in.lora_A.weight": draw(2, 8), "img_in.lora_B.weight": draw(32, 2)} if lora else {}
    with pytest.raises(CheckpointError) as error:
        merge(flux, good | {name: draw(*shape) for name, shape in lora.items()})
    assert str(error.value) == sentence
    assert all(torch.equal(before[n], b) for n, b in bits(flux).items())


def test_a_whole_network_is_no_lora():
    """All its tensors have names of the model's, and would replace the weights without an error."""
    flux = fe.load().flux
    before = {name: value.clone() for name, value in flux.state_dict().items()}
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        merge(flux, {name: 2 * value for name, value in before.items()})
    assert all(torch.equal(value, before[name]) for name, value in flux.state_dict().items())


def test_merging_keeps_no_graph():
    """A LoRA that is being trained has gradients; merged weights and what is held for unmerging have none."""
    flux = model(dtype=torch.float32)
    lora = {name: tensor.requires_grad_() for name, tensor in official(flux).items()}
    merged = merge(flux, lora)
    held = [*merged.before.values(), *merged.after.values()]
    assert held and all(tensor.grad_fn is None and not tensor.requires_grad for tensor in held)
    assert all(parameter.grad_fn is None for parameter in flux.parameters())


def test_a_merged_weight_is_rounded_once():
    """The change is added in float32, whatever the dtype of the weights."""
    layer = nn.Linear(32, 96)
    layer.weight.data, layer.bias.data = draw(96, 32).bfloat16(), draw(96).bfloat16()
    A, B, bias = draw(4, 32), draw(96, 4), draw(96)
    weight = layer.weight.detach().double() + SCALE * (B.double() @ A.double())
    shifted = layer.bias.detach().double() + SCALE * bias.double()
    lora = {"layer.lora_A.weight": A, "layer.lora_B.weight": B, "layer.lora_B.bias": bias}
    merge(nn.ModuleDict({"layer": layer}), lora, scale=SCALE)
    half_a_step = {"rtol": 2**-8, "atol": 1e-6}  # of bfloat16; and the rounding of float32
    torch.testing.assert_close(layer.weight.detach().double(), weight, **half_a_step)
    torch.testing.assert_close(layer.bias.detach().double(), shifted, **half_a_step)


@pytest.mark.parametrize("scale", [float("nan"), "1", float("inf"), True, None])
def test_a_scale_is_a_number(scale):
    with pytest.raises(CheckpointError, match="scale must be (a number|of the type float)"):
        merge(torch.nn.Linear(2, 2), {}, scale)
