"""Notebook 13b: removing and patching."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes, wrong


def _tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(8)
    return [
        (torch.randn(1, 6, 4, generator=g), torch.randn(1, 6, 4, generator=g), [1, 4]),
        (torch.randn(2, 5, 3, generator=g), torch.randn(2, 5, 3, generator=g), [0]),
    ]


def _by_mask(target: Tensor, source: Tensor, tokens: list[int]) -> Tensor:
    patched = torch.zeros(target.shape[1], dtype=torch.bool)
    patched[tokens] = True
    return torch.where(patched[None, :, None], source, target)


@exercise(
    "inside.transplant",
    minutes=5,
    difficulty=1,
    cases=_tokens,
    against=_by_mask,
    tolerance=0,
    hints=(
        "Only some tokens change: take these from the source run, and all others from the target run.",
        "Do not write into a tensor that the network still uses: `clone()` it first. Tokens are the second axis.",
        "`patched = target.clone()`, `patched[:, tokens] = source[:, tokens]`, `return patched`.",
    ),
)
def transplant(target: Tensor, source: Tensor, tokens: list[int]) -> Tensor:
    """A copy of `target [B, N, D]` in which the tokens with the indices `tokens` come from `source [B, N, D]`."""
    patched = target.clone()
    patched[:, tokens] = source[:, tokens]  # [B, len(tokens), D]
    return patched


wrong("inside.transplant", "it is the other way round: you keep the chosen tokens and replace all others.")(
    lambda target, source, tokens: transplant(source, target, tokens)
)
wrong("inside.transplant", "all tokens are replaced; only those in `tokens` should be.")(
    lambda target, source, tokens: source.clone()
)
wrong("inside.transplant", "you add the source's tokens; they must replace the target's.")(
    lambda target, source, tokens: transplant(target, target + source, tokens)
)
wrong("inside.transplant", "you index the channels; tokens are the second axis, after the batch.")(
    lambda target, source, tokens: transplant(target.mT, source.mT, [i % target.shape[2] for i in tokens]).mT
)


def _latents() -> list[tuple]:
    g = torch.Generator().manual_seed(81)
    cases = []
    for shape, share in (((3, 2, 4, 4), 0.3), ((1, 16, 16, 16), 0.9), ((2, 5), -0.2)):
        target, source, other = torch.randn(3, *shape, generator=g)
        cases.append((target + share * (source - target) + 0.2 * other, target, source))
    return cases


def _by_least_squares(z: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """The reference: for each image, the multiple of the difference that comes nearest to the change."""
    found = []
    for change, difference in zip((z - target).flatten(1), (source - target).flatten(1), strict=True):
        found.append(torch.linalg.lstsq(difference[:, None].double(), change[:, None].double()).solution[0, 0])
    return torch.stack(found).float()


@exercise(
    "inside.recovered",
    minutes=5,
    difficulty=1,
    cases=_latents,
    against=_by_least_squares,
    tolerance=1e-4,
    hints=(
        "Project the change from the target to `z` onto the difference of source and target, for each image.",
        "Flatten each image to a vector first. The scalar product of vectors in rows is `(a * b).sum(dim=1)`.",
        "`d = (source - target).flatten(1)`, then `((z - target).flatten(1) * d).sum(1) / d.square().sum(1)`.",
    ),
)
def recovered(z: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """How far is each latent on the way from the target's to the source's? Three tensors `[B, ...]` -> `[B]`.

    The projection onto the straight line through both: 0 at the target's latent and 1 at the source's.
    """
    direction = (source - target).flatten(1)  # [B, D]
    return ((z - target).flatten(1) * direction).sum(dim=1) / direction.square().sum(dim=1)


@mistakes(
    "inside.recovered",
    ("cosine", "that is the cosine of the angle; divide by the squared length of the difference only."),
    (
        "length",
        "you divide by the length of the difference; divide by its square, so that the source's latent gives 1.",
    ),
    ("origin", "you project z itself; project its change from the target's latent."),
    ("batch", "you sum over all images; each image has its own number."),
    ("reversed", "source and target are exchanged: the target's latent should give 0."),
)
def _recovered_with(mistake, z, target, source):
    if mistake == "reversed":
        target, source = source, target
    d, change = (source - target).flatten(1), (z if mistake == "origin" else z - target).flatten(1)
    product, square = (change * d).sum(1), d.square().sum(1)
    if mistake == "batch":
        return (product.sum() / square.sum()).expand(len(z))
    if mistake == "cosine":
        return product / (square.sqrt() * change.norm(dim=1))
    return product / (square.sqrt() if mistake == "length" else square)


def _experiments() -> list[tuple]:
    g = torch.Generator().manual_seed(82)
    cases = []
    for sites, groups, tokens, width in (
        (("a", "b", "c"), ([0], [1, 3]), 5, 4),
        (("double.0.txt", "single.2.x"), ([1], [2], [7], list(range(32))), 96, 128),
    ):
        target = {site: torch.randn(3, 2, tokens, width, generator=g) for site in sites}
        source = {site: torch.randn(3, 2, tokens, width, generator=g) for site in sites}
        cases.append((target, source, sites, groups))
    return cases


def _patched(answer: Callable, target: Mapping, source: Mapping, sites: Sequence, groups: Sequence) -> Tensor:
    """The grid of an answer, for an experiment whose result is a number that depends on every patched value."""
    weights = torch.arange(1.0, 4.0)

    def draw(site: str, change: Callable) -> float:
        new = torch.stack([change(x.clone(), step) for step, x in enumerate(target[site])])  # [S, B, N, D]
        position = torch.arange(1.0, new.shape[2] + 1)
        return float((new.sum(-1) * position * weights[:, None, None]).mean()) / 10

    return answer(draw, source, sites, groups)


def _by_where(draw: Callable, source: Mapping, sites: Sequence[str], groups: Sequence[list[int]]) -> Tensor:
    """The reference: one experiment after the other, with masks."""
    grid = torch.zeros(len(sites), len(groups))
    for i, site in enumerate(sites):
        for j, tokens in enumerate(groups):
            mask = torch.zeros(source[site].shape[2], 1, dtype=torch.bool)
            mask[tokens] = True
            grid[i, j] = draw(site, lambda x, step, m=mask, s=site: torch.where(m, source[s][step], x))
    return grid


@exercise(
    "inside.patch_grid",
    minutes=12,
    difficulty=3,
    cases=_experiments,
    call=_patched,
    against=_by_where,
    tolerance=1e-4,
    hints=(
        "Use two loops, over sites and over groups. In the inner one, define a function and run an experiment with it.",
        "`change(x, step)` is called once per step. It needs the source's value of the same site and the same step.",
        "In the loops: `change = lambda x, step: transplant(x, source[site][step], tokens)`, and append "
        "`draw(site, change)` to the row of the site.",
    ),
)
def patch_grid(
    draw: Callable, source: Mapping[str, Tensor], sites: Sequence[str], groups: Sequence[list[int]]
) -> Tensor:
    """The results of all patching experiments, `[len(sites), len(groups)]`: one per site and group of token indices.

    `draw(site, change)` runs the target prompt with `change(x, step)` in place of each value `x [B, N, D]` at the
    site, and returns a number. In each experiment, replace one group of tokens by the source run's, with `transplant`.
    `source[site]` has the source run's values, `[steps, B, N, D]`.
    """
    rows = []
    for site in sites:
        row = []
        for tokens in groups:

            def change(x: Tensor, step: int, site=site, tokens=tokens) -> Tensor:
                return transplant(x, source[site][step], tokens)

            row.append(draw(site, change))
        rows.append(row)
    return torch.tensor(rows)


@mistakes(
    "inside.patch_grid",
    ("first step", "you use the source's values of the first step at every step; `change` is told the step."),
    ("one site", "you take the values of the first site everywhere; each site has its own."),
    ("all tokens", "you replace all tokens; replace those of one group."),
    ("growing", "your groups add up; each experiment replaces the tokens of one group only."),
    ("others", "you replace the tokens outside the group; replace those inside."),
)
def _patch_grid_with(mistake, draw, source, sites, groups):
    def change(x, step, site, j):
        tokens = {"all tokens": list(range(x.shape[1])), "growing": sum(groups[: j + 1], [])}.get(mistake, groups[j])
        new = source[sites[0] if mistake == "one site" else site][0 if mistake == "first step" else step]
        return transplant(new, x, tokens) if mistake == "others" else transplant(x, new, tokens)

    return torch.tensor(
        [[draw(s, lambda x, step, s=s, j=j: change(x, step, s, j)) for j in range(len(groups))] for s in sites]
    )
