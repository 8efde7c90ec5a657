"""Every network and every variant as data. No numbers live anywhere else.

Field names are those of the public files: the flow's and the autoencoder's follow
black-forest-labs/flux (util.py), the text encoders' follow their ``config.json`` on the hub.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real

from fluxedu.errors import ConfigError, describe

LARGEST = 1 << 24  # no number of a network is larger, or it is a mistake
DEEPEST = 256  # layers, blocks, levels
_COUNTS = ("depth", "depth_single_blocks", "num_layers", "num_hidden_layers", "num_res_blocks")


@dataclass(frozen=True)
class Config:
    """Shared by all: to and from plain dictionaries, strictly. Lists given for tuples become tuples."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, value := tuple(value))
            _check(field.name, field.type, value)

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """Build from a mapping; a key that is not a field is an error that names it."""
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__} is made of a dictionary, not of {describe(values)}.")
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {describe(unknown[0])}; its fields are {', '.join(sorted(known))}."
            )
        return cls(**values)

    def to_dict(self) -> dict:
        """Plain values (tuples become lists), fit for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def with_(self, **changes) -> Config:
        """A copy with some fields changed."""
        return replace(self, **changes)


def _check(name: str, kind: str, value) -> None:
    """A field is what its annotation says, and of a size that makes sense; raises ConfigError."""
    if kind.startswith("tuple"):
        if not isinstance(value, tuple) or len(value) > DEEPEST:
            raise ConfigError(f"{name} must be a list of whole numbers, not {describe(value)}.")
        for one in value:
            _check(f"every number in {name}", "int", one)
    elif kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, not {describe(value)}.")
    elif kind == "int":
        most = DEEPEST if name in _COUNTS else LARGEST
        if isinstance(value, bool) or not isinstance(value, Integral) or value > most:
            raise ConfigError(f"{name} must be a whole number of at most {most:,}, not {describe(value)}.")
    elif isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or abs(value) > LARGEST:
        raise ConfigError(f"{name} must be a number of at most {LARGEST:,}, not {describe(value)}.")


def _positive(config: Config, *names: str, least: int = 1) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(f"{name} must be at least {least}, not {getattr(config, name)}.")


@dataclass(frozen=True)
class TransformerConfig(Config):
    """What the flow transformers of FLUX.1 and FLUX.2 have in common; the fields are those of the subclasses."""

    def __post_init__(self):
        super().__post_init__()
        _positive(self, "in_channels", "out_channels", "context_in_dim", "hidden_size", "num_heads", "theta")
        if self.mlp_hidden < 1:
            raise ConfigError(f"mlp_ratio must make an MLP at least 1 wide, which {self.mlp_ratio} does not.")
        if self.depth < 0 or self.depth_single_blocks < 0:
            raise ConfigError("depth and depth_single_blocks must not be negative.")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not divide into num_heads {self.num_heads} equal heads."
            )
        if any(d < 2 or d % 2 for d in self.axes_dim):
            raise ConfigError(
                f"every number in axes_dim must be even and positive (RoPE turns pairs), not {self.axes_dim}."
            )
        if sum(self.axes_dim) != self.head_dim:
            raise ConfigError(
                f"axes_dim {self.axes_dim} adds up to {sum(self.axes_dim)}, but a head has "
                f"hidden_size / num_heads = {self.head_dim} numbers."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True)
class FluxConfig(TransformerConfig):
    """The flow transformer of FLUX.1. Defaults are FLUX.1-dev's; ``FluxConfig.variant(name)`` gives the others."""

    in_channels: int = 64  # numbers per image token going in: 16 latent channels x 2 x 2 cells
    out_channels: int = 64  # and coming out: the velocity of those cells
    vec_in_dim: int = 768  # CLIP's pooled vector
    context_in_dim: int = 4096  # T5's token vectors
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19  # double-stream blocks
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # RoPE: how head_dim is shared by (frame, row, column)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self):
        super().__post_init__()
        _positive(self, "vec_in_dim")

    @classmethod
    def variant(cls, name: str) -> FluxConfig:
        """A published variant by name: one of :data:`VARIANTS`."""
        if not isinstance(name, str) or name not in VARIANTS:
            raise ConfigError(f"there is no FLUX.1 variant called {describe(name)}; there are {', '.join(VARIANTS)}.")
        return VARIANTS[name].flux


@dataclass(frozen=True)
class Flux2Config(TransformerConfig):
    """The flow transformer of FLUX.2. Defaults are FLUX.2-dev's; ``Flux2Config.variant(name)`` gives the others."""

    in_channels: int = 128  # numbers per image token going in: 32 latent channels x 2 x 2 cells
    out_channels: int = 128
    context_in_dim: int = 15360  # three hidden states of the language model, 5120 wide each
    hidden_size: int = 6144
    mlp_ratio: float = 3.0  # of the MLP after its gate; its first layer is twice as wide
    num_heads: int = 48
    depth: int = 8  # double-stream blocks
    depth_single_blocks: int = 48
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)  # RoPE: (image, row, column, index of a text token)
    theta: int = 2_000
    guidance_embed: bool = True

    @property
    def vec_in_dim(self) -> int:
        """0: FLUX.2 has no pooled vector."""
        return 0

    @classmethod
    def variant(cls, name: str) -> Flux2Config:
        """A published variant by name: one of :data:`FLUX2_VARIANTS`."""
        if not isinstance(name, str) or name not in FLUX2_VARIANTS:
            names = ", ".join(FLUX2_VARIANTS)
            raise ConfigError(f"there is no FLUX.2 variant called {describe(name)}; there are {names}.")
        return FLUX2_VARIANTS[name]


@dataclass(frozen=True)
class PyramidConfig(Config):
    """What the autoencoders of FLUX.1 and FLUX.2 have in common; the fields are those of the subclasses."""

    def __post_init__(self):
        super().__post_init__()
        if self.norm_groups < 1 or self.ch < 1 or self.ch % self.norm_groups:
            raise ConfigError(f"ch must be a multiple of norm_groups = {self.norm_groups}, not {self.ch}.")
        if not 1 <= len(self.ch_mult) <= 12 or min(self.ch_mult) < 1:
            raise ConfigError(f"ch_mult needs 1 to 12 levels, each at least 1, not {describe(self.ch_mult)}.")
        _positive(self, "in_channels", "out_ch", "num_res_blocks", "z_channels")

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class AutoEncoderConfig(PyramidConfig):
    """FLUX.1's autoencoder; defaults are the official size. ``ch`` must be a multiple of ``norm_groups``.

    The official code fixes 32 groups, 4 channels each; a narrow network needs fewer groups, since a
    group of one channel forgets how bright its channel was.
    """

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_groups: int = 32
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


@dataclass(frozen=True)
class Flux2AutoEncoderConfig(PyramidConfig):
    """FLUX.2's autoencoder; defaults are the official size. Latents are normalised by statistics in the weights."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 32
    norm_groups: int = 32


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """CLIP's text encoder; defaults are openai/clip-vit-large-patch14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        super().__post_init__()
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
        _positive(self, *sizes)
        _positive(self, "num_hidden_layers", "eos_token_id", least=0)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not divide into num_attention_heads "
                f"{self.num_attention_heads} equal heads."
            )


@dataclass(frozen=True)
class T5Config(Config):
    """T5's encoder; defaults are google/t5-v1_1-xxl's."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        _positive(self, "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "relative_attention_max_distance")
        _positive(self, "num_layers", least=0)
        _positive(self, "relative_attention_num_buckets", least=4)


@dataclass(frozen=True)
class Sampling:
    """How a variant is meant to be sampled (its model card's defaults)."""

    steps: int
    guidance: float
    text_length: int
    shift: bool
    shift_ends: tuple[float, float] = (0.5, 1.15)  # mu at 256 and at 4096 tokens: sampling/solvers.py


@dataclass(frozen=True)
class Variant:
    """A published member of the family: its transformer and how it is sampled."""

    flux: FluxConfig | Flux2Config
    sampling: Sampling


_DEV = FluxConfig()
VARIANTS: dict[str, Variant] = {
    "schnell": Variant(_DEV.with_(guidance_embed=False), Sampling(4, 0.0, 256, shift=False)),
    "dev": Variant(_DEV, Sampling(50, 3.5, 512, shift=True)),
    "krea": Variant(_DEV, Sampling(50, 4.5, 512, shift=True)),
    "fill": Variant(_DEV.with_(in_channels=384), Sampling(50, 30.0, 128, shift=True)),
    # canny and depth: the guidance scales of the official `cli_control.py`, lines 214-218 at commit 802fb47
    "canny": Variant(_DEV.with_(in_channels=128), Sampling(50, 30.0, 512, shift=True)),
    "depth": Variant(_DEV.with_(in_channels=128), Sampling(50, 10.0, 512, shift=True)),
    "canny-lora": Variant(_DEV.with_(in_channels=128), Sampling(50, 30.0, 512, shift=True)),
    "depth-lora": Variant(_DEV.with_(in_channels=128), Sampling(50, 10.0, 512, shift=True)),
    "kontext": Variant(_DEV, Sampling(30, 2.5, 512, shift=True)),
}

_KLEIN_4B = Flux2Config(
    context_in_dim=7680, hidden_size=3072, num_heads=24, depth=5, depth_single_blocks=20, guidance_embed=False
)
FLUX2_VARIANTS: dict[str, Flux2Config] = {
    "dev": Flux2Config(),
    "klein-4b": _KLEIN_4B,
    "klein-9b": _KLEIN_4B.with_(context_in_dim=12288, hidden_size=4096, num_heads=32, depth=8, depth_single_blocks=24),
}
_DISTILLED, _UNDISTILLED = Sampling(4, 1.0, 512, shift=True), Sampling(50, 4.0, 512, shift=True)
#: FLUX.2 by the names of ``fe.load``, as ``VARIANTS`` is FLUX.1; "klein" is short for "klein-4b"
FLUX2_MODELS: dict[str, Variant] = {
    "flux2-dev": Variant(FLUX2_VARIANTS["dev"], _UNDISTILLED),
    "klein": Variant(_KLEIN_4B, _DISTILLED),
    "klein-4b": Variant(_KLEIN_4B, _DISTILLED),
    "klein-9b": Variant(FLUX2_VARIANTS["klein-9b"], _DISTILLED),
    "klein-base": Variant(_KLEIN_4B, _UNDISTILLED),
    "klein-base-9b": Variant(FLUX2_VARIANTS["klein-9b"], _UNDISTILLED),
}
