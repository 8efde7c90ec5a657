"""Notebook 13: look inside."""

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, wrong
from fluxedu.instruments.named import Named
from fluxedu.instruments.reductions import Value, made
from fluxedu.instruments.reductions import entropy as our_entropy


def _maps() -> list[tuple]:
    g = torch.Generator().manual_seed(13)
    peak = torch.zeros(3, 4, 5)
    for word, (row, column) in enumerate([(3, 1), (0, 4), (2, 2)]):
        peak[word, row, column] = 1.0
    share = torch.zeros(3, 4, 5)
    share[0, 2:, :2], share[1, 0, 3:], share[2, 0, 1] = 1.0, 0.4, 1.0
    share[2, 2, 2] = 0.05  # a brush with the thing is no hit
    clear = 0.02 * torch.rand(3, 4, 5, generator=g) + torch.tensor([0.3, 0.9, 0.5])[:, None, None] * peak
    many = torch.rand(12, 3, 5, generator=g)
    there = torch.rand(12, 3, 5, generator=g) * (torch.rand(12, 3, 5, generator=g) < 0.4)
    return [(clear, share), (many, there)]


def _points_at(weights: Tensor, share: Tensor) -> Tensor:
    best = [max(range(w.numel()), key=w.flatten().tolist().__getitem__) for w in weights]
    return torch.tensor([float(s.flatten()[i] > 0.1) for s, i in zip(share, best, strict=True)])


@exercise(
    "inside.points",
    minutes=7,
    difficulty=1,
    cases=_maps,
    against=_points_at,
    tolerance=0,
    hints=(
        "A word points where its map is brightest: one patch a word, whatever the rest of the map does.",
        "`flatten(1)` puts rows and columns on one axis, so that `argmax(dim=1)` gives one place a word.",
        "`best = weights.flatten(1).argmax(dim=1, keepdim=True)`, then `share.flatten(1).gather(1, best)` is the share "
        "at that patch; compare it with 0.1.",
    ),
)
def points(weights: Tensor, share: Tensor) -> Tensor:
    """Does each word point at its thing? `weights [W, rows, columns]`, `share [W, rows, columns]` -> `[W]`, 1.0 or 0.0.

    `share` is the part of every patch that the word's thing covers. A word points right if its brightest patch is
    covered by more than a tenth.
    """
    best = weights.flatten(1).argmax(dim=1, keepdim=True)  # [W, 1], rows * columns unrolled
    return (share.flatten(1).gather(1, best)[:, 0] > 0.1).float()


@wrong("inside.points", "one brightest patch was taken for all words together; every word has its own.")
def _one_for_all(weights, share):
    best = int(weights.mean(0).argmax())
    return (share.flatten(1)[:, best] > 0.1).float()


@wrong("inside.points", "the thing's most covered patch had to be hit; any patch that the thing covers will do.")
def _same_patch(weights, share):
    return (weights.flatten(1).argmax(1) == share.flatten(1).argmax(1)).float()


@wrong("inside.points", "rows and columns have changed places between the map and the share.")
def _turned(weights, share):
    best = weights.flatten(1).argmax(1, keepdim=True)
    return (share.transpose(1, 2).flatten(1).gather(1, best)[:, 0] > 0.1).float()


@wrong("inside.points", "any patch that is touched at all counts as a hit; more than a tenth must be covered.")
def _touched(weights, share):
    best = weights.flatten(1).argmax(1, keepdim=True)
    return (share.flatten(1).gather(1, best)[:, 0] > 0).float()


def _overlaps() -> list[tuple]:
    g = torch.Generator().manual_seed(31)
    cases = []
    for words, rows, columns in ((3, 4, 6), (2, 5, 3)):
        weights = torch.rand(words, rows, columns, generator=g) * torch.tensor([1.0, 0.2, 0.4])[:words, None, None]
        share = (torch.rand(words, rows, columns, generator=g) - 0.4).clamp(min=0)
        cases.append((weights, share))
    return cases


def _by_sets(weights: Tensor, share: Tensor) -> Tensor:
    """The same with Python's sets."""
    found = []
    for w, s in zip(weights, share, strict=True):
        numbers, top = w.flatten().tolist(), float(w.max())
        bright = {i for i, x in enumerate(numbers) if x >= top / 2}
        there = {i for i, x in enumerate(s.flatten().tolist()) if x > 0.15}
        found.append(len(bright & there) / len(bright | there))
    return torch.tensor(found)


@exercise(
    "inside.iou",
    minutes=10,
    difficulty=2,
    cases=_overlaps,
    against=_by_sets,
    hints=(
        "Make two sets of patches for each word: those its map is bright in, and those the thing covers. Then count.",
        "`weights.amax(dim=(1, 2), keepdim=True)` is each word's peak; `&` and `|` of two boolean tensors are their "
        "intersection and union.",
        "`bright = weights >= weights.amax((1, 2), keepdim=True) / 2`, `there = share > 0.15`, and then `(bright & "
        "there).sum((1, 2)) / (bright | there).sum((1, 2))`.",
    ),
)
def iou(weights: Tensor, share: Tensor) -> Tensor:
    """How well does each word's map cover its thing? `weights`, `share` `[W, rows, columns]` -> `[W]` in [0, 1].

    Intersection over union of two sets of patches: the bright ones, with at least half of their own map's peak, and
    those of which the thing covers more than 0.15.
    """
    bright = weights >= weights.amax(dim=(1, 2), keepdim=True) / 2  # [W, rows, columns]
    there = share > 0.15
    return (bright & there).sum(dim=(1, 2)) / (bright | there).sum(dim=(1, 2))


@wrong(
    "inside.iou", "it is divided by the thing's patches, which rewards a map that is bright everywhere: use the union."
)
def _recall(weights, share):
    bright, there = weights >= weights.amax(dim=(1, 2), keepdim=True) / 2, share > 0.15
    return (bright & there).sum(dim=(1, 2)) / there.sum(dim=(1, 2))


@wrong("inside.iou", "half of the largest weight of all words was the bar; each word has a peak of its own.")
def _one_peak(weights, share):
    bright, there = weights >= weights.max() / 2, share > 0.15
    return (bright & there).sum(dim=(1, 2)) / (bright | there).sum(dim=(1, 2))


@wrong("inside.iou", "that is Dice, twice the intersection over the sum of both; the union counts common patches once.")
def _dice(weights, share):
    bright, there = weights >= weights.amax(dim=(1, 2), keepdim=True) / 2, share > 0.15
    return 2 * (bright & there).sum(dim=(1, 2)) / (bright.sum(dim=(1, 2)) + there.sum(dim=(1, 2)))


@wrong("inside.iou", "bright means half of the peak and more; yours are the patches above the map's mean.")
def _above_mean(weights, share):
    bright, there = weights > weights.mean(dim=(1, 2), keepdim=True), share > 0.15
    return (bright & there).sum(dim=(1, 2)) / (bright | there).sum(dim=(1, 2))


def _looks() -> list[tuple]:
    g = torch.Generator().manual_seed(5)
    even = torch.randn(2, 3, 5, 7, generator=g).softmax(-1)
    sure = (8 * torch.randn(1, 2, 4, 4, generator=g)).softmax(-1)
    sure[0, 0, 1] = torch.tensor([0.0, 0.5, 0.5, 0.0])  # 0 log 0 is 0
    return [(even,), (sure,)]


def _named(answer, weights: Tensor) -> Tensor:
    """A reduction tried on a map whose axes have names."""
    given = answer(Named(weights, ("batch", "head", "query", "key")))
    if isinstance(given, Named) and given.axes != ("batch", "head", "query"):
        raise ValueError(f"the axes left are {', '.join(given.axes)}; they should be batch, head, query")
    if isinstance(given, Tensor):
        raise TypeError('a recording needs a Named; `p.dropped("key", numbers)` makes one')
    return given.tensor if isinstance(given, Named) else given


def _by_library(value: Named) -> Named:
    told = our_entropy(value)
    return Named(told.tensor.exp(), told.axes)


@exercise(
    "inside.spread",
    minutes=10,
    difficulty=2,
    cases=_looks,
    call=_named,
    against=_by_library,
    hints=(
        "A query that looks at n tokens evenly has entropy log n. So the exponential of the entropy counts tokens.",
        "`torch.special.entr(p)` is `-p log p`, and 0 where p is 0. `value.dropped(name, tensor)` makes a Named "
        "without that axis.",
        '`p = made(value)`, then `p.dropped("key", torch.special.entr(p.tensor).sum(-1).exp())`.',
    ),
)
def spread(value: Value) -> Named:
    """A reduction: at how many tokens does each query look? `[batch, head, query, key]` -> `[batch, head, query]`.

    The exponential of each row's entropy (in nats): 1 for a query that looks at one token only, n for one that
    looks at n evenly. A map arrives lazily; `made(value)` is the Named, `made(value).tensor` its numbers.
    """
    p = made(value)  # [batch, head, query, key], every row sums to 1
    return p.dropped("key", torch.special.entr(p.tensor).sum(-1).exp())


@wrong("inside.spread", "that is the entropy itself; its exponential counts tokens.")
def _no_exponential(value):
    p = made(value)
    return p.dropped("key", torch.special.entr(p.tensor).sum(-1))


@wrong("inside.spread", "bits and nats are mixed: with log2 inside, the power outside must be of 2.")
def _bits(value):
    p = made(value)
    return p.dropped("key", (torch.special.entr(p.tensor).sum(-1) / torch.log(torch.tensor(2.0))).exp())


@wrong("inside.spread", "that is one over the sum of squares, another count of tokens, which weighs large shares more.")
def _participation(value):
    p = made(value)
    return p.dropped("key", 1 / p.tensor.square().sum(-1))


@wrong("inside.spread", "the entropy is of one query; yours is averaged over all of them before the exponential.")
def _averaged(value):
    p = made(value)
    entropy = torch.special.entr(p.tensor).sum(-1)
    return p.dropped("key", entropy.mean(-1, keepdim=True).exp().expand_as(entropy))


def _tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(8)
    return [
        (torch.randn(1, 6, 4, generator=g), torch.randn(1, 6, 4, generator=g), [1, 4]),
        (torch.randn(2, 5, 3, generator=g), torch.randn(2, 5, 3, generator=g), [0]),
    ]


def _by_mask(mine: Tensor, theirs: Tensor, places: list[int]) -> Tensor:
    chosen = torch.zeros(mine.shape[1], dtype=torch.bool)
    chosen[places] = True
    return torch.where(chosen[None, :, None], theirs, mine)


@exercise(
    "inside.transplant",
    minutes=6,
    difficulty=1,
    cases=_tokens,
    against=_by_mask,
    tolerance=0,
    hints=(
        "Only some tokens change: take everything of one run, and of the other run these tokens only.",
        "What goes through the network must not be written into: `clone()` it first. Tokens are the second axis.",
        "`new = mine.clone()`, `new[:, places] = theirs[:, places]`, `return new`.",
    ),
)
def transplant(mine: Tensor, theirs: Tensor, places: list[int]) -> Tensor:
    """`mine [B, N, D]` with the tokens at `places` from `theirs [B, N, D]`, a new tensor; all other tokens stay."""
    new = mine.clone()
    new[:, places] = theirs[:, places]  # [B, len(places), D]
    return new


@wrong("inside.transplant", "it is the other way round: the named tokens were kept and all the others replaced.")
def _others(mine, theirs, places):
    return transplant(theirs, mine, places)


@wrong("inside.transplant", "the other run's tokens are added; they must take the place of what was there.")
def _added(mine, theirs, places):
    new = mine.clone()
    new[:, places] += theirs[:, places]
    return new


@wrong("inside.transplant", "all tokens were replaced; only those at `places` should be.")
def _all(mine, theirs, places):
    return theirs.clone()


@wrong("inside.transplant", "the tokens are the second axis, the first is the batch and the last the channels.")
def _channels(mine, theirs, places):
    new = mine.clone()
    places = [p % mine.shape[2] for p in places]
    new[:, :, places] = theirs[:, :, places]
    return new
