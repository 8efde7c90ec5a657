"""Converting renames rows: there and back is exact to the bit, and the names are those of diffusers."""

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxedu.checkpoints import convert, from_diffusers_config, infer_config, to_diffusers_config
from fluxedu.checkpoints.layouts import shapes
from fluxedu.errors import CheckpointError
from fluxedu.models import AutoEncoder, AutoEncoderConfig, Flux, FluxConfig

DRAWN = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
EVEN = st.integers(1, 3).map(lambda n: 2 * n)


@st.composite
def flux_configs(draw):
    axes = draw(st.tuples(EVEN, EVEN, EVEN))
    heads = draw(st.integers(1, 3))
    small = st.integers(1, 9)
    return FluxConfig(
        in_channels=draw(small),
        out_channels=draw(small),
        vec_in_dim=draw(small),
        context_in_dim=draw(small),
        hidden_size=heads * sum(axes),
        num_heads=heads,
        depth=draw(st.integers(0, 3)),
        depth_single_blocks=draw(st.integers(0, 3)),
        axes_dim=axes,
        guidance_embed=draw(st.booleans()),
    )


@st.composite
def autoencoder_configs(draw):
    groups = draw(st.integers(1, 4))
    return AutoEncoderConfig(
        in_channels=draw(st.integers(1, 4)),
        out_ch=draw(st.integers(1, 4)),
        ch=groups * draw(st.integers(1, 3)),
        ch_mult=(1, *draw(st.lists(st.integers(1, 3), max_size=3))),
        num_res_blocks=draw(st.integers(1, 3)),
        z_channels=draw(st.integers(1, 5)),
        norm_groups=groups,
        scale_factor=draw(st.floats(0.1, 2)),
        shift_factor=draw(st.floats(-1, 1)),
    )


def filled(expected, dtype):
    """Every tensor with values of its own, NaNs and minus zero among them (a copy keeps those too)."""
    state, start = {}, 0
    for name, shape in expected.items():
        values = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64)
        values[::7], values[3::11] = torch.nan, -0.0
        state[name] = values.reshape(shape).to(dtype)
        start += 13
    return state


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape, name
        assert torch.equal(bits(left[name]), bits(right[name])), name


def names_and_shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@DRAWN
@given(flux_configs(), DTYPES)
def test_a_transformer_survives_the_round_trip(config, dtype):
    ours = filled(shapes(config), dtype)
    theirs = convert(ours, to="diffusers", config=config)
    same(convert(theirs, to="bfl", config=config), ours)
    same(convert(convert(theirs, to="bfl", config=config), to="diffusers", config=config), theirs)


@DRAWN
@given(autoencoder_configs(), DTYPES)
def test_an_autoencoder_survives_the_round_trip(config, dtype):
    ours = filled(shapes(config), dtype)
    theirs = convert(ours, to="diffusers", config=config)
    same(convert(theirs, to="bfl", config=config), ours)


@DRAWN
@given(flux_configs())
def test_diffusers_has_these_names_and_shapes(config):
    with torch.device("meta"):
        theirs = FluxTransformer2DModel.from_config(to_diffusers_config(config))
    assert shapes(config, "diffusers") == names_and_shapes(theirs)
    assert from_diffusers_config(dict(theirs.config)) == config


@DRAWN
@given(autoencoder_configs())
def test_diffusers_autoencoder_has_these_names_and_shapes(config):
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(to_diffusers_config(config))
    assert shapes(config, "diffusers") == names_and_shapes(theirs)
    assert from_diffusers_config({**theirs.config, "_class_name": "AutoencoderKL"}) == config


@DRAWN
@given(flux_configs(), st.sampled_from(["bfl", "diffusers"]))
def test_the_configuration_follows_from_the_shapes(config, layout):
    state = filled(shapes(config, layout), torch.float32)
    if config.depth + config.depth_single_blocks == 0:
        return  # then nothing in the file knows how many heads there are
    assert infer_config(state, like=config.with_(depth=7, guidance_embed=not config.guidance_embed)) == config
    other = "diffusers" if layout == "bfl" else "bfl"
    same(convert(state, to=other), convert(state, to=other, config=config))  # axes_dim is not needed for this


@pytest.mark.parametrize(
    ("layout", "count"),
    [("bfl", {"schnell": 776, "dev": 780, "fill": 780}), ("diffusers", {"schnell": 1156, "dev": 1160, "canny": 1160})],
)
def test_official_counts(layout, count):
    assert {name: len(shapes(FluxConfig.variant(name), layout)) for name in count} == count
    assert len(shapes(AutoEncoderConfig(), layout)) == 244


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"theta": 5000}, "diffusers' layout always has theta 10000 and cannot store 5000."),
        ({"mlp_ratio": 2.0}, "diffusers' layout always has mlp_ratio 4.0 and cannot store 2.0."),
        ({"qkv_bias": False}, "diffusers' layout always has qkv_bias True and cannot store False."),
        ({"axes_dim": (4, 4)}, "diffusers' layout has three axes and cannot store axes_dim (4, 4)."),
    ],
)
def test_what_diffusers_cannot_store_is_refused_and_bfl_can(changes, sentence):
    config = FluxConfig(hidden_size=16, num_heads=2, axes_dim=(2, 2, 4), depth=1, depth_single_blocks=1).with_(
        **changes
    )
    state = Flux(config).state_dict()
    with pytest.raises(CheckpointError) as error:
        convert(state, to="diffusers", config=config)
    assert str(error.value) == sentence
    same(convert(state, to="bfl", config=config), dict(state))


def test_renamed_tensors_share_memory_and_state_is_left_alone():
    config = AutoEncoderConfig(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=2, norm_groups=2)
    state = AutoEncoder(config).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    theirs = convert(state, to="diffusers", config=config)
    q = "encoder.mid_block.attentions.0.to_q.weight"
    assert theirs[q].data_ptr() == state["encoder.mid.attn_1.q.weight"].data_ptr() and theirs[q].ndim == 2
    same(dict(state), before)
