"""The networks of FLUX.1 and FLUX.2: transformers and their blocks, text encoders, autoencoders, the Redux head."""

from importlib import import_module
from pkgutil import iter_modules

#: public name -> the module that defines it, imported on first use: sizes and counts can be had without PyTorch
_PUBLIC = {
    "FLUX2_VARIANTS": "fluxedu.models.config",
    "MLP": "fluxedu.models.blocks",
    "VARIANTS": "fluxedu.models.config",
    "AttentionMap": "fluxedu.attention_map",
    "AutoEncoder": "fluxedu.models.autoencoder",
    "AutoEncoderConfig": "fluxedu.models.config",
    "CLIPTextConfig": "fluxedu.models.config",
    "CLIPTextEncoder": "fluxedu.models.clip",
    "DoubleStreamBlock": "fluxedu.models.blocks",
    "Flux": "fluxedu.models.flux",
    "Flux2": "fluxedu.models.flux2",
    "Flux2AutoEncoder": "fluxedu.models.autoencoder",
    "Flux2AutoEncoderConfig": "fluxedu.models.config",
    "Flux2Config": "fluxedu.models.config",
    "Flux2DoubleStreamBlock": "fluxedu.models.flux2",
    "Flux2SingleStreamBlock": "fluxedu.models.flux2",
    "FluxConfig": "fluxedu.models.config",
    "GatedMLP": "fluxedu.models.flux2",
    "LastLayer": "fluxedu.models.blocks",
    "MLPEmbedder": "fluxedu.models.modulation",
    "Modulation": "fluxedu.models.modulation",
    "Plan": "fluxedu.models.flux",
    "QKNorm": "fluxedu.models.attention",
    "RMSNorm": "fluxedu.models.attention",
    "Redux": "fluxedu.models.redux",
    "ReduxHead": "fluxedu.models.redux",
    "Sampling": "fluxedu.models.config",
    "SelfAttention": "fluxedu.models.attention",
    "SharedModulation": "fluxedu.models.flux2",
    "SingleStreamBlock": "fluxedu.models.blocks",
    "SwiGLU": "fluxedu.models.flux2",
    "T5Config": "fluxedu.models.config",
    "T5Encoder": "fluxedu.models.t5",
    "Variant": "fluxedu.models.config",
    "attend": "fluxedu.models.attention",
    "rope_table": "fluxedu.models.attention",
    "rotate": "fluxedu.models.attention",
    "timestep_embedding": "fluxedu.models.modulation",
}
_MODULES = [module.name for module in iter_modules(__path__)]
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"fluxedu.models has no attribute {name!r}; it has {', '.join(_PUBLIC)}.")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
