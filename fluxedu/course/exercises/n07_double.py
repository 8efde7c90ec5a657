"""Notebook 07: the double-stream block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.models import FluxConfig
from fluxedu.models.attention import SelfAttention, attend, rope_table, rotate
from fluxedu.models.blocks import MLP, DoubleStreamBlock
from fluxedu.models.modulation import Modulation, modulate, normalised
from fluxedu.probe import Probed
from fluxedu.sampling.latents import image_ids

CONFIG = FluxConfig(
    hidden_size=24, num_heads=2, mlp_ratio=2.0, axes_dim=(2, 4, 6), depth=1, depth_single_blocks=1, vec_in_dim=8
)


def _random(module: nn.Module, g: torch.Generator) -> nn.Module:
    """Every tensor random, norm scales too, so that no part is 0 or 1 by chance."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        p.data = 1 + 0.3 * noise if name.endswith("scale") else noise * p.shape[-1] ** -0.5
    return module.eval().requires_grad_(False)


def _mod(g: torch.Generator, batch: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, 1, 24, generator=g) for _ in range(6))


def _entering() -> list[tuple]:
    g = torch.Generator().manual_seed(70)
    attn = _random(SelfAttention(24, 2, True), g)
    return [
        (torch.randn(2, 5, 24, generator=g) * 4 + 1, _mod(g, 2), attn),
        (torch.randn(1, 3, 24, generator=g) * 0.01, _mod(g, 1), attn),  # so small that eps is seen
    ]


@exercise(
    "double.enter",
    minutes=8,
    difficulty=1,
    cases=_entering,
    against=lambda x, mod, attn: attn(modulate(normalised(x), mod[0], mod[1])),
    hints=(
        "Three things in a row: make every token mean 0 and variance 1, move and stretch it, hand it to `attn`.",
        "`F.layer_norm(x, x.shape[-1:], eps=1e-6)` normalises each token without weights of its own.",
        "`shift, scale = mod[0], mod[1]`, then `attn((1 + scale) * normed + shift)`.",
    ),
)
def enter(x: Tensor, mod: tuple[Tensor, ...], attn: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """One stream into the attention: `x [B, N, D]` -> q, k, v, each `[B, H, N, d]`.

    `mod` is (shift1, scale1, gate1, shift2, scale2, gate2), each `[B, 1, D]`: the first three are the attention's.
    Normalise every token (LayerNorm without weights, eps 1e-6), modulate it, `(1 + scale) * normed + shift`, and give
    it to `attn`, which makes q, k and v with this stream's weights and has QKNorm in it.
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)  # [B, N, D], each token for itself
    return attn((1 + mod[1]) * normed + mod[0])


@wrong("double.enter", "the tokens are modulated, but were not normalised first.")
def _raw(x, mod, attn):
    return attn((1 + mod[1]) * x + mod[0])


@wrong("double.enter", "it multiplies by scale; FLUX multiplies by 1 + scale, so that a scale of 0 changes nothing.")
def _scale_alone(x, mod, attn):
    return attn(mod[1] * normalised(x) + mod[0])


@wrong("double.enter", "shift and scale have changed places: shift comes first in mod.")
def _swapped(x, mod, attn):
    return attn((1 + mod[0]) * normalised(x) + mod[1])


@wrong("double.enter", "eps is 1e-5, torch's own; FLUX uses 1e-6.")
def _torch_eps(x, mod, attn):
    return attn((1 + mod[1]) * F.layer_norm(x, x.shape[-1:]) + mod[0])


@wrong("double.enter", "these are the MLP's shift and scale; the attention's are the first two of mod.")
def _second_pair(x, mod, attn):
    return attn((1 + mod[4]) * normalised(x) + mod[3])


def _meetings() -> list[tuple]:
    g = torch.Generator().manual_seed(71)
    some = lambda batch, n: tuple(torch.randn(batch, 2, n, 12, generator=g) for _ in range(3))  # noqa: E731
    turns = lambda words: rope_table(  # noqa: E731
        torch.cat([torch.zeros(words, 3), image_ids(4, 6)]), (2, 4, 6)
    ).to(torch.complex64)
    return [(some(2, 4), some(2, 6), turns(4)), (some(1, 7), some(1, 6), turns(7))]


def _by_attend(txt, img, rope):
    words, both = txt[0].shape[2], [torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True)]
    heard = attend(*both, rope, words, Probed())
    return heard[:, :words], heard[:, words:]


@exercise(
    "double.joint",
    minutes=12,
    difficulty=2,
    cases=_meetings,
    against=_by_attend,
    hints=(
        "Lay the text's tokens and the image's end to end, attend once, and cut the result where you joined it.",
        "Tokens are axis 2 of `[B, H, N, d]`. `F.scaled_dot_product_attention(q, k, v)` is notebook 06's attention; "
        "turn q and k first.",
        "`q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img))`; afterwards `heard.transpose(1, 2).flatten(2)` "
        "puts the heads side by side, and `txt[0].shape[2]` is where to cut.",
    ),
)
def joint(txt: tuple[Tensor, ...], img: tuple[Tensor, ...], rope: Tensor) -> tuple[Tensor, Tensor]:
    """Both streams in one attention: what the text and what the image heard, `[B, L, D]` and `[B, N, D]`.

    `txt` is (q, k, v), each `[B, H, L, d]`; `img` is the same with N tokens. Text comes first. Turn q and k by position
    with `rotate(x, rope)`; v is not turned.
    """
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))  # [B, H, L + N, d]
    heard = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
    heard = heard.transpose(1, 2).flatten(2)  # [B, H, L + N, d] -> [B, L + N, D]
    words = txt[0].shape[2]
    return heard[:, :words], heard[:, words:]


@wrong("double.joint", "each stream hears only itself: join them before the attention, not after it.")
def _apart(txt, img, rope):
    words = txt[0].shape[2]
    one = lambda x, r: attend(*x, r, 0, Probed())  # noqa: E731
    return one(txt, rope[..., :words, :]), one(img, rope[..., words:, :])


@wrong("double.joint", "queries and keys are not turned: without positions the image is a bag of patches.")
def _unturned(txt, img, rope):
    return _by_attend(txt, img, torch.ones_like(rope))


@wrong("double.joint", "the image comes first here, and so the turns, which count the text first, go to wrong tokens.")
def _image_first(txt, img, rope):
    image, text = _by_attend(img, txt, rope)
    return text, image


@wrong("double.joint", "the values are turned too; only queries and keys are.")
def _values_turned(txt, img, rope):
    words = txt[0].shape[2]
    turned = lambda x, r: (x[0], x[1], rotate(x[2], r))  # noqa: E731
    return _by_attend(turned(txt, rope[..., :words, :]), turned(img, rope[..., words:, :]), rope)


@wrong("double.joint", "the heads are put together in the wrong order: transpose to [B, N, H, d] before you flatten.")
def _scrambled(txt, img, rope):
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))
    heard = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
    heard = heard.reshape(len(q), q.shape[2], -1)
    return heard[:, : txt[0].shape[2]], heard[:, txt[0].shape[2] :]


def _leaving() -> list[tuple]:
    g = torch.Generator().manual_seed(72)
    attn, mlp = _random(SelfAttention(24, 2, True), g), _random(MLP(24, 60), g)
    return [
        (torch.randn(2, 5, 24, generator=g) * 4 + 1, torch.randn(2, 5, 24, generator=g), _mod(g, 2), attn, mlp),
        (torch.randn(1, 3, 24, generator=g) * 0.1, torch.randn(1, 3, 24, generator=g), _mod(g, 1), attn, mlp),
    ]


def _by_library(x, heard, mod, attn, mlp):
    x = torch.addcmul(x, mod[2], attn.proj(heard))
    return torch.addcmul(x, mod[5], mlp(modulate(normalised(x), mod[3], mod[4])))


@exercise(
    "double.leave",
    minutes=10,
    difficulty=2,
    cases=_leaving,
    against=_by_library,
    hints=(
        "Two residual steps: x grows by the attention's share, and the new x by the MLP's.",
        "A step is `x + gate * what_is_added`; `attn.proj(heard)` is added first. The MLP reads the new x.",
        "`x = x + mod[2] * attn.proj(heard)`, normalise and modulate that x with `mod[3]`, `mod[4]`, and give back "
        "`x + mod[5] * mlp(...)`.",
    ),
)
def leave(x: Tensor, heard: Tensor, mod: tuple[Tensor, ...], attn: nn.Module, mlp: nn.Module) -> Tensor:
    """One stream out of the attention: `x [B, N, D]` and what it `heard [B, N, D]` -> the new `x [B, N, D]`.

    First x grows by `gate1 * attn.proj(heard)`. Then the new x is normalised and modulated once more, with shift2 and
    scale2, goes through `mlp`, and x grows by `gate2` times the result. `mod` is in the order of `enter`.
    """
    x = x + mod[2] * attn.proj(heard)
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x + mod[5] * mlp((1 + mod[4]) * normed + mod[3])


@wrong("double.leave", "the gate blends, (1 - gate) x + gate f: in FLUX the stream is kept whole, x + gate f.")
def _blend(x, heard, mod, attn, mlp):
    x = (1 - mod[2]) * x + mod[2] * attn.proj(heard)
    return (1 - mod[5]) * x + mod[5] * mlp(modulate(normalised(x), mod[3], mod[4]))


@wrong("double.leave", "the MLP reads the x from before the attention; here it comes after and reads the new one.")
def _side_by_side(x, heard, mod, attn, mlp):
    return x + mod[2] * attn.proj(heard) + mod[5] * mlp(modulate(normalised(x), mod[3], mod[4]))


@wrong("double.leave", "both steps use the attention's gate; the MLP has its own, the last of mod.")
def _one_gate(x, heard, mod, attn, mlp):
    return _by_library(x, heard, (*mod[:5], mod[2]), attn, mlp)


@wrong("double.leave", "what was heard is added as it is; it first goes through attn.proj, which mixes the heads.")
def _no_proj(x, heard, mod, attn, mlp):
    x = x + mod[2] * heard
    return x + mod[5] * mlp(modulate(normalised(x), mod[3], mod[4]))


@wrong("double.leave", "the MLP's input is not normalised again.")
def _unnormed(x, heard, mod, attn, mlp):
    x = x + mod[2] * attn.proj(heard)
    return x + mod[5] * mlp(modulate(x, mod[3], mod[4]))


def _blocks() -> list[tuple]:
    cases = []
    for seed, batch, words, side in ((73, 2, 3, (4, 4)), (74, 1, 5, (2, 6))):
        g = torch.Generator().manual_seed(seed)
        state = _random(DoubleStreamBlock(CONFIG), g).state_dict()
        ids = image_ids(*side)
        rope = rope_table(torch.cat([torch.zeros(words, 3), ids]), CONFIG.axes_dim).to(torch.complex64)
        img, txt = torch.randn(batch, len(ids), 24, generator=g), 3 * torch.randn(batch, words, 24, generator=g)
        cases.append((state, img, txt, torch.randn(batch, 24, generator=g), rope))
    return cases


def _run(made, state, img, txt, vec, rope):
    block = made(24, 2, 48)
    block.load_state_dict(state)
    return block(img, txt, block.plan(vec), rope)


@exercise(
    "double.block",
    minutes=12,
    difficulty=2,
    cases=_blocks,
    call=_run,
    against=lambda dim, num_heads, hidden: DoubleStreamBlock(CONFIG),
    hints=(
        "Everything is there: enter once per stream, join once, leave once per stream.",
        "`mods['img'].unsqueeze(-2).chunk(6, dim=-1)` gives the image's six modulations, each `[B, 1, D]`.",
        "`txt_heard, img_heard = joint(enter(txt, mod['txt'], self.txt_attn), enter(img, mod['img'], self.img_attn), "
        "rope)`; then `leave` for each with its own `mod`, `attn` and `mlp`, and give back `img, txt`.",
    ),
    stub='''
    class Block(nn.Module):
        """Two streams, one attention. `forward(img, txt, mods, rope)`."""

        def __init__(self, dim: int, num_heads: int, mlp_hidden: int):
            super().__init__()
            for stream in ("img", "txt"):  # the same three parts twice
                self.add_module(f"{stream}_mod", Modulation(dim, double=True))
                self.add_module(f"{stream}_attn", SelfAttention(dim, num_heads, qkv_bias=True))
                self.add_module(f"{stream}_mlp", MLP(dim, mlp_hidden))

        def plan(self, vec: Tensor) -> dict[str, Tensor]:  # [..., D] -> [..., 6 D] for each stream
            return {"txt": self.txt_mod(vec), "img": self.img_mod(vec)}

        def forward(self, img: Tensor, txt: Tensor, mods: dict[str, Tensor], rope: Tensor) -> tuple[Tensor, Tensor]:
            mod = {s: row.unsqueeze(-2).chunk(6, dim=-1) for s, row in mods.items()}  # 6 x [B, 1, D]
            raise NotImplementedError("your turn")
    ''',
)
class Block(nn.Module):
    """The whole block from your three functions: `forward(img, txt, mods, rope)` gives the new `(img, txt)`.

    `img [B, N, D]`, `txt [B, L, D]`, `mods` a dict with the rows of both streams, `rope` the turns of [text, image].
    The parts have the official names, so that official weights fit; write `forward`.
    """

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int):
        super().__init__()
        for stream in ("img", "txt"):  # the same three parts twice
            self.add_module(f"{stream}_mod", Modulation(dim, double=True))
            self.add_module(f"{stream}_attn", SelfAttention(dim, num_heads, qkv_bias=True))
            self.add_module(f"{stream}_mlp", MLP(dim, mlp_hidden))

    def plan(self, vec: Tensor) -> dict[str, Tensor]:  # [..., D] -> [..., 6 D] for each stream
        return {"txt": self.txt_mod(vec), "img": self.img_mod(vec)}

    def forward(self, img: Tensor, txt: Tensor, mods: dict[str, Tensor], rope: Tensor) -> tuple[Tensor, Tensor]:
        mod = {s: row.unsqueeze(-2).chunk(6, dim=-1) for s, row in mods.items()}  # 6 x [B, 1, D]
        of_txt, of_img = enter(txt, mod["txt"], self.txt_attn), enter(img, mod["img"], self.img_attn)
        txt_heard, img_heard = joint(of_txt, of_img, rope)
        img = leave(img, img_heard, mod["img"], self.img_attn, self.img_mlp)
        txt = leave(txt, txt_heard, mod["txt"], self.txt_attn, self.txt_mlp)
        return img, txt


@wrong("double.block", "the text goes through the image's weights; each stream has its own.")
class _Shared(Block):
    def forward(self, img, txt, mods, rope):
        self.txt_attn, self.txt_mlp = self.img_attn, self.img_mlp
        return super().forward(img, txt, mods, rope)


@wrong("double.block", "the two streams' modulations have changed places.")
class _Crossed(Block):
    def forward(self, img, txt, mods, rope):
        return super().forward(img, txt, {"txt": mods["img"], "img": mods["txt"]}, rope)


@wrong("double.block", "the text comes out as it went in: both streams leave the attention changed.")
class _OneSided(Block):
    def forward(self, img, txt, mods, rope):
        return super().forward(img, txt, mods, rope)[0], txt


@wrong("double.block", "the text hears the image as it is after this block; both streams enter before either leaves.")
class _InTurn(Block):
    def forward(self, img, txt, mods, rope):
        new = super().forward(img, txt, mods, rope)[0]
        return new, super().forward(new, txt, mods, rope)[1]
