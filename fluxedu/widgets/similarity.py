"""CLIP's vectors of prompts: choose two prompts, replace a word of one, and see how similar their vectors are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.lenses.run import check_encoder
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import Choice, Explorer, Try, View, explorer
from fluxedu.widgets.panels import Lines, Pixels, sequential, upscale

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


def replace_word(prompt: str, index: int, word: str | None) -> str:
    """``prompt`` with the word at ``index`` (or the last, if it has fewer) replaced; None changes nothing."""
    words = prompt.split()
    if word is not None:
        words[min(index, len(words) - 1)] = word
    return " ".join(words)


def similarity_view(
    vectors: Tensor,
    prompts: Sequence[str],
    first: int,
    second: int,
    new_vector: Tensor | None = None,
    new_prompt: str = "",
) -> View:
    """Pooled vectors ``[P, D]`` as a table of 1 - cosine, and two of them number by number.

    ``new_vector [D]``: shown instead of the second vector, if that prompt was changed to ``new_prompt``.
    """
    table = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)  # [P, P]
    a, b = vectors[first], vectors[second] if new_vector is None else new_vector
    order = a.argsort(descending=True)
    series = {"first": a[order].tolist(), "second - first": (b - a)[order].tolist()}
    distances = (1 - table).clamp(min=0)  # most cosines are close to 1: what is missing to 1 tells them apart
    panels = [
        Pixels(
            "How different every two prompts are: 1 - cosine",
            upscale(sequential(distances, None, "viridis", "log"), 256),
            cells=tuple(table.shape), mark=(first, second), key=("0", f"{distances.max():.2f}"), colours="viridis",
            unit="1 - cosine", axes=("prompt", "prompt"),
            rows=[f"{i + 1}  {prompt}" for i, prompt in enumerate(prompts)], columns=range(1, len(prompts) + 1),
        ),
        Lines("The first vector, and what is different in the second", range(len(order)), series,
              "channel, sorted by the first vector", "value", units={"second - first": "difference"}),
    ]  # fmt: skip
    cosine = float(F.cosine_similarity(a, b, dim=0))
    return View(panels, f"“{prompts[first]}” and “{new_prompt or prompts[second]}”: cosine {cosine:.4f}.")


@explorer(example=lambda pipe: similarity(pipe))
def similarity(pipe: FluxPipeline, prompts: Sequence[str] = PROMPTS, words: Sequence[str | None] = WORDS) -> Explorer:
    """Compare the pooled CLIP vectors of two of several ``prompts``; one word of the second may be replaced by one of
    ``words``, in which None stands for no change. This takes no run: each move encodes one prompt.

    Raises InstrumentError for fewer than two prompts.
    """
    if len(prompts) < 2:
        raise InstrumentError(f"prompts must be a list of at least two prompts, not {describe(prompts)}.")
    if not words:
        raise InstrumentError("words must not be empty; [None] stands for no change.")
    check_encoder(pipe, "clip")
    encoder = pipe.prompt_encoder

    @torch.no_grad()
    def pooled(texts: Sequence[str]) -> Tensor:
        return encoder.clip(encoder.clip_tokenizer(list(texts)).to(pipe.device))[1].float().cpu()

    vectors = pooled(prompts)
    longest = max(len(prompt.split()) for prompt in prompts)
    numbers = [str(i + 1) for i in range(longest)]
    controls = [
        Choice("first", "first prompt", prompts),
        Choice("second", "second prompt", prompts, 1),
        Choice("index", "in the second, replace word number", numbers, min(1, longest - 1)),
        Choice("word", "by", ["(no change)" if word is None else word for word in words]),
    ]

    def draw(first: int, second: int, index: int, word: int) -> View:
        if words[word] is None:
            return similarity_view(vectors, prompts, first, second)
        prompt = replace_word(prompts[second], index, words[word])
        return similarity_view(vectors, prompts, first, second, pooled([prompt])[0], prompt)

    new = next((word for word in words if word is not None and word not in prompts[1].split()), None)
    tries = [
        Try("Does CLIP notice when the colours are exchanged?", second=2),
        Try("Is the same scene the same to CLIP, told from the other side?", second=3),
    ]
    if prompts is not PROMPTS:
        tries = [Try("How similar is a prompt to itself?", second=0)]
    if new is not None:
        tries.append(
            Try(f"How far does one word, “{new}”, move the second vector?", word=new, index=min(1, longest - 1))
        )
    return Explorer(
        "How similar are two prompts to CLIP?",
        controls,
        draw,
        widths=[5.2, 3.4],
        instruction="Choose two prompts, then replace a word of the second: how far does its vector move?",
        tries=tries,
    )
