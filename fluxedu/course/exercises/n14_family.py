"""Notebook 14: the family of models."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.checkpoints.lora import merge as library_merge
from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.sampling import conditions as library
from fluxedu.sampling.latents import image_ids, pack


def _fill_inputs() -> list[tuple]:
    g = torch.Generator().manual_seed(14)
    cases = []
    for batch, height, width in ((1, 4, 6), (2, 6, 2)):
        noise, masked = (torch.randn(batch, 16, height, width, generator=g) for _ in range(2))
        mask = (torch.rand(batch, 1, 8 * height, 8 * width, generator=g) < 0.3).float()
        cases.append((noise, masked, mask))
    return cases


def _by_unfold(noise: Tensor, masked: Tensor, mask: Tensor) -> Tensor:
    """The reference: PyTorch's own unfolding, first pixels into latent cells, then cells into patches."""
    cells = F.pixel_unshuffle(mask, 8)
    parts = [F.unfold(x, 2, stride=2).transpose(1, 2) for x in (noise, masked, cells)]
    return torch.cat(parts, dim=-1)


@exercise(
    "family.fill",
    minutes=12,
    difficulty=3,
    cases=_fill_inputs,
    against=_by_unfold,
    tolerance=0,
    hints=(
        "The mask keeps all of its pixels: the 8 x 8 pixels of a latent cell become 64 channels of that cell. A patch "
        "of 2 x 2 cells then has 4 x 64 = 256 mask values, beside 64 of the noise and 64 of the masked image.",
        "`reshape(B, h, 8, w, 8)` splits rows and columns of pixels into cells; `permute` moves both axes of size 8 "
        "to the front, rows before columns. `pack` does the rest.",
        "`cells = mask.reshape(b, h, 8, w, 8).permute(0, 2, 4, 1, 3).reshape(b, 64, h, w)`; then "
        "`torch.cat([pack(noise), pack(masked), pack(cells)], dim=-1)`.",
    ),
)
def fill_tokens(noise: Tensor, masked: Tensor, mask: Tensor) -> Tensor:
    """The input tokens of FLUX.1 Fill: `noise`, `masked [B, 16, h, w]`, `mask [B, 1, 8h, 8w]` -> `[B, h/2 * w/2, 384]`.

    `masked` is the latent of the image without the region to be painted; the mask is 1 in that region. Each token
    holds 64 numbers of noise, then 64 of the masked image, then its 256 mask pixels, ordered first by the pixel (row,
    column) within its latent cell, then by the cell (row, column) within the patch, as `pack` does it.
    """
    b, _, h, w = noise.shape
    cells = mask.reshape(b, h, 8, w, 8)  # [B, h, 8, w, 8]
    cells = cells.permute(0, 2, 4, 1, 3).reshape(b, 64, h, w)  # [B, 8 * 8, h, w]
    return torch.cat([pack(noise), pack(masked), pack(cells)], dim=-1)  # [B, h/2 * w/2, 64 + 64 + 256]


@mistakes(
    "family.fill",
    ("mask before image", "the mask comes before the masked image; the order is noise, masked image, mask."),
    ("columns first", "within a cell the mask's pixels are ordered column by column; they go row by row."),
    ("mask inverted", "your mask is 0 in the region to be painted; it should be 1 there."),
    ("patches", "you fold the mask in patches of 16 x 16 pixels; fold 8 x 8 into cells first, then pack the cells."),
)
def _fill_with(mistake, noise, masked, mask):
    b, _, h, w = noise.shape
    if mistake == "mask inverted":
        mask = 1 - mask
    order = (0, 4, 2, 1, 3) if mistake == "columns first" else (0, 2, 4, 1, 3)
    mask_tokens = pack(mask.reshape(b, h, 8, w, 8).permute(*order).reshape(b, 64, h, w))
    if mistake == "patches":
        patches = mask.reshape(b, h // 2, 16, w // 2, 16).permute(0, 1, 3, 2, 4)
        mask_tokens = patches.reshape(b, -1, 256)
    if mistake == "mask before image":
        return torch.cat([pack(noise), mask_tokens, pack(masked)], dim=-1)
    return torch.cat([pack(noise), pack(masked), mask_tokens], dim=-1)


@exercise(
    "family.reference",
    minutes=4,
    difficulty=1,
    cases=lambda: [(4, 6), (10, 2), (16, 16)],
    against=library.reference_ids,
    tolerance=0,
    hints=(
        "As for the image itself (notebook 04): a token is 2 x 2 latent cells, and rows come before columns.",
        "`image_ids(height, width)` from fluxedu.sampling.latents gives rows and columns; only the frame is missing.",
        "`ids = image_ids(height, width)`, then `ids[:, 0] = 1`.",
    ),
)
def reference_ids(height: int, width: int) -> Tensor:
    """The position ids of FLUX.1 Kontext's reference image of `height x width` latent cells: `[h/2 * w/2, 3]`.

    Each id is (1, row, column). Row and column are those of an ordinary image of this size; only the frame differs.
    """
    ids = image_ids(height, width)  # [h/2 * w/2, 3]: (0, row, column)
    ids[:, 0] = 1
    return ids


def _grid_ids(height: int, width: int, frame: float = 1, offset: float = 0) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.full_like(rows, frame), rows, columns + offset], dim=-1).reshape(-1, 3).float()


wrong(
    "family.reference", "the frame is 0, that of the target: each token would share its position with a target token."
)(lambda height, width: _grid_ids(height, width, frame=0))
wrong("family.reference", "you put the reference beside the target in frame 0; it belongs in frame 1.")(
    lambda height, width: _grid_ids(height, width, frame=0, offset=width // 2)
)
wrong("family.reference", "columns come before rows in your ids; they are (1, row, column).")(
    lambda height, width: _grid_ids(height, width)[:, [0, 2, 1]]
)
wrong("family.reference", "your rows and columns count latent cells; they count tokens, which are two cells wide.")(
    lambda height, width: _grid_ids(height, width) * torch.tensor([1, 2, 2])
)


def _text_and_image_tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(43)
    first = torch.randn(1, 5, 6, generator=g), torch.randn(1, 3, 6, generator=g)
    second = torch.randn(2, 3, 6, generator=g), torch.randn(1, 7, 6, generator=g)
    return [first, second]


def _prompt_by_prompt(txt: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: fill in one prompt after another."""
    (b, t, d), m = txt.shape, image_tokens.shape[1]
    tokens = txt.new_zeros(b, t + m, d)
    for i in range(b):
        tokens[i, :t], tokens[i, t:] = txt[i], image_tokens[0]
    return tokens, torch.zeros(t + m, 3)


@exercise(
    "family.redux",
    minutes=6,
    difficulty=1,
    cases=_text_and_image_tokens,
    against=_prompt_by_prompt,
    tolerance=0,
    hints=(
        "To the network, the tokens of the prompt image are more text: more tokens of the same width, with text ids.",
        "Every prompt of the batch gets the same image: `image_tokens.expand(B, -1, -1)`. All text ids are (0, 0, 0).",
        "`torch.cat([txt, image_tokens.expand(len(txt), -1, -1)], dim=1)`, and `torch.zeros(T + M, 3)`.",
    ),
)
def with_image_tokens(txt: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The text input of FLUX.1 Redux: T5's tokens `txt [B, T, D]`, then the `image_tokens [1, M, D]` of a prompt image.

    Return tokens `[B, T + M, D]` and their ids `[T + M, 3]`. The image is the same for every prompt of the batch.
    """
    tokens = torch.cat([txt, image_tokens.expand(len(txt), -1, -1)], dim=1)  # [B, T + M, D]
    return tokens, torch.zeros(tokens.shape[1], 3)


@mistakes(
    "family.redux",
    ("image first", "the image's tokens come before the text; they come after it."),
    ("frame 1", "the image's tokens have frame 1, as in Kontext; here they are text, with ids of 0."),
    ("numbered", "your ids number the tokens; the ids of text are all zero, and these tokens are text."),
    ("first prompt", "only the first prompt of the batch gets the image; every prompt should."),
)
def _redux_with(mistake, txt, image_tokens):
    tokens, ids = _prompt_by_prompt(txt, image_tokens)
    txt_len = txt.shape[1]
    if mistake == "image first":
        tokens = torch.cat([tokens[:, txt_len:], tokens[:, :txt_len]], dim=1)
    if mistake == "frame 1":
        ids[txt_len:, 0] = 1
    if mistake == "numbered":
        ids[:, 2] = torch.arange(len(ids))
    if mistake == "first prompt":
        tokens[1:, txt_len:] = 0
    return tokens, ids


def _test_velocity(x: Tensor, t: float) -> Tensor:
    """A made-up velocity that depends on state and time."""
    return 0.7 * x.roll(1, -1) * (1 + float(t)) - torch.sin(3 * x) + float(t) ** 2


def _inversions() -> list[tuple]:
    g = torch.Generator().manual_seed(41)
    return [
        (torch.randn(1, 3, 4, generator=g), torch.tensor([1.0, 0.7, 0.3, 0.0]), _test_velocity, 1),
        (torch.randn(2, 3, 5, generator=g), torch.tensor([1.0, 0.9, 0.75, 0.4, 0.0]), _test_velocity, 3),
    ]


def _by_recursion(x: Tensor, times: Tensor, velocity: Callable, rounds: int = 1) -> Tensor:
    """The reference, by recursion: invert the last step by fixed-point iteration, then the steps before it."""
    if len(times) < 2:
        return x
    t, t_next = times[-2], times[-1]
    guesses = [x]
    while len(guesses) <= rounds:
        guesses.append(x - (t_next - t) * velocity(guesses[-1], t))
    return _by_recursion(guesses[-1], times[:-1], velocity, rounds)


@exercise(
    "family.invert",
    minutes=15,
    difficulty=3,
    cases=_inversions,
    against=_by_recursion,
    hints=(
        "The sampler went from t to t_next with x_next = x + (t_next - t) v(x, t). You know x_next and look for x. "
        "v(x, t) needs the x that you do not have yet, so use x_next in its place at first.",
        "Go through the steps from the last to the first: `times[:-1].flip(0)` are their start times, "
        "`times[1:].flip(0)` their end times.",
        "For every step: `guess = x`, then `rounds` times `guess = x + (t - t_next) * velocity(guess, t)`, then "
        "`x = guess`.",
    ),
)
def invert(x: Tensor, times: Tensor, velocity: Callable, rounds: int = 1) -> Tensor:
    """Invert Euler's method: from the image `x [B, N, D]` at `times[-1]` to the state at `times[0]` that leads to it.

    `times` falls from 1 to 0, as in the sampler. For each step evaluate `velocity(x, t)` at the step's start time, as
    the sampler did. Find the state at the start by fixed-point iteration: the first guess is x itself, and each
    evaluation gives the next guess, `rounds` times in all.
    """
    for t, t_next in zip(times[:-1].flip(0), times[1:].flip(0), strict=True):
        guess = x
        for _ in range(rounds):
            guess = x + (t - t_next) * velocity(guess, t)
        x = guess
    return x


@mistakes(
    "family.invert",
    ("sampler's order", "you take the steps in the sampler's order; to go back, begin with its last step."),
    ("sign", "your step has the sampler's sign, so it continues towards the image; time grows during inversion."),
    ("end time", "you evaluate at t_next; the sampler evaluated at t, and that velocity has to be undone."),
    (
        "start moves",
        "each of your rounds starts where the last one ended, so the step is taken repeatedly; start at x each time.",
    ),
)
def _invert_with(mistake, x, times, velocity, rounds=1):
    steps = list(zip(times[:-1], times[1:], strict=True))
    for t, t_next in steps if mistake == "sampler's order" else reversed(steps):
        dt = t_next - t if mistake == "sign" else t - t_next
        guess = x
        for _ in range(rounds):
            start = guess if mistake == "start moves" else x
            guess = start + dt * velocity(guess, t_next if mistake == "end time" else t)
        x = guess
    return x


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
    "family.lora",
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


wrong("family.lora", "alpha is not divided by the rank, so LoRAs of a higher rank would have a stronger effect.")(
    lambda weight, A, B, alpha, scale: weight + scale * alpha * (B @ A)
)
wrong("family.lora", "you return the update alone; it has to be added to the weight.")(
    lambda weight, A, B, alpha, scale: scale * alpha / A.shape[0] * (B @ A)
)
wrong("family.lora", "you divide alpha by the number of inputs; divide by the rank, the number of rows of A.")(
    lambda weight, A, B, alpha, scale: weight + scale * alpha / A.shape[1] * (B @ A)
)
wrong("family.lora", "alpha from the file is not used; only your own scale is.")(
    lambda weight, A, B, alpha, scale: weight + scale * (B @ A)
)


def _comparisons() -> list[tuple]:
    games = [(1000.0, 1000.0, 1.0), (1200.0, 900.0, 0.0), (1200.0, 900.0, 1.0), (850.0, 1100.0, 0.5)]
    return [*games, (900.0, 950.0, 1.0, 16.0)]


def _by_strengths(a: float, b: float, score: float, k: float = 32.0) -> tuple[float, float]:
    """The reference, with strengths instead of ratings: a is preferred with probability s_a / (s_a + s_b)."""
    s_a, s_b = math.pow(10, a / 400), math.pow(10, b / 400)
    gain = k * (score - s_a / (s_a + s_b))
    return a + gain, b - gain


@exercise(
    "family.elo",
    minutes=8,
    difficulty=2,
    cases=_comparisons,
    against=_by_strengths,
    tolerance=1e-6,
    hints=(
        "Ratings move in proportion to the surprise: the actual score minus the expected score.",
        "The expected score of a against b is 1 / (1 + 10^((b - a) / 400)): 0.5 for equal ratings, more if a is "
        "ahead. What one side gains, the other loses.",
        "`expected = 1 / (1 + 10 ** ((b - a) / 400))`, `gain = k * (score - expected)`, `return a + gain, b - gain`.",
    ),
)
def elo(a: float, b: float, score: float, k: float = 32.0) -> tuple[float, float]:
    """The new ratings of a and b after one comparison: `score` is 1.0 if a was preferred, 0.0 if b, 0.5 for a tie.

    400 points more mean odds of 10 to 1. At most `k` points move from one side to the other.
    """
    expected = 1 / (1 + 10 ** ((b - a) / 400))
    gain = k * (score - expected)
    return a + gain, b - gain


@mistakes(
    "family.elo",
    ("expected of b", "your expected score is that of b: if a is ahead, it must be above a half."),
    ("base e", "your expected score uses powers of e; Elo uses powers of 10, so that 400 points mean ten to one."),
    ("same direction", "the rating of b moves in the same direction as that of a; what one gains the other loses."),
    ("fixed k", "k is 32 in your answer, whatever is passed in; use the argument."),
    ("no expectation", "every win counts the same; a surprising result should move the ratings more."),
)
def _elo_with(mistake, a, b, score, k=32.0):
    gap = a - b if mistake == "expected of b" else b - a
    expected = 1 / (1 + (math.e if mistake == "base e" else 10) ** (gap / 400))
    if mistake == "no expectation":
        expected = 0.5
    gain = (32 if mistake == "fixed k" else k) * (score - expected)
    return a + gain, b + gain if mistake == "same direction" else b - gain
