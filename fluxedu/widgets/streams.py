"""Two streams side by side: how large the text's and the image's tokens are, and what feeds each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluxedu.instruments.named import Named
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.contributions import over_tokens, shares
from fluxedu.widgets.controls import Chips, Choice, Slider, clock
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import Pixels8, over, over_stops, picture
from fluxedu.widgets.panels import Lines, Pixels

SHOWN = ("size of the token", "attention adds", "MLP adds")


def streams_view(
    sizes: Named,
    given: Named,
    pieces: Sequence[str],
    words: int,
    grid: tuple[int, int],
    image: Pixels8,
    shown: int,
    block: int,
    step: int,
    word: int,
) -> View:
    """Both streams' sizes over depth, what feeds them over time, and one quantity over patches and words.

    ``sizes``, ``given``: from :func:`fluxedu.widgets.contributions.shares` · ``pieces``: the prompt's tokens, without
    padding · ``shown``: a place in SHOWN.
    """
    blocks, times = sizes.coords["block"], sizes.coords["step"]
    streams = {"text": slice(0, words), "image": slice(words, None)}
    depth = {name: over_tokens(sizes.tensor[:, step], part).tolist() for name, part in streams.items()}
    fed = {
        f"{name}: {part}": over_tokens(given.tensor[block, i], tokens).tolist()
        for name, tokens in streams.items()
        for i, part in enumerate(given.coords["part"][:2])
    }
    values = sizes.tensor[block, step] if shown == 0 else given.tensor[block, shown - 1, step]  # [token]
    said, patches = values[: len(pieces)], values[words:].view(grid)
    panels = [
        Lines(f"size of a token entering each block, t = {times[step]:.2f}", list(range(len(blocks))), depth,
              f"block, {blocks[0]} to {blocks[-1]}", "root mean square", block),
        Lines(f"what {blocks[block]} adds, over time", times, fed, "time (1 is noise)", "root mean square",
              times[step]),
        Pixels(f"image patches: {SHOWN[shown]}", over(image, patches), key=("0", f"{patches.max():.2f}"),
               colours=over_stops()),
    ]  # fmt: skip
    t, i = (depth[name][block] for name in ("text", "image"))
    text = (
        f"{blocks[block]} at t = {times[step]:.2f}: a text token has size {t:.1f}, an image token {i:.1f}. "
        f"{pieces[word].replace('▁', '')}: size {sizes.tensor[block, step, word]:.1f}, attention adds "
        f"{given.tensor[block, 0, step, word]:.1f}, the MLP {given.tensor[block, 1, step, word]:.1f}."
    )
    return View(panels, text, {"word": (said / said.max().clamp(min=1e-12)).tolist()})


def streams(pipe: FluxPipeline, prompt: str, *, block: str = "double.1", **asked) -> Explorer:
    """The text's and the image's residual stream in every block and step while ``prompt`` is drawn.

    In single blocks the two are one sequence, and are shown by the same token numbers.
    """
    sizes, given, out = shares(pipe, prompt, **asked)
    tokenizer = pipe.prompt_encoder.t5_tokenizer
    grid, image = tuple(n // 2 for n in out.latents.shape[-2:]), picture(out.images[0])
    pieces, times = tokenizer.pieces(prompt), sizes.coords["step"]

    def draw(shown: int, block: int, step: int, word: int) -> View:
        with torch.no_grad():
            return streams_view(sizes, given, pieces, tokenizer.length, grid, image, shown, block, step, word)

    blocks = sizes.coords["block"]
    controls = [
        Choice("shown", "shade", SHOWN),
        Slider("block", "block", blocks, blocks.index(block)),
        clock(times, len(times) // 2),
        Chips("word", "text tokens", pieces, min(1, len(pieces) - 1)),
    ]
    return Explorer("Streams", controls, draw, widths=[3.4, 3.4, 2.8])
