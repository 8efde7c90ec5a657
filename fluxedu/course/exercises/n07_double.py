"""Notebook 07: the double-stream block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.course.exercises import build_module, randomise, subclass
from fluxedu.models import FluxConfig
from fluxedu.models.attention import SelfAttention, rope_table, rotate
from fluxedu.models.blocks import MLP, DoubleStreamBlock
from fluxedu.models.modulation import Modulation, layer_norm, modulate
from fluxedu.sampling.latents import image_ids

CONFIG = FluxConfig(
    hidden_size=24, num_heads=2, mlp_ratio=2.0, axes_dim=(2, 4, 6), depth=1, depth_single_blocks=1, vec_in_dim=8
)


def _mod(g: torch.Generator, batch: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, 1, 24, generator=g) for _ in range(6))


def _enter_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(70)
    attn = randomise(SelfAttention(24, 2, True), g)
    return [
        (torch.randn(2, 64, 24, generator=g) * 4 + 1, _mod(g, 2), attn),
        (torch.randn(1, 3, 24, generator=g) * 0.01, _mod(g, 1), attn),  # so small that the value of eps matters
    ]


@exercise(
    "double.enter",
    minutes=8,
    difficulty=1,
    cases=_enter_cases,
    against=lambda x, mod, attn: attn(modulate(layer_norm(x), mod[0], mod[1])),
    hints=(
        "Three steps: normalise every token, scale and shift it, call `attn` with the result.",
        "`F.layer_norm(x, x.shape[-1:], eps=1e-6)` normalises each token, without weights.",
        "`shift, scale = mod[0], mod[1]`, then `attn((1 + scale) * normed + shift)`.",
    ),
)
def enter(x: Tensor, mod: tuple[Tensor, ...], attn: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Compute q, k and v of one stream: `x [B, N, D]` -> three tensors `[B, H, N, d]`.

    `mod` is (shift1, scale1, gate1, shift2, scale2, gate2), each `[B, 1, D]`: the first three are for the attention.
    Normalise every token (LayerNorm without weights, eps 1e-6), modulate it, `(1 + scale) * normed + shift`, and pass
    it to `attn`, which computes q, k and v with this stream's weights, QKNorm included.
    """
    shift, scale = mod[0], mod[1]
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)  # [B, N, D], each token separately
    return attn((1 + scale) * normed + shift)


wrong("double.enter", "the tokens are modulated, but not normalised before.")(
    lambda x, mod, attn: attn((1 + mod[1]) * x + mod[0])
)
wrong("double.enter", "you multiply by scale; FLUX multiplies by 1 + scale, so that a scale of 0 changes nothing.")(
    lambda x, mod, attn: attn(mod[1] * layer_norm(x) + mod[0])
)
wrong("double.enter", "shift and scale are exchanged: shift comes first in mod.")(
    lambda x, mod, attn: attn((1 + mod[0]) * layer_norm(x) + mod[1])
)
wrong("double.enter", "your eps is 1e-5, PyTorch's default; FLUX uses 1e-6.")(
    lambda x, mod, attn: attn((1 + mod[1]) * F.layer_norm(x, x.shape[-1:]) + mod[0])
)
wrong("double.enter", "you use the MLP's shift and scale; the attention's are the first two of mod.")(
    lambda x, mod, attn: attn((1 + mod[4]) * layer_norm(x) + mod[3])
)


def rotations(txt_len: int, height: int, width: int) -> Tensor:
    """The rotations of text tokens and an image of `height x width` latent cells, for a block with `CONFIG`."""
    ids = torch.cat([torch.zeros(txt_len, 3), image_ids(height, width)])
    return rope_table(ids, CONFIG.axes_dim).to(torch.complex64)


def _leave_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(72)
    attn, mlp = randomise(SelfAttention(24, 2, True), g), randomise(MLP(24, 60), g)
    return [
        (torch.randn(2, 5, 24, generator=g) * 4 + 1, torch.randn(2, 5, 24, generator=g), _mod(g, 2), attn, mlp),
        (torch.randn(1, 3, 24, generator=g) * 0.1, torch.randn(1, 3, 24, generator=g), _mod(g, 1), attn, mlp),
    ]


def _library_leave(x, attn_out, mod, attn, mlp):
    x = torch.addcmul(x, mod[2], attn.proj(attn_out))
    return torch.addcmul(x, mod[5], mlp(modulate(layer_norm(x), mod[3], mod[4])))


@exercise(
    "double.leave",
    minutes=10,
    difficulty=2,
    cases=_leave_cases,
    against=_library_leave,
    hints=(
        "Two residual steps: first add the attention's contribution to x, then the MLP's to the new x.",
        "A residual step is `x + gate * output`, where the first output is `attn.proj(attn_out)`. The MLP gets the new "
        "x.",
        "`x = x + mod[2] * attn.proj(attn_out)`, normalise and modulate this x with `mod[3]`, `mod[4]`, and return "
        "`x + mod[5] * mlp(...)`.",
    ),
)
def leave(x: Tensor, attn_out: Tensor, mod: tuple[Tensor, ...], attn: nn.Module, mlp: nn.Module) -> Tensor:
    """The rest of the block for one stream: `x [B, N, D]` and `attn_out [B, N, D]` -> the new `x [B, N, D]`.

    First add `gate1 * attn.proj(attn_out)` to x. Then normalise the new x, modulate it with shift2 and scale2, apply
    `mlp`, and add `gate2` times the result. `mod` has the same order as in `enter`.
    """
    gate1, shift2, scale2, gate2 = mod[2:]
    x = x + gate1 * attn.proj(attn_out)
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x + gate2 * mlp((1 + scale2) * normed + shift2)


@wrong("double.leave", "your gate blends, (1 - gate) x + gate f; in FLUX all of x is kept: x + gate f.")
def _blend(x, attn_out, mod, attn, mlp):
    x = (1 - mod[2]) * x + mod[2] * attn.proj(attn_out)
    return (1 - mod[5]) * x + mod[5] * mlp(modulate(layer_norm(x), mod[3], mod[4]))


@wrong("double.leave", "your MLP gets the x from before the attention; it should get the new one.")
def _parallel(x, attn_out, mod, attn, mlp):
    return x + mod[2] * attn.proj(attn_out) + mod[5] * mlp(modulate(layer_norm(x), mod[3], mod[4]))


wrong("double.leave", "both steps use the attention's gate; the MLP has its own, the last of mod.")(
    lambda x, attn_out, mod, attn, mlp: _library_leave(x, attn_out, (*mod[:5], mod[2]), attn, mlp)
)


@wrong("double.leave", "you add the attention output directly; apply attn.proj first, which mixes the heads.")
def _no_proj(x, attn_out, mod, attn, mlp):
    x = x + mod[2] * attn_out
    return x + mod[5] * mlp(modulate(layer_norm(x), mod[3], mod[4]))


@wrong("double.leave", "the MLP's input is not normalised.")
def _mlp_not_normalised(x, attn_out, mod, attn, mlp):
    x = x + mod[2] * attn.proj(attn_out)
    return x + mod[5] * mlp(modulate(x, mod[3], mod[4]))


def _block_cases() -> list[tuple]:
    cases = []
    for seed, batch, txt_len, side in ((73, 2, 3, (4, 4)), (74, 1, 5, (2, 6))):
        g = torch.Generator().manual_seed(seed)
        weights = randomise(DoubleStreamBlock(CONFIG), g).state_dict()
        rope, patches = rotations(txt_len, *side), side[0] * side[1] // 4
        img, txt = torch.randn(batch, patches, 24, generator=g), 3 * torch.randn(batch, txt_len, 24, generator=g)
        cases.append((weights, img, txt, torch.randn(batch, 24, generator=g), rope))
    return cases


def _block_output(answer, weights, img, txt, vec, rope):
    block = build_module(answer, (24, 2, 48), weights)
    return block(img, txt, block.plan(vec), rope)


@exercise(
    "double.block",
    minutes=12,
    difficulty=2,
    cases=_block_cases,
    call=_block_output,
    against=lambda dim, num_heads, mlp_hidden: DoubleStreamBlock(CONFIG),
    hints=(
        "You have all the parts: `enter` for each stream, `self.joint` once, `leave` for each stream.",
        "`mods['img'].unsqueeze(-2).chunk(6, dim=-1)` gives the image's six modulation vectors, each `[B, 1, D]`.",
        "`img_qkv = enter(img, img_mod, self.img_attn)`, likewise for txt; `txt_attn_out, img_attn_out = "
        "self.joint(txt_qkv, img_qkv, rope)`; then `leave` for each stream with its own `mod`, `attn` and `mlp`, and "
        "return `img, txt`.",
    ),
)
class Block(nn.Module):
    """The whole block, from your two functions: `forward(img, txt, mods, rope)` returns the new `(img, txt)`.

    `img [B, N, D]`, `txt [B, L, D]`, `mods` a dict with both streams' modulation, `rope` the rotations of
    [text, image]. The joint attention is already written: it is that of notebook 06b. The modules have the official
    names, so that the trained weights fit.
    """

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int):
        super().__init__()
        self.img_mod = Modulation(dim, double=True)
        self.img_attn = SelfAttention(dim, num_heads, qkv_bias=True)
        self.img_mlp = MLP(dim, mlp_hidden)
        self.txt_mod = Modulation(dim, double=True)
        self.txt_attn = SelfAttention(dim, num_heads, qkv_bias=True)
        self.txt_mlp = MLP(dim, mlp_hidden)

    def plan(self, vec: Tensor) -> dict[str, Tensor]:  # [..., D] -> [..., 6 D] for each stream
        return {"txt": self.txt_mod(vec), "img": self.img_mod(vec)}

    def joint(self, txt: tuple[Tensor, ...], img: tuple[Tensor, ...], rope: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over all tokens, text first. Returns the text's and the image's output, `[B, L or N, D]`."""
        q, k, v = (torch.cat([txt[i], img[i]], dim=2) for i in range(3))  # each [B, H, L + N, d]
        attn_out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
        attn_out = attn_out.transpose(1, 2).flatten(2)  # [B, H, L + N, d] -> [B, L + N, D]
        return attn_out[:, : txt[0].shape[2]], attn_out[:, txt[0].shape[2] :]

    def forward(self, img: Tensor, txt: Tensor, mods: dict[str, Tensor], rope: Tensor) -> tuple[Tensor, Tensor]:
        img_mod = mods["img"].unsqueeze(-2).chunk(6, dim=-1)  # six times [B, 1, D]
        txt_mod = mods["txt"].unsqueeze(-2).chunk(6, dim=-1)
        # your turn
        img_qkv = enter(img, img_mod, self.img_attn)
        txt_qkv = enter(txt, txt_mod, self.txt_attn)
        txt_attn_out, img_attn_out = self.joint(txt_qkv, img_qkv, rope)
        img = leave(img, img_attn_out, img_mod, self.img_attn, self.img_mlp)
        txt = leave(txt, txt_attn_out, txt_mod, self.txt_attn, self.txt_mlp)
        return img, txt


@wrong("double.block", "the text goes through the image's weights; each stream has its own.")
class _Shared(Block):
    def forward(self, img, txt, mods, rope):
        self.txt_attn, self.txt_mlp = self.img_attn, self.img_mlp
        return super().forward(img, txt, mods, rope)


wrong("double.block", "the two streams' modulations are exchanged.")(
    subclass(Block, plan=lambda self, vec: {"txt": self.img_mod(vec), "img": self.txt_mod(vec)})
)
wrong("double.block", "the text is returned unchanged; the block changes both streams.")(
    subclass(Block, forward=lambda self, img, txt, mods, rope: (Block.forward(self, img, txt, mods, rope)[0], txt))
)


@wrong("double.block", "the text attends to the image's new tokens; compute both streams' q, k and v first.")
class _OneAfterTheOther(Block):
    def forward(self, img, txt, mods, rope):
        new = super().forward(img, txt, mods, rope)[0]
        return new, super().forward(new, txt, mods, rope)[1]
