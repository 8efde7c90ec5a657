"""Notebook 14c: LoRA."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.checkpoints.lora import merge as library_merge
from fluxedu.course.exercise import exercise, mistakes, wrong


def _layer_shapes() -> list[tuple]:
    return [([(3072, 3072)], 16), ([(64, 3072), (3072, 12288), (12288, 3072)], 128), ([(128, 160), (160, 480)], 8)]


def _by_matrices(shapes: list[tuple[int, int]], rank: int) -> int:
    """The reference: create the matrices and count their numbers."""
    layers = [(nn.Linear(i, min(rank, i, o), bias=False), nn.Linear(min(rank, i, o), o)) for i, o in shapes]
    return sum(p.numel() for pair in layers for layer in pair for p in layer.parameters())


@exercise(
    "lora.count",
    minutes=4,
    difficulty=1,
    cases=_layer_shapes,
    against=_by_matrices,
    tolerance=0,
    hints=(
        "Per layer: A has rank x in numbers, B has out x rank, and there is a bias of out numbers.",
        "No matrix has a rank above its shorter side: use `min(rank, d_in, d_out)` for each layer.",
        "`r = min(rank, d_in, d_out)`, and add up `r * (d_in + d_out) + d_out` over the shapes.",
    ),
)
def lora_size(shapes: list[tuple[int, int]], rank: int) -> int:
    """How many numbers a LoRA has: `shapes` are the (in, out) of the linear layers that it changes.

    Each layer has A `[r, in]`, B `[out, r]` and, as in the official LoRAs, a bias `[out]`. r is `rank`, but never above
    the shorter side of the layer.
    """
    total = 0
    for d_in, d_out in shapes:
        r = min(rank, d_in, d_out)
        total += r * (d_in + d_out) + d_out
    return total


@mistakes(
    "lora.count",
    ("product", "you count the layer's own weights, in times out; A and B have rank times (in + out)."),
    ("no minimum", "the rank of a layer cannot exceed its shorter side, which is 64 in one of the cases."),
    ("no bias", "each layer of the official LoRAs also has a bias of `out` numbers."),
    ("A only", "you count A only; B has as many rows as the layer has outputs, and `rank` columns."),
    ("bias of in", "the bias is added to the layer's output, so it has `out` numbers."),
)
def _size_with(mistake, shapes, rank):
    total = 0
    for d_in, d_out in shapes:
        r = rank if mistake == "no minimum" else min(rank, d_in, d_out)
        weights = {"product": d_in * d_out, "A only": r * d_in}.get(mistake, r * (d_in + d_out))
        total += weights + {"no bias": 0, "bias of in": d_in}.get(mistake, d_out)
    return total


def _lora_factors() -> list[tuple]:
    g = torch.Generator().manual_seed(7)
    cases = []
    for out, wide, rank, alpha, scale in ((5, 3, 2, 8.0, 0.85), (4, 7, 3, 1.0, 0.5)):
        weight, a, b = (torch.randn(*shape, generator=g) for shape in ((out, wide), (rank, wide), (out, rank)))
        cases.append((weight, a, b, alpha, scale))
    return cases


def _by_library(weight: Tensor, A: Tensor, B: Tensor, alpha: float, scale: float) -> Tensor:
    net = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    net[0].weight.data = weight
    library_merge(net, {"0.lora_down.weight": A, "0.lora_up.weight": B, "0.alpha": torch.tensor(alpha)}, scale)
    return net[0].weight.data


@exercise(
    "lora.merge",
    minutes=6,
    difficulty=1,
    cases=_lora_factors,
    against=_by_library,
    hints=(
        "The product of two thin matrices is an update of the same shape as W. It is added to W.",
        "The rank is the number of rows of A. `B @ A` is `[out, in]`.",
        "`weight + scale * alpha / A.shape[0] * (B @ A)`.",
    ),
)
def merged(weight: Tensor, A: Tensor, B: Tensor, alpha: float, scale: float) -> Tensor:
    """Merge a LoRA into a weight: `weight [out, in]`, `A [rank, in]`, `B [out, rank]` -> `[out, in]`.

    The update is `scale * alpha / rank` times the product of the two factors. `alpha` was chosen in training and is
    stored in the file; `scale` is your choice.
    """
    rank = A.shape[0]
    return weight + scale * alpha / rank * (B @ A)  # [out, rank] @ [rank, in]


wrong("lora.merge", "alpha is not divided by the rank, so LoRAs of a higher rank would have a stronger effect.")(
    lambda weight, A, B, alpha, scale: weight + scale * alpha * (B @ A)
)
wrong("lora.merge", "you return the update alone; it has to be added to the weight.")(
    lambda weight, A, B, alpha, scale: scale * alpha / A.shape[0] * (B @ A)
)
wrong("lora.merge", "you divide alpha by the number of inputs; divide by the rank, the number of rows of A.")(
    lambda weight, A, B, alpha, scale: weight + scale * alpha / A.shape[1] * (B @ A)
)
wrong("lora.merge", "alpha from the file is not used; only your own scale is.")(
    lambda weight, A, B, alpha, scale: weight + scale * (B @ A)
)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return layer


def _layers() -> list[tuple]:
    g = torch.Generator().manual_seed(48)
    cases = []
    for d_in, d_out, rank, scale, tokens in ((3, 5, 2, 0.7, (2, 4)), (128, 160, 8, 1.0, (1, 32))):
        weight, bias = torch.randn(d_out, d_in, generator=g), torch.randn(d_out, generator=g)
        a, b = torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g)
        cases.append((weight, bias, a, b, scale, torch.randn(*tokens, d_in, generator=g)))
    return cases


def _run_layer(answer, weight, bias, a, b, scale, x) -> list[Tensor]:
    layer = _linear(weight, bias)
    return [answer(layer, a, b, scale)(x), layer.weight, layer.bias]


def _merged_layer(layer: nn.Linear, a: Tensor, b: Tensor, scale: float) -> nn.Linear:
    """The reference: one layer with the merged weight."""
    return _linear(layer.weight.data + scale * (b @ a), layer.bias.data)


@exercise(
    "lora.layer",
    minutes=8,
    difficulty=2,
    cases=_layers,
    call=_run_layer,
    against=_merged_layer,
    gradient=False,  # A and B may become new parameters, as in most LoRA code
    hints=(
        "The layer computes its own output as before. The update is added to this output, and never becomes a large "
        "matrix: first A, which makes a vector of only `rank` numbers, then B.",
        "For a vector, A x; for tokens x `[..., in]` this is `x @ A.T`, or `F.linear(x, A)`, of shape `[..., rank]`.",
        "In `__init__`: `self.old, self.A, self.B, self.scale = old, A, B, scale`. In `forward`: "
        "`return self.old(x) + self.scale * (x @ self.A.T @ self.B.T)`.",
    ),
)
class LoRALinear(nn.Module):
    """A linear layer with a LoRA that is not merged: `old` is the trained `nn.Linear`, `A [rank, in]`, `B [out, rank]`.

    `forward`: `x [..., in]` -> `[..., out]`, the old layer's output plus `scale * B A x`. The weights of the old layer
    stay as they are.
    """

    def __init__(self, old: nn.Linear, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        # your turn
        self.old, self.A, self.B, self.scale = old, A, B, scale

    def forward(self, x: Tensor) -> Tensor:
        # your turn
        return self.old(x) + self.scale * (x @ self.A.T @ self.B.T)  # [..., in] -> [..., rank] -> [..., out]


class _Layer(LoRALinear):
    mistake = ""

    def forward(self, x):
        update = x @ self.A.T @ self.B.T
        if self.mistake == "update only":
            return self.scale * update
        if self.mistake == "no scale":
            return self.old(x) + update
        if self.mistake == "no bias":
            return F.linear(x, self.old.weight) + self.scale * update
        if self.mistake == "scales all":
            return self.scale * (self.old(x) + update)
        if self.mistake == "divided":
            return self.old(x) + self.scale / len(self.A) * update
        if self.mistake == "of the output":
            return self.old(x) * (1 + self.scale * update)
        return self.old(x) + self.scale * update


for _mistake, _message in (
    ("update only", "you return the update alone; the old layer's output has to be added."),
    ("no scale", "the scale is not used; it says how strongly the update acts."),
    ("no bias", "the bias of the old layer is missing: call `self.old(x)`."),
    ("scales all", "the scale multiplies the old output as well; only the update is scaled."),
    ("divided", "here nothing is divided by the rank; `scale` is the whole factor."),
    ("of the output", "you multiply the output by the update; add it."),
):
    wrong("lora.layer", _message)(type("LoRALinear", (_Layer,), {"mistake": _mistake}))


def _updates() -> list[tuple]:
    g = torch.Generator().manual_seed(49)
    return [
        (torch.randn(5, 3, generator=g), 2),
        (torch.randn(4, 7, generator=g), 1),
        (torch.randn(160, 128, generator=g), 8),
    ]


def _product_and_shapes(answer, update: Tensor, rank: int) -> list[Tensor]:
    a, b = answer(update, rank)
    return [torch.tensor([*a.shape, *b.shape]), b @ a]


def _by_eigenvectors(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The reference: project onto the eigenvectors of `update^T update` with the largest eigenvalues."""
    values, vectors = torch.linalg.eigh((update.T @ update).double())
    a = vectors[:, values.argsort(descending=True)[:rank]].T.to(update)
    return a, update @ a.T


@exercise(
    "lora.factors",
    minutes=10,
    difficulty=2,
    cases=_updates,
    call=_product_and_shapes,
    against=_by_eigenvectors,
    tolerance=1e-4,
    hints=(
        "`torch.linalg.svd(update, full_matrices=False)` returns U, S and V^T: columns of U, numbers S in falling "
        "order, rows of V^T. Their product is the update.",
        "Keep the first `rank` columns of U, numbers of S and rows of V^T. S goes into one of the factors.",
        "`U, S, Vt = torch.linalg.svd(update, full_matrices=False)`, then `return Vt[:rank], U[:, :rank] * S[:rank]`.",
    ),
)
def factors(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best LoRA for a known update `[out, in]`: `A [rank, in]` and `B [out, rank]`, with `B @ A` nearest to it.

    The nearest matrix of this rank consists of the largest singular values and their directions.
    """
    U, S, Vt = torch.linalg.svd(update, full_matrices=False)
    return Vt[:rank], U[:, :rank] * S[:rank]


@mistakes(
    "lora.factors",
    ("smallest", "you keep the smallest singular values; the largest ones are the best approximation."),
    ("no S", "the singular values are missing: the directions alone have length 1."),
    ("S twice", "the singular values are in both factors; put them into one, or their roots into both."),
    ("one root", "the root of the singular values is in one factor only; put them into one factor, or it into both."),
    ("first rows", "you keep the first columns of the update itself; keep its largest singular directions."),
)
def _factors_with(mistake, update, rank):
    U, S, Vt = torch.linalg.svd(update, full_matrices=False)
    if mistake == "smallest":
        U, S, Vt = U.flip(1), S.flip(0), Vt.flip(0)
    if mistake == "no S":
        S = torch.ones_like(S)
    if mistake == "S twice":
        S = S * S
    a, b = Vt[:rank], U[:, :rank] * (S.sqrt() if mistake == "one root" else S)[:rank]
    if mistake == "first rows":
        return torch.eye(update.shape[1])[:rank], update[:, :rank]
    return a, b
