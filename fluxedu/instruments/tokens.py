"""Which tokens a word of the prompt or a region of the image is: a user thinks in words and pictures."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxedu.errors import InstrumentError, RequestError, WordNotInPrompt, describe
from fluxedu.sampling.images import Picture, to_mask
from fluxedu.sampling.latents import PATCH
from fluxedu.sampling.prompts import Tokenizer
from fluxedu.sampling.step_context import StepContext


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the image, see :func:`region`: ``mask [h, w]``, 1 inside, which fills ``box`` of the image."""

    mask: Tensor
    box: tuple[float, float, float, float]

    def tokens(self, shape: tuple[int, int]) -> list[int]:
        """Indices of the image tokens that lie in it, for a latent of ``shape`` (rows, columns of cells)."""
        left, top, right, bottom = self.box
        rows = _overlaps(shape[0] // PATCH, self.mask.shape[0], top, bottom)
        columns = _overlaps(shape[1] // PATCH, self.mask.shape[1], left, right)
        inside = rows @ self.mask @ columns.T  # the fraction of each token's area
        return (inside >= 0.5 - 1e-9).flatten().nonzero().flatten().tolist()


def region(box: Sequence[float] | None = None, mask: Picture | None = None) -> Region:
    """A part of the image, for ``tokens=`` and ``queries=``: the tokens whose patch lies at least half inside.

    box: (left, top, right, bottom) as fractions of the image, from 0 to 1 · mask: a PIL image, or an array or tensor
    ``[h, w]`` of any size, white or 1 inside, which covers the whole image. Give one of the two; InstrumentError
    otherwise.

    >>> import fluxedu as fe
    >>> fe.region(box=(0, 0, 0.5, 1)).tokens((4, 4))  # 4 x 4 latent cells are 2 x 2 tokens; the left ones
    [0, 2]
    """
    if (box is None) == (mask is None):
        raise InstrumentError("a region is given by box=(left, top, right, bottom) or by mask=, one of the two.")
    if mask is not None:
        try:
            return Region(to_mask(mask)[0, 0].double().cpu(), (0.0, 0.0, 1.0, 1.0))
        except RequestError as error:
            raise InstrumentError(f"{error}") from None
    try:
        left, top, right, bottom = (float(side) for side in box)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError
    except (TypeError, ValueError, RuntimeError):
        raise InstrumentError(f"box must be (left, top, right, bottom) within 0 to 1, not {describe(box)}.") from None
    return Region(torch.ones(1, 1, dtype=torch.float64, device="cpu"), (left, top, right, bottom))


def _overlaps(tokens: int, cells: int, start: float, end: float) -> Tensor:
    """``[tokens, cells]``: along a side of length 1 of ``tokens``, the fraction of each that each cell covers.

    The cells lie between ``start`` and ``end``.
    """
    options = {"dtype": torch.float64, "device": "cpu"}
    sides = torch.linspace(0, 1, tokens + 1, **options)[:, None]
    edges = torch.linspace(start, end, cells + 1, **options)
    shared = torch.minimum(sides[1:], edges[1:]) - torch.maximum(sides[:-1], edges[:-1])
    return shared.clamp(min=0) * tokens


Word = str | int
Token = Word | Region


def as_list(tokens: Sequence[Token] | Token, name: str = "tokens") -> list[Token]:
    """One or several words, regions or token indices (whole numbers of any type), as a list."""
    try:
        items = [tokens] if isinstance(tokens, str) or not hasattr(tokens, "__iter__") else list(tokens)
        found = [item if isinstance(item, (str, Region)) else operator.index(item) for item in items]
    except TypeError:
        found = []
    if not found:
        allowed = "words or token indices, one or several, or regions of the image, fe.region(box=...)"
        raise InstrumentError(f"{name} must be {allowed}, not {describe(tokens)}.")
    return found


def contains_words(tokens: Sequence[Token] | Token) -> bool:
    """Whether any of them is a word."""
    return any(isinstance(token, str) for token in as_list(tokens))


def token_indices_at(
    context: StepContext | None, site: str, words: Sequence[Word] | Word, negative: bool = False
) -> list[int]:
    """Indices of the tokens of ``words`` in the prompt that is read at ``site`` now; numbers are indices already."""
    if not contains_words(words):
        return as_list(words)
    if context is None:
        raise InstrumentError(f"at {site!r}, words can only be found while a pipeline runs; use token indices instead.")
    return token_indices(tokenizer_at(context, site), prompt_at(context, negative), as_list(words))


def tokenizer_at(context: StepContext, site: str) -> Tokenizer:
    """CLIP's tokenizer at the sites of CLIP, that of the text tokens everywhere else."""
    encoder = context.pipe.prompt_encoder
    return encoder.clip_tokenizer if site.startswith("clip.") else encoder.tokenizer


def prompt_at(context: StepContext, negative: bool = False) -> str:
    """The prompt that is being encoded or drawn."""
    if context.text is not None:
        return context.text
    return context.request.negative_prompt if negative else context.request.prompt


def token_indices(tokenizer: Tokenizer, prompt: str, words: Sequence[Word]) -> list[int]:
    """Indices of the tokens that spell ``words`` in ``prompt``, in the order of ``words``; a number stands for itself.

    All occurrences of a word are found. Padding never belongs to a word. Raises WordNotInPrompt.
    """
    spans = _spans(tokenizer, prompt)
    found: list[int] = []
    for word in as_list(words):
        found += _indices_of(word, spans, prompt) if isinstance(word, str) else [word]
    return list(dict.fromkeys(found))


def text_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Indices of all tokens that stand for text: neither the end-of-text token nor padding."""
    return [i for i, (start, end) in enumerate(_spans(tokenizer, prompt)) if end > start]


def _spans(tokenizer: Tokenizer, prompt: str) -> list[tuple[int, int]]:
    """Start and end of each token in the prompt, in characters."""
    try:
        return tokenizer.spans(prompt)
    except TypeError:  # not a string, or half a character
        raise InstrumentError(f"the prompt must be one string, not {describe(prompt)}.") from None


def _indices_of(word: str, spans: list[tuple[int, int]], prompt: str) -> list[int]:
    matches = re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) if word else []
    occurrences = [match.span() for match in matches]
    indices = []
    for i, (start, end) in enumerate(spans):
        if end > start and any(start < last and end > first for first, last in occurrences):
            indices.append(i)
    if not indices:
        raise WordNotInPrompt(f"the prompt does not contain {describe(word)}; it is {prompt!r}.")
    return indices
