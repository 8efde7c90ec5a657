"""The stages of a run, in the order of the diagram, and what is shown of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from matplotlib.figure import Figure

from fluxedu import plots
from fluxedu.errors import InstrumentError
from fluxedu.instruments import lenses
from fluxedu.instruments.catalogue import sites
from fluxedu.instruments.lenses.attention import look_at_heads
from fluxedu.instruments.lenses.layers import look_at_contributions
from fluxedu.instruments.lenses.run import together
from fluxedu.instruments.lenses.words import attention_to_words
from fluxedu.instruments.named import Named
from fluxedu.instruments.parts import Part, parts
from fluxedu.instruments.recorder import record
from fluxedu.instruments.tokens import real_tokens
from fluxedu.plots.canvas import figure, quiet
from fluxedu.sampling.pipeline import FluxPipeline, Output
from fluxedu.trace.values import glance

#: a site's name and shape, its mean, spread, least and most over the run, its meaning, its last value at a glance
Row = tuple[str, str, tuple[float, float, float, float], str, torch.Tensor]
Shown = tuple[str, str, Figure | None]  # a part's name, a figure and what it shows; without one, more of its text


#: parts behind which the next one stands beside them, not after them
BESIDE = ("clip", "t5")


@dataclass
class Stage:
    """One part of the diagram, and what is shown of it: ``more`` than its own text, ``figures``, and its sites."""

    part: Part
    more: str = ""
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def text(self) -> str:
        return f"{self.part.text} {self.more}".strip()

    @property
    def beside(self) -> bool:
        return self.part.name in BESIDE


def stages(pipe: FluxPipeline, prompt: str, **asked) -> tuple[Output, list[Stage]]:
    """Draw ``prompt`` and say what happened at every stage; ``asked`` as for the pipeline."""
    if not isinstance(prompt, str):
        raise InstrumentError(f"a trace is of one prompt, not of {prompt!r}.")
    asked = asked | {"trajectory": True}
    words, looks = _words(pipe, prompt), [look_at_contributions(pipe)]
    if words:
        looks += [attention_to_words(pipe, prompt, words), look_at_heads(pipe, prompt, words[-1])]
    with record("*", reduce="summary") as rec, record("*", steps=-1, reduce=glance) as last:
        out, (added, *maps) = together(pipe, prompt, looks, asked)
    shown = [
        *_before(pipe, prompt, asked.get("guidance")),
        *_blocks(out, *(maps or (None, None)), words),
        *_after(pipe, prompt, out, added),
    ]
    found = [Stage(part) for part in parts(pipe) if part.name != "encoder" or "image" in asked]
    for stage in found:
        stage.rows = _rows(pipe, rec, last, stage.part)
        mine = [said for name, *said in shown if name == stage.part.name]
        stage.figures = [(caption, figure) for caption, figure in mine if figure is not None]
        stage.more = " ".join(caption for caption, figure in mine if figure is None)
    return out, found


def _words(pipe: FluxPipeline, prompt: str) -> list[str]:
    """The prompt's last words that can be pointed at: at most four, the short ones left out."""
    said = [w for w in dict.fromkeys(re.findall(r"\w+", prompt)) if len(w) > 2 or w.isupper()]
    return said[-4:] if real_tokens(pipe.prompt_encoder.t5_tokenizer, prompt) else []


def _rows(pipe: FluxPipeline, rec: record, last: record, part: Part) -> list[Row]:
    """Every site of a part with its numbers over the whole run, and its last value."""
    rows = []
    for site in sites(pipe):
        if site.name in rec and part.has(site.name):
            numbers = torch.stack([value.tensor for _, value in rec.entries(site.name)])
            mean, spread, least, most = numbers.unbind(-1)
            told = (float(mean.mean()), float(spread.mean()), float(least.min()), float(most.max()))
            value = last.entries(site.name)[-1][1].tensor
            rows.append((site.name, "×".join(map(str, site.shape)), told, site.meaning, value))
    return rows


def _before(pipe: FluxPipeline, prompt: str, guidance: float | None) -> list[Shown]:
    """From the prompt to the first block."""
    pieces, length = pipe.prompt_encoder.t5_tokenizer.pieces(prompt), pipe.prompt_encoder.t5_tokenizer.length
    sizes = plots.modulation(lenses.modulation(pipe, prompt, guidance=guidance))
    return [
        ("t5", f"The pieces: {' '.join(pieces)}, and {length - len(pieces)} pads behind them.", None),
        ("vec", "The size of every modulation, over time and depth.", sizes),
    ]


def _blocks(out: Output, maps: Named | None, heads: Named | None, words: list[str]) -> list[Shown]:
    """Two pictures a block."""
    shown = []
    for i, name in enumerate([] if maps is None else maps.coords["block"]):
        here, each = (Named(v.tensor[i : i + 1], v.axes, v.coords | {"block": [name]}) for v in (maps, heads))
        image = out.images[0]
        shown += [
            (name, "What each patch takes from a word, over heads and steps.", plots.word_maps(here, image)),
            (name, f"Where each head looks from “{words[-1]}” at the end.", plots.head_gallery(each, image)),
        ]
    return shown


@torch.no_grad()
def _after(pipe: FluxPipeline, prompt: str, out: Output, added: Named) -> list[Shown]:
    """From the last block to the picture."""
    path = out.trajectory
    decoded = lambda latents: [pipe.autoencoder.decode(x)[0].float().cpu() for x in latents]  # noqa: E731
    strip = plots.film_strip({"state": decoded(path.latents[:-1]), "foreseen": decoded(path.x0)}, path.times[:-1])
    places = (0, len(path.times) // 2, len(path.times) - 1)
    spectrum = plots.spectrum({f"t = {float(path.times[i]):.2f}": path.latents[i] for i in places})
    picture, ((ax,),) = figure(1, 1, (3.2, 3.2))
    quiet(ax).imshow(out.images[0])
    return [
        ("final", "How much each block added to the image, beside what was there.", plots.contributions(added)),
        ("solver", "The state, and the picture foreseen: x - t v.", strip),
        ("solver", "Noise is flat.", spectrum),
        ("image", prompt, picture),
    ]
