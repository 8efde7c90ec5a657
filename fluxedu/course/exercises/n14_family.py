"""Notebook 14: the family of models."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes
from fluxedu.sampling.latents import pack


def _fill_inputs() -> list[tuple]:
    g = torch.Generator().manual_seed(14)
    cases = []
    for batch, height, width in ((1, 4, 6), (2, 6, 2), (1, 16, 16)):
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
    holds 64 numbers of noise, then 64 of the masked image, then its 256 mask pixels. The pixel's index
    (row, column) inside its latent cell changes slowest; then the cell's row and column in the patch, as in `pack`.
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


def _text_and_image_tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(43)
    first = torch.randn(1, 5, 6, generator=g), torch.randn(1, 3, 6, generator=g)
    second = torch.randn(2, 3, 6, generator=g), torch.randn(1, 7, 6, generator=g)
    return [first, second, (torch.randn(1, 32, 128, generator=g), torch.randn(1, 16, 128, generator=g))]


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


def _paths() -> list[tuple]:
    g = torch.Generator().manual_seed(50)
    few = torch.tensor([1.0, 0.7, 0.2, 0.0]), torch.randn(4, 2, 3, 4, 4, generator=g).cumsum(0)
    page = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), torch.randn(5, 1, 16, 16, 16, generator=g).cumsum(0)
    uneven = torch.tensor([1.0, 0.9, 0.85, 0.1, 0.0]), torch.randn(5, 1, 2, 2, 2, generator=g).cumsum(0)
    return [(states, times) for times, states in (few, page, uneven)]


def _step_by_step(states: Tensor, times: Tensor) -> Tensor:
    """The reference: one step after another."""
    steps = zip(states[:-1], states[1:], times[:-1].tolist(), times[1:].tolist(), strict=True)
    return torch.stack([(after - before) / (t_next - t) for before, after, t, t_next in steps])


@exercise(
    "family.chords",
    minutes=6,
    difficulty=2,
    cases=_paths,
    against=_step_by_step,
    hints=(
        "An Euler step is y_next = y + (t_next - t) v. Here y and y_next are known; solve for v.",
        "`states[1:] - states[:-1]` are all differences, `times[1:] - times[:-1]` the lengths of the steps (they are "
        "negative). The lengths need four more axes, `.view(-1, 1, 1, 1, 1)`.",
        "`return (states[1:] - states[:-1]) / (times[1:] - times[:-1]).view(-1, 1, 1, 1, 1)`.",
    ),
)
def chords(states: Tensor, times: Tensor) -> Tensor:
    """The constant velocity of each step of a path: `states [K + 1, B, C, h, w]`, `times [K + 1]` -> `[K, B, C, h, w]`.

    One Euler step from `states[k]` at `times[k]` with the velocity k must lead exactly to `states[k + 1]`.
    """
    lengths = (times[1:] - times[:-1]).view(-1, 1, 1, 1, 1)  # negative
    return (states[1:] - states[:-1]) / lengths


@mistakes(
    "family.chords",
    ("sign", "the sign is wrong: time falls from noise to image, so the length of a step is negative."),
    ("difference", "you return differences of states; a velocity is the difference divided by the length of the step."),
    ("equal steps", "you divide by 1 / K, as if all steps were equally long."),
    ("to the end", "your velocities lead to the last state; each step leads to the next one only."),
    ("times", "you multiply by the length of the step; divide by it."),
)
def _chords_with(mistake, states, times):
    difference, lengths = states[1:] - states[:-1], (times[1:] - times[:-1]).view(-1, 1, 1, 1, 1)
    if mistake == "difference":
        return difference
    if mistake == "equal steps":
        return -len(difference) * difference
    if mistake == "to the end":
        return (states[-1:] - states[:-1]) / (times[-1:] - times[:-1]).view(-1, 1, 1, 1, 1)
    if mistake == "times":
        return difference * lengths
    return difference / lengths * (-1 if mistake == "sign" else 1)
