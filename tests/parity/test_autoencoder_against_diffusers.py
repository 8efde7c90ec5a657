"""The autoencoder computes what diffusers' AutoencoderKL computes, including the scaling of the latents.

Every bound is derived from the case itself: see rounding.py.
"""

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from oracle import examples, gradients, pyramid_arguments, randomise, worst_gradient
from rounding import Exact, worst_error

from fluxedu.models import AutoEncoder, AutoEncoderConfig


def diffusers_config(config):
    """diffusers' description of the same network."""
    return pyramid_arguments(config) | {
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def to_diffusers(state, config):
    return convert_ldm_vae_checkpoint(dict(state), diffusers_config(config))


def diffusers_autoencoder(config, state):
    with torch.device("meta"):
        theirs = AutoencoderKL(**diffusers_config(config))
    theirs.load_state_dict(to_diffusers(state, config), strict=True, assign=True)
    return theirs.eval()


@st.composite
def networks(draw):
    """A config, a batch size, an image size in pixels (mostly not square) and a seed."""
    groups = draw(st.sampled_from((1, 2, 4, 32)))
    config = AutoEncoderConfig(
        in_channels=draw(st.integers(1, 4)),
        out_ch=draw(st.integers(1, 4)),
        ch=groups * (1 if groups == 32 else draw(st.integers(1, 5))),
        ch_mult=(1, *draw(st.lists(st.integers(1, 3), max_size=3))),  # diffusers' begins with 1
        num_res_blocks=draw(st.integers(1, 2)),
        z_channels=draw(st.integers(1, 16)),
        norm_groups=groups,
        scale_factor=draw(st.floats(0.1, 2)),
        shift_factor=draw(st.floats(-0.5, 0.5)),
    )
    size = (draw(st.integers(16, 40)), draw(st.integers(16, 40)))
    return config, draw(st.integers(1, 2)), size, draw(st.integers(0, 2**31))


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def to_float64(model):
    """The same network in float64."""
    copy = AutoEncoder(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.double()


@examples(20)
@given(networks())
@torch.no_grad()
def test_encode_and_decode(network):
    config, batch, size, seed = network
    ours = randomise(AutoEncoder(config), seed)
    ours64 = to_float64(ours)
    theirs = diffusers_autoencoder(config, ours.state_dict())
    reference = diffusers_autoencoder(config, ours.state_dict()).double()
    image = normal((batch, config.in_channels, *size), seed + 1)

    def our_encodings(model, image):  # they clamp the logarithm of the variance, ours does not
        mean, logvar = model.moments(image)
        return [mean, logvar.clamp(-30, 20), model.encode(image)]

    def their_encodings(model, image):  # ours scales inside, theirs leaves it to the pipeline
        posterior = model.encode(image).latent_dist
        return [posterior.mean, posterior.logvar, config.scale_factor * (posterior.mean - config.shift_factor)]

    exact = Exact(lambda: their_encodings(reference, image.double()), worst_error)
    exact.check(their_encodings(theirs, image), torch.float32)
    exact.check(our_encodings(ours, image), torch.float32)
    exact.check(our_encodings(ours64, image.double()), torch.float64)

    def their_image(model, latents):
        return model.decode(latents / config.scale_factor + config.shift_factor).sample

    latents = ours.encode(image)
    exact = Exact(lambda: their_image(reference, latents.double()))
    exact.check(their_image(theirs, latents), torch.float32)
    exact.check(ours.decode(latents), torch.float32)
    exact.check(ours64.decode(latents.double()), torch.float64)


@examples(10)
@given(networks())
def test_gradients(network):
    config, batch, size, seed = network
    ours = randomise(AutoEncoder(config), seed)
    ours64 = to_float64(ours)
    theirs = diffusers_autoencoder(config, ours.state_dict())
    reference = diffusers_autoencoder(config, ours.state_dict()).double()

    def gradients_of(model, reconstruct, dtype):
        image = normal((batch, config.in_channels, *size), seed + 1).to(dtype).requires_grad_()
        out = reconstruct(image)
        model.zero_grad()
        (out * normal(out.shape, seed + 2).to(dtype)).sum().backward()
        return gradients(model.named_parameters()), {"image": image.grad}

    def our_gradients(model, dtype):
        of_weights, of_image = gradients_of(model, model, dtype)
        return {**to_diffusers(of_weights, config), **of_image}

    def their_gradients(model, dtype):
        reconstruct = lambda image: model.decode(model.encode(image).latent_dist.mode()).sample  # noqa: E731
        of_weights, of_image = gradients_of(model, reconstruct, dtype)
        return {**of_weights, **of_image}

    exact = Exact(lambda: their_gradients(reference, torch.float64), worst_gradient)
    exact.check(their_gradients(theirs, torch.float32), torch.float32)
    exact.check(our_gradients(ours, torch.float32), torch.float32)
    exact.check(our_gradients(ours64, torch.float64), torch.float64)


@torch.no_grad()
def test_samples_of_the_posterior():
    """With a generator, ``encode`` returns ``mean + exp(logvar / 2) * noise`` with the noise that theirs draws."""
    config = AutoEncoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, norm_groups=4)
    ours = randomise(AutoEncoder(config), 0)
    image = normal((2, 3, 10, 14), 1)
    reference = diffusers_autoencoder(config, ours.state_dict()).double()

    def their_sample(model, image):
        sample = model.encode(image).latent_dist.sample(torch.Generator().manual_seed(5))
        return config.scale_factor * (sample - config.shift_factor)

    exact = Exact(lambda: their_sample(reference, image.double()))
    theirs = their_sample(diffusers_autoencoder(config, ours.state_dict()), image)
    exact.check(theirs, torch.float32)
    exact.check(ours.encode(image, torch.Generator().manual_seed(5)), torch.float32)
