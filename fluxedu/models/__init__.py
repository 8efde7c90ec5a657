"""The networks of FLUX.1 and FLUX.2: transformers and their blocks, text encoders, autoencoders, the Redux head."""

from fluxedu.attention_map import AttentionMap
from fluxedu.models.attention import QKNorm, RMSNorm, SelfAttention, attend, rope_table, rotate
from fluxedu.models.autoencoder import AutoEncoder, Flux2AutoEncoder
from fluxedu.models.blocks import MLP, DoubleStreamBlock, LastLayer, SingleStreamBlock
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.config import (
    FLUX2_VARIANTS,
    VARIANTS,
    AutoEncoderConfig,
    CLIPTextConfig,
    Flux2AutoEncoderConfig,
    Flux2Config,
    FluxConfig,
    Sampling,
    T5Config,
    Variant,
)
from fluxedu.models.flux import Flux, Plan
from fluxedu.models.flux2 import (
    Flux2,
    Flux2DoubleStreamBlock,
    Flux2SingleStreamBlock,
    GatedMLP,
    SharedModulation,
    SwiGLU,
)
from fluxedu.models.modulation import MLPEmbedder, Modulation, timestep_embedding
from fluxedu.models.redux import Redux, ReduxHead
from fluxedu.models.t5 import T5Encoder

__all__ = [
    "FLUX2_VARIANTS",
    "MLP",
    "VARIANTS",
    "AttentionMap",
    "AutoEncoder",
    "AutoEncoderConfig",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "DoubleStreamBlock",
    "Flux",
    "Flux2",
    "Flux2AutoEncoder",
    "Flux2AutoEncoderConfig",
    "Flux2Config",
    "Flux2DoubleStreamBlock",
    "Flux2SingleStreamBlock",
    "FluxConfig",
    "GatedMLP",
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
    "SharedModulation",
    "SingleStreamBlock",
    "SwiGLU",
    "T5Config",
    "T5Encoder",
    "Variant",
    "attend",
    "rope_table",
    "rotate",
    "timestep_embedding",
]
