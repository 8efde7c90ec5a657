"""From one layout to the other, strictly: what the tensors are, whether they are all there, and the conversion.

>>> from fluxedu.models import Flux, FluxConfig
>>> config = FluxConfig(hidden_size=16, num_heads=2, axes_dim=(2, 2, 4), depth=1, depth_single_blocks=1)
>>> theirs = convert(Flux(config).state_dict(), to="diffusers", config=config)
>>> theirs["transformer_blocks.0.attn.to_q.weight"].shape
torch.Size([16, 16])
>>> ours = convert(theirs, to="bfl", config=config)
>>> ours["double_blocks.0.img_attn.qkv.weight"].shape
torch.Size([48, 16])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fluxedu.checkpoints.configs import described, from_diffusers_config, read_off, to_diffusers_config
from fluxedu.checkpoints.tables import LAYOUTS, TABLES, Converted, Shape, label_of, recipes, shapes, shapes_of
from fluxedu.errors import CheckpointError, ConfigError, first_of
from fluxedu.models import AutoEncoderConfig, CLIPTextConfig, FluxConfig, T5Config
from fluxedu.models.config import Config

__all__ = ["check", "convert", "converted", "from_diffusers_config", "infer_config", "to_diffusers_config"]

#: by which names a network and its layout are known; any one will do
_MARKS: dict[tuple[type[Config], str], tuple[str, ...]] = {
    (FluxConfig, "bfl"): ("img_in.weight", "final_layer.linear.weight", "txt_in.weight"),
    (FluxConfig, "diffusers"): ("x_embedder.weight", "norm_out.linear.weight", "context_embedder.weight"),
    (AutoEncoderConfig, "bfl"): ("encoder.mid.block_1.norm1.weight", "decoder.mid.block_1.norm1.weight"),
    (AutoEncoderConfig, "diffusers"): tuple(f"{half}coder.mid_block.resnets.0.norm1.weight" for half in ("en", "de")),
    (CLIPTextConfig, "bfl"): ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"),
    (T5Config, "bfl"): ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
}
#: what others put before every name
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "first_stage_model.", "vae.", "model.")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names without what others put before them: plain name -> the name as stored.

    A prefix is only one if every name has it. CLIP gets its ``text_model.`` back where a newer
    transformers left it out, and loses ``position_ids``, which are 0, 1, 2… and no weight. T5's token
    table is often stored twice: it keeps the name ``shared.weight``.
    """
    names = {name: name for name in names}
    while prefix := next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): stored for name, stored in names.items()}
    if "embeddings.token_embedding.weight" in names:
        names = {f"text_model.{name}": stored for name, stored in names.items()}
    names.pop("text_model.embeddings.position_ids", None)
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in names and "encoder.embed_tokens.weight" in names:
        twin = names.pop("encoder.embed_tokens.weight")
        names.setdefault("shared.weight", twin)
    return names


def kind_of(names: Iterable[str]) -> tuple[type[Config], str] | None:
    """Which network and which layout these (plain) names belong to; None if they are of neither."""
    names = set(names)
    return next((known for known, marks in _MARKS.items() if names.intersection(marks)), None)


def infer_config(tensors: Mapping[str, Tensor], like: Config | None = None) -> Config:
    """The configuration that these tensors' shapes tell.

    What shapes do not tell is taken from ``like``, or is the official value where it can be: ``axes_dim``
    for heads of 128, 32 norm groups for an autoencoder, heads of 64 for CLIP. Raises CheckpointError
    where it cannot.
    """
    found, label = shapes_of(tensors), label_of(tensors)
    known = kind_of(found)
    if known is None:
        raise CheckpointError(f"{label} is no network of FLUX.1: {first_of(found)} is none of its names.")
    kind = known[0]
    try:
        fields = read_off(kind, found)
    except KeyError as error:
        raise CheckpointError(
            f"{label} is too incomplete to tell its configuration ({error.args[0]}); give config."
        ) from None
    base = like if isinstance(like, kind) else kind()
    if kind is CLIPTextConfig and like is None:
        fields["num_attention_heads"] = max(1, fields["hidden_size"] // 64)
    try:
        return base.with_(**fields)
    except ConfigError as error:
        raise CheckpointError(f"the shapes in {label} do not tell everything, give config: {error}") from None


def check(found: dict[str, Shape], expected: dict[str, Shape], label: str) -> None:
    """Every expected tensor, no other, each in its shape; or a CheckpointError that names the first."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    faults = []
    if missing:
        faults.append(f"lacks the key {first_of(missing)}")
    if extra:
        faults.append(f"has an unexpected key {first_of(extra)}")
    if faults:
        raise CheckpointError(f"{label} {' and '.join(faults)}.")
    wrong = [name for name in expected if tuple(found[name]) != tuple(expected[name])]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{label} has {first_of(wrong)} in shape {list(found[name])}, but it should be {list(expected[name])}."
        )


def check_variant(found: dict[str, Shape], config: Config, layout: str, label: str) -> None:
    """Refuse tensors that are in order, but another network's than ``config`` says."""
    known = kind_of(found)
    if known is not None and known[0] is not type(config):
        raise CheckpointError(f"{label} is {_name_of_kind(known[0])}, but {_name_of_kind(type(config))} is wanted.")
    if known is not None and known[1] != layout and type(config) in TABLES:
        raise CheckpointError(f"{label} is in {known[1]}'s layout, but {layout}'s is wanted; convert it first.")
    try:
        fields = read_off(type(config), found)
        theirs = _fitted(config, fields)
        whole = found.keys() == shapes(theirs, layout).keys() and shapes(theirs, layout) == found
    except (KeyError, ConfigError):
        return
    if whole:
        told = [f"{n} is {v}, not {getattr(config, n)}" for n, v in fields.items() if v != getattr(config, n)]
        who, wanted = described(theirs), described(config)
        raise CheckpointError(f"{label} is {who}, but the config is that of {wanted}: {', '.join(told)}.")


def _fitted(config: Config, fields: dict) -> Config:
    """``config`` with other fields, and any axes that add up to a head (no shape depends on them)."""
    if not isinstance(config, FluxConfig):
        return config.with_(**fields)
    head = fields["hidden_size"] // fields.get("num_heads", config.num_heads)
    axes = config.axes_dim if sum(config.axes_dim) == head else (2, 2, head - 4)
    return config.with_(**fields, axes_dim=axes)


def _name_of_kind(kind: type[Config]) -> str:
    return "a flow transformer" if kind is FluxConfig else described(kind())


def layout_of(found: dict[str, Shape], config: Config) -> str:
    """The layout these names are in, for a network with ``config``."""
    if type(config) not in TABLES:
        return "bfl"
    return max(LAYOUTS, key=lambda layout: len(found.keys() & shapes(config, layout).keys()))


def plain(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors under their plain names; those of a file have them already."""
    if hasattr(tensors, "shapes"):
        return tensors
    return {name: tensors[stored] for name, stored in plain_names(tensors).items()}


def converted(tensors: Mapping[str, Tensor], to: str, config: Config | None = None) -> Converted:
    """Like :func:`convert`, but each tensor is made when it is asked for."""
    if to not in LAYOUTS:
        raise CheckpointError(f"there is no layout called {to!r}; there are {' and '.join(LAYOUTS)}.")
    tensors = plain(tensors)
    config = config or _told_config(tensors)
    found, label = shapes_of(tensors), label_of(tensors)
    layout = layout_of(found, config)
    require(found, config, layout, label)
    if to == "diffusers":
        to_diffusers_config(config)  # refuses what that layout cannot say
    lazy = Converted(tensors, recipes(config, layout, to), label)
    lazy.dtypes  # noqa: B018  (refuses parts of one tensor in two dtypes, before anything is made)
    return lazy


def _told_config(tensors: Mapping[str, Tensor]) -> Config:
    """As told by the shapes; how a head is shared by the axes does not matter to a state dict."""
    found = shapes_of(tensors)
    known = kind_of(found)
    if known and known[0] is FluxConfig:
        try:
            return _fitted(FluxConfig(), read_off(FluxConfig, found))
        except (KeyError, ConfigError):
            pass
    return infer_config(tensors)


def require(found: dict[str, Shape], config: Config, layout: str, label: str) -> None:
    """Exactly the tensors of a network with ``config``; or a CheckpointError, the most telling one."""
    if found == shapes(config, layout):
        return
    check_variant(found, config, layout, label)
    check(found, shapes(config, layout), label)


def convert(state_dict: Mapping[str, Tensor], to: str, config: Config | None = None) -> dict[str, Tensor]:
    """The same weights under the other layout's names.

    ``state_dict`` is a flow transformer's or an autoencoder's, in either layout; ``to`` is ``"bfl"`` or
    ``"diffusers"``; ``config`` may be left out where the shapes tell it. Values are not computed with:
    there and back is exact to the bit. Tensors that are only renamed, cut or reshaped share memory
    with ``state_dict``.

    Raises CheckpointError for a missing or unexpected name, a wrong shape, another variant's tensors, or
    a network the wanted layout cannot express.
    """
    return dict(converted(state_dict, to, config))
