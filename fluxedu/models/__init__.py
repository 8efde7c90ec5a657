"""The networks of FLUX.1 and FLUX.2: transformers and their blocks, text encoders, autoencoders, the Redux head."""

from pkgutil import iter_modules

from fluxedu.lazy import public_names

#: imported on first use: sizes and counts can be had without PyTorch
_NAMES = {
    "fluxedu.attention_map": ["AttentionMap"],
    "config": [
        "FLUX2_MODELS",
        "FLUX2_VARIANTS",
        "VARIANTS",
        "AutoEncoderConfig",
        "CLIPTextConfig",
        "Flux2AutoEncoderConfig",
        "Flux2Config",
        "FluxConfig",
        "Sampling",
        "T5Config",
        "Variant",
    ],
    "attention": ["QKNorm", "RMSNorm", "SelfAttention", "attend", "rope_table", "rotate"],
    "modulation": ["MLPEmbedder", "Modulation", "timestep_embedding"],
    "blocks": ["MLP", "DoubleStreamBlock", "LastLayer", "SingleStreamBlock"],
    "flux": ["Flux", "Plan"],
    "flux2": ["Flux2", "Flux2DoubleStreamBlock", "Flux2SingleStreamBlock", "GatedMLP", "SharedModulation", "SwiGLU"],
    "t5": ["T5Encoder"],
    "clip": ["CLIPTextEncoder"],
    "autoencoder": ["AutoEncoder", "Flux2AutoEncoder"],
    "redux": ["Redux", "ReduxHead"],
}
__getattr__, __dir__, __all__ = public_names(__name__, _NAMES, [module.name for module in iter_modules(__path__)])
