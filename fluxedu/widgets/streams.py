"""The text and the image stream: how large their tokens are in every block, and what is added to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fluxedu.errors import InstrumentError, check_choice
from fluxedu.instruments.lenses.run import blocks_of, enough_steps, few_steps_note
from fluxedu.instruments.named import Named
from fluxedu.plots import TIME_LABEL
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.contributions import measure_contributions, rms_over_tokens
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Chips, Choice, Explorer, Slider, Try, View, explorer, time_slider
from fluxedu.widgets.panels import RGB, Lines, Pixels, overlay, overlay_colours, to_rgb

QUANTITIES = ("size of the token", "size added by attention", "size added by the MLP")


@torch.no_grad()
def streams_view(
    sizes: Named,
    added: Named,
    pieces: Sequence[str],
    txt_len: int,
    grid: tuple[int, int],
    image: RGB,
    quantity: int,
    block: int,
    step: int,
    word: int,
) -> View:
    """Token sizes of both streams over depth, what a block adds to them over time, and one quantity for each token.

    ``sizes``, ``added``: from :func:`fluxedu.widgets.contributions.measure_contributions` · ``pieces``: the prompt's
    tokens without padding · ``quantity``: an index into QUANTITIES.
    """
    blocks, times = sizes.coords["block"], sizes.coords["step"]
    name, t = blocks[block].replace(".", " "), times[step]
    streams = {"text": slice(0, txt_len), "image": slice(txt_len, None)}
    over_depth = {stream: rms_over_tokens(sizes.tensor[:, step], tokens).tolist() for stream, tokens in streams.items()}
    over_time = {}
    for stream, tokens in streams.items():
        for i, source in enumerate(("attention", "MLP")):
            over_time[f"{source}, {stream}"] = rms_over_tokens(added.tensor[block, i], tokens).tolist()
    values = sizes.tensor[block, step] if quantity == 0 else added.tensor[block, quantity - 1, step]  # [token]
    words, patches = values[: len(pieces)], values[txt_len:].view(grid)
    panels = [
        Lines(f"Size of the tokens that enter each block, t = {t:.2f}", range(len(blocks)), over_depth, "block",
              "root mean square over channels", block, x_names=blocks),
        Lines(f"Size of what block {name} adds, over time", times, over_time, TIME_LABEL,
              "root mean square over channels", t),
        Pixels(f"Image tokens: {QUANTITIES[quantity]}", overlay(image, patches), key=("0", f"{patches.max():.2f}"),
               colours=overlay_colours(), unit="root mean square over channels"),
    ]  # fmt: skip
    text = (
        f"Block {name} at t = {t:.2f}: the size of a text token is {over_depth['text'][block]:.1f}, of an image token "
        f"{over_depth['image'][block]:.1f}. The token “{pieces[word].replace('▁', '')}” has size "
        f"{sizes.tensor[block, step, word]:.1f}; attention adds {added.tensor[block, 0, step, word]:.1f} and the MLP "
        f"{added.tensor[block, 1, step, word]:.1f}."
    )
    shades = (words - words.min()) / (words.max() - words.min()).clamp(min=1e-12)  # sizes differ little
    return View(panels, text, {"word": shades.tolist()})


@explorer(example=lambda pipe: streams(pipe, EXAMPLE_PROMPT, steps=enough_steps(pipe), progress=False))
def streams(pipe: FluxPipeline, prompt: str, *, block: str = "double.1", **request) -> Explorer:
    """Text and image tokens in every block and step while ``prompt`` is drawn; ``block`` is the first one shown.

    In single-stream blocks both are one sequence, of which the first tokens are text. This takes one run. ``request``:
    as for the pipeline.
    """
    check_choice("block", block, blocks_of(pipe), error=InstrumentError)
    sizes, added, out = measure_contributions(pipe, prompt, **request)
    tokenizer = pipe.prompt_encoder.tokenizer
    grid, image = tuple(n // 2 for n in out.latents.shape[-2:]), to_rgb(out.images[0])
    pieces, times, blocks = tokenizer.pieces(prompt), sizes.coords["step"], sizes.coords["block"]
    note = few_steps_note(pipe, request)

    def draw(**state: int) -> View:
        view = streams_view(sizes, added, pieces, tokenizer.length, grid, image, **state)
        return replace(view, text=view.text + note)

    controls = [
        Choice("quantity", "shade tokens by", QUANTITIES),
        Slider("block", "block", blocks, blocks.index(block)),
        time_slider(times, len(times) // 2),
        Chips("word", "text tokens", pieces, min(1, len(pieces) - 1)),
    ]
    return Explorer(
        "How large are text and image tokens, and what is added to them?",
        controls,
        draw,
        widths=[3.4, 3.4, 2.8],
        instruction="Press play to go through the blocks; click a word to read its size below.",
        tries=[
            Try("Which words and patches does attention change most?", quantity="size added by attention"),
            Try("How large are the tokens in the last block?", block=-1),
            Try("Is it the same at the first step, in pure noise?", step=0),
        ],
        play="block",
    )
