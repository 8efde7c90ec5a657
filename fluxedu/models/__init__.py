"""Every block of FLUX.1; a file a block."""

from fluxedu.errors import ConfigError
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.config import VARIANTS, AutoEncoderConfig, CLIPTextConfig, FluxConfig, Sampling, T5Config, Variant
from fluxedu.models.flux import Flux, Plan
from fluxedu.models.redux import ReduxHead
from fluxedu.models.t5 import T5Encoder

__all__ = [
    "VARIANTS",
    "AutoEncoder",
    "AutoEncoderConfig",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "ConfigError",
    "Flux",
    "FluxConfig",
    "Plan",
    "ReduxHead",
    "Sampling",
    "T5Config",
    "T5Encoder",
    "Variant",
]
