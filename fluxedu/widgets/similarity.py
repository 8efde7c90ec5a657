"""What CLIP makes of a prompt: build two prompts word by word and see how alike their vectors are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.errors import InstrumentError
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.controls import Choice
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import enlarged, two_sided
from fluxedu.widgets.panels import Lines, Pixels

PROMPTS = (
    "a red circle left of a blue square",
    "a red circle right of a blue square",
    "a blue circle left of a red square",
    "a blue square left of a red circle",
    "a green circle left of a blue square",
    "a red star left of a blue square",
    "a red circle left of a blue square on a black background",
    "a letter K",
)
WORDS = (None, "red", "green", "yellow", "circle", "star", "square", "small", "left", "right", "black")


def swapped(prompt: str, place: int, word: str | None) -> str:
    """``prompt`` with its word number ``place`` (the last, if it has fewer) replaced; None changes nothing."""
    words = prompt.split()
    if word is not None:
        words[min(place, len(words) - 1)] = word
    return " ".join(words)


def similarity_view(
    vectors: Tensor, prompts: Sequence[str], first: int, second: int, changed: Tensor | None = None, said: str = ""
) -> View:
    """Pooled vectors ``[P, D]`` as a table of cosines, and two of them number by number.

    changed: the vector ``[D]`` that takes the place of the second, being that of the prompt ``said``.
    """
    table = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)  # [P, P]
    one, other = vectors[first], vectors[second] if changed is None else changed
    alike = float(F.cosine_similarity(one, other, dim=0))
    order = one.argsort(descending=True)
    panels = [
        Pixels(
            "cosine of all prompts with all, in the order of the lists", enlarged(two_sided(table, 1.0), 256),
            cells=tuple(table.shape), mark=(first, second), key=("-1", "1"), colours="RdBu_r",
        ),
        Lines(
            "the two vectors, number by number", list(range(len(order))),
            {"first": one[order].tolist(), "second": other[order].tolist()},
            across="the first's largest number comes first", up="value",
        ),
    ]  # fmt: skip
    return View(panels, f"“{prompts[first]}” and “{said or prompts[second]}”: cosine {alike:.2f}.")


def similarity(pipe: FluxPipeline, prompts: Sequence[str] = PROMPTS, words: Sequence[str | None] = WORDS) -> Explorer:
    """Compare the pooled vectors of two of several ``prompts``; a word of the second may be replaced by one of
    ``words``, None standing for no change.

    Raises InstrumentError for fewer than two prompts.
    """
    if isinstance(prompts, str) or len(prompts) < 2:
        raise InstrumentError(f"similarity compares at least two prompts, a list of them, not {prompts!r}.")
    encoder = pipe.prompt_encoder

    @torch.no_grad()
    def pooled(some: Sequence[str]) -> Tensor:
        return encoder.clip(encoder.clip_tokenizer(list(some)).to(pipe.device))[1].float().cpu()

    vectors = pooled(prompts)
    longest = max(len(prompt.split()) for prompt in prompts)
    controls = [
        Choice("first", "first", prompts),
        Choice("second", "second", prompts, 1),
        Choice("place", "in the second, word number", [str(i + 1) for i in range(longest)], min(1, longest - 1)),
        Choice("word", "becomes", ["as it is" if word is None else word for word in words]),
    ]

    def draw(first: int, second: int, place: int, word: int) -> View:
        if words[word] is None:
            return similarity_view(vectors, prompts, first, second)
        said = swapped(prompts[second], place, words[word])
        return similarity_view(vectors, prompts, first, second, pooled([said])[0], said)

    return Explorer("Prompts", controls, draw, widths=[3.0, 4.4])
