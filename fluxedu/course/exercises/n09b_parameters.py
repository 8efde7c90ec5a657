"""Notebook 09b: parameters and layouts."""

import torch
from torch import Tensor

from fluxedu.checkpoints import convert
from fluxedu.course.exercise import exercise, wrong
from fluxedu.course.exercises import randomise
from fluxedu.course.exercises.n09_whole import SMALL
from fluxedu.models import Flux, FluxConfig
from fluxedu.models.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxedu.models.meta_init import meta_init


def _configs() -> list[tuple]:
    return [(FluxConfig.variant("dev"),), (FluxConfig.variant("schnell"),), (FluxConfig.variant("fill"),), (SMALL,)]


def _parameters(config: FluxConfig, *substrings: str) -> int:
    """The number of parameters, counted in the network itself; only those whose name contains one of `substrings`."""
    with meta_init():
        named = list(Flux(config).named_parameters())
    return sum(p.numel() for name, p in named if not substrings or any(part in name for part in substrings))


@exercise(
    "whole.count",
    minutes=12,
    difficulty=2,
    cases=_configs,
    against=_parameters,
    tolerance=0,
    hints=(
        "List every linear layer of a module as inputs x outputs, plus one bias per output. A double block has all of "
        "its layers twice.",
        "One stream of a double block: modulation D to 6 D, qkv D to 3 D, two norms of head_dim, proj D to D, MLP D to "
        "M and M to D. A single block: modulation D to 3 D, linear1 D to 3 D + M, linear2 D + M to D, two norms.",
        "The rest: img_in, txt_in, an embedder (two linear layers) each for the time, for the pooled text and, with "
        "`guidance_embed`, for the guidance; the last layer has D to 2 D and D to out_channels.",
    ),
)
def count(config: FluxConfig) -> int:
    """The number of parameters of a FLUX transformer, by arithmetic alone.

    `config` has hidden_size (D), mlp_hidden (M), head_dim, depth, depth_single_blocks, in_channels, out_channels,
    context_in_dim, vec_in_dim and guidance_embed. The embeddings of time and guidance have 256 numbers (sines and
    cosines). Every linear layer has a bias.
    """
    d, m, c = config.hidden_size, config.mlp_hidden, config

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    norms = 2 * c.head_dim
    stream = linear(d, 6 * d) + linear(d, 3 * d) + norms + linear(d, d) + linear(d, m) + linear(m, d)
    single = linear(d, 3 * d) + linear(d, 3 * d + m) + norms + linear(d + m, d)
    time_in = guidance_in = linear(256, d) + linear(d, d)
    vector_in = linear(c.vec_in_dim, d) + linear(d, d)
    inputs = linear(c.in_channels, d) + linear(c.context_in_dim, d) + time_in + vector_in
    if c.guidance_embed:
        inputs += guidance_in
    last = linear(d, 2 * d) + linear(d, c.out_channels)
    return c.depth * 2 * stream + c.depth_single_blocks * single + inputs + last


wrong("whole.count", "the biases are missing: every linear layer has one more number for each output.")(
    lambda config: count(config) - _parameters(config, "bias")
)
wrong("whole.count", "the norms of queries and keys are missing: head_dim numbers for q and as many for k.")(
    lambda config: count(config) - _parameters(config, "norm.")
)
wrong("whole.count", "a double block is counted with one stream; it has two.")(
    lambda config: count(config) - _parameters(config, ".txt_")
)
wrong("whole.count", "you gave every variant a guidance input; schnell has none.")(
    lambda config: count(config.with_(guidance_embed=True))
)
wrong("whole.count", "each stream of a double block has six modulations: three for the attention, three for the MLP.")(
    lambda config: count(config) - _parameters(config, "_mod.") // 2
)


NAMES = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear")


def _single_blocks() -> list[tuple]:
    cases = []
    for seed, dim, num_heads in ((92, 24, 2), (93, 36, 3)):
        config = SMALL.with_(hidden_size=dim, num_heads=num_heads, mlp_ratio=4.0)
        block = randomise(SingleStreamBlock(config), torch.Generator().manual_seed(seed))
        cases.append((dict(block.state_dict()), dim))
    return cases


def _in_fixed_order(state: dict[str, Tensor], names: tuple[str, ...], norms: tuple[str, ...]) -> list[Tensor]:
    """The tensors of an answer in a fixed order; a name that is missing, or unknown, raises an error that names it."""
    state = dict(state)
    names = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")] + [f"{name}.weight" for name in norms]
    if missing := [name for name in names if name not in state]:
        raise KeyError(f"the tensor {missing[0]} is missing")
    if unknown := sorted(set(state) - set(names)):
        raise KeyError(f"no tensor is called {unknown[0]}")
    return [state[name] for name in names]


def _single_in_order(answer, block, dim) -> list[Tensor]:
    return _in_fixed_order(answer(block, dim), NAMES, ("attn.norm_q", "attn.norm_k"))


def _converted(block: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """The reference: the package's conversion of a whole network that contains this block."""
    config = SMALL.with_(hidden_size=dim, num_heads=dim // 12, mlp_ratio=4.0)
    state = Flux(config).state_dict() | {f"single_blocks.0.{name}": tensor for name, tensor in block.items()}
    converted = convert(state, to="diffusers", config=config)
    prefix = "single_transformer_blocks.0."
    return {name.removeprefix(prefix): tensor for name, tensor in converted.items() if name.startswith(prefix)}


@exercise(
    "whole.unfused",
    minutes=10,
    difficulty=2,
    cases=_single_blocks,
    call=_single_in_order,
    against=_converted,
    tolerance=0,
    hints=(
        "Most tensors only change their names. linear1 is four layers stacked along axis 0, in weight and bias alike.",
        "`tensor.split([dim, dim, dim, len(tensor) - 3 * dim])` cuts rows, and works for a bias as well.",
        "The names: linear1 becomes attn.to_q, attn.to_k, attn.to_v, proj_mlp; linear2 proj_out; modulation.lin "
        "norm.linear; norm.query_norm.scale attn.norm_q.weight; norm.key_norm.scale attn.norm_k.weight.",
    ),
)
def unfused(block: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """The tensors of one single block under diffusers' names; `dim` is the width of a token.

    `linear1` becomes `attn.to_q`, `attn.to_k`, `attn.to_v` and `proj_mlp`, in this order; `linear2` becomes `proj_out`,
    `modulation.lin` becomes `norm.linear` (each with `.weight` and `.bias`); `norm.query_norm.scale` becomes
    `attn.norm_q.weight` and `norm.key_norm.scale` becomes `attn.norm_k.weight`.
    """
    state = {"attn.norm_q.weight": block["norm.query_norm.scale"], "attn.norm_k.weight": block["norm.key_norm.scale"]}
    for kind in ("weight", "bias"):
        linear1 = block[f"linear1.{kind}"]
        q, k, v, mlp = linear1.split([dim, dim, dim, len(linear1) - 3 * dim])
        state[f"attn.to_q.{kind}"] = q
        state[f"attn.to_k.{kind}"] = k
        state[f"attn.to_v.{kind}"] = v
        state[f"proj_mlp.{kind}"] = mlp
        state[f"proj_out.{kind}"] = block[f"linear2.{kind}"]
        state[f"norm.linear.{kind}"] = block[f"modulation.lin.{kind}"]
    return state


def _exchanged(state: dict[str, Tensor], one: str, other: str) -> dict[str, Tensor]:
    return state | {one: state[other], other: state[one]}


@wrong("whole.unfused", "queries and keys are exchanged: the rows are q, k, v, MLP.")
def _keys_first(block, dim):
    state = _exchanged(unfused(block, dim), "attn.to_q.weight", "attn.to_k.weight")
    return _exchanged(state, "attn.to_q.bias", "attn.to_k.bias")


@wrong("whole.unfused", "the rows of the MLP are taken from the top of linear1; they are its last rows.")
def _mlp_on_top(block, dim):
    rolled = {f"linear1.{kind}": block[f"linear1.{kind}"].roll(3 * dim, 0) for kind in ("weight", "bias")}
    return unfused(block | rolled, dim)


wrong("whole.unfused", "the weights are right, but the biases are not cut in the same way.")(
    lambda block, dim: unfused(block | {"linear1.bias": block["linear1.bias"].flip(0)}, dim)
)
wrong("whole.unfused", "norm_q and norm_k are exchanged.")(
    lambda block, dim: _exchanged(unfused(block, dim), "attn.norm_q.weight", "attn.norm_k.weight")
)


RENAMED = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
RENAMED_NORMS = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")


def _double_blocks() -> list[tuple]:
    cases = []
    for seed, dim, num_heads in ((94, 24, 2), (95, 36, 3)):
        config = SMALL.with_(hidden_size=dim, num_heads=num_heads, mlp_ratio=4.0)
        state = randomise(DoubleStreamBlock(config), torch.Generator().manual_seed(seed)).state_dict()
        cases.append(({name: tensor for name, tensor in state.items() if "qkv" not in name},))
    return cases


def _double_in_order(answer, block) -> list[Tensor]:
    return _in_fixed_order(answer(block), tuple(RENAMED.values()), RENAMED_NORMS)


def _double_converted(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference: the package's conversion of a whole network that contains this block."""
    dim = len(block["img_attn.proj.bias"])
    config = SMALL.with_(hidden_size=dim, num_heads=dim // 12, mlp_ratio=4.0)
    state = Flux(config).state_dict() | {f"double_blocks.0.{name}": tensor for name, tensor in block.items()}
    prefix, converted = "transformer_blocks.0.", convert(state, to="diffusers", config=config)
    wanted = {name.removeprefix(prefix): tensor for name, tensor in converted.items() if name.startswith(prefix)}
    fused = ("to_q", "to_k", "to_v", "add_q_", "add_k_", "add_v_")
    return {name: tensor for name, tensor in wanted.items() if not any(part in name for part in fused)}


@exercise(
    "whole.renamed",
    minutes=8,
    difficulty=1,
    cases=_double_blocks,
    call=_double_in_order,
    against=_double_converted,
    tolerance=0,
    hints=(
        "Write the pairs of the table as a dictionary, and replace the beginning of every name by its partner.",
        "`layer, _, kind = name.rpartition('.')` separates `img_mod.lin` from `weight`. The norms' `scale` is called "
        "`weight` in diffusers.",
        "`{f\"{table[layer]}.{kind.replace('scale', 'weight')}\": tensor for ...}` over "
        "`name, tensor in block.items()`, with `layer` and `kind` as in the second hint.",
    ),
)
def renamed(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one double block under diffusers' names. `block` does not contain the `qkv` tensors.

    Each has `.weight` and `.bias` in both layouts, except the norms: `.scale` in the official one, `.weight` in
    diffusers'.

    | official | diffusers | official | diffusers |
    |---|---|---|---|
    | `img_mod.lin` | `norm1.linear` | `txt_mod.lin` | `norm1_context.linear` |
    | `img_attn.proj` | `attn.to_out.0` | `txt_attn.proj` | `attn.to_add_out` |
    | `img_mlp.0` | `ff.net.0.proj` | `txt_mlp.0` | `ff_context.net.0.proj` |
    | `img_mlp.2` | `ff.net.2` | `txt_mlp.2` | `ff_context.net.2` |
    | `img_attn.norm.query_norm` | `attn.norm_q` | `txt_attn.norm.query_norm` | `attn.norm_added_q` |
    | `img_attn.norm.key_norm` | `attn.norm_k` | `txt_attn.norm.key_norm` | `attn.norm_added_k` |
    """
    table = {
        "img_mod.lin": "norm1.linear",
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_mod.lin": "norm1_context.linear",
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    }
    state = {}
    for name, tensor in block.items():
        layer, _, kind = name.rpartition(".")
        state[f"{table[layer]}.{kind.replace('scale', 'weight')}"] = tensor
    return state


def _streams_exchanged(block: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The block with the tensors of text and image exchanged whose names contain ``part``."""
    other = {"img": "txt", "txt": "img"}
    return {name: block[other[name[:3]] + name[3:]] if part in name else tensor for name, tensor in block.items()}


wrong("whole.renamed", "text and image are exchanged: the names with `context` and `add` are the text's.")(
    lambda block: renamed(_streams_exchanged(block, ""))
)
wrong("whole.renamed", "the modulations of text and image are exchanged: norm1_context is the text's.")(
    lambda block: renamed(_streams_exchanged(block, "_mod"))
)
wrong("whole.renamed", "the output projections are exchanged: to_add_out is the text's.")(
    lambda block: renamed(_streams_exchanged(block, "proj"))
)
wrong("whole.renamed", "the norms of text and image are exchanged: those with `added` are the text's.")(
    lambda block: renamed(_streams_exchanged(block, "norm"))
)


@wrong("whole.renamed", "the norms of queries and keys are exchanged.")
def _norms_exchanged(block):
    state = _exchanged(renamed(block), "attn.norm_q.weight", "attn.norm_k.weight")
    return _exchanged(state, "attn.norm_added_q.weight", "attn.norm_added_k.weight")
