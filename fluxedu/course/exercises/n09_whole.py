"""Notebook 09: the whole transformer."""

import torch
from torch import Tensor, nn

from fluxedu.checkpoints import convert
from fluxedu.course.exercise import exercise, wrong
from fluxedu.course.exercises.n07_double import _random
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
PLAIN = SMALL.with_(guidance_embed=False, depth=1, depth_single_blocks=3)


def _questions() -> list[tuple]:
    cases = []
    for seed, config, batch, words, side in ((90, SMALL, 2, 5, (4, 6)), (91, PLAIN, 1, 3, (8, 4))):
        g = torch.Generator().manual_seed(seed)
        state, ids = _random(Flux(config), g).state_dict(), image_ids(*side)
        img, txt = torch.randn(batch, len(ids), 20, generator=g), torch.randn(batch, words, 10, generator=g)
        times, pooled = torch.rand(batch, generator=g), torch.randn(batch, 6, generator=g)
        guidance = 1 + 4 * torch.rand(batch, generator=g) if config.guidance_embed else None
        cases.append((config, state, img, ids, txt, text_ids(words), times, pooled, guidance))
    return cases


def _asked(made, config, state, *inputs):
    flux = made(config)
    flux.load_state_dict(state)
    return flux(*inputs)


@exercise(
    "whole.flux",
    minutes=15,
    difficulty=2,
    cases=_questions,
    call=_asked,
    against=Flux,
    hints=(
        "Five steps: the vector, the turns, both kinds of token to the width, all blocks, the last layer. Between "
        "double and single blocks the streams are laid end to end.",
        "`timestep_embedding(timesteps).to(y)` makes waves of a number (times 1000 is in it; float32, hence `.to(y)`) "
        "and `self.time_in` a vector; guidance likewise. A block is called with `block.plan(vec)` and the turns.",
        "`x = torch.cat([txt, img], dim=1)`, then `x = block(x, block.plan(vec), rope, words)` for every single block, "
        "and `self.final_layer(x[:, words:], self.final_layer.plan(vec))`.",
    ),
    stub='''
    class MyFlux(nn.Module):
        """Noisy image tokens and text tokens in, a velocity for every image token out."""

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
        ) -> Tensor:
            rope = rope_table(torch.cat([txt_ids, img_ids]), self.config.axes_dim).to(torch.complex64)
            raise NotImplementedError("your turn")
    ''',
)
class MyFlux(nn.Module):
    """The transformer from its parts: `forward` gives the velocity `[B, N, out_channels]` of the image's tokens.

    `img [B, N, in_channels]` with `img_ids [N, 3]`, `txt [B, L, context_in_dim]` with `txt_ids [L, 3]`, `timesteps [B]`
    from 1 (noise) to 0, the pooled text `y [B, vec_in_dim]`, and `guidance [B]` where the variant has that input.
    The parts have the official names; write `forward`, the text before the image wherever they are together.
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
        vec = self.time_in(timestep_embedding(timesteps).to(y)) + self.vector_in(y)  # [B, D]
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(y))
        img, txt = self.img_in(img), self.txt_in(txt)  # [B, N, D], [B, L, D]
        for block in self.double_blocks:
            img, txt = block(img, txt, block.plan(vec), rope)
        words, x = txt.shape[1], torch.cat([txt, img], dim=1)  # [B, L + N, D]
        for block in self.single_blocks:
            x = block(x, block.plan(vec), rope, words)
        return self.final_layer(x[:, words:], self.final_layer.plan(vec))  # [B, N, out_channels]


class _Steps(MyFlux):
    """The same in steps, so that a wrong answer changes one of them."""

    def turns(self, txt_ids, img_ids):
        return torch.cat([txt_ids, img_ids])

    def vector(self, timesteps, y, guidance):
        vec = self.time_in(timestep_embedding(timesteps)) + self.vector_in(y)
        return vec if guidance is None else vec + self.guidance_in(timestep_embedding(guidance))

    def single(self, txt, img, vec, rope):
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, block.plan(vec), rope)
        return x

    def kept(self, x, words):
        return x[:, words:]

    def last(self, x, vec):
        return self.final_layer(x, self.final_layer.plan(vec))

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        rope = rope_table(self.turns(txt_ids, img_ids), self.config.axes_dim).to(torch.complex64)
        vec, img, txt = self.vector(timesteps, y, guidance), self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, block.plan(vec), rope)
        return self.last(self.kept(self.single(txt, img, vec, rope), txt.shape[1]), vec)


@wrong("whole.flux", "the first tokens are kept, which are the text's: the image's come behind them.")
class _TextKept(_Steps):
    def kept(self, x, words):
        return x[:, : x.shape[1] - words]


@wrong("whole.flux", "the turns are made for the image first, but the tokens come text first.")
class _TurnsOtherway(_Steps):
    def turns(self, txt_ids, img_ids):
        return torch.cat([img_ids, txt_ids])


@wrong("whole.flux", "the time is multiplied by 1000 twice: timestep_embedding does it.")
class _TimesThousand(_Steps):
    def vector(self, timesteps, y, guidance):
        return super().vector(1000 * timesteps, y, guidance)


@wrong("whole.flux", "the pooled text is not in vec: add self.vector_in(y).")
class _NoText(_Steps):
    def vector(self, timesteps, y, guidance):
        return super().vector(timesteps, y, guidance) - self.vector_in(y)


@wrong("whole.flux", "the guidance is not in vec, though this variant has the input.")
class _NoGuidance(_Steps):
    def vector(self, timesteps, y, guidance):
        return super().vector(timesteps, y, None)


@wrong(
    "whole.flux",
    "the last layer takes scale before shift, which is diffusers' order; the official one is shift, scale.",
)
class _ScaleFirst(_Steps):
    def last(self, x, vec):
        return self.final_layer(x, self.final_layer.plan(vec).roll(self.config.hidden_size, -1))


@wrong("whole.flux", "the text is left behind at the double blocks; the single ones need it as well.")
class _ImageAlone(_Steps):
    def single(self, txt, img, vec, rope):
        x = super().single(txt[:, :0], img, vec, rope[..., txt.shape[1] :, :])
        return torch.cat([txt, x], dim=1)


def _configs() -> list[tuple]:
    return [(FluxConfig.variant("dev"),), (FluxConfig.variant("schnell"),), (FluxConfig.variant("fill"),), (SMALL,)]


def _counted(config: FluxConfig) -> int:
    with meta_init():
        return sum(p.numel() for p in Flux(config).parameters())


@exercise(
    "whole.count",
    minutes=15,
    difficulty=2,
    cases=_configs,
    against=_counted,
    tolerance=0,
    hints=(
        "Write down every linear layer of a part as inputs x outputs, plus its biases. A double block has each of its "
        "layers twice.",
        "A stream: modulation D to 6 D, qkv D to 3 D, two norms of head_dim, proj D to D, MLP D to M and M to D. A "
        "single block: modulation D to 3 D, linear1 D to 3 D + M, linear2 D + M to D, two norms.",
        "The rest: img_in, txt_in, an embedder (two layers) for the time, for the pooled text and, with "
        "`guidance_embed`, for the guidance; the last layer has D to 2 D and D to out_channels.",
    ),
)
def count(config: FluxConfig) -> int:
    """The number of parameters of a FLUX transformer, by arithmetic alone.

    `config` has hidden_size (D), mlp_hidden (M), head_dim, depth, depth_single_blocks, in_channels, out_channels,
    context_in_dim, vec_in_dim and guidance_embed. Time and guidance come as 256 waves; every linear layer has a bias.
    """
    d, m, c = config.hidden_size, config.mlp_hidden, config

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    norms = 2 * c.head_dim
    stream = linear(d, 6 * d) + linear(d, 3 * d) + norms + linear(d, d) + linear(d, m) + linear(m, d)
    single = linear(d, 3 * d) + linear(d, 3 * d + m) + norms + linear(d + m, d)
    waves = (2 if c.guidance_embed else 1) * (linear(256, d) + linear(d, d))
    inputs = linear(c.in_channels, d) + linear(c.context_in_dim, d) + linear(c.vec_in_dim, d) + linear(d, d) + waves
    last = linear(d, 2 * d) + linear(d, c.out_channels)
    return c.depth * 2 * stream + c.depth_single_blocks * single + inputs + last


def _of(config: FluxConfig, *words: str) -> int:
    """The parameters whose names have one of the words."""
    with meta_init():
        return sum(p.numel() for name, p in Flux(config).named_parameters() if any(word in name for word in words))


@wrong("whole.count", "the biases are missing: every linear layer has one number more for each output.")
def _no_biases(config):
    return count(config) - _of(config, "bias")


@wrong("whole.count", "the norms of queries and keys are missing: head_dim numbers each, for q and for k.")
def _no_norms(config):
    return count(config) - _of(config, "norm.")


@wrong("whole.count", "a double block is counted with one stream; it has two.")
def _one_stream(config):
    return count(config) - _of(config, ".txt_")


@wrong("whole.count", "every variant is given a guidance input; schnell has none.")
def _all_guided(config):
    return count(config.with_(guidance_embed=True))


@wrong("whole.count", "a stream of a double block has six modulations, three for the attention and three for the MLP.")
def _half_modulated(config):
    return count(config) - _of(config, "_mod.") // 2


NAMES = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear")


def _single_blocks() -> list[tuple]:
    cases = []
    for seed, config in (
        (92, SMALL.with_(mlp_ratio=4.0)),
        (93, SMALL.with_(hidden_size=36, num_heads=3, mlp_ratio=4.0)),
    ):
        block = _random(SingleStreamBlock(config), torch.Generator().manual_seed(seed))
        cases.append((dict(block.state_dict()), config.hidden_size))
    return cases


def _in_order(answer, block, dim) -> list[Tensor]:
    """By name; a name that is missing or not wanted is an error that says so."""
    made = dict(answer(block, dim))
    wanted = [f"{name}.{kind}" for name in NAMES for kind in ("weight", "bias")]
    found = [made.pop(name) for name in [*wanted, "attn.norm_q.weight", "attn.norm_k.weight"]]
    if made:
        raise KeyError(f"no tensor is called {min(made)}")
    return found


def _converted(block: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """By the package's own table, from a whole network with this block in it."""
    config = SMALL.with_(hidden_size=dim, num_heads=dim // 12, mlp_ratio=4.0)
    state = Flux(config).state_dict() | {f"single_blocks.0.{name}": tensor for name, tensor in block.items()}
    theirs = convert(state, to="diffusers", config=config)
    begins = "single_transformer_blocks.0."
    return {name.removeprefix(begins): tensor for name, tensor in theirs.items() if name.startswith(begins)}


@exercise(
    "whole.unfused",
    minutes=10,
    difficulty=2,
    cases=_single_blocks,
    call=_in_order,
    against=_converted,
    tolerance=0,
    hints=(
        "Most tensors only change their names. linear1 is four layers below each other, in weight and in bias alike.",
        "`tensor.split([dim, dim, dim, len(tensor) - 3 * dim])` cuts rows, and works for a bias as well.",
        "The names: linear1 becomes attn.to_q, attn.to_k, attn.to_v, proj_mlp; linear2 proj_out; modulation.lin "
        "norm.linear; norm.query_norm.scale attn.norm_q.weight; norm.key_norm.scale attn.norm_k.weight.",
    ),
)
def unfused(block: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """One single block's tensors under diffusers' names, `dim` being the width of a token.

    `linear1` becomes `attn.to_q`, `attn.to_k`, `attn.to_v` and `proj_mlp`, in this order; `linear2` becomes `proj_out`,
    `modulation.lin` becomes `norm.linear` (each with `.weight` and `.bias`); `norm.query_norm.scale` becomes
    `attn.norm_q.weight` and `norm.key_norm.scale` becomes `attn.norm_k.weight`.
    """
    theirs = {"attn.norm_q.weight": block["norm.query_norm.scale"], "attn.norm_k.weight": block["norm.key_norm.scale"]}
    for kind in ("weight", "bias"):
        wide = block[f"linear1.{kind}"]
        rows = wide.split([dim, dim, dim, len(wide) - 3 * dim])
        for name, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), rows, strict=True):
            theirs[f"{name}.{kind}"] = part
        theirs[f"proj_out.{kind}"] = block[f"linear2.{kind}"]
        theirs[f"norm.linear.{kind}"] = block[f"modulation.lin.{kind}"]
    return theirs


def _exchanged(theirs: dict[str, Tensor], one: str, other: str) -> dict[str, Tensor]:
    return theirs | {one: theirs[other], other: theirs[one]}


@wrong("whole.unfused", "queries and keys have changed places: the rows are q, k, v, MLP.")
def _keys_first(block, dim):
    theirs = _exchanged(unfused(block, dim), "attn.to_q.weight", "attn.to_k.weight")
    return _exchanged(theirs, "attn.to_q.bias", "attn.to_k.bias")


@wrong("whole.unfused", "the MLP's rows are taken from the top; they are the last ones of linear1.")
def _mlp_on_top(block, dim):
    moved = {f"linear1.{kind}": block[f"linear1.{kind}"].roll(3 * dim, 0) for kind in ("weight", "bias")}
    return unfused(block | moved, dim)


@wrong("whole.unfused", "the weights are right; the biases are not cut like them.")
def _biases_apart(block, dim):
    return unfused(block | {"linear1.bias": block["linear1.bias"].flip(0)}, dim)


@wrong("whole.unfused", "norm_q and norm_k have changed places.")
def _norms_exchanged(block, dim):
    return _exchanged(unfused(block, dim), "attn.norm_q.weight", "attn.norm_k.weight")
