"""Notebook 09: the whole transformer."""

import torch
from torch import Tensor, nn

from fluxedu.checkpoints import convert
from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.course.exercises import randomise, run_module
from fluxedu.models import Flux, FluxConfig
from fluxedu.models.attention import rope_table
from fluxedu.models.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxedu.models.flux import LastLayer
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import MLPEmbedder, timestep_embedding
from fluxedu.sampling.latents import image_ids, text_ids

SMALL = FluxConfig(
    in_channels=20, out_channels=12, vec_in_dim=6, context_in_dim=10, hidden_size=24, mlp_ratio=2.0, num_heads=2,
    depth=2, depth_single_blocks=2, axes_dim=(2, 4, 6),
)  # fmt: skip
UNGUIDED = SMALL.with_(guidance_embed=False, depth=1, depth_single_blocks=3)


def _inputs() -> list[tuple]:
    cases = []
    for seed, config, batch, txt_len, size in ((90, SMALL, 2, 5, (4, 6)), (91, UNGUIDED, 1, 3, (8, 4))):
        g = torch.Generator().manual_seed(seed)
        state, img_ids = randomise(Flux(config), g).state_dict(), image_ids(*size)
        img, txt = torch.randn(batch, len(img_ids), 20, generator=g), torch.randn(batch, txt_len, 10, generator=g)
        timesteps, pooled = torch.rand(batch, generator=g), torch.randn(batch, 6, generator=g)
        guidance = 1 + 4 * torch.rand(batch, generator=g) if config.guidance_embed else None
        cases.append(((config,), state, img, img_ids, txt, text_ids(txt_len), timesteps, pooled, guidance))
    return cases


@exercise(
    "whole.flux",
    minutes=15,
    difficulty=2,
    cases=_inputs,
    call=run_module,
    against=Flux,
    hints=(
        "Five steps: compute the conditioning vector `vec`, compute the rotations, project image and text tokens to "
        "the width D, run all blocks, run the last layer. Concatenate text and image before the single blocks.",
        "`timestep_embedding(timesteps).to(y)` turns a number into sines and cosines (it multiplies by 1000 and "
        "returns float32, hence `.to(y)`), and `self.time_in` turns those into a vector. Guidance works the same way. "
        "A block is called with `block.plan(vec)` and the rotations.",
        "`x = torch.cat([txt, img], dim=1)`, then `x = block(x, block.plan(vec), rope, txt_len)` for every single "
        "block, and `self.final_layer(x[:, txt_len:], self.final_layer.plan(vec))`.",
    ),
)
class MyFlux(nn.Module):
    """Assemble the transformer: write `forward`, which returns the velocity `[B, N, out_channels]` of the image tokens.

    Inputs: `img [B, N, in_channels]` with `img_ids [N, 3]`, `txt [B, L, context_in_dim]` with `txt_ids [L, 3]`,
    `timesteps [B]` from 1 (noise) to 0, the pooled text vector `y [B, vec_in_dim]`, and `guidance [B]` for variants
    that have this input. The modules have their official names. Where text and image are concatenated, the text comes
    first.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config, dim = config, config.hidden_size
        self.img_in = nn.Linear(config.in_channels, dim)
        self.txt_in = nn.Linear(config.context_in_dim, dim)
        self.time_in = MLPEmbedder(256, dim)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim)
        self.guidance_in = MLPEmbedder(256, dim) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(dim, config.out_channels)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rope = rope_table(torch.cat([txt_ids, img_ids]), self.config.axes_dim).to(torch.complex64)
        # your turn
        vec = self.time_in(timestep_embedding(timesteps).to(y)) + self.vector_in(y)  # [B, D]
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(y))
        img, txt = self.img_in(img), self.txt_in(txt)  # [B, N, D], [B, L, D]
        for block in self.double_blocks:
            img, txt = block(img, txt, block.plan(vec), rope)
        txt_len = txt.shape[1]
        x = torch.cat([txt, img], dim=1)  # [B, L + N, D]
        for block in self.single_blocks:
            x = block(x, block.plan(vec), rope, txt_len)
        return self.final_layer(x[:, txt_len:], self.final_layer.plan(vec))  # [B, N, out_channels]


@mistakes(
    "whole.flux",
    ("first tokens", "you return the first tokens, which are text; the image tokens come after them."),
    ("image ids first", "the rotations are computed with the image ids first, but the text tokens come first."),
    ("time x 1000 twice", "the time is multiplied by 1000 twice: timestep_embedding does it already."),
    ("no pooled text", "the pooled text is not in vec: add self.vector_in(y)."),
    ("no guidance", "the guidance is not in vec, though this variant has a guidance input."),
    (
        "scale before shift",
        "your last layer takes scale before shift, which is diffusers' order; the official one is shift, scale.",
    ),
    ("text left out", "the single blocks get the image tokens only; they need the text tokens as well."),
)
class _Mistaken(MyFlux):
    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        ids = [img_ids, txt_ids] if self.mistake == "image ids first" else [txt_ids, img_ids]
        rope = rope_table(torch.cat(ids), self.config.axes_dim).to(torch.complex64)
        scale = 1000 if self.mistake == "time x 1000 twice" else 1
        vec = self.time_in(timestep_embedding(scale * timesteps))
        if self.mistake != "no pooled text":
            vec = vec + self.vector_in(y)
        if guidance is not None and self.mistake != "no guidance":
            vec = vec + self.guidance_in(timestep_embedding(guidance))
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, block.plan(vec), rope)
        txt_len = txt.shape[1]
        if self.mistake == "text left out":
            txt, rope, txt_len = txt[:, :0], rope[..., txt_len:, :], 0
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, block.plan(vec), rope)
        img = x[:, : x.shape[1] - txt_len] if self.mistake == "first tokens" else x[:, txt_len:]
        mods = self.final_layer.plan(vec)
        if self.mistake == "scale before shift":
            mods = mods.roll(self.config.hidden_size, -1)
        return self.final_layer(img, mods)


def _configs() -> list[tuple]:
    return [(FluxConfig.variant("dev"),), (FluxConfig.variant("schnell"),), (FluxConfig.variant("fill"),), (SMALL,)]


def _parameters(config: FluxConfig, *substrings: str) -> int:
    """The number of parameters, counted in the network itself; only those whose name contains one of `substrings`."""
    with meta_init():
        named = list(Flux(config).named_parameters())
    return sum(p.numel() for name, p in named if not substrings or any(part in name for part in substrings))


@exercise(
    "whole.count",
    minutes=15,
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


def _in_fixed_order(answer, block, dim) -> list[Tensor]:
    """The tensors of the answer in a fixed order; a name that is missing, or unknown, raises an error that names it."""
    state = dict(answer(block, dim))
    names = [f"{name}.{kind}" for name in NAMES for kind in ("weight", "bias")]
    tensors = [state.pop(name) for name in [*names, "attn.norm_q.weight", "attn.norm_k.weight"]]
    if state:
        raise KeyError(f"no tensor is called {min(state)}")
    return tensors


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
    call=_in_fixed_order,
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
