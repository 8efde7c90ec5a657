"""Notebook 16: from FLUX.1 to FLUX.2."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes
from fluxedu.course.exercises import randomise, run_module
from fluxedu.models import (
    Flux2,
    Flux2Config,
    Flux2DoubleStreamBlock,
    Flux2SingleStreamBlock,
    LastLayer,
    MLPEmbedder,
    QKNorm,
    SharedModulation,
)
from fluxedu.models import GatedMLP as LibraryMLP
from fluxedu.models.attention import rope_table, rotate, split_heads
from fluxedu.models.modulation import layer_norm, modulate, timestep_embedding
from fluxedu.sampling.latents import image_ids, text_ids

SMALL = Flux2Config(
    in_channels=20, out_channels=12, context_in_dim=10, hidden_size=24, mlp_ratio=1.5, num_heads=2, depth=2,
    depth_single_blocks=2, axes_dim=(2, 4, 2, 4), guidance_embed=False,
)  # fmt: skip


def _mlps() -> list[tuple]:
    cases = []
    for seed, dim, hidden, shape in ((160, 4, 6, (2, 3, 4)), (161, 6, 5, (6,)), (162, 160, 584, (1, 5, 160))):
        g = torch.Generator().manual_seed(seed)
        state = randomise(LibraryMLP(dim, hidden), g).state_dict()
        cases.append(((dim, hidden), state, 2 * torch.randn(*shape, generator=g)))
    return cases


@exercise(
    "flux2.mlp",
    minutes=6,
    difficulty=1,
    cases=_mlps,
    call=run_module,
    against=LibraryMLP,
    hints=(
        "The first layer must compute both halves at once, so it has twice the outputs that the last layer has inputs.",
        "`self[0](x).chunk(2, dim=-1)` gives gate and value. Only the gate goes through SiLU, `F.silu`.",
        "`super().__init__(nn.Linear(dim, 2 * hidden, bias=False), nn.Identity(), nn.Linear(hidden, dim, bias=False))`;"
        " and forward returns `self[2](F.silu(gate) * value)`.",
    ),
)
class GatedMLP(nn.Sequential):
    """The MLP of FLUX.2, `x [..., D]` -> `[..., D]`. With `[gate, value] = W1 x`, it is `W2 (silu(gate) * value)`.

    `W1` has `2 * hidden` outputs, of which the first half is the gate; `W2` has `hidden` inputs. No layer has a bias.
    The official names of the two weights are `0.weight` and `2.weight`: in an `nn.Sequential` of three modules, these
    are the first and the last. Put `nn.Identity()`, which has no weights, between them.
    """

    def __init__(self, dim: int, hidden: int):
        # your turn: super().__init__(first layer, nn.Identity(), last layer)
        super().__init__(nn.Linear(dim, 2 * hidden, bias=False), nn.Identity(), nn.Linear(hidden, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        # your turn
        gate, value = self[0](x).chunk(2, dim=-1)  # each [..., hidden]
        return self[2](F.silu(gate) * value)


@mistakes(
    "flux2.mlp",
    ("halves", "your gate is the second half of W1 x; in FLUX.2 it is the first."),
    ("both", "both halves go through SiLU; the value stays as it is."),
    ("gelu", "your gate goes through GELU; FLUX.2 uses SiLU."),
    ("sigmoid", "your gate goes through the sigmoid, as in GLU; SwiGLU uses SiLU, which is x * sigmoid(x)."),
    ("neighbours", "you take gate and value alternately; the first half of the channels is the gate."),
    ("sum", "you add gate and value; multiply them."),
    ("after", "SiLU is applied to the product; apply it to the gate before the product."),
)
class _MistakenMLP(GatedMLP):
    def forward(self, x):
        wide = self[0](x)
        gate, value = (wide[..., 0::2], wide[..., 1::2]) if self.mistake == "neighbours" else wide.chunk(2, dim=-1)
        if self.mistake == "halves":
            gate, value = value, gate
        activation = {"gelu": partial(F.gelu, approximate="tanh"), "sigmoid": torch.sigmoid}.get(self.mistake, F.silu)
        if self.mistake == "after":
            return self[2](F.silu(gate * value))
        gate, value = activation(gate), F.silu(value) if self.mistake == "both" else value
        return self[2](gate + value if self.mistake == "sum" else gate * value)


def _rope(config: Flux2Config, txt_len: int, height: int, width: int) -> Tensor:
    """Rotations of text and image tokens, complex `[1, L + N, d/2]`; height and width in cells of the latent."""
    ids = torch.cat([text_ids(txt_len, 4), image_ids(height, width, 4)])
    return rope_table(ids, config.axes_dim, config.theta).to(torch.complex64)


def _blocks() -> list[tuple]:
    cases = []
    for seed, batch, txt_len, size in ((163, 2, 32, (16, 16)), (164, 1, 5, (2, 6))):
        g = torch.Generator().manual_seed(seed)
        state, rope = randomise(Flux2SingleStreamBlock(SMALL), g).state_dict(), _rope(SMALL, txt_len, *size)
        x, mods = 3 * torch.randn(batch, rope.shape[-2], 24, generator=g), torch.randn(batch, 72, generator=g)
        cases.append(((SMALL,), state, x, mods, rope))
    return cases


@exercise(
    "flux2.single",
    minutes=8,
    difficulty=2,
    cases=_blocks,
    call=run_module,
    against=Flux2SingleStreamBlock,
    hints=(
        "linear1 computes four things at once: q, k and v for the attention, and gate and value for the MLP. Count the "
        "outputs of all of them. linear2 reads what attention and MLP give, D + M numbers.",
        "`self.linear1(y).split(self.widths, dim=-1)` gives qkv `[B, T, 3 D]` and both halves of the MLP, "
        "`[B, T, 2 M]`, which `chunk(2, dim=-1)` separates.",
        "`self.widths = [3 * dim, 2 * hidden]`, `nn.Linear(dim, sum(self.widths), bias=False)`, `nn.Linear(dim + "
        "hidden, dim, bias=False)`; `x + mod_gate * self.linear2(torch.cat([self.attention(qkv, rope), "
        "F.silu(mlp_gate) * value], dim=-1))`.",
    ),
)
class SingleBlock(nn.Module):
    """FLUX.2's single block, `x [B, T, D]` -> `[B, T, D]`. Write the layers, and what follows the modulation.

    1. `linear1(y)` gives qkv `[B, T, 3 D]`, then gate and value of the MLP, `[B, T, M]` each. No layer has a bias.
    2. The attention is given: `self.attention(qkv, rope)`, `[B, T, D]`. The MLP is `silu(its gate) * value`.
    3. `linear2` of [attention, MLP]; multiply by the modulation's gate, and add to x.

    D is `config.hidden_size`, M is `config.mlp_hidden`. The modulation, `mods [B, 3 D]`, comes from outside; `txt_len`
    is not needed.
    """

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.num_heads, self.norm = config.num_heads, QKNorm(config.head_dim)
        dim, hidden = config.hidden_size, config.mlp_hidden
        # your turn: self.linear1, self.linear2
        self.widths = [3 * dim, 2 * hidden]
        self.linear1 = nn.Linear(dim, sum(self.widths), bias=False)
        self.linear2 = nn.Linear(dim + hidden, dim, bias=False)

    def attention(self, qkv: Tensor, rope: Tensor) -> Tensor:  # [B, T, 3 D] -> [B, T, D]
        q, k, v = split_heads(qkv, 3, self.num_heads)  # each [B, H, T, d]
        q, k = self.norm(q, k)
        attn_out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
        return attn_out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mods: Tensor, rope: Tensor, txt_len: int = 0) -> Tensor:
        shift, scale, mod_gate = mods.unsqueeze(-2).chunk(3, dim=-1)  # each [B, 1, D]
        y = modulate(layer_norm(x), shift, scale)  # [B, T, D]
        # your turn
        qkv, mlp = self.linear1(y).split(self.widths, dim=-1)  # [B, T, 3 D], [B, T, 2 M]
        mlp_gate, value = mlp.chunk(2, dim=-1)
        attn_out = self.attention(qkv, rope)  # [B, T, D]
        return x + mod_gate * self.linear2(torch.cat([attn_out, F.silu(mlp_gate) * value], dim=-1))


@mistakes(
    "flux2.single",
    ("halves", "the MLP's gate and value are exchanged: the gate comes first."),
    ("gelu", "your MLP uses GELU, as in FLUX.1; here SiLU of the gate multiplies the value."),
    ("MLP first", "you concatenate the MLP's output first; linear2 reads the attention's output first."),
    ("mlp rows first", "in your linear1 the MLP's outputs come first; the order is q, k, v, gate, value."),
    ("no gate", "what is added is not multiplied by the modulation's gate."),
    ("no residual", "x itself is missing: a block adds to x and does not replace it."),
    ("gate blends", "your gate blends, (1 - gate) x + gate f; in FLUX all of x is kept: x + gate f."),
    ("old x", "linear1 reads x itself; it should read y, which is normalised and modulated."),
)
class _MistakenBlock(SingleBlock):
    def forward(self, x, mods, rope, txt_len=0):
        shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)
        wide = self.linear1(x if self.mistake == "old x" else modulate(layer_norm(x), shift, scale))
        if self.mistake == "mlp rows first":
            wide = wide.roll(self.widths[0], -1)
        qkv, mlp = wide.split(self.widths, dim=-1)
        mlp_gate, value = mlp.chunk(2, dim=-1)
        if self.mistake == "halves":
            mlp_gate, value = value, mlp_gate
        activation = partial(F.gelu, approximate="tanh") if self.mistake == "gelu" else F.silu
        parts = [self.attention(qkv, rope), activation(mlp_gate) * value]
        out = self.linear2(torch.cat(parts[::-1] if self.mistake == "MLP first" else parts, dim=-1))
        update = out if self.mistake == "no gate" else gate * out
        if self.mistake == "no residual":
            return update
        return (1 - gate) * x + update if self.mistake == "gate blends" else x + update


@exercise(
    "flux2.ids",
    minutes=5,
    difficulty=1,
    cases=lambda: [(3, 2, 2), (5, 2, 3), (1, 4, 1), (32, 8, 8)],
    call=lambda answer, *case: answer(*case).float(),
    against=lambda txt_len, rows, columns: torch.cat([text_ids(txt_len, 4), image_ids(2 * rows, 2 * columns, 4)]),
    tolerance=0,
    hints=(
        "Make two tables of zeros with four columns, one for text and one for image, and fill in what differs from 0.",
        "The text table needs only its last column. The image table is the one of notebook 04, with one more column, "
        "which stays 0.",
        "`txt[:, 3] = torch.arange(txt_len)`; `img = torch.zeros(rows, columns, 4)`, `img[..., 1] = "
        "torch.arange(rows)[:, None]`, `img[..., 2] = torch.arange(columns)`; then `torch.cat([txt, img.flatten(0, "
        "1)])`.",
    ),
)
def position_ids(txt_len: int, rows: int, columns: int) -> Tensor:
    """The position ids of all tokens of FLUX.2, `[txt_len + rows * columns, 4]`, text tokens first.

    The four ids are (image, row, column, text index). Text token i has (0, 0, 0, i). A patch of the image has (0, row,
    column, 0); patches are numbered row by row. All ids count from 0.
    """
    txt = torch.zeros(txt_len, 4)
    txt[:, 3] = torch.arange(txt_len)
    img = torch.zeros(rows, columns, 4)
    img[..., 1] = torch.arange(rows)[:, None]
    img[..., 2] = torch.arange(columns)[None, :]
    return torch.cat([txt, img.flatten(0, 1)])


@mistakes(
    "flux2.ids",
    ("no text", "your text ids are all zero, as in FLUX.1; here token i has the id i on the last axis."),
    ("first axis", "you count the text tokens on the first axis, which belongs to images; the last one is the text's."),
    ("exchanged", "rows and columns of the image are exchanged."),
    ("image first", "the image tokens come first in your table; the text tokens should."),
    ("from 1", "you count the text tokens from 1; FLUX.2 counts from 0."),
    ("patches too", "you number the patches on the last axis, too; it is 0 for all of them."),
    ("columns first", "your patches are numbered column by column; number them row by row."),
    ("diagonal", "you count the text tokens on all four axes; only the last one is the text's."),
)
def _ids_with(mistake, txt_len, rows, columns):
    ids = position_ids(txt_len, rows, columns)
    txt, img = ids.split([txt_len, rows * columns])
    if mistake == "no text":
        txt = 0 * txt
    elif mistake == "first axis":
        txt = txt.flip(-1)
    elif mistake == "exchanged":
        img = img[:, [0, 2, 1, 3]]
    elif mistake == "image first":
        return torch.cat([img, txt])
    elif mistake == "from 1":
        txt = txt + torch.tensor([0.0, 0, 0, 1])
    elif mistake == "patches too":
        img = img + torch.arange(len(img))[:, None] * torch.tensor([0.0, 0, 0, 1])
    elif mistake == "columns first":
        img = img.unflatten(0, (rows, columns)).transpose(0, 1).flatten(0, 1)
    elif mistake == "diagonal":
        txt = txt[:, 3:].expand(-1, 4)
    return torch.cat([txt, img])


def _inputs() -> list[tuple]:
    cases = []
    for seed, config, batch, txt_len, size in (
        (165, SMALL, 2, 5, (4, 6)),
        (166, SMALL.with_(depth=1, depth_single_blocks=3), 1, 3, (8, 4)),
    ):
        g = torch.Generator().manual_seed(seed)
        state, img_ids = randomise(Flux2(config), g).state_dict(), image_ids(*size, 4)
        img, txt = torch.randn(batch, len(img_ids), 20, generator=g), torch.randn(batch, txt_len, 10, generator=g)
        cases.append(((config,), state, img, img_ids, txt, text_ids(txt_len, 4), torch.rand(batch, generator=g)))
    return cases


@exercise(
    "flux2.forward",
    minutes=9,
    difficulty=2,
    cases=_inputs,
    call=run_module,
    against=Flux2,
    hints=(
        "Compute vec, then three rows of modulation from it, once. Every block of a kind gets the same rows.",
        "`vec = self.time_in(timestep_embedding(timesteps).to(img))`. `timestep_embedding` multiplies by 1000, and "
        "the modulation layers begin with SiLU, so do neither here. A double block takes a dict with img and txt.",
        "`mods = {'img': self.double_stream_modulation_img(vec), 'txt': self.double_stream_modulation_txt(vec)}`, "
        "`img, txt = block(img, txt, mods, rope)`; `x = torch.cat([txt, img], dim=1)`, `x = block(x, row, rope, "
        "txt_len)`; `self.final_layer(x[:, txt_len:], self.final_layer.plan(vec))`.",
    ),
)
class MyFlux2(nn.Module):
    """Assemble FLUX.2 (klein, without a guidance input): write `forward`, which returns the velocity `[B, N, out]`.

    Inputs: `img [B, N, in_channels]`, `img_ids [N, 4]`, `txt [B, L, context_in_dim]`, `txt_ids [L, 4]` and `timesteps
    [B]`. The rotations are given. Use `timestep_embedding` (cosines and sines, notebook 05) and `self.time_in` for
    `vec [B, D]`.

    A modulation layer maps `vec` to one row for all blocks. A double block is called as `block(img, txt, {"img": row,
    "txt": row}, rope)` and returns both streams, a single block as `block(x, row, rope, txt_len)` with the text tokens
    first, and the last layer, which reads the image tokens only, as `final_layer(img, final_layer.plan(vec))`.
    """

    def __init__(self, config: Flux2Config):
        super().__init__()
        self.config, dim = config, config.hidden_size
        self.img_in = nn.Linear(config.in_channels, dim, bias=False)
        self.txt_in = nn.Linear(config.context_in_dim, dim, bias=False)
        self.time_in = MLPEmbedder(256, dim, bias=False)
        self.double_stream_modulation_img = SharedModulation(dim, 6)  # shift, scale, gate, twice
        self.double_stream_modulation_txt = SharedModulation(dim, 6)
        self.single_stream_modulation = SharedModulation(dim, 3)
        self.double_blocks = nn.ModuleList(Flux2DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(Flux2SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(dim, config.out_channels, bias=False)

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor) -> Tensor:
        rope = rope_table(torch.cat([txt_ids, img_ids]), self.config.axes_dim, self.config.theta).to(torch.complex64)
        # your turn
        vec = self.time_in(timestep_embedding(timesteps).to(img))  # [B, D]
        mods = {"img": self.double_stream_modulation_img(vec), "txt": self.double_stream_modulation_txt(vec)}
        row = self.single_stream_modulation(vec)  # [B, 3 D]
        img, txt = self.img_in(img), self.txt_in(txt)  # [B, N, D], [B, L, D]
        for block in self.double_blocks:
            img, txt = block(img, txt, mods, rope)
        txt_len = txt.shape[1]
        x = torch.cat([txt, img], dim=1)  # [B, L + N, D]
        for block in self.single_blocks:
            x = block(x, row, rope, txt_len)
        return self.final_layer(x[:, txt_len:], self.final_layer.plan(vec))  # [B, N, out_channels]


@mistakes(
    "flux2.forward",
    ("streams exchanged", "the image stream gets the text's modulation, and the text stream the image's."),
    ("one row", "both streams get the image's modulation; the text has a layer of its own."),
    ("time x 1000 twice", "the time is multiplied by 1000 twice: timestep_embedding does it already."),
    ("silu", "you apply SiLU to vec; the modulation layers begin with it, so it would be applied twice."),
    ("first tokens", "you return the first tokens, which are text; the image tokens come after them."),
    ("image first", "you concatenate the image tokens first; the rotations are those of the text first."),
    ("only one double block", "only the first double block runs; all of them should, one after the other."),
)
class _MistakenFlux2(MyFlux2):
    def forward(self, img, img_ids, txt, txt_ids, timesteps):
        rope = rope_table(torch.cat([txt_ids, img_ids]), self.config.axes_dim, self.config.theta).to(torch.complex64)
        scale = 1000 if self.mistake == "time x 1000 twice" else 1
        vec = self.time_in(timestep_embedding(scale * timesteps).to(img))
        vec = F.silu(vec) if self.mistake == "silu" else vec
        mods = {"img": self.double_stream_modulation_img(vec), "txt": self.double_stream_modulation_txt(vec)}
        if self.mistake == "streams exchanged":
            mods = {"img": mods["txt"], "txt": mods["img"]}
        if self.mistake == "one row":
            mods["txt"] = mods["img"]
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks[: 1 if self.mistake == "only one double block" else None]:
            img, txt = block(img, txt, mods, rope)
        img_len, txt_len = img.shape[1], txt.shape[1]
        x = torch.cat([img, txt] if self.mistake == "image first" else [txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, self.single_stream_modulation(vec), rope, txt_len)
        img = x[:, :img_len] if self.mistake in ("first tokens", "image first") else x[:, txt_len:]
        return self.final_layer(img, self.final_layer.plan(vec))
