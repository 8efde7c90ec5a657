"""Notebook 03b: relative positions, and what T5's vectors contain."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.models.config import T5Config
from fluxedu.models.t5 import distance_buckets


def _lengths() -> list[tuple]:
    return [(9, 8, 6), (40, 32, 128), (21, 16, 20)]


def _library_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    config = T5Config(relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance)
    return distance_buckets(length, config)


@exercise(
    "t5.buckets",
    minutes=15,
    difficulty=3,
    cases=_lengths,
    call=lambda answer, *case: answer(*case).long(),
    against=_library_buckets,
    tolerance=0,
    hints=(
        "Compute two tables first: the offset, which is key position minus query position, and the distance, its "
        "absolute value. Then compute one formula for near distances and one for far ones, and choose with "
        "`torch.where`.",
        "`position[None, :] - position[:, None]` is the offset. With `half = num_buckets // 2` and `near = half // 2`, "
        "the formula for far distances goes from `near` at distance `near` to `half` at `max_distance`, linearly in "
        "the logarithm of the distance.",
        "`far = near + (torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near) * (half - near))"
        ".long()`, clamped to `half - 1`; choose with `torch.where(distance < near, distance, far)`, and add `half` "
        "where the offset is above 0.",
    ),
)
def buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """For each query and key, the bucket number (an index into the bias table): `[length, length]`, one row per query.

    Half of the `num_buckets` buckets are for keys at or before the query (numbers from 0), half for keys after it
    (numbers from `num_buckets // 2`). In each half, the first half of the buckets hold one distance each: 0, 1, 2, ...
    The rest share the distances up to `max_distance`, with limits that are equally spaced in the logarithm; round the
    bucket number down. Distances from `max_distance` on get the last bucket.
    """
    half = num_buckets // 2
    near = half // 2
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]  # key minus query, [L, L]
    distance = offset.abs()
    fraction = torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near)  # 0 at near, 1 at max_distance
    far = (near + (fraction * (half - near)).long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


wrong("t5.buckets", "the two halves are exchanged: the upper half is for keys after the query.")(
    lambda length, num_buckets, max_distance: buckets(length, num_buckets, max_distance).T
)
wrong("t5.buckets", "earlier and later keys share their buckets; each direction needs its own half.")(
    lambda length, num_buckets, max_distance: buckets(length, num_buckets, max_distance) % (num_buckets // 2)
)


@mistakes(
    "t5.buckets",
    ("none shared", "every distance has its own bucket until they run out; far distances must share buckets."),
    ("linear", "your far buckets are equally spaced in the distance; use its logarithm."),
    ("rounded", "the bucket numbers of far distances are rounded to the nearest; round them down."),
)
def _buckets_with(mistake, length, num_buckets, max_distance):
    half = num_buckets // 2
    near = half if mistake == "none shared" else half // 2  # this many distances have their own bucket
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]
    distance = offset.abs()
    fraction = torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near)
    if mistake == "linear":
        fraction = (distance - near) / (max_distance - near)
    buckets_after_near = fraction * (half - near)
    if mistake == "rounded":
        buckets_after_near = buckets_after_near.round()
    far = (near + buckets_after_near.long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


def _vectors_and_classes() -> list[tuple]:
    g = torch.Generator().manual_seed(6)
    cases = []
    for number, dim, classes, ridge in ((12, 5, 3, 0.5), (8, 20, 2, 2.0), (400, 128, 8, 0.01)):
        centres, y = torch.randn(classes, dim, generator=g).double(), torch.arange(number) % classes
        x = 1 + centres[y] + torch.randn(number, dim, generator=g).double()
        cases.append((x / x.norm(dim=-1).mean(), y, x[:7].flip(0) + 0.3, classes, ridge))
    return cases


def _by_least_squares(train_x: Tensor, train_y: Tensor, test_x: Tensor, classes: int, ridge: float) -> Tensor:
    """The same without the normal equations: ridge regression is least squares with extra rows."""
    x, test = (torch.cat([x, torch.ones_like(x[:, :1])], dim=1) for x in (train_x, test_x))
    rows = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    targets = torch.cat([torch.eye(classes, dtype=x.dtype)[train_y], x.new_zeros(x.shape[1], classes)])
    return test @ torch.linalg.lstsq(rows, targets).solution


@exercise(
    "t5.probe",
    minutes=8,
    difficulty=2,
    cases=_vectors_and_classes,
    against=_by_least_squares,
    hints=(
        "`F.pad(x, (0, 1), value=1.0)` appends the constant to the training and to the test vectors. The targets are "
        "`F.one_hot(train_y, classes)`, converted to the vectors' dtype.",
        "The formula's inverse is not needed: `torch.linalg.solve(A, B)` returns the W with `A @ W = B`.",
        "`X = F.pad(train_x, (0, 1), value=1.0)`, `Y = F.one_hot(train_y, classes).to(X)`, `A = X.T @ X + ridge * "
        "torch.eye(X.shape[1]).to(X)`, `W = torch.linalg.solve(A, X.T @ Y)`; return the padded test vectors times W.",
    ),
)
def probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, classes: int, ridge: float) -> Tensor:
    """Fit a linear probe to `train_x [N, D]` and their classes `train_y [N]`.

    Return its scores for `test_x [M, D]`, as `[M, classes]`.

    Append a 1 to every vector. The targets are 1 for the right class and 0 for the others. `ridge` is the formula's
    lambda; it applies to all weights, those of the appended 1 included.
    """
    x = F.pad(train_x, (0, 1), value=1.0)  # [N, D + 1]
    targets = F.one_hot(train_y, classes).to(x)  # [N, classes]
    squares = x.T @ x + ridge * torch.eye(x.shape[1]).to(x)
    weights = torch.linalg.solve(squares, x.T @ targets)  # [D + 1, classes]
    return F.pad(test_x, (0, 1), value=1.0) @ weights


@mistakes(
    "t5.probe",
    ("no constant", "the constant is missing: append a 1 to the training and to the test vectors."),
    ("no ridge", "the ridge is missing, so the probe can fit noise where there are few vectors."),
    ("mean", "you divide the sums over vectors by their number, so the ridge counts N times as much."),
    ("free constant", "the weights of the constant have no ridge in your answer; apply it to all weights."),
    ("square", "you square the ridge; the formula contains lambda itself."),
    ("negative", "you subtract the ridge; it is added to the diagonal."),
    ("softmax", "you return probabilities; return the scores themselves, without a softmax."),
    ("minus one", "your targets are -1 for wrong classes; they should be 0."),
)
def _probe_with(mistake, train_x, train_y, test_x, classes, ridge):
    constant = mistake != "no constant"
    x, test = (F.pad(x, (0, 1), value=1.0) if constant else x for x in (train_x, test_x))
    targets = F.one_hot(train_y, classes).to(x)
    targets = 2 * targets - 1 if mistake == "minus one" else targets
    factor = {"no ridge": 1e-9, "mean": len(x), "square": ridge, "negative": -1}.get(mistake, 1)
    diagonal = ridge * factor * torch.ones(x.shape[1]).to(x)
    if mistake == "free constant":
        diagonal[-1] = 0
    scores = test @ torch.linalg.solve(x.T @ x + diagonal.diag(), x.T @ targets)
    return scores.softmax(dim=-1) if mistake == "softmax" else scores


def _vectors_to_steer() -> list[tuple]:
    g = torch.Generator().manual_seed(7)
    cases = []
    for batch, length, dim, number, token in ((2, 4, 3, 5, 1), (1, 6, 4, 8, 5), (1, 32, 128, 36, 2)):
        a, b = torch.randn(2, number, dim, generator=g)
        cases.append((torch.randn(batch, length, dim, generator=g), token, a + 1, 2 * b))
    return cases


@exercise(
    "t5.steer",
    minutes=4,
    difficulty=1,
    cases=_vectors_to_steer,
    hints=(
        "The mean of each set is one vector of D numbers, `from_vectors.mean(dim=0)`. The difference of the two means "
        "is the direction.",
        "Copy first, `txt.clone()`, so that the input stays as it is. `txt[:, token]` is the token's vector in every "
        "row, `[B, D]`.",
        "`new = txt.clone()`, `new[:, token] += to_vectors.mean(dim=0) - from_vectors.mean(dim=0)`, `return new`.",
    ),
)
def steer(txt: Tensor, token: int, from_vectors: Tensor, to_vectors: Tensor) -> Tensor:
    """Move the vector of one token: return `txt [B, L, D]` with a direction added to the vector at index
    `token`, in every row of the batch.

    The direction is the mean of `to_vectors [N, D]` minus the mean of `from_vectors [N, D]`. All other tokens stay.
    Do not change `txt` itself.
    """
    steered = txt.clone()
    steered[:, token] += to_vectors.mean(dim=0) - from_vectors.mean(dim=0)
    return steered


@mistakes(
    "t5.steer",
    ("reversed", "the direction is reversed: it leads from the mean of `from_vectors` to that of `to_vectors`."),
    ("all", "you move all tokens; move the vectors of one token only."),
    ("replaced", "you replace the vector by the mean of `to_vectors`, so it loses all that it contained besides."),
    ("no from", "you add the mean of `to_vectors` without subtracting the mean of `from_vectors`."),
    ("sum", "you add the sums of the vectors; take their means."),
    ("row", "you move all tokens of one row of the batch; the token is the second axis: `txt[:, token]`."),
)
def _steer_with(mistake, txt, token, from_vectors, to_vectors):
    a, b = (x.sum(0) if mistake == "sum" else x.mean(0) for x in (from_vectors, to_vectors))
    direction = {"reversed": a - b, "no from": b}.get(mistake, b - a)
    steered = txt.clone()
    if mistake == "all":
        return steered + direction
    if mistake == "row":
        steered[token % len(txt)] += direction
    else:
        steered[:, token] = b if mistake == "replaced" else steered[:, token] + direction
    return steered
