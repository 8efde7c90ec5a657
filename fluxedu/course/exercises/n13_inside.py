"""Notebook 13: maps and lenses."""

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.instruments.named import Named
from fluxedu.instruments.reductions import Value, to_named
from fluxedu.instruments.reductions import entropy as library_entropy


def _maps() -> list[tuple]:
    g = torch.Generator().manual_seed(13)
    peak = torch.zeros(3, 4, 5)
    peak[0, 3, 1] = peak[1, 0, 4] = peak[2, 2, 2] = 1.0
    coverage = torch.zeros(3, 4, 5)
    coverage[0, 2:, :2], coverage[1, 0, 3:], coverage[2, 0, 1] = 1.0, 0.4, 1.0
    coverage[2, 2, 2] = 0.05  # barely touched by the object: no hit
    clear = 0.02 * torch.rand(3, 4, 5, generator=g) + torch.tensor([0.3, 0.9, 0.5])[:, None, None] * peak
    many = torch.rand(12, 3, 5, generator=g)
    scattered = torch.rand(12, 3, 5, generator=g) * (torch.rand(12, 3, 5, generator=g) < 0.4)
    return [(clear, coverage), (many, scattered)]


def _hits_one_by_one(weights: Tensor, coverage: Tensor) -> Tensor:
    """The reference: word by word, with Python lists."""
    hits = []
    for word_weights, word_coverage in zip(weights.flatten(1).tolist(), coverage.flatten(1).tolist(), strict=True):
        brightest = word_weights.index(max(word_weights))
        hits.append(float(word_coverage[brightest] > 0.1))
    return torch.tensor(hits)


@exercise(
    "inside.points",
    minutes=7,
    difficulty=1,
    cases=_maps,
    against=_hits_one_by_one,
    tolerance=0,
    hints=(
        "Only the brightest patch of each word's map counts, whatever the rest of the map looks like.",
        "`flatten(1)` merges rows and columns into one axis, so that `argmax(dim=1)` gives one patch index per word.",
        "`best = weights.flatten(1).argmax(dim=1, keepdim=True)`, then `coverage.flatten(1).gather(1, best)` is the "
        "coverage of that patch; compare it with 0.1.",
    ),
)
def points(weights: Tensor, coverage: Tensor) -> Tensor:
    """Does each word's map point at its object? `weights`, `coverage` `[W, rows, columns]` -> `[W]`, 1.0 or 0.0.

    `weights` has one attention map per word. `coverage` is the fraction of each patch that the word's object covers.
    A map points at its object if the object covers more than a tenth of the map's brightest patch.
    """
    best = weights.flatten(1).argmax(dim=1, keepdim=True)  # [W, 1], an index into rows * columns
    return (coverage.flatten(1).gather(1, best)[:, 0] > 0.1).float()


wrong("inside.points", "you use one brightest patch for all words; each word has its own.")(
    lambda weights, coverage: (coverage.flatten(1)[:, int(weights.mean(0).argmax())] > 0.1).float()
)
wrong("inside.points", "you require the object's most covered patch; any patch covered by more than a tenth will do.")(
    lambda weights, coverage: (weights.flatten(1).argmax(1) == coverage.flatten(1).argmax(1)).float()
)
wrong("inside.points", "rows and columns are exchanged between the map and the coverage.")(
    lambda weights, coverage: points(weights, coverage.transpose(1, 2))
)
wrong("inside.points", "you count any patch that the object touches; more than a tenth must be covered.")(
    lambda weights, coverage: points(weights, (coverage > 0).float())
)


def _overlaps() -> list[tuple]:
    g = torch.Generator().manual_seed(31)
    cases = []
    for words, rows, columns in ((3, 4, 6), (2, 5, 3)):
        weights = torch.rand(words, rows, columns, generator=g) * torch.tensor([1.0, 0.2, 0.4])[:words, None, None]
        coverage = (torch.rand(words, rows, columns, generator=g) - 0.4).clamp(min=0)
        cases.append((weights, coverage))
    return cases


def _by_sets(weights: Tensor, coverage: Tensor) -> Tensor:
    """The reference: the same with Python sets of patch indices."""
    ious = []
    for word_weights, word_coverage in zip(weights.flatten(1).tolist(), coverage.flatten(1).tolist(), strict=True):
        bright = {i for i, weight in enumerate(word_weights) if weight >= max(word_weights) / 2}
        covered = {i for i, fraction in enumerate(word_coverage) if fraction > 0.15}
        ious.append(len(bright & covered) / len(bright | covered))
    return torch.tensor(ious)


@exercise(
    "inside.iou",
    minutes=10,
    difficulty=2,
    cases=_overlaps,
    against=_by_sets,
    hints=(
        "For each word, make two sets of patches: those that are bright in its map, and those that its object covers. "
        "Then count.",
        "`weights.amax(dim=(1, 2), keepdim=True)` is the peak of each map; `&` and `|` of two boolean tensors are "
        "their intersection and union.",
        "`bright = weights >= weights.amax((1, 2), keepdim=True) / 2`, `covered = coverage > 0.15`, and then "
        "`(bright & covered).sum((1, 2)) / (bright | covered).sum((1, 2))`.",
    ),
)
def iou(weights: Tensor, coverage: Tensor) -> Tensor:
    """Intersection over union of each word's map and its object: two tensors `[W, rows, columns]` -> `[W]` in [0, 1].

    Compare two sets of patches: the bright ones, with at least half of the peak of their own map, and those of which
    the object covers more than 0.15.
    """
    bright = weights >= weights.amax(dim=(1, 2), keepdim=True) / 2  # [W, rows, columns]
    covered = coverage > 0.15
    return (bright & covered).sum(dim=(1, 2)) / (bright | covered).sum(dim=(1, 2))


@mistakes(
    "inside.iou",
    (
        "recall",
        "you divide by the object's patches, which rewards maps that are bright everywhere; divide by the union.",
    ),
    ("one peak", "your threshold is half of the largest weight of all words; each map has its own peak."),
    ("Dice", "that is Dice, twice the intersection over the sum of both sizes; the union counts shared patches once."),
    ("mean", "bright means at least half of the map's peak; yours are the patches above the map's mean."),
)
def _iou_with(mistake, weights, coverage):
    threshold = weights.amax(dim=(1, 2), keepdim=True) / 2
    if mistake == "one peak":
        threshold = weights.max() / 2
    if mistake == "mean":
        threshold = weights.mean(dim=(1, 2), keepdim=True)
    bright, covered = weights >= threshold, coverage > 0.15
    both, either = (bright & covered).sum(dim=(1, 2)), (bright | covered).sum(dim=(1, 2))
    if mistake == "recall":
        return both / covered.sum(dim=(1, 2))
    return 2 * both / (both + either) if mistake == "Dice" else both / either


def _attention() -> list[tuple]:
    g = torch.Generator().manual_seed(5)
    flat = torch.randn(2, 3, 5, 7, generator=g).softmax(-1)
    sharp = (8 * torch.randn(1, 2, 4, 4, generator=g)).softmax(-1)
    sharp[0, 0, 1] = torch.tensor([0.0, 0.5, 0.5, 0.0])  # 0 log 0 is 0
    return [(flat,), (sharp,)]


def _reduced(answer, weights: Tensor) -> Tensor:
    """The numbers of a reduction, applied to a map with named axes."""
    result = answer(Named(weights, ("batch", "head", "query", "key")))
    if isinstance(result, Named) and result.axes != ("batch", "head", "query"):
        raise ValueError(f"the remaining axes are {', '.join(result.axes)}; they should be batch, head, query")
    if isinstance(result, Tensor):
        raise TypeError('a recording needs a Named; `p.dropped("key", numbers)` makes one')
    return result.tensor if isinstance(result, Named) else result


def _by_library(value: Named) -> Named:
    entropy = library_entropy(value)
    return Named(entropy.tensor.exp(), entropy.axes)


@exercise(
    "inside.spread",
    minutes=10,
    difficulty=2,
    cases=_attention,
    call=_reduced,
    against=_by_library,
    hints=(
        "A query that attends to n tokens equally has entropy log n, so the exponential of the entropy counts tokens.",
        "`torch.special.entr(p)` is `-p log p`, and 0 where p is 0. `value.dropped(name, tensor)` makes a Named "
        "without that axis.",
        '`p = to_named(value)`, then `p.dropped("key", torch.special.entr(p.tensor).sum(-1).exp())`.',
    ),
)
def spread(value: Value) -> Named:
    """A reduction `[batch, head, query, key]` -> `[batch, head, query]`: to how many tokens does each query attend?

    Return the exponential of the entropy of each row (in nats): 1 for a query that attends to one token only, n for
    one that attends to n tokens equally. The map is not computed yet: `to_named(value)` computes it as a `Named`, which
    is a tensor with named axes, and `to_named(value).tensor` is that tensor.
    """
    p = to_named(value)  # [batch, head, query, key], every row sums to 1
    return p.dropped("key", torch.special.entr(p.tensor).sum(-1).exp())


@mistakes(
    "inside.spread",
    ("entropy", "you return the entropy itself; its exponential counts tokens."),
    ("bits", "bits and nats are mixed: with log2 in the entropy, take 2 to its power."),
    ("squares", "that is one over the sum of squares, a different count, which gives large weights more influence."),
    ("mean", "each query has its own entropy; you average over all queries before the exponential."),
)
def _spread_with(mistake, value):
    p = to_named(value)
    entropy = torch.special.entr(p.tensor).sum(-1)
    if mistake == "entropy":
        return p.dropped("key", entropy)
    if mistake == "bits":
        entropy = entropy / torch.log(torch.tensor(2.0))
    if mistake == "mean":
        entropy = entropy.mean(-1, keepdim=True).expand_as(entropy)
    return p.dropped("key", 1 / p.tensor.square().sum(-1) if mistake == "squares" else entropy.exp())
