"""Notebook 14: what kontext and redux read, more tokens."""

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, wrong
from fluxedu.sampling import conditions as library
from fluxedu.sampling.latents import image_ids


@exercise(
    "family.reference",
    minutes=4,
    difficulty=1,
    cases=lambda: [(4, 6), (10, 2), (16, 16)],
    against=library.reference_ids,
    tolerance=0,
    hints=(
        "As for the picture itself, notebook 04: a token is 2 x 2 cells, and rows come before columns.",
        "`image_ids(height, width)` from fluxedu.sampling.latents has the rows and the columns; the frame is missing.",
        "`ids = image_ids(height, width)`, then `ids[:, 0] = 1`.",
    ),
)
def reference_ids(height: int, width: int) -> Tensor:
    """Where FLUX.1 Kontext puts a reference of `height x width` latent cells: `[h/2 * w/2, 3]`, (1, row, column).

    Row and column are those that the tokens of a picture of this size would have; only the frame differs.
    """
    ids = image_ids(height, width)  # [h/2 * w/2, 3]: (0, row, column)
    ids[:, 0] = 1
    return ids


def _placed(height: int, width: int, frame: float = 1, beside: float = 0) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.full_like(rows, frame), rows, columns + beside], dim=-1).reshape(-1, 3).float()


@wrong(
    "family.reference", "the frame is 0, the target's own: every token would share its place with one of the target."
)
def _same_frame(height, width):
    return _placed(height, width, frame=0)


@wrong("family.reference", "the reference stands beside the target in frame 0; it stands behind it, in frame 1.")
def _beside(height, width):
    return _placed(height, width, frame=0, beside=width // 2)


@wrong("family.reference", "columns come before rows in your ids; they are (1, row, column).")
def _column_row(height, width):
    return _placed(height, width)[:, [0, 2, 1]]


@wrong("family.reference", "rows and columns are counted in cells; a token is two cells wide, so they count in ones.")
def _in_cells(height, width):
    return _placed(height, width) * torch.tensor([1, 2, 2])


def _words_and_seen() -> list[tuple]:
    g = torch.Generator().manual_seed(43)
    return [
        (torch.randn(b, t, 6, generator=g), torch.randn(1, m, 6, generator=g)) for b, t, m in ((1, 5, 3), (2, 3, 7))
    ]


def _row_by_row(txt: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The same, filled in one prompt after another."""
    (b, t, d), m = txt.shape, seen.shape[1]
    out = txt.new_zeros(b, t + m, d)
    for row in range(b):
        out[row, :t], out[row, t:] = txt[row], seen[0]
    return out, torch.zeros(t + m, 3)


@exercise(
    "family.redux",
    minutes=6,
    difficulty=1,
    cases=_words_and_seen,
    against=_row_by_row,
    tolerance=0,
    hints=(
        "What is seen is more text to the network: more tokens of the same width, at the places that text has.",
        "Every prompt of the batch gets the same picture: `seen.expand(B, -1, -1)`. All ids of text are (0, 0, 0).",
        "`torch.cat([txt, seen.expand(len(txt), -1, -1)], dim=1)`, and `torch.zeros(T + M, 3)`.",
    ),
)
def with_seen(txt: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """What FLUX.1 Redux reads: T5's tokens `txt [B, T, D]`, then a picture's `seen [1, M, D]`, and the ids of all.

    Gives tokens `[B, T + M, D]` and ids `[T + M, 3]`. The picture is the same for every prompt of the batch.
    """
    tokens = torch.cat([txt, seen.expand(len(txt), -1, -1)], dim=1)  # [B, T + M, D]
    return tokens, torch.zeros(tokens.shape[1], 3)


@wrong("family.redux", "the picture's tokens come before the words; they come after them.")
def _seen_first(txt, seen):
    return torch.cat([seen.expand(len(txt), -1, -1), txt], dim=1), torch.zeros(txt.shape[1] + seen.shape[1], 3)


@wrong("family.redux", "the picture's tokens stand in frame 1, as Kontext's do; here they are text, at 0.")
def _as_kontext(txt, seen):
    tokens, ids = _row_by_row(txt, seen)
    return tokens, torch.cat([ids[: txt.shape[1]], ids[txt.shape[1] :] + torch.tensor([1.0, 0, 0])])


@wrong("family.redux", "the tokens are numbered; the ids of text are all zero, and these are text.")
def _numbered(txt, seen):
    tokens, ids = _row_by_row(txt, seen)
    return tokens, ids + torch.arange(len(ids))[:, None] * torch.tensor([0.0, 0, 1])


@wrong("family.redux", "only the first prompt of the batch is given the picture; all of them see it.")
def _first_prompt(txt, seen):
    tokens, ids = _row_by_row(txt, seen)
    tokens[1:, txt.shape[1] :] = 0
    return tokens, ids
