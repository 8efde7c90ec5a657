"""Every block of FLUX.1; a file a block."""

from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.config import (
    VARIANTS,
    AutoEncoderConfig,
    CLIPTextConfig,
    ConfigError,
    FluxConfig,
    Sampling,
    T5Config,
    Variant,
)
from fluxedu.models.redux import ReduxHead
from fluxedu.models.t5 import T5Encoder
from fluxedu.models.transformer import Flux, Plan

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
