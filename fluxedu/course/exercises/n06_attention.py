"""Notebook 06: attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.models import attention as library
from fluxedu.models.attention import rope_table, rotate


def _queries() -> list[tuple]:
    g = torch.Generator().manual_seed(6)
    shapes = ((2, 3, 7, 4), (1, 2, 5, 9))
    return [tuple(1.5 * torch.randn(*shape, generator=g) for _ in range(3)) for shape in shapes]


@exercise(
    "attention.attend",
    minutes=8,
    difficulty=1,
    cases=_queries,
    against=F.scaled_dot_product_attention,
    hints=(
        "Every query meets every key: a table of scores, a row a query. A row becomes shares, and they mix the values.",
        "`q @ k.transpose(-1, -2)` is the table, `[B, H, N, N]`; `softmax(dim=-1)` makes each row sum to 1.",
        "`weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)`, and the answer is `weights @ v`.",
    ),
)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v`, in every head for itself: three tensors `[B, H, N, d]` -> `[B, H, N, d]`."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [B, H, N, N], a row a query
    weights = scores.softmax(dim=-1)  # each row sums to 1
    return weights @ v  # [B, H, N, d]


@wrong("attention.attend", "the scores are not divided by sqrt(d), so the softmax is too sharp.")
def _unscaled(q, k, v):
    return attend(q * q.shape[-1] ** 0.5, k, v)


@wrong("attention.attend", "the scores are divided by d; they should be divided by its root.")
def _by_d(q, k, v):
    return attend(q * q.shape[-1] ** -0.5, k, v)


@wrong("attention.attend", "the columns sum to 1; the shares of a query, a row, should (softmax over the last axis).")
def _over_queries(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-2) @ v


@wrong("attention.attend", "queries and keys have changed places: a row of the table belongs to a query.")
def _swapped(q, k, v):
    return attend(k, q, v)


@wrong("attention.attend", "the scores mix the values without a softmax.")
def _linear(q, k, v):
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 @ v


def _built(answer, made_with: tuple, weights: dict[str, Tensor]) -> nn.Module:
    """A learner's module with given weights; says in one sentence when its tensors are called otherwise."""
    module = answer(*made_with)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{type(module).__name__} is no torch.nn.Module")
    mine = module.state_dict()
    if mine.keys() != weights.keys():
        have, want = (", ".join(sorted(names)) or "none" for names in (mine, weights))
        raise ValueError(f"its tensors are {have}, and should be {want}")
    module.load_state_dict(weights)
    return module


def _random(module: nn.Module, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: 0.6 * torch.randn(x.shape, generator=g) + 0.2 for name, x in module.state_dict().items()}


def _heads() -> list[tuple]:
    g = torch.Generator().manual_seed(7)
    cases = []
    for shape, size in (((2, 3, 5, 4), 3.0), ((1, 2, 3, 6), 0.01)):  # of small vectors eps shows
        q, k = (size * (torch.randn(*shape, generator=g) + 0.5) for _ in range(2))
        cases.append((q, k, (shape[-1],), _random(library.QKNorm(shape[-1]), shape[-1])))
    small = (1e-2 * torch.randn(1, 2, 4, 8, generator=g) for _ in range(2))
    return [*cases, (*(x.bfloat16() for x in small), (8,), _random(library.QKNorm(8), 8))]


def _in_float32(q: Tensor, k: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """The formula in float64, back to the numbers' own kind at the end."""
    normed = []
    for x, name in ((q, "query"), (k, "key")):
        wide, scale = x.double(), weights[f"{name}_norm.scale"].double()
        normed.append((wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale).type_as(x))
    return normed


def _normed(answer, q: Tensor, k: Tensor, made_with: tuple, weights: dict[str, Tensor]):
    if answer is _in_float32:
        return answer(q, k, weights)
    return _built(answer, made_with, weights)(q, k)


@exercise(
    "attention.qknorm",
    minutes=10,
    difficulty=2,
    cases=_heads,
    call=_normed,
    against=_in_float32,
    tolerance=3e-5,
    hints=(
        "Every query and every key of every head is divided by its own root mean square, then multiplied by a learned "
        "number a channel. No mean is taken off.",
        "The mean is over the last axis: `x.float().square().mean(-1, keepdim=True)`; eps 1e-6 goes under the root.",
        "`x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale`, then `.type_as(x)`; q with "
        "`self.query_norm.scale`, k with `self.key_norm.scale`.",
    ),
    stub='''
    class QKNorm(nn.Module):
        """Bring every query and key `[B, H, N, d]` to root mean square 1, then times a learned `scale [d]`.

        `x / sqrt(mean(x^2) + 1e-6) * scale`, the mean over the d numbers of one head of one token, in float32 and then
        back to the type of x. Gives (q, k); queries and keys have their own scale.
        """

        def __init__(self, head_dim: int):
            super().__init__()
            self.query_norm = nn.ParameterDict({"scale": torch.ones(head_dim)})
            self.key_norm = nn.ParameterDict({"scale": torch.ones(head_dim)})

        def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            raise NotImplementedError("your turn")
    ''',
)
class QKNorm(nn.Module):
    """Bring every query and key `[B, H, N, d]` to root mean square 1, then times a learned `scale [d]`.

    `x / sqrt(mean(x^2) + 1e-6) * scale`, the mean over the d numbers of one head of one token, in float32 and then
    back to the type of x. Gives (q, k); queries and keys have their own scale.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = nn.ParameterDict({"scale": torch.ones(head_dim)})
        self.key_norm = nn.ParameterDict({"scale": torch.ones(head_dim)})

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(q, self.query_norm.scale), self.one(k, self.key_norm.scale)

    def one(self, x: Tensor, scale: Tensor) -> Tensor:
        wide = x.float()
        size = (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # [B, H, N, 1]
        return (wide / size * scale).type_as(x)


@wrong("attention.qknorm", "the vectors are brought to length 1; root mean square 1 is length sqrt(d).")
class _Unit(QKNorm):
    def one(self, x, scale):
        return (F.normalize(x.float(), dim=-1) * scale).type_as(x)


@wrong("attention.qknorm", "the mean is taken off first, as in LayerNorm; RMSNorm takes off nothing.")
class _Centred(QKNorm):
    def one(self, x, scale):
        return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * scale).type_as(x)


@wrong("attention.qknorm", "the learned scale is missing.")
class _NoScale(QKNorm):
    def one(self, x, scale):
        return super().one(x, torch.ones_like(scale))


@wrong("attention.qknorm", "eps is added outside of the root; it belongs under it, with the mean square.")
class _EpsOutside(QKNorm):
    def one(self, x, scale):
        return (x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + 1e-6) * scale).type_as(x)


@wrong("attention.qknorm", "q and k are both multiplied by the query's scale; the keys have their own.")
class _OneScale(QKNorm):
    def forward(self, q, k):
        return self.one(q, self.query_norm.scale), self.one(k, self.query_norm.scale)


@wrong("attention.qknorm", "the mean goes over all heads and channels of a token; each head has its own.")
class _AllHeads(QKNorm):
    def one(self, x, scale):
        return (x.float() / (x.float().square().mean((1, 3), keepdim=True) + 1e-6).sqrt() * scale).type_as(x)


@wrong("attention.qknorm", "it is computed in bfloat16, which loses digits; go to float32 first and back at the end.")
class _Narrow(QKNorm):
    def one(self, x, scale):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale.type_as(x)


def _streams() -> list[tuple]:
    g = torch.Generator().manual_seed(8)
    cases = []
    for b, n, dim, heads, bias in ((2, 5, 12, 3, True), (1, 7, 8, 2, False)):
        weights = _random(library.SelfAttention(dim, heads, bias), dim)
        cases.append((torch.randn(b, n, dim, generator=g), (dim, heads, bias), weights))
    return cases


def _qkv(answer, x: Tensor, made_with: tuple, weights: dict[str, Tensor]):
    return _built(answer, made_with, weights)(x)


@exercise(
    "attention.stream",
    minutes=12,
    difficulty=2,
    cases=_streams,
    call=_qkv,
    against=library.SelfAttention,
    hints=(
        "One linear layer gives q, k and v of all heads side by side. What remains is to cut `3 D` numbers the right "
        "way and to norm q and k.",
        "The last axis is `3 x H x d`, in this order: `unflatten(-1, (3, H, -1))` gives `[B, N, 3, H, d]`, and "
        "`permute` brings the 3 to the front and the heads before the tokens.",
        "`q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)`, then "
        "`q, k = self.norm(q, k)`.",
    ),
    stub='''
    class SelfAttention(nn.Module):
        """One stream's way into the attention: `x [B, N, D]` -> q, k, v, each `[B, H, N, d]`, q and k normalised.

        `qkv` makes all three at once, `D -> 3 D`; `norm` is the QKNorm. `proj` is the way out again, which the block
        calls itself after the attention.
        """

        def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
            super().__init__()
            self.num_heads = num_heads
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
            self.norm = library.QKNorm(dim // num_heads)  # or your own
            self.proj = nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            raise NotImplementedError("your turn")
    ''',
)
class SelfAttention(nn.Module):
    """One stream's way into the attention: `x [B, N, D]` -> q, k, v, each `[B, H, N, d]`, q and k normalised.

    `qkv` makes all three at once, `D -> 3 D`; `norm` is the QKNorm. `proj` is the way out again, which the block
    calls itself after the attention.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = library.QKNorm(dim // num_heads)  # or your own
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, d]
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, d]
        return *self.norm(q, k), v


@wrong("attention.stream", "the heads come before the 3: the row is cut as H x 3 x d; it is 3 x H x d.")
class _HeadsFirst(SelfAttention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
        return *self.norm(q, k), v


@wrong("attention.stream", "every H-th number goes to the same head; a head is d neighbours.")
class _Strided(SelfAttention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.num_heads)).permute(2, 0, 4, 1, 3).unbind(0)
        return *self.norm(q, k), v


@wrong(
    "attention.stream", "`[B, N, H d]` was reshaped to `[B, H, N, d]` at once, which mixes tokens; transpose instead."
)
class _Reshaped(SelfAttention):
    def forward(self, x):
        b, n, dim = x.shape
        q, k, v = (part.reshape(b, self.num_heads, n, -1) for part in self.qkv(x).chunk(3, dim=-1))
        return *self.norm(q, k), v


@wrong("attention.stream", "q and k are not normalised: the QKNorm was not called.")
class _NotNormed(SelfAttention):
    def forward(self, x):
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


@wrong("attention.stream", "q, k and v are taken in another order; the row is queries, keys, values.")
class _Order(SelfAttention):
    def forward(self, x):
        k, q, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return *self.norm(q, k), v


class Turn:
    """Turns the joint tokens by their positions, for the exercise's cases."""

    def __init__(self, ids: Tensor, axes_dim: tuple[int, ...]):
        self.table = rope_table(ids, axes_dim, 100.0)

    def __call__(self, x: Tensor) -> Tensor:
        return rotate(x, self.table)


def _pairs() -> list[tuple]:
    g = torch.Generator().manual_seed(9)
    cases = []
    for b, h, words, patches, axes_dim in ((2, 3, 2, 6, (2, 4)), (1, 2, 5, 4, (2, 2))):
        txt, img = (
            tuple(1.5 * torch.randn(b, h, n, sum(axes_dim), generator=g) for _ in range(3)) for n in (words, patches)
        )
        ids = torch.cat([torch.zeros(words, 2), torch.rand(patches, 2, generator=g) * 9])
        cases.append((txt, img, Turn(ids, axes_dim)))
    return cases


def _by_library(txt: tuple, img: tuple, turn: Turn) -> list[Tensor]:
    from fluxedu.probe import Probed

    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))
    both = library.attend(q, k, v, turn.table, txt[0].shape[2], Probed())
    return list(both.split([txt[0].shape[2], img[0].shape[2]], dim=1))


@exercise(
    "attention.joint",
    minutes=12,
    difficulty=3,
    cases=_pairs,
    against=_by_library,
    hints=(
        "Put the two streams' tokens behind one another, text first, and attend once: from here on nobody knows which "
        "token came from where. Afterwards cut them apart again.",
        "`torch.cat` along the axis of tokens, which is 2. `turn` is for q and k only. Heads are merged by "
        "`transpose(1, 2).flatten(2)`.",
        "`q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img))`, then "
        "`F.scaled_dot_product_attention(turn(q), turn(k), v).transpose(1, 2).flatten(2)`, then "
        "`.split([L, N], dim=1)`.",
    ),
)
def joint(txt: tuple, img: tuple, turn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over text and image together: `txt` and `img` are each stream's (q, k, v), `[B, H, L or N, d]`.

    `turn` turns the queries or keys of all L + N tokens, text first, by their positions. Gives what each stream's
    tokens have heard, heads merged: `[B, L, H d]` for the text and `[B, N, H d]` for the image.
    """
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))  # [B, H, L + N, d]
    heads = F.scaled_dot_product_attention(turn(q), turn(k), v)  # [B, H, L + N, d]
    both = heads.transpose(1, 2).flatten(2)  # [B, L + N, H d]
    words, patches = txt[0].shape[2], img[0].shape[2]
    return both.split([words, patches], dim=1)


def _joined(txt, img, turn, merge=lambda heads: heads.transpose(1, 2).flatten(2)):
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))
    return merge(F.scaled_dot_product_attention(turn(q), turn(k), v)).split([txt[0].shape[2], img[0].shape[2]], dim=1)


@wrong("attention.joint", "each stream attends to itself only; put the tokens together before the softmax.")
def _alone(txt, img, turn):
    words = txt[0].shape[2]
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))
    q, k = turn(q), turn(k)
    parts = [[x[:, :, where] for x in (q, k, v)] for where in (slice(0, words), slice(words, None))]
    return tuple(F.scaled_dot_product_attention(*part).transpose(1, 2).flatten(2) for part in parts)


@wrong("attention.joint", "the image comes first, so every token is turned by another's position; text comes first.")
def _image_first(txt, img, turn):
    heard = _joined(img, txt, turn)
    return heard[1], heard[0]


@wrong("attention.joint", "positions are left out: q and k were not turned.")
def _not_turned(txt, img, turn):
    return _joined(txt, img, lambda x: x)


@wrong("attention.joint", "the values are turned as well; positions belong into the scores only, so q and k.")
def _values_turned(txt, img, turn):
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))
    both = F.scaled_dot_product_attention(turn(q), turn(k), turn(v)).transpose(1, 2).flatten(2)
    return both.split([txt[0].shape[2], img[0].shape[2]], dim=1)


@wrong("attention.joint", "heads and tokens are mixed up: transpose them before the heads are flattened.")
def _no_transpose(txt, img, turn):
    return _joined(txt, img, turn, merge=lambda heads: heads.reshape(heads.shape[0], heads.shape[2], -1))


@wrong("attention.joint", "the streams only look across, text at image and image at text; all look at all.")
def _across(txt, img, turn):
    words = txt[0].shape[2]
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))
    q, k = turn(q), turn(k)
    first = F.scaled_dot_product_attention(q[:, :, :words], k[:, :, words:], v[:, :, words:])
    second = F.scaled_dot_product_attention(q[:, :, words:], k[:, :, :words], v[:, :, :words])
    return tuple(heads.transpose(1, 2).flatten(2) for heads in (first, second))
