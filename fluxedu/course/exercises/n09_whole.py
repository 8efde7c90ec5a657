"""Notebook 09: the whole transformer."""

import torch
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes
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
        "returns float32, hence `.to(y)`), and `self.time_in` turns those into a vector. Guidance works the same way.",
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

    A double block is called as `block(img, txt, block.plan(vec), rope)` and returns both, a single block as
    `block(x, block.plan(vec), rope, txt_len)`, and the last layer as `final_layer(x, final_layer.plan(vec))`. As in
    notebook 05, `timestep_embedding(t).to(y)` embeds times and guidance scales.
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


def _requests() -> list[tuple]:
    dev, schnell, fill = (FluxConfig.variant(name) for name in ("dev", "schnell", "fill"))
    return [(dev, 512, 4096), (schnell, 256, 1024), (fill, 128, 2304), (SMALL, 5, 6), (UNGUIDED, 7, 12)]


def _operations(config: FluxConfig, txt_len: int, img_len: int) -> int:
    """The reference: every linear layer of the network itself, by its name, and the attention."""
    total, tokens = 0, txt_len + img_len
    with meta_init():
        network = Flux(config)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and not any(part in name for part in ("mod", "Mod", "time", "vector", "guid")):
            n = txt_len if "txt" in name else tokens if "single" in name else img_len
            total += 2 * n * module.weight.numel()
        if isinstance(module, (DoubleStreamBlock, SingleStreamBlock)):
            total += 4 * tokens**2 * config.hidden_size
    return total


@exercise(
    "whole.flops",
    minutes=10,
    difficulty=2,
    cases=_requests,
    against=_operations,
    tolerance=1e-9,
    hints=(
        "A linear layer costs 2 x tokens x inputs x outputs. Double blocks and single blocks have the same layers per "
        "token: qkv, output projection, and the two of the MLP.",
        "Attention has two products per block: the scores, tokens x tokens x D, and the weighted sum of the values, as "
        "large again; each costs 2 operations per multiplication.",
        "With T tokens, a block costs `2 * T * (4 * D * D + 2 * D * M) + 4 * T * T * D`; add img_in and the last layer "
        "for the image tokens, and txt_in for the text tokens.",
    ),
)
def flops(config: FluxConfig, txt_len: int, img_len: int) -> int:
    """The operations of one evaluation of the network for one image: multiplications and additions both count.

    `config` has hidden_size (D), mlp_hidden (M), depth, depth_single_blocks, in_channels, context_in_dim and
    out_channels. Count the matrix products only: the linear layers and, in every block, the attention's scores and
    weighted sum over all `txt_len + img_len` tokens. Leave out biases, norms, softmax, and what is computed from `vec`
    alone (the embedders and the modulation). The last layer reads image tokens only.
    """
    d, m, tokens = config.hidden_size, config.mlp_hidden, txt_len + img_len

    def linear(n: int, inputs: int, outputs: int) -> int:
        return 2 * n * inputs * outputs

    attention = 2 * (2 * tokens * tokens * d)  # scores, and weighted sum of the values
    block = linear(tokens, d, 3 * d) + linear(tokens, d, d) + linear(tokens, d, m) + linear(tokens, m, d) + attention
    before = linear(img_len, config.in_channels, d) + linear(txt_len, config.context_in_dim, d)
    last = linear(img_len, d, config.out_channels)
    return before + (config.depth + config.depth_single_blocks) * block + last


@mistakes(
    "whole.flops",
    ("half", "you count a multiplication and its addition as one operation; count both."),
    ("one product", "attention has two products: the scores, and the weighted sum of the values."),
    (
        "no attention",
        "the attention itself is missing: its scores and weighted sum have no weights, but cost operations.",
    ),
    ("image only", "the blocks process the text tokens, too: there are txt_len + img_len of them."),
    ("double blocks", "the single blocks are missing: there are depth + depth_single_blocks blocks."),
    ("twice", "you count double blocks twice; they have two sets of weights, but each token goes through one of them."),
    ("last layer", "the last layer reads the image tokens only."),
    ("ends missing", "the layers before and after the blocks are missing: img_in, txt_in and the last one."),
)
def _flops_with(mistake, config, txt_len, img_len):
    d, m, tokens = config.hidden_size, config.mlp_hidden, img_len + (txt_len if mistake != "image only" else 0)
    products = {"one product": 1, "no attention": 0}.get(mistake, 2)
    block = 2 * tokens * (4 * d * d + 2 * d * m) + products * 2 * tokens**2 * d
    count = config.depth + config.depth_single_blocks * (mistake != "double blocks")
    count += config.depth * (mistake == "twice")
    last = 2 * (tokens if mistake == "last layer" else img_len) * d * config.out_channels
    before = 2 * d * (img_len * config.in_channels + txt_len * config.context_in_dim)
    total = count * block + (before + last) * (mistake != "ends missing")
    return total // 2 if mistake == "half" else total
