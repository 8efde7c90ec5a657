"""Notebook 06b: joint attention."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes
from fluxedu.models import attention as library
from fluxedu.models.attention import rope_table, rotate
from fluxedu.probe import Probed


def _joint_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(9)
    cases = []
    for b, h, txt_len, patches, axes_dim in ((2, 3, 2, 6, (2, 4)), (1, 2, 5, 4, (2, 2)), (1, 5, 32, 64, (16, 16))):
        txt = tuple(1.5 * torch.randn(b, h, txt_len, sum(axes_dim), generator=g) for _ in range(3))
        img = tuple(1.5 * torch.randn(b, h, patches, sum(axes_dim), generator=g) for _ in range(3))
        ids = torch.cat([torch.zeros(txt_len, 2), torch.rand(patches, 2, generator=g) * 9])
        cases.append((txt, img, partial(rotate, rope=rope_table(ids, axes_dim, 100.0))))
    return cases


def library_joint(txt: tuple, img: tuple, apply_rope: Callable[[Tensor], Tensor]) -> list[Tensor]:
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))
    txt_len = txt[0].shape[2]
    attn_out = library.attend(q, k, v, apply_rope.keywords["rope"], txt_len, Probed())
    return [attn_out[:, :txt_len], attn_out[:, txt_len:]]


@exercise(
    "attention.joint",
    minutes=12,
    difficulty=3,
    cases=_joint_cases,
    against=library_joint,
    hints=(
        "Concatenate the tokens of the two streams, text first, apply the attention once, and split the result again.",
        "`torch.cat` along the axis of tokens, which is 2. Apply `apply_rope` to q and k only. To merge the heads, "
        "`transpose(1, 2).flatten(2)`.",
        "`q = torch.cat([txt[0], img[0]], dim=2)`, and likewise k and v; then "
        "`F.scaled_dot_product_attention(apply_rope(q), apply_rope(k), v).transpose(1, 2).flatten(2)`; the first "
        "`txt[0].shape[2]` tokens are text.",
    ),
)
def joint(txt: tuple, img: tuple, apply_rope: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over text and image together: `txt` and `img` are each stream's (q, k, v), `[B, H, L or N, d]`.

    `apply_rope` rotates the queries or keys of all L + N tokens, text first, by their positions. Return each stream's
    attention output with the heads merged: `[B, L, H d]` for the text and `[B, N, H d]` for the image.
    """
    q = torch.cat([txt[0], img[0]], dim=2)  # [B, H, L + N, d]
    k = torch.cat([txt[1], img[1]], dim=2)
    v = torch.cat([txt[2], img[2]], dim=2)
    attn_out = F.scaled_dot_product_attention(apply_rope(q), apply_rope(k), v)  # [B, H, L + N, d]
    attn_out = attn_out.transpose(1, 2).flatten(2)  # [B, L + N, H d]
    txt_len = txt[0].shape[2]
    return attn_out[:, :txt_len], attn_out[:, txt_len:]


@mistakes(
    "attention.joint",
    ("separate", "each stream attends only to itself; concatenate the tokens before the softmax."),
    ("across", "each stream attends only to the other; every token should attend to all tokens."),
    ("image first", "you put the image first, so tokens get the rotations of other tokens; text comes first."),
    ("not rotated", "q and k are not rotated, so the positions are missing."),
    ("values rotated", "you rotate the values as well; rotate only q and k."),
    ("no transpose", "heads and tokens are mixed up: transpose them before you flatten the heads."),
)
def joint_with(mistake, txt, img, apply_rope):
    if mistake == "image first":
        image, text = joint(img, txt, apply_rope)
        return text, image
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))
    if mistake != "not rotated":
        q, k = apply_rope(q), apply_rope(k)
    if mistake == "values rotated":
        v = apply_rope(v)
    txt_len = txt[0].shape[2]
    is_text = torch.arange(q.shape[2]) < txt_len
    same_stream = is_text[:, None] == is_text[None, :]  # [L + N, L + N], one row per query
    allowed = {"separate": same_stream, "across": ~same_stream}.get(mistake)
    attn_out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # [B, H, L + N, d]
    if mistake != "no transpose":
        attn_out = attn_out.transpose(1, 2)
    attn_out = attn_out.reshape(len(q), q.shape[2], -1)
    return attn_out[:, :txt_len], attn_out[:, txt_len:]


def _map_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(10)
    cases = []
    for b, h, txt_len, side, axes_dim in ((2, 3, 3, 2, (2, 2, 4)), (1, 5, 32, 8, (4, 14, 14))):
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        img_ids = torch.stack([torch.zeros(side * side), rows.flatten(), columns.flatten()], dim=-1)
        ids = torch.cat([torch.zeros(txt_len, 3), img_ids])
        q, k = (1.5 * torch.randn(b, h, len(ids), sum(axes_dim), generator=g) for _ in range(2))
        cases.append((q, k, rope_table(ids, axes_dim)))
    return cases


def _library_map(q: Tensor, k: Tensor, rope: Tensor) -> Tensor:
    return library.AttentionMap(rotate(q, rope), rotate(k, rope)).weights()


@exercise(
    "attention.map",
    minutes=8,
    difficulty=2,
    cases=_map_cases,
    against=_library_map,
    tolerance=3e-5,
    hints=(
        "This is `attend` without its last line, but with the rotation: no values are needed for the map.",
        "Rotate q and k by `rope`, multiply every query with every key, divide by the root of d, and apply the softmax "
        "to each row.",
        "`q, k = rotate(q, rope), rotate(k, rope)`, then "
        "`(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)`.",
    ),
)
def attention_map(q: Tensor, k: Tensor, rope: Tensor) -> Tensor:
    """Compute the attention map `[B, H, T, T]` of a block, one row per query, from its queries and keys.

    `q` and `k` `[B, H, T, d]` belong to all T = L + N tokens. They are normalised, but not rotated yet;
    `rotate(x, rope)` rotates queries or keys by their positions.
    """
    q, k = rotate(q, rope), rotate(k, rope)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [B, H, T, T]
    return scores.softmax(dim=-1)


@mistakes(
    "attention.map",
    ("not rotated", "q and k are not rotated, so this map does not depend on positions."),
    ("only q", "you rotate only the queries; rotate the keys, too, so that scores depend on differences of positions."),
    ("no root", "the scores are not divided by sqrt(d), so the map is too sharp."),
    ("by d", "you divide the scores by d; divide them by its square root."),
    ("columns", "your columns sum to 1; the rows should, one per query (softmax over the last axis)."),
    ("transposed", "your map has one row per key; it needs one row per query."),
    ("scores", "these are the scores; the softmax is missing."),
    ("one map", "you average over the heads, or use one head for all; each head has its own map."),
)
def map_with(mistake, q, k, rope):
    q = q if mistake == "not rotated" else rotate(q, rope)
    k = k if mistake in ("not rotated", "only q") else rotate(k, rope)
    scores = q @ k.transpose(-1, -2) / {"no root": 1, "by d": q.shape[-1]}.get(mistake, q.shape[-1] ** 0.5)
    if mistake == "scores":
        return scores
    weights = scores.softmax(dim=-2 if mistake == "columns" else -1)
    if mistake == "one map":
        weights = weights.mean(1, keepdim=True).expand_as(weights)
    return weights.transpose(-1, -2) if mistake == "transposed" else weights


def _score_cases() -> list[tuple]:
    g = torch.Generator().manual_seed(11)
    return [
        (2 * torch.randn(2, 3, 6, 6, generator=g), [1, 4]),
        (3 * torch.randn(1, 5, 96, 96, generator=g), list(range(9, 32))),
        (2 * torch.randn(1, 2, 5, 5, generator=g), [0]),
    ]


def _softmax_of(answer, scores: Tensor, keys: list[int]) -> Tensor | None:
    """The attention map of the changed scores; a row in which every key is hidden becomes uniform."""
    changed = answer(scores, keys)
    return changed.clamp(min=-1e4).softmax(-1) if isinstance(changed, Tensor) else changed


@exercise(
    "attention.hide",
    minutes=6,
    difficulty=2,
    cases=_score_cases,
    call=_softmax_of,
    hints=(
        "A weight is 0 after the softmax if its score is minus infinity before it, since exp(-inf) = 0. The softmax "
        "itself then makes the other weights of the row sum to 1.",
        "A row of the table belongs to a query and a column to a key, so change whole columns: the last axis. Work on "
        "a copy of `scores`.",
        "`scores = scores.clone()`, then `scores[..., keys] = -torch.inf`, and return it.",
    ),
)
def hide_keys(scores: Tensor, keys: list[int]) -> Tensor:
    """Hide the tokens at the indices `keys` from all queries: return other scores `[B, H, T, T]`, one row per query.

    After the softmax, which the model applies later, the hidden tokens must have the weight 0, and the others must
    share the whole attention. Do not change `scores` itself.
    """
    scores = scores.clone()
    scores[..., keys] = -torch.inf
    return scores


@mistakes(
    "attention.hide",
    ("rows", "you change the rows of these tokens; a row is a query, and the keys are the columns."),
    ("both", "you change rows and columns; the hidden tokens may still attend to others themselves."),
    ("zero", "you set the scores to 0, but exp(0) = 1: a token is hidden if its score is minus infinity."),
    ("weights", "you change the weights after a softmax; change the scores, because the model's softmax comes later."),
    ("others", "you hide all tokens except these; hide these."),
    ("plus", "you use plus infinity, or a very large score, so that the hidden tokens get all the attention."),
    ("lowest", "you use the lowest score that occurs; the tokens still get attention: use minus infinity."),
)
def hide_with(mistake, scores, keys):
    is_hidden = torch.zeros(scores.shape[-1], dtype=torch.bool)
    is_hidden[keys] = True
    if mistake == "others":
        is_hidden = ~is_hidden
    where = {"rows": is_hidden[:, None], "both": is_hidden[:, None] | is_hidden}.get(mistake, is_hidden)
    if mistake == "weights":
        scores = scores.softmax(-1)
    value = {"zero": 0.0, "weights": 0.0, "plus": 1e4, "lowest": float(scores.min())}.get(mistake, -torch.inf)
    return scores.masked_fill(where, value)
