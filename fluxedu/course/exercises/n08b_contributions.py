"""Notebook 08b: what single blocks add."""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes
from fluxedu.course.exercises import build_module
from fluxedu.course.exercises.n07_double import CONFIG
from fluxedu.course.exercises.n08_single import block_inputs
from fluxedu.models.attention import rotate, split_heads
from fluxedu.models.blocks import SingleStreamBlock
from fluxedu.models.modulation import layer_norm, modulate


def _contribution_cases() -> list[tuple]:
    """What passes the sites of some blocks in several evaluations, as (site, value), and the number of text tokens."""
    cases = []
    # contributions that grow during the run, at other rates, so that the last evaluation has another order
    for seed, batch, tokens, txt_len, blocks in ((180, 2, 96, 32, (0, 1, 2)), (181, 1, 7, 3, (5, 2, 4, 0))):
        g, events = torch.Generator().manual_seed(seed), []
        start, growth = torch.rand(len(blocks), generator=g) + 0.5, torch.linspace(2.5, 0.4, len(blocks))
        for step in range(3):
            for i, block in enumerate(blocks):
                value = torch.randn(batch, tokens, 24, generator=g) * (start[i] * growth[i] ** step)
                value[:, :txt_len] *= 20 ** (1 - 2 * i / len(blocks))  # text tokens would give another order
                value[:, txt_len] *= 3  # tokens of one stream differ in size, too
                events.append((f"single.{block}.contribution", value))
        cases.append((events, txt_len))
    return cases


def _measured(answer, events, txt_len):
    meter, returned = answer(), []
    streams = {"txt": slice(0, txt_len), "img": slice(txt_len, None)}
    for site, value in events:
        result = meter(value.clone(), SimpleNamespace(site=site, stream_slice=streams.__getitem__, step=0, time=0.5))
        if result is None:
            raise TypeError(f"__call__ returns None at {site}; what it returns replaces the value")
        returned.append(result)
    ranking = list(meter.ranking())
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) for pair in ranking):
        raise TypeError("ranking must return a list of pairs (name of a block, size)")
    names, sizes = [name for name, _ in ranking], [float(size) for _, size in ranking]
    return [*returned, torch.tensor(sizes), " ".join(names)]


@exercise(
    "contributions.meter",
    minutes=12,
    difficulty=2,
    cases=_contribution_cases,
    call=_measured,
    hints=(
        "Two things to do at every call: store one number under the block's name, and return the value as it came. At "
        "the end, average each block's numbers and sort.",
        "The image tokens are `value[:, ctx.stream_slice('img')]`; the size of a token is "
        "`.square().mean(-1).sqrt()`, and the name of the block is `ctx.site.removesuffix('.contribution')`.",
        "`self.sizes.setdefault(name, []).append(float(size.mean()))`, then `return value`; in `ranking`: "
        "`sorted(means.items(), key=lambda pair: pair[1], reverse=True)`.",
    ),
)
class Meter:
    """Measure what each block adds to the image tokens. Write `__call__(value, ctx)` and `ranking()`.

    `fe.intervene` calls it at the site `single.0.contribution`, and at the same site of every other single block, with
    what the block adds to all tokens, `value [B, L + N, D]`. Take the image tokens only (`ctx.stream_slice("img")` is
    their slice), compute the size of each (the root mean square of its D numbers), and store the mean over batch and
    tokens in `self.sizes`, one number per call, under the name of the block ("single.0"). Return the value, so that the
    run goes on unchanged.

    `ranking` returns pairs (name, mean of the block's numbers over all calls), the largest first.
    """

    def __init__(self):
        self.sizes = {}  # "single.0" -> one number per call

    def __call__(self, value: Tensor, ctx) -> Tensor:
        # your turn
        img = value[:, ctx.stream_slice("img")]  # [B, N, D]
        size = img.square().mean(-1).sqrt()  # [B, N]
        name = ctx.site.removesuffix(".contribution")
        self.sizes.setdefault(name, []).append(float(size.mean()))
        return value

    def ranking(self) -> list[tuple[str, float]]:
        # your turn
        means = {name: sum(sizes) / len(sizes) for name, sizes in self.sizes.items()}
        return sorted(means.items(), key=lambda pair: pair[1], reverse=True)


@mistakes(
    "contributions.meter",
    ("all tokens", "you measure all tokens; take only the image's, value[:, ctx.stream_slice('img')]."),
    ("text", "you measure the text tokens; the image tokens are asked for."),
    ("norm", "you take the length of a token; its root mean square is the length divided by the square root of D."),
    ("whole", "you take one root mean square over all tokens; take it for each token, then the mean of the sizes."),
    ("last", "only the last call of each block counts; keep all of them, and average."),
    ("first", "only the first call of each block counts; keep all of them, and average."),
    ("smallest first", "the smallest block comes first; sort with reverse=True."),
    ("sum", "you add up a block's numbers; their mean is asked for."),
    ("changed", "you return zeros, so the blocks add nothing; return the whole value, unchanged."),
)
class _MistakenMeter(Meter):
    def __call__(self, value, ctx):
        stream = {"all tokens": slice(None), "text": ctx.stream_slice("txt")}.get(self.mistake, ctx.stream_slice("img"))
        part = value[:, stream]
        size = part.square().mean(-1).sqrt().mean()
        if self.mistake == "norm":
            size = part.norm(dim=-1).mean()
        if self.mistake == "whole":
            size = part.square().mean().sqrt()
        name = ctx.site.removesuffix(".contribution")
        stored = self.sizes.setdefault(name, [])
        if self.mistake == "last":
            stored.clear()
        if self.mistake != "first" or not stored:
            stored.append(float(size))
        return torch.zeros_like(value) if self.mistake == "changed" else value

    def ranking(self):
        pairs = super().ranking()
        if self.mistake == "sum":
            pairs = [(name, size * len(self.sizes[name])) for name, size in pairs]
        return pairs[::-1] if self.mistake == "smallest first" else pairs


def _run_serial(answer, state, x, vec, rope):
    block = build_module(answer, (CONFIG,), state)
    return block(x, block.plan(vec), rope)


@exercise(
    "contributions.serial",
    minutes=12,
    difficulty=2,
    cases=partial(block_inputs, 182),
    call=_run_serial,
    hints=(
        "Two residual steps with the same shift, scale and gate: x plus what the attention adds, then the new x plus "
        "what the MLP adds. Normalise and modulate x again for the second.",
        "`W = self.linear2.weight`: `F.linear(attn_out, W[:, :dim], self.linear2.bias)` is the part for attention, "
        "and `F.linear(hidden, W[:, dim:])` the MLP's. The hidden layer is `self.linear1(y)[..., 3 * dim :]`.",
        "`y = modulate(layer_norm(x), shift, scale)`, `x = x + gate * F.linear(self.attention(y, rope), W[:, :dim], "
        "self.linear2.bias)`; then y again from this x, `hidden = F.gelu(self.linear1(y)[..., 3 * dim :], "
        "approximate='tanh')`, and return `x + gate * F.linear(hidden, W[:, dim:])`.",
    ),
)
class MLPAfterAttention(SingleStreamBlock):
    """A single block in the usual order: first the attention, then the MLP on its result. Write `forward`.

    The weights are those of a single block. `linear2` is split: its first D columns are for the attention output, the
    others for the MLP's hidden layer (notebook 08), and its bias is added once, with the attention.

    1. `y = modulate(layer_norm(x), shift, scale)`, and `x = x + gate * (the part of linear2 for attention)`
    2. `y` again, from the new x; `hidden` is the GELU (tanh approximation) of the last outputs of `linear1`
    3. return `x + gate * (the part of linear2 for the MLP)`
    """

    def attention(self, y: Tensor, rope: Tensor) -> Tensor:  # [B, L + N, D] -> [B, L + N, D]
        q, k, v = split_heads(self.linear1(y)[..., : 3 * y.shape[-1]], 3, self.num_heads)
        q, k = self.norm(q, k)
        return F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mods: Tensor, rope: Tensor, txt_len: int = 0) -> Tensor:
        shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)  # each [B, 1, D]
        dim = x.shape[-1]
        # your turn
        weight = self.linear2.weight  # [D, D + M]
        y = modulate(layer_norm(x), shift, scale)
        x = x + gate * F.linear(self.attention(y, rope), weight[:, :dim], self.linear2.bias)
        y = modulate(layer_norm(x), shift, scale)  # of the new x
        hidden = F.gelu(self.linear1(y)[..., 3 * dim :], approximate="tanh")
        return x + gate * F.linear(hidden, weight[:, dim:])


@mistakes(
    "contributions.serial",
    ("old x", "your MLP reads the x from before the attention, so both still run in parallel."),
    ("only normed", "the second y is normalised, but not modulated: shift and scale are for both."),
    ("bias twice", "the bias of linear2 is added twice; add it with the attention only."),
    ("no bias", "the bias of linear2 is missing: add it once, with the attention."),
    ("exact GELU", "this is the exact GELU; FLUX was trained with its tanh approximation."),
    ("no gate", "the MLP's share is not multiplied by the gate."),
    ("not normalised", "the MLP's input is not normalised and modulated."),
    ("MLP first", "your MLP comes before the attention; the attention should come first."),
)
class _MistakenSerial(MLPAfterAttention):
    def forward(self, x, mods, rope, txt_len=0):
        shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)
        dim, weight, bias = x.shape[-1], self.linear2.weight, self.linear2.bias
        approximate = "none" if self.mistake == "exact GELU" else "tanh"

        def mlp(y):
            hidden = F.gelu(self.linear1(y)[..., 3 * dim :], approximate=approximate)
            return F.linear(hidden, weight[:, dim:], bias if self.mistake == "bias twice" else None)

        y = modulate(layer_norm(x), shift, scale)
        if self.mistake == "MLP first":
            x = x + gate * mlp(y)
            y = modulate(layer_norm(x), shift, scale)
            return x + gate * F.linear(self.attention(y, rope), weight[:, :dim], bias)
        attn_bias = None if self.mistake == "no bias" else bias
        new = x + gate * F.linear(self.attention(y, rope), weight[:, :dim], attn_bias)
        fresh = modulate(layer_norm(new), shift, scale)
        read = {"old x": y, "only normed": layer_norm(new), "not normalised": new}
        added = mlp(read.get(self.mistake, fresh))
        return new + (added if self.mistake == "no gate" else gate * added)
