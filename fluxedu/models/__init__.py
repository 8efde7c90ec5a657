"""The networks of FLUX.1: the transformer and its blocks, both text encoders, the autoencoder, the Redux head."""

from fluxedu.attention_map import AttentionMap
from fluxedu.models.attention import QKNorm, RMSNorm, SelfAttention, attend, rope_table, rotate
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.blocks import MLP, DoubleStreamBlock, LastLayer, SingleStreamBlock
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.config import (
    VARIANTS,
    AutoEncoderConfig,
    CLIPTextConfig,
    FluxConfig,
    Sampling,
    T5Config,
    Variant,
)
from fluxedu.models.flux import Flux, Plan
from fluxedu.models.modulation import MLPEmbedder, Modulation, timestep_embedding
from fluxedu.models.redux import Redux, ReduxHead
from fluxedu.models.t5 import T5Encoder

__all__ = [
    "MLP",
    "VARIANTS",
    "AttentionMap",
    "AutoEncoder",
    "AutoEncoderConfig",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "DoubleStreamBlock",
    "Flux",
    "FluxConfig",
    "LastLayer",
    "MLPEmbedder",
    "Modulation",
    "Plan",
    "QKNorm",
    "RMSNorm",
    "Redux",
    "ReduxHead",
    "Sampling",
    "SelfAttention",
    "SingleStreamBlock",
    "T5Config",
    "T5Encoder",
    "Variant",
    "attend",
    "rope_table",
    "rotate",
    "timestep_embedding",
]
