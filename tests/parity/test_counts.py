"""Number of parameters and tensors of every network, equal to the official files. Counted on the meta device."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from oracle import to_diffusers

from fluxedu.models import VARIANTS, AutoEncoder, CLIPTextEncoder, Flux, FluxConfig, ReduxHead, T5Encoder

DEV = (11_901_408_320, 780)
CONTROL = (11_901_604_928, 780)
COUNTS = {
    "schnell": (11_891_178_560, 776),
    "dev": DEV,
    "krea": DEV,
    "kontext": DEV,
    "fill": (11_902_391_360, 780),
    "canny": CONTROL,
    "depth": CONTROL,
    "canny-lora": CONTROL,
    "depth-lora": CONTROL,
}


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def sizes(module):
    """(number of parameters, number of tensors) of the state dict."""
    state = module.state_dict()
    return sum(x.numel() for x in state.values()), len(state)


def test_every_variant_is_counted():
    assert COUNTS.keys() == VARIANTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_variant(name):
    assert sizes(on_meta(Flux, FluxConfig.variant(name))) == COUNTS[name]


@pytest.mark.parametrize(("name", "tensors"), [("schnell", 1156), ("dev", 1160), ("fill", 1160), ("canny", 1160)])
def test_names_and_shapes_in_diffusers(name, tensors):
    config = FluxConfig.variant(name)
    theirs = on_meta(
        lambda: FluxTransformer2DModel(
            in_channels=config.in_channels, out_channels=64, guidance_embeds=config.guidance_embed
        )
    )
    ours = on_meta(lambda: to_diffusers(Flux(config).state_dict(), config))
    assert len(ours) == tensors
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.state_dict().items()}


def test_blocks():
    dev = on_meta(Flux, FluxConfig.variant("dev"))
    assert {sizes(block)[0] for block in dev.double_blocks} == {339_831_296}
    assert {sizes(block)[0] for block in dev.single_blocks} == {141_591_808}
    assert (len(dev.double_blocks), len(dev.single_blocks)) == (19, 38)


def test_modulation_is_27_percent():
    dev = on_meta(Flux, FluxConfig.variant("dev"))
    modulation = sum(p.numel() for n, p in dev.named_parameters() if "_mod." in n or ".modulation." in n)
    assert 0.27 < modulation / COUNTS["dev"][0] < 0.275


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (AutoEncoder, (83_819_683, 244)),
        (lambda: AutoEncoder().encoder, (34_274_208, 106)),
        (lambda: AutoEncoder().decoder, (49_545_475, 138)),
        (CLIPTextEncoder, (123_060_480, 196)),
        (T5Encoder, (4_762_310_656, 219)),
        (ReduxHead, (64_503_808, 4)),
    ],
    ids=["autoencoder", "encoder", "decoder", "clip", "t5", "redux"],
)
def test_the_other_networks(build, expected):
    assert sizes(on_meta(build)) == expected
