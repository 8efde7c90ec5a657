"""Notebook 07b: why two streams?"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes
from fluxedu.course.exercises import build_module, randomise
from fluxedu.course.exercises.n07_double import CONFIG, rotations
from fluxedu.instruments.interventions import Context
from fluxedu.models.attention import SelfAttention, rotate
from fluxedu.models.blocks import MLP, DoubleStreamBlock
from fluxedu.models.modulation import Modulation, layer_norm, modulate


def _shared_cases() -> list[tuple]:
    cases = []
    for seed, batch, txt_len, size in ((170, 2, 32, (16, 16)), (171, 1, 5, (2, 6))):  # the first as in the miniature
        g = torch.Generator().manual_seed(seed)
        block = SharedBlock(CONFIG.hidden_size, CONFIG.num_heads, CONFIG.mlp_hidden)
        weights = randomise(block, g).state_dict()
        rope, patches = rotations(txt_len, *size), size[0] * size[1] // 4
        img, txt = torch.randn(batch, patches, 24, generator=g), 3 * torch.randn(batch, txt_len, 24, generator=g)
        cases.append((weights, img, txt, torch.randn(batch, 24, generator=g), rope))
    return cases


def _shared_output(answer, weights, img, txt, vec, rope):
    block = build_module(answer, (CONFIG.hidden_size, CONFIG.num_heads, CONFIG.mlp_hidden), weights)
    return block(img, txt, block.plan(vec), rope)


@exercise(
    "streams.shared",
    minutes=12,
    difficulty=2,
    cases=_shared_cases,
    call=_shared_output,
    against=lambda dim, num_heads, mlp_hidden: _TwoStreams(dim, num_heads, mlp_hidden),
    hints=(
        "Concatenate the streams, text first. From there on it is an ordinary transformer block: attention, then the "
        "MLP, each on normalised and modulated tokens. At the end, split the sequence where the text ends.",
        "`x = torch.cat([txt, img], dim=1)`. A residual step is `x + gate * f(...)`, and its input is "
        "`modulate(layer_norm(x), shift, scale)`. `self.attention(..., rope)` includes the output projection.",
        "`x = x + gate1 * self.attention(modulate(layer_norm(x), shift1, scale1), rope)`, the same with the MLP, then "
        "`txt_len = txt.shape[1]` and `return x[:, txt_len:], x[:, :txt_len]`.",
    ),
)
class SharedBlock(nn.Module):
    """A block that has one set of weights for both streams. Write `forward(img, txt, mods, rope)` -> `(img, txt)`.

    Treat text and image as one sequence `[B, L + N, D]`, text first, with one modulation for all tokens:

    1. add gate1 times the attention of the tokens, normalised and modulated with shift1 and scale1
    2. add gate2 times the MLP of the new tokens, normalised and modulated with shift2 and scale2
    3. return the image tokens and the text tokens separately, in this order

    `layer_norm(x)` and `modulate(x, shift, scale)` are imported above.
    """

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int):
        super().__init__()
        self.mod = Modulation(dim, double=True)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=True)
        self.mlp = MLP(dim, mlp_hidden)

    def plan(self, vec: Tensor) -> dict[str, Tensor]:  # [..., D] -> [..., 6 D], the same for both streams
        modulation = self.mod(vec)
        return {"txt": modulation, "img": modulation}

    def attention(self, x: Tensor, rope: Tensor) -> Tensor:  # [B, L + N, D] -> [B, L + N, D]
        q, k, v = self.attn(x)
        attn_out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
        return self.attn.proj(attn_out.transpose(1, 2).flatten(2))

    def forward(self, img: Tensor, txt: Tensor, mods: dict[str, Tensor], rope: Tensor) -> tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = mods["img"].unsqueeze(-2).chunk(6, dim=-1)  # [B, 1, D] each
        # your turn
        x = torch.cat([txt, img], dim=1)  # [B, L + N, D]
        x = x + gate1 * self.attention(modulate(layer_norm(x), shift1, scale1), rope)
        x = x + gate2 * self.mlp(modulate(layer_norm(x), shift2, scale2))
        txt_len = txt.shape[1]
        return x[:, txt_len:], x[:, :txt_len]


class _TwoStreams(SharedBlock):
    """The reference: the library's block of two streams, both with these weights."""

    def forward(self, img, txt, mods, rope):
        block = DoubleStreamBlock(CONFIG)
        for part in ("mod", "attn", "mlp"):
            for stream in ("img", "txt"):
                setattr(block, f"{stream}_{part}", getattr(self, part))
        return block(img, txt, mods, rope)


@mistakes(
    "streams.shared",
    ("image first", "you put the image first, so tokens get the rotations of other tokens; rope has the text first."),
    ("own attention", "each stream attends only to itself; concatenate them before the attention."),
    ("old x", "your MLP reads the tokens from before the attention; it should read the new ones."),
    ("no gates", "the gates are missing: multiply what the attention and the MLP add by gate1 and gate2."),
    ("no norm", "the tokens are modulated, but not normalised before."),
    ("same modulation", "the MLP has its own shift, scale and gate, the last three."),
    ("text kept", "the text is returned as it came in; the block changes both streams."),
)
class _MistakenShared(SharedBlock):
    def forward(self, img, txt, mods, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = mods["img"].unsqueeze(-2).chunk(6, dim=-1)
        if self.mistake == "same modulation":
            shift2, scale2, gate2 = shift1, scale1, gate1
        if self.mistake == "no gates":
            gate1 = gate2 = 1
        norm = (lambda x: x) if self.mistake == "no norm" else layer_norm
        txt_len, first = txt.shape[1], [img, txt] if self.mistake == "image first" else [txt, img]
        x = torch.cat(first, dim=1)
        h = modulate(norm(x), shift1, scale1)
        if self.mistake == "own attention":
            attn_out = torch.cat(
                [
                    self.attention(h[:, :txt_len], rope[..., :txt_len, :]),
                    self.attention(h[:, txt_len:], rope[..., txt_len:, :]),
                ],
                dim=1,
            )
        else:
            attn_out = self.attention(h, rope)
        new = x + gate1 * attn_out
        new = new + gate2 * self.mlp(modulate(norm(x if self.mistake == "old x" else new), shift2, scale2))
        if self.mistake == "image first":
            return new[:, : img.shape[1]], new[:, img.shape[1] :]
        return new[:, txt_len:], txt if self.mistake == "text kept" else new[:, :txt_len]


def _hold_cases() -> list[tuple]:
    """What passes the sites of one stream: for two evaluations, the tokens that enter and leave each of the blocks."""
    cases = []
    for seed, stream, tokens, blocks in ((172, "txt", 32, (0, 1)), (173, "img", 64, (1, 3, 4))):
        g = torch.Generator().manual_seed(seed)
        sites = [f"double.{i}.{stream}{end}" for i in blocks for end in ("", "_out")]
        cases.append((stream, [(site, torch.randn(1, tokens, 12, generator=g)) for site in 2 * sites]))
    return cases


def _returned(answer, stream, events):
    axis, hold = {"txt": "text", "img": "image"}[stream], answer()
    results = []
    for site, value in events:
        result = hold(value.clone(), Context(site, ("batch", axis, "channel"), None))
        if result is None:
            raise TypeError(f"it returns None at {site}; what it returns replaces the value")
        results.append(result)
    return results


@exercise(
    "streams.hold",
    minutes=8,
    difficulty=1,
    cases=_hold_cases,
    call=_returned,
    gradient=False,  # the stored value may be detached
    hints=(
        "The object is called twice for each block: first with what enters, then with what leaves. It has to remember "
        "the first until the second.",
        "`ctx.site.endswith('_out')` tells the two sites apart. Store what enters in `self.entered`.",
        "At a site that ends in `_out`: `return self.entered`. Otherwise: `self.entered = value` and `return value`.",
    ),
)
class Hold:
    """Hold one stream still: its tokens leave every block as they entered it. Write `__call__(value, ctx)`.

    `fe.intervene` calls it at two sites of every block, in the order of the computation: at `double.0.txt` with the
    tokens that enter block 0, at `double.0.txt_out` with those that leave it, then likewise for block 1, and so on (or
    with `img` in place of `txt`). `ctx.site` is the name of the site, and what you return replaces the value: what
    enters stays as it is, and what leaves becomes what entered the same block.
    """

    def __init__(self):
        self.entered = None  # the tokens that have entered the block

    def __call__(self, value: Tensor, ctx) -> Tensor:
        # your turn
        if ctx.site.endswith("_out"):
            return self.entered
        self.entered = value
        return value


@mistakes(
    "streams.hold",
    ("zeros", "you return zeros where the stream leaves the block; return what entered it."),
    ("first forever", "you keep the very first tokens and return them everywhere; store again whenever tokens enter."),
    ("not held", "nothing is held: at a site that ends in _out, return the stored tokens."),
    ("entry replaced", "you also replace what enters; only what leaves is to be replaced."),
)
class _MistakenHold(Hold):
    def __call__(self, value, ctx):
        leaves, before = ctx.site.endswith("_out"), self.entered
        if not leaves and (self.mistake != "first forever" or before is None):
            self.entered = value
        if self.mistake == "not held":
            return value
        if self.mistake == "zeros":
            return torch.zeros_like(value) if leaves else value
        if self.mistake == "entry replaced" and before is not None:
            return before
        return self.entered if leaves else value
