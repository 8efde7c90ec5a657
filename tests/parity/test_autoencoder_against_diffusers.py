"""The autoencoder computes what diffusers' AutoencoderKL computes, scaling and packing order included."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from oracle import drawn, gradients, randomise, relative, worst_gradient

from fluxedu.models import AutoEncoder, AutoEncoderConfig

F32, F64 = 2e-5, 1e-12
GRAD_F32, GRAD_F64 = 1e-4, 1e-11
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "bar", "grad"), [(torch.float32, F32, GRAD_F32), (torch.float64, F64, GRAD_F64)], ids=["f32", "f64"]
)


def as_theirs(config):
    """diffusers' description of the same network."""
    levels = len(config.ch_mult)
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "block_out_channels": tuple(config.ch * m for m in config.ch_mult),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def to_diffusers(state, config):
    return convert_ldm_vae_checkpoint(dict(state), as_theirs(config))


def diffusers_autoencoder(config, state):
    with torch.device("meta"):
        theirs = AutoencoderKL(**as_theirs(config))
    theirs.load_state_dict(to_diffusers(state, config), strict=True, assign=True)
    return theirs.eval()


@st.composite
def networks(draw):
    """A config, an image size (pixels, any, not square) and a seed."""
    groups = draw(st.sampled_from((1, 2, 4, 32)))
    config = AutoEncoderConfig(
        in_channels=draw(st.integers(1, 4)),
        out_ch=draw(st.integers(1, 4)),
        ch=groups * (1 if groups == 32 else draw(st.integers(1, 5))),
        ch_mult=(1, *draw(st.lists(st.integers(1, 3), max_size=3))),  # theirs must begin with 1
        num_res_blocks=draw(st.integers(1, 2)),
        z_channels=draw(st.integers(1, 16)),
        norm_groups=groups,
        scale_factor=draw(st.floats(0.1, 2)),
        shift_factor=draw(st.floats(-0.5, 0.5)),
    )
    size = (draw(st.integers(16, 40)), draw(st.integers(16, 40)))
    return config, draw(st.integers(1, 2)), size, draw(st.integers(0, 2**31))


def normal(shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


@PRECISIONS
def test_encode_and_decode(dtype, bar, grad):
    @drawn(20)
    @given(networks())
    @torch.no_grad()
    def check(network):
        config, batch, size, seed = network
        ours = randomise(AutoEncoder(config), seed).to(dtype)
        theirs = diffusers_autoencoder(config, ours.state_dict())
        image = normal((batch, config.in_channels, *size), seed + 1, dtype)

        posterior = theirs.encode(image).latent_dist
        mean, logvar = ours.moments(image)
        assert relative(mean, posterior.mean) <= bar
        assert relative(logvar.clamp(-30, 20), posterior.logvar) <= bar  # they clamp it, in case

        # Ours scales inside, theirs leaves it to the pipeline.
        latent = ours.encode(image)
        assert relative(latent, config.scale_factor * (posterior.mean - config.shift_factor)) <= bar
        theirs_image = theirs.decode(latent / config.scale_factor + config.shift_factor).sample
        assert relative(ours.decode(latent), theirs_image) <= bar

    check()


@PRECISIONS
def test_gradients(dtype, bar, grad):
    @drawn(10)
    @given(networks())
    def check(network):
        config, batch, size, seed = network
        ours = randomise(AutoEncoder(config), seed).to(dtype)
        theirs = diffusers_autoencoder(config, ours.state_dict())
        found = []
        for model in (ours, theirs):
            image = normal((batch, config.in_channels, *size), seed + 1, dtype).requires_grad_()
            if model is ours:
                out = ours(image)
            else:
                out = theirs.decode(theirs.encode(image).latent_dist.mode()).sample
            (out * normal(out.shape, seed + 2, dtype)).sum().backward()
            of_weights = gradients(model.named_parameters())
            if model is ours:
                of_weights = to_diffusers(of_weights, config)
            found.append({**of_weights, "image": image.grad})
        assert worst_gradient(*found) <= grad

    check()


@torch.no_grad()
def test_a_sample_is_their_sample():
    """With a generator, ``mean + exp(logvar / 2) * noise``, the noise theirs would draw from it too."""
    config = AutoEncoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, norm_groups=4)
    ours = randomise(AutoEncoder(config), 0)
    image = normal((2, 3, 10, 14), 1, torch.float32)
    theirs = diffusers_autoencoder(config, ours.state_dict()).encode(image).latent_dist
    sample = theirs.sample(torch.Generator().manual_seed(5))
    assert (
        relative(
            ours.encode(image, torch.Generator().manual_seed(5)), config.scale_factor * (sample - config.shift_factor)
        )
        <= F32
    )
