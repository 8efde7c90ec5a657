"""The stages of a run, in the order of the diagram, and what is shown of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from matplotlib.figure import Figure

from fluxedu import plots
from fluxedu.instruments import lenses
from fluxedu.instruments.catalogue import sites
from fluxedu.instruments.errors import InstrumentError
from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import MapView, Value, made
from fluxedu.instruments.words import real_tokens
from fluxedu.plots.canvas import figure, quiet
from fluxedu.sampling.pipeline import FluxPipeline, Output

Row = tuple[str, str, tuple[float, float, float, float], str]


@dataclass
class Stage:
    """One box of the diagram. ``kind`` is its colour; ``beside``: the next one stands beside it, not behind."""

    name: str
    title: str
    kind: str
    text: str
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    beside: bool = False


def _numbers(value: Value) -> Named:
    """Mean, spread, least and most of a value; of a map, of its columns' sums (how much a key is looked at)."""
    if isinstance(value, MapView):
        x = value.head_mean().tensor.sum(-2)
    else:
        x = made(value).tensor
        x = (x.abs() if x.is_complex() else x).float()
    return Named(torch.stack([x.mean(), x.std(correction=0), x.min(), x.max()]), ("number",))


def stages(pipe: FluxPipeline, prompt: str, **asked) -> tuple[Output, list[Stage]]:
    """Draw ``prompt`` and say what happened at every stage; ``asked`` as for the pipeline."""
    if not isinstance(prompt, str):
        raise InstrumentError(f"a trace is of one prompt, not of {prompt!r}.")
    with record("*", reduce=_numbers) as rec:
        out = pipe(prompt, **asked)
    asked = asked | {"progress": False}
    words = _words(pipe, prompt)
    maps = lenses.word_maps(pipe, prompt, words, **asked) if words else None
    heads = lenses.head_gallery(pipe, prompt, words[-1], **asked) if words else None
    made_of = [
        *_before(pipe, prompt, asked.get("guidance")),
        *_blocks(pipe, out, maps, heads, words),
        *_after(pipe, prompt, out, asked),
    ]
    for stage in made_of:
        stage.rows = _rows(pipe, rec, stage.name)
    return out, made_of


def _words(pipe: FluxPipeline, prompt: str) -> list[str]:
    """The prompt's last words that can be pointed at: at most four, the short ones left out."""
    said = [w for w in dict.fromkeys(re.findall(r"\w+", prompt)) if len(w) > 2 or w.isupper()]
    return said[-4:] if real_tokens(pipe.prompt_encoder.t5_tokenizer, prompt) else []


#: which sites belong to a stage: by the beginning of their names
_BELONG = {
    "clip": ("clip.",),
    "t5": ("t5.",),
    "noise": ("sample.noise", "sample.txt", "sample.pooled"),
    "vec": ("vec",),
    "in": ("img_in", "txt_in"),
    "final": ("final_layer.", "velocity"),
    "solver": ("sample.x", "sample.velocity", "sample.negative", "sample.prompted", "sample.latent"),
    "image": ("ae.decoder.", "sample.image"),
}


def _rows(pipe: FluxPipeline, rec: record, stage: str) -> list[Row]:
    """Every site of a stage with its numbers over the whole run."""
    begins = _BELONG.get(stage, (f"{stage}.",))
    rows = []
    for site in sites(pipe):
        if site.name in rec and site.name.startswith(begins):
            numbers = torch.stack([value.tensor for _, value in rec.entries(site.name)])
            mean, spread, least, most = numbers.unbind(-1)
            told = (float(mean.mean()), float(spread.mean()), float(least.min()), float(most.max()))
            rows.append((site.name, "×".join(map(str, site.shape)), told, site.meaning))
    return rows


#: name -> title, colour, what it says; of the stages that every model has once
_FIXED = {
    "clip": ("CLIP text encoder", "text", "One vector for the whole prompt: all that modulation hears of it."),
    "t5": ("T5 encoder", "text", "A vector for every piece of the prompt: what the image tokens look at."),
    "noise": ("Noise", "image", "Where the run begins: a number a channel and cell, drawn on the CPU from the seed."),
    "vec": (
        "Time + guidance + text",
        "time",
        "Three vectors are added, and every shift, scale and gate of every block is made from the sum. They do not "
        "depend on the picture, so those of all steps are known before the first.",
    ),
    "in": ("Patches and words", "flow", "Both kinds of token are brought to the transformer's width."),
    "final": ("Last layer: velocity", "flow", "Image tokens become velocities, noise minus picture, a patch each."),
    "solver": ("Solver", "time", "From noise (t = 1) to the picture (t = 0), against the velocity, step by step."),
    "image": ("Autoencoder: the picture", "image", "The latent becomes pixels."),
}
_DOUBLE = "Text and image have weights of their own; one attention mixes them."
_SINGLE = "Text and image are one sequence; attention and MLP work side by side on the same tokens."


def _fixed(name: str, *figures: tuple[str, Figure], more: str = "", beside: bool = False) -> Stage:
    title, kind, text = _FIXED[name]
    return Stage(name, title, kind, f"{text} {more}".strip(), list(figures), beside=beside)


def _before(pipe: FluxPipeline, prompt: str, guidance: float | None) -> list[Stage]:
    """From the prompt to the first block."""
    pieces, length = pipe.prompt_encoder.t5_tokenizer.pieces(prompt), pipe.prompt_encoder.t5_tokenizer.length
    said = f"The pieces: {' '.join(pieces)}, and {length - len(pieces)} pads behind them."
    sizes = plots.modulation(lenses.modulation(pipe, prompt, guidance=guidance))
    return [
        _fixed("clip", beside=True),
        _fixed("t5", more=said, beside=True),
        _fixed("noise"),
        _fixed("vec", ("The size of every modulation, over time and depth.", sizes)),
        _fixed("in"),
    ]


def _blocks(pipe: FluxPipeline, out: Output, maps: Named | None, heads: Named | None, words: list[str]) -> list[Stage]:
    """A stage a block."""
    found = []
    for i, name in enumerate(blocks_of(pipe)):
        kind, number = name.split(".")
        figures = []
        if maps is not None:
            here, each = (Named(v.tensor[i : i + 1], v.axes, v.coords | {"block": [name]}) for v in (maps, heads))
            figures.append(
                ("What each patch takes from a word, over heads and steps.", plots.word_maps(here, out.images[0]))
            )
            figures.append(
                (f"Where each head looks from “{words[-1]}” at the end.", plots.head_gallery(each, out.images[0]))
            )
        text = _DOUBLE if kind == "double" else _SINGLE
        found.append(Stage(name, f"{kind.capitalize()}-stream block {number}", "flow", text, figures))
    return found


@torch.no_grad()
def _after(pipe: FluxPipeline, prompt: str, out: Output, asked: dict) -> list[Stage]:
    """From the last block to the picture."""
    path = out.trajectory
    decoded = lambda latents: [pipe.autoencoder.decode(x)[0].float().cpu() for x in latents]  # noqa: E731
    strip = plots.film_strip({"state": decoded(path.latents[:-1]), "foreseen": decoded(path.x0)}, path.times[:-1])
    places = (0, len(path.times) // 2, len(path.times) - 1)
    spectrum = plots.spectrum({f"t = {float(path.times[i]):.2f}": path.latents[i] for i in places})
    added = plots.contributions(lenses.contributions(pipe, prompt, **asked))
    picture, ((ax,),) = figure(1, 1, (3.2, 3.2))
    quiet(ax).imshow(out.images[0])
    return [
        _fixed("final", ("How much each block added to the image, beside what was there.", added)),
        _fixed("solver", ("The state, and the picture foreseen: x - t v.", strip), ("Noise is flat.", spectrum)),
        _fixed("image", (prompt, picture)),
    ]
