"""Notebook 14: the family."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.checkpoints.lora import merge as our_merge
from fluxedu.course.exercise import exercise, wrong
from fluxedu.sampling.latents import pack


def _canvases() -> list[tuple]:
    g = torch.Generator().manual_seed(14)
    cases = []
    for batch, height, width in ((1, 4, 6), (2, 6, 2)):
        noise, masked = (torch.randn(batch, 16, height, width, generator=g) for _ in range(2))
        mask = (torch.rand(batch, 1, 8 * height, 8 * width, generator=g) < 0.3).float()
        cases.append((noise, masked, mask))
    return cases


def _by_unfold(noise: Tensor, masked: Tensor, mask: Tensor) -> Tensor:
    """The same by torch's own unfolding: pixels of a cell as channels, then cells of a patch."""
    cells = F.pixel_unshuffle(mask, 8)
    parts = [F.unfold(x, 2, stride=2).transpose(1, 2) for x in (noise, masked, cells)]
    return torch.cat(parts, dim=-1)


@exercise(
    "family.fill",
    minutes=12,
    difficulty=3,
    cases=_canvases,
    against=_by_unfold,
    tolerance=0,
    hints=(
        "Nothing of the mask is lost: its 8 x 8 pixels of a latent cell become 64 channels of that cell. A patch of "
        "2 x 2 cells then has 4 x 64 = 256 of its numbers, beside 64 of the noise and 64 of the masked picture.",
        "`reshape(B, h, 8, w, 8)` splits rows and columns of pixels into cells; `permute` brings the two eights to the "
        "front, rows before columns. `pack` does the rest.",
        "`cells = mask.reshape(b, h, 8, w, 8).permute(0, 2, 4, 1, 3).reshape(b, 64, h, w)`; then "
        "`torch.cat([pack(noise), pack(masked), pack(cells)], dim=-1)`.",
    ),
)
def fill_tokens(noise: Tensor, masked: Tensor, mask: Tensor) -> Tensor:
    """What FLUX.1 Fill reads: `noise`, `masked [B, 16, h, w]`, `mask [B, 1, 8h, 8w]` -> `[B, h/2 * w/2, 384]`.

    `masked` is the latent of the picture without the part to be painted; the mask is 1 where to paint. A token is 64
    numbers of noise, then 64 of the masked picture, then its 256 pixels of mask: first the pixel (row, column) in its
    cell, then the cell (row, column) in the patch, as `pack` orders them.
    """
    b, _, h, w = noise.shape
    cells = mask.reshape(b, h, 8, w, 8)  # [B, h, 8, w, 8]
    cells = cells.permute(0, 2, 4, 1, 3).reshape(b, 64, h, w)  # [B, 8 * 8, h, w]
    return torch.cat([pack(noise), pack(masked), pack(cells)], dim=-1)  # [B, h/2 * w/2, 64 + 64 + 256]


def _cells(mask, order=(0, 2, 4, 1, 3)):
    b, _, h, w = mask.shape
    return mask.reshape(b, h // 8, 8, w // 8, 8).permute(*order).reshape(b, 64, h // 8, w // 8)


@wrong("family.fill", "the mask comes before the masked picture; the order is noise, masked picture, mask.")
def _mask_first(noise, masked, mask):
    return torch.cat([pack(noise), pack(_cells(mask)), pack(masked)], dim=-1)


@wrong("family.fill", "inside a cell the mask's pixels go column by column; they go row by row.")
def _columns_first(noise, masked, mask):
    return torch.cat([pack(noise), pack(masked), pack(_cells(mask, (0, 4, 2, 1, 3)))], dim=-1)


@wrong("family.fill", "your mask is 0 where to paint; here 1 is where to paint.")
def _kept(noise, masked, mask):
    return torch.cat([pack(noise), pack(masked), pack(_cells(1 - mask))], dim=-1)


@wrong(
    "family.fill",
    "the mask's pixels are taken patch by patch, 16 x 16; fold 8 x 8 into cells first, then pack the cells.",
)
def _whole_patch(noise, masked, mask):
    b, _, h, w = mask.shape
    folded = mask.reshape(b, h // 16, 16, w // 16, 16).permute(0, 1, 3, 2, 4).reshape(b, -1, 256)
    return torch.cat([pack(noise), pack(masked), folded], dim=-1)


def _pull(x: Tensor, t: float) -> Tensor:
    """A made-up velocity that depends on the place and on the time."""
    return 0.7 * x.roll(1, -1) * (1 + float(t)) - torch.sin(3 * x) + float(t) ** 2


def _ways_back() -> list[tuple]:
    g = torch.Generator().manual_seed(41)
    return [
        (torch.randn(1, 3, 4, generator=g), torch.tensor([1.0, 0.7, 0.3, 0.0]), _pull, 1),
        (torch.randn(2, 3, 5, generator=g), torch.tensor([1.0, 0.9, 0.75, 0.4, 0.0]), _pull, 3),
    ]


def _by_recursion(x: Tensor, times: Tensor, velocity: Callable, rounds: int = 1) -> Tensor:
    """The same, said of the last step and the rest: a step's beginning is a fixed point, come near to in rounds."""
    if len(times) < 2:
        return x
    t, t_next = times[-2], times[-1]
    nearer = [x]
    while len(nearer) <= rounds:
        nearer.append(x - (t_next - t) * velocity(nearer[-1], t))
    return _by_recursion(nearer[-1], times[:-1], velocity, rounds)


@exercise(
    "family.invert",
    minutes=15,
    difficulty=3,
    cases=_ways_back,
    against=_by_recursion,
    hints=(
        "The sampler went from t to t_next with x_next = x + (t_next - t) v(x, t). You have x_next and want x; v(x, t) "
        "needs the x that you do not have yet, so begin with x_next in its place.",
        "The steps are gone through from the last to the first: `times[:-1].flip(0)` are their beginnings, "
        "`times[1:].flip(0)` their ends.",
        "For every step: `guess = x`, then `rounds` times `guess = x + (t - t_next) * velocity(guess, t)`, then "
        "`x = guess`.",
    ),
)
def invert(x: Tensor, times: Tensor, velocity: Callable, rounds: int = 1) -> Tensor:
    """From a picture back to noise: `x [B, N, D]` at `times[-1]` -> the x at `times[0]` that Euler's steps lead from.

    `times` fall from 1 to 0, as the sampler takes them. `velocity(x, t)` is asked at the time at which the sampler
    asked for the same step. A step's beginning is found by guessing: first x itself is put in, then each answer again,
    `rounds` times in all.
    """
    for t, t_next in zip(times[:-1].flip(0), times[1:].flip(0), strict=True):
        guess = x
        for _ in range(rounds):
            guess = x + (t - t_next) * velocity(guess, t)
        x = guess
    return x


@wrong("family.invert", "the steps are taken in the sampler's order; going back, its last step comes first.")
def _same_order(x, times, velocity, rounds=1):
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        guess = x
        for _ in range(rounds):
            guess = x + (t - t_next) * velocity(guess, t)
        x = guess
    return x


@wrong("family.invert", "the sign is the sampler's, so you walk on towards the picture: time grows on the way back.")
def _forward(x, times, velocity, rounds=1):
    for t, t_next in zip(times[:-1].flip(0), times[1:].flip(0), strict=True):
        guess = x
        for _ in range(rounds):
            guess = x + (t_next - t) * velocity(guess, t)
        x = guess
    return x


@wrong("family.invert", "the network is asked at t_next; the sampler asked at t, so that is the velocity to be undone.")
def _at_the_end(x, times, velocity, rounds=1):
    for t, t_next in zip(times[:-1].flip(0), times[1:].flip(0), strict=True):
        guess = x
        for _ in range(rounds):
            guess = x + (t - t_next) * velocity(guess, t_next)
        x = guess
    return x


@wrong(
    "family.invert",
    "every round begins where the last one ended, so the step is taken several times; begin at x again.",
)
def _walks_on(x, times, velocity, rounds=1):
    for t, t_next in zip(times[:-1].flip(0), times[1:].flip(0), strict=True):
        for _ in range(rounds):
            x = x + (t - t_next) * velocity(x, t)
    return x


def _factors() -> list[tuple]:
    g = torch.Generator().manual_seed(7)
    cases = []
    for out, wide, rank, alpha, scale in ((5, 3, 2, 8.0, 0.85), (4, 7, 3, 1.0, 0.5)):
        weight, a, b = (torch.randn(*size, generator=g) for size in ((out, wide), (rank, wide), (out, rank)))
        cases.append((weight, a, b, alpha, scale))
    return cases


def _by_library(weight: Tensor, A: Tensor, B: Tensor, alpha: float, scale: float) -> Tensor:
    net = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    net[0].weight.data = weight
    our_merge(net, {"0.lora_down.weight": A, "0.lora_up.weight": B, "0.alpha": torch.tensor(alpha)}, scale)
    return net[0].weight.data


@exercise(
    "family.lora",
    minutes=6,
    difficulty=1,
    cases=_factors,
    against=_by_library,
    hints=(
        "Two thin matrices make one change as large as W. It is added to W, which stays.",
        "The rank is A's number of rows. `B @ A` is `[out, in]`.",
        "`weight + scale * alpha / A.shape[0] * (B @ A)`.",
    ),
)
def merged(weight: Tensor, A: Tensor, B: Tensor, alpha: float, scale: float) -> Tensor:
    """A LoRA put into a weight: `weight [out, in]`, `A [rank, in]`, `B [out, rank]` -> `[out, in]`.

    The change is `scale * alpha / rank` times the product of the two factors; `alpha` is the trainer's, kept in the
    file, `scale` yours.
    """
    rank = A.shape[0]
    return weight + scale * alpha / rank * (B @ A)  # [out, rank] @ [rank, in]


@wrong("family.lora", "alpha is not divided by the rank, so a file of higher rank would act more strongly.")
def _no_rank(weight, A, B, alpha, scale):
    return weight + scale * alpha * (B @ A)


@wrong("family.lora", "that is the change alone; it is to be added to the weight.")
def _only_change(weight, A, B, alpha, scale):
    return scale * alpha / A.shape[0] * (B @ A)


@wrong("family.lora", "alpha is divided by the number of inputs; it should be the rank, A's number of rows.")
def _by_inputs(weight, A, B, alpha, scale):
    return weight + scale * alpha / A.shape[1] * (B @ A)


@wrong("family.lora", "the file's alpha is left out; only your own scale acts.")
def _no_alpha(weight, A, B, alpha, scale):
    return weight + scale * (B @ A)


def _games() -> list[tuple]:
    return [
        (1000.0, 1000.0, 1.0),
        (1200.0, 900.0, 0.0),
        (1200.0, 900.0, 1.0),
        (850.0, 1100.0, 0.5),
        (900.0, 950.0, 1.0, 16.0),
    ]


def _by_strengths(a: float, b: float, score: float, k: float = 32.0) -> tuple[float, float]:
    """The same with strengths instead of ratings: a wins s_a / (s_a + s_b) of the time."""
    mine, theirs = (math.pow(10, rating / 400) for rating in (a, b))
    gain = k * (score - mine / (mine + theirs))
    return a + gain, b - gain


@exercise(
    "family.elo",
    minutes=8,
    difficulty=2,
    cases=_games,
    against=_by_strengths,
    tolerance=1e-6,
    hints=(
        "Ratings move by how surprising the outcome was: the score that came minus the score that was expected.",
        "Expected of a against b is 1 / (1 + 10^((b - a) / 400)): a half if they are equal, more if a is ahead. What "
        "one gains the other loses.",
        "`expected = 1 / (1 + 10 ** ((b - a) / 400))`, `gain = k * (score - expected)`, `return a + gain, b - gain`.",
    ),
)
def elo(a: float, b: float, score: float, k: float = 32.0) -> tuple[float, float]:
    """Two ratings after a comparison: `score` is 1.0 if a's picture was preferred, 0.0 if b's, 0.5 if neither.

    400 points ahead is an expected score of 10 to 1. At most `k` points change hands.
    """
    expected = 1 / (1 + 10 ** ((b - a) / 400))
    gain = k * (score - expected)
    return a + gain, b - gain


@wrong("family.elo", "the expected score is b's: with a ahead it must be above a half.")
def _expected_of_b(a, b, score, k=32.0):
    gain = k * (score - 1 / (1 + 10 ** ((a - b) / 400)))
    return a + gain, b - gain


@wrong("family.elo", "the expected score uses e; Elo's base is 10, so that 400 points are ten to one.")
def _natural(a, b, score, k=32.0):
    gain = k * (score - 1 / (1 + math.exp((b - a) / 400)))
    return a + gain, b - gain


@wrong("family.elo", "b's rating moves the same way as a's; what one gains the other loses.")
def _both(a, b, score, k=32.0):
    gain = k * (score - 1 / (1 + 10 ** ((b - a) / 400)))
    return a + gain, b + gain


@wrong("family.elo", "k is 32 whatever is asked for; use the argument.")
def _own_k(a, b, score, k=32.0):
    return elo(a, b, score)


@wrong("family.elo", "every win counts the same whoever wins; a surprise should move ratings more.")
def _flat(a, b, score, k=32.0):
    gain = k * (score - 0.5)
    return a + gain, b - gain
