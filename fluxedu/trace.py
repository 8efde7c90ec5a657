"""One run as one HTML page: every stage of the model, with the values that were recorded there.

    fluxedu trace "a red circle left of a blue square" --html out.html

The page contains its images and its script, and loads nothing from the network.
"""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fluxedu import plots
from fluxedu.errors import InstrumentError, checked, describe
from fluxedu.figure import Figure
from fluxedu.instruments import lenses
from fluxedu.instruments.catalogue import Site, globs_of_everything, sites
from fluxedu.instruments.lenses.run import run_lenses
from fluxedu.instruments.named import Named
from fluxedu.instruments.parts import Part, parts
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import MapView, Value, to_named
from fluxedu.instruments.tokens import text_tokens
from fluxedu.instruments.wiring import wiring
from fluxedu.sampling.pipeline import FluxPipeline, Output

__all__ = ["Stage", "Stages", "page", "stages"]

SIDE_BY_SIDE = ("clip", "t5")  # the part after one of these stands beside it in the diagram, not below it
ROWS, COLUMNS = 16, 48  # size of a value's thumbnail
THUMBNAIL_COLOURS = 15  # odd, so that one of them stands for 0; few, so that thousands of thumbnails stay small
MAX_BYTES = 4_500_000  # of the page
MAX_FRAMES = 24  # steps of which the map shows the values; of longer runs they are evenly spaced
#: sizes of a value on the map; of these, the first with which all values of all steps have few enough numbers
FRAME_SIZES = ((16, 48), (12, 32), (8, 24), (6, 16), (4, 8), (2, 4))
MAX_FRAME_NUMBERS, MAX_CURVE_NUMBERS = 2_500_000, 200_000
PICTURE_SIDE = 64  # px of the decoded states on the map
DPI, MIN_DPI = 80, 24  # of its figures, which are drawn smaller if there are many


@dataclass(frozen=True)
class SiteSummary:
    """A site over the run: its shape, four numbers, its meaning, and a thumbnail of its value at the last step.

    ``numbers [S, 4]``: mean, standard deviation, smallest and largest value per step · ``frames [F, rows, columns]``:
    the thumbnails at some steps. A site outside the loop over steps has one of each.
    """

    name: str
    shape: str
    mean: float
    std: float
    low: float
    high: float
    meaning: str
    thumbnail: Tensor
    numbers: Tensor
    frames: Tensor

    @property
    def is_picture(self) -> bool:
        """Whether rows and columns of the value are those of the image."""
        return self.shape.endswith("h×w")


@dataclass
class Stage:
    """One part of the model and what the page shows of it: text, figures with captions, and its sites."""

    part: Part
    text: str
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    sites: list[SiteSummary] = field(default_factory=list)


class Stages(list[Stage]):
    """The stages of a run in order, and what the map shows of it: the model's ``wiring``; the ``times`` of all steps;
    ``frame_steps``: the indices of those with thumbnails; ``pictures``: site -> RGB images, one per step or one in all.
    """

    def __init__(self, found: Sequence[Stage], model: dict, times: list[float], frame_steps: list[int], pictures: dict):
        super().__init__(found)
        self.wiring, self.times, self.frame_steps, self.pictures = model, times, frame_steps, pictures


# ---------------------------------------------------------------- recording


@checked(InstrumentError)
def stages(pipe: FluxPipeline, prompt: str, **request) -> tuple[Output, Stages]:
    """Draw ``prompt`` and return the run with what happened at every stage; ``request``: as for the pipeline."""
    if not isinstance(prompt, str):
        raise InstrumentError(f"a trace is of one prompt, not of {describe(prompt)}.")
    request = request | {"trajectory": True}
    words, chosen = _words(pipe, prompt), {"contributions": {}}
    if words:
        chosen |= {"word_maps": {"words": words}, "head_gallery": {"query": words[-1]}}
    steps = request.get("steps", pipe.defaults.steps)
    # what is not a number of steps is refused by the pipeline
    every = -(-steps // MAX_FRAMES) if isinstance(steps, int) and steps > 0 else 1
    with_frames = None if every == 1 else [*range(0, steps - 1, every), -1]
    everything = globs_of_everything(pipe)
    numbers = record(*everything, reduce="summary")
    thumbnails = record(*everything, steps=with_frames, reduce=thumbnail)
    with numbers, thumbnails:
        out, results = run_lenses(pipe, prompt, chosen, **request)
    states, x0 = _decoded(pipe, out)
    figures = _figures(pipe, prompt, request.get("guidance"), out, results["contributions"], states, x0)
    if words:
        figures |= _attention_figures(out, results["word_maps"], results["head_gallery"], words[-1])
    found, all_sites = [], sites(pipe)
    for part in parts(pipe):
        if part.name == "encoder" and "image" not in request:
            continue
        text = part.text
        if part.name in ("t5", "language_model"):
            text += f" {_tokens(pipe.prompt_encoder.tokenizer, prompt)}"
        summaries = _site_summaries(all_sites, numbers, thumbnails, part)
        found.append(Stage(part, text, figures.get(part.name, []), summaries))
    frame_steps = sorted({key.step for key, _ in thumbnails.entries("sample.x")})
    pictures = {"sample.x": [_small(x) for x in states], "sample.x0": [_small(x) for x in x0]}
    for name in ("sample.image", "ae.decoder.image"):
        pictures[name] = [np.asarray(_shrunk(out.images[0]))]
    return out, Stages(found, wiring(pipe), out.trajectory.times[:-1].tolist(), frame_steps, pictures)


def _tokens(tokenizer: Any, prompt: str) -> str:
    """A sentence with the tokens of the prompt, and the number of padding tokens before or after them."""
    padding, pieces = tokenizer.padding(prompt), tokenizer.pieces(prompt)
    is_left = len(padding) > 0 and padding[0] == 0
    pieces = pieces[len(padding) :] if is_left else pieces
    return f"The tokens: {' '.join(pieces)}, {'after' if is_left else 'followed by'} {len(padding)} padding tokens."


def _decoded(pipe: FluxPipeline, out: Output) -> tuple[list[Tensor], list[Tensor]]:
    """The state and the predicted x0 of each step, as pixels."""
    path = out.trajectory
    with torch.no_grad():
        decoded = [[pipe.autoencoder.decode(x)[0].float().cpu() for x in xs] for xs in (path.latents[:-1], path.x0)]
    return decoded[0], decoded[1]


def _shrunk(image: Image.Image) -> Image.Image:
    return image.reduce(max(1, round(max(image.size) / PICTURE_SIDE)))


def _small(image: Tensor) -> np.ndarray:
    """``[3, H, W]`` in [-1, 1] as a small 8-bit RGB image."""
    return np.asarray(_shrunk(Image.fromarray((plots.to_pixels(image) * 255).round().astype(np.uint8))))


def _words(pipe: FluxPipeline, prompt: str) -> list[str]:
    """The last four words of the prompt, short ones left out; none if the prompt has no tokens."""
    words = [w for w in dict.fromkeys(re.findall(r"\w+", prompt)) if len(w) > 2 or w.isupper()]
    return words[-4:] if text_tokens(pipe.prompt_encoder.tokenizer, prompt) else []


def _site_summaries(all_sites: list[Site], numbers: record, thumbnails: record, part: Part) -> list[SiteSummary]:
    found = []
    for site in all_sites:
        if site.name in numbers and part.has(site.name):
            mean, std, low, high = torch.stack([v.tensor for _, v in numbers.entries(site.name)]).unbind(-1)
            over_run = float(mean.mean()), float(std.mean()), float(low.min()), float(high.max())
            per_step, frames = (torch.stack(_first_of_each_step(rec, site.name)) for rec in (numbers, thumbnails))
            last = thumbnails.entries(site.name)[-1][1].tensor
            shape = "×".join(map(str, site.shape))
            found.append(SiteSummary(site.name, shape, *over_run, site.meaning, last, per_step, frames))
    return found


def _first_of_each_step(rec: record, name: str) -> list[Tensor]:
    """The values of a site, one per step: some solvers evaluate the model several times in a step."""
    found: dict[int | None, Tensor] = {}
    for key, value in rec.entries(name):
        if key.step not in found or found[key.step].shape != value.tensor.shape:  # the last of different shapes
            found[key.step] = value.tensor
    shape = list(found.values())[-1].shape
    return [value for value in found.values() if value.shape == shape]


@torch.no_grad()
def _figures(
    pipe: FluxPipeline,
    prompt: str,
    guidance: float | None,
    out: Output,
    contributions: Named,
    states: list[Tensor],
    x0: list[Tensor],
) -> dict[str, list[tuple[str, Figure]]]:
    """Part -> captions and figures, apart from those of attention."""
    path = out.trajectory
    steps = (0, len(path.times) // 2, len(path.times) - 1)
    spectrum = plots.spectrum({f"t = {float(path.times[i]):.2f}": path.latents[i] for i in steps})
    final, ((ax,),) = plots.new_figure(1, 1, (3.2, 3.2))
    plots.hide_axes(ax).imshow(out.images[0])
    modulation = plots.modulation(lenses.modulation(pipe, prompt, guidance=guidance))
    strip = plots.film_strip({"state": states, "predicted x0": x0}, path.times[:-1])
    return {
        "vec": [("The size of every modulation, over time and depth.", modulation)],
        "final": [("How much each block changes the image tokens.", plots.contributions(contributions))],
        "solver": [
            ("The state and the predicted x0 = x - t v at each step, decoded.", strip),
            ("The power spectrum of the state: flat for noise, falling for an image.", spectrum),
        ],
        "image": [(prompt, final)],
    }


def _attention_figures(out: Output, maps: Named, heads: Named, word: str) -> dict[str, list[tuple[str, Figure]]]:
    """Block -> two captions and figures."""
    figures = {}
    for i, block in enumerate(maps.coords["block"]):
        block_maps, block_heads = (
            Named(x.tensor[i : i + 1], x.axes, x.coords | {"block": [block]}) for x in (maps, heads)
        )
        word_maps = plots.word_maps(block_maps, out.images[0])
        gallery = plots.head_gallery(block_heads, out.images[0], word)
        figures[block] = [
            ("How much each patch attends to a word, averaged over heads and steps.", word_maps),
            (f"How much each patch attends to “{word}” in the last step, head by head.", gallery),
        ]
    return figures


def thumbnail(value: Value) -> Named:
    """A reduction: the value as a matrix of at most 16 x 48 numbers, neighbours averaged.

    Tokens, or rows of cells, run down; channels, heads with their channels, or keys run across. Maps are averaged over
    heads, images over channels, and images keep their shape. With guidance, the prompted pass.
    """
    if isinstance(value, MapView):
        x = value.head_mean().tensor
    else:
        named = to_named(value)
        axes, x = list(named.axes), named.tensor
        if "row" in axes:  # [B, C, h, w]
            x = x.mean(axes.index("channel"))
        elif axes[1:2] == ["head"] and axes[-1] == "key":
            x = x.mean(1)
        elif axes[1:2] == ["head"]:  # [B, H, N, d]
            x = x.transpose(1, 2).flatten(2)
        else:
            x = x.flatten(1, -2) if x.ndim > 2 else x.flatten(1)[:, None]
    is_picture = not isinstance(value, MapView) and "row" in axes
    x = (x.angle() if x.is_complex() else x).float()[-1]
    return Named(F.adaptive_avg_pool2d(x[None], _fitting(x.shape, (ROWS, COLUMNS), is_picture))[0], ("row", "column"))


def _fitting(size: Sequence[int], limits: tuple[int, int], is_picture: bool) -> tuple[int, int]:
    """Rows and columns within the limits; a picture keeps its shape, and has at most as many cells as they allow."""
    height, width = size
    if not is_picture:
        return min(height, limits[0]), min(width, limits[1])
    scale = min(1.0, (limits[0] * limits[1] / (height * width)) ** 0.5)
    return max(1, round(height * scale)), max(1, round(width * scale))


# ---------------------------------------------------------------- the page


@checked(InstrumentError)
def page(title: str, about: str, stages: Stages) -> str:
    """The whole page as HTML, of at most 4.5 MB as long as its figures can be drawn smaller."""
    data = map_data(stages)
    dpi, html = DPI, _page(title, about, stages, DPI, data)
    while len(html) > MAX_BYTES and dpi > MIN_DPI:
        in_figures = sum(len(source) for source in re.findall(r'<figure><img [^>]*src="([^"]*)', html))
        available = max(MAX_BYTES - (len(html) - in_figures), 1)
        dpi = max(MIN_DPI, int(0.95 * dpi * min(1, available / in_figures)))  # bytes fall more slowly than dots
        html = _page(title, about, stages, dpi, data)
    return html


# ---------------------------------------------------------------- what the map shows


def map_data(stages: Stages) -> str:
    """The model's wiring and the values of the run, as JSON for web/src/map_page.js.

    Numbers that many sites share one size for are packed: ``values`` is a base64 string of zlib-compressed bytes, in
    which ``sites`` says where each site's part begins. Thumbnails have 15 levels, with one scale over all steps.
    """
    sites = [site for stage in stages for site in stage.sites]
    for rows, columns in FRAME_SIZES:
        sizes = [(len(s.frames), *_fitting(s.frames.shape[1:], (rows, columns), s.is_picture)) for s in sites]
        if sum(n * h * w for n, h, w in sizes) <= MAX_FRAME_NUMBERS:
            break
    every = -(-sum(s.numbers.numel() for s in sites) // MAX_CURVE_NUMBERS)
    height, width = stages.pictures["sample.image"][0].shape[:2]
    levels, curves, places, at, aspect = [], [], {}, 0, round(width / height, 3)
    for site, size in zip(sites, sizes, strict=True):
        frames = F.adaptive_avg_pool2d(site.frames.float(), size[1:]).numpy()
        signed, largest = bool((frames < 0).any()), max(float(np.abs(frames).max()), 1e-30)
        share = (frames / largest + 1) / 2 if signed else frames / largest
        levels.append(np.round((THUMBNAIL_COLOURS - 1) * np.nan_to_num(share)).astype(np.uint8).ravel())
        numbers = site.numbers[::every].float().numpy()
        curves.append(numbers.ravel())
        ratio = aspect if site.is_picture else 1 if site.name.endswith((".map", ".scores")) else 0
        places[site.name] = [at, *size, int(signed), float(f"{largest:.3g}"), len(numbers), ratio]
        at += levels[-1].size
    pictures, images = {}, []
    for name, found in stages.pictures.items():
        pictures[name] = [at, len(found), *found[0].shape[:2]]
        images += [picture.ravel() for picture in found]
        at += sum(picture.size for picture in found)
    pad = -at % 4  # the 32-bit floats begin at a multiple of four
    packed = np.concatenate([*levels, *images, np.zeros(pad, np.uint8)]).tobytes()
    packed += np.concatenate(curves).astype("<f4").tobytes()
    colours = [
        matplotlib.colormaps[name](np.linspace(0, 1, THUMBNAIL_COLOURS)) for name in (plots.SEQUENTIAL, plots.DIVERGING)
    ]
    data = {
        "wiring": stages.wiring,
        "times": [round(t, 4) for t in stages.times],
        "frameSteps": stages.frame_steps,
        "curveSteps": list(range(0, len(stages.times), every)),
        "sites": places,
        "pictures": pictures,
        "curves": at + pad,
        "colours": [np.round(255 * c[:, :3]).astype(int).tolist() for c in colours],
        "values": base64.b64encode(zlib.compress(packed, 9)).decode(),
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")  # no end of the script


def _page(title: str, about: str, stages: Stages, dpi: int, data: str) -> str:
    buttons, panels = [], []
    for stage in stages:
        name, heading = re.sub("[. ]", "-", stage.part.name), escape(stage.part.title)
        beside = ' class="beside"' if stage.part.name in SIDE_BY_SIDE else ""
        colour = plots.PART_COLOURS[stage.part.kind]
        buttons.append(
            f'<li role="presentation"{beside} style="--shade: {colour}"><button role="tab" type="button" '
            f'aria-controls="panel-{name}" id="tab-{name}">{heading}</button></li>'
        )
        figures = "".join(
            f'<figure><img alt="{escape(caption)}" src="{_figure_as_png(figure, dpi)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, figure in stage.figures
        )
        panels.append(
            f'<section role="tabpanel" id="panel-{name}" aria-labelledby="tab-{name}"><h2>{heading}</h2>'
            f"<p>{escape(stage.text)}</p>{figures}{_table(stage.sites)}</section>"
        )
    page, script, style = (
        resources.files("fluxedu").joinpath(name).read_text(encoding="utf-8")
        for name in ("trace.html", "map.js", "map.css")
    )
    return Template(page).substitute(
        title=escape(title),
        about=escape(about),
        buttons="\n".join(buttons),
        panels="\n".join(panels),
        data=data,
        script=script,
        style=style,
    )


def _table(sites: list[SiteSummary]) -> str:
    if not sites:
        return ""
    names = ("site", "shape", "last value", "mean", "std. dev.", "min", "max", "meaning")
    lines = []
    for site in sites:
        alt = escape(f"{site.name} at the last step, {site.shape}")
        kind = "value picture" if site.is_picture else "value"
        image = f'<td><img class="{kind}" alt="{alt}" title="{alt}" src="{as_png(site.thumbnail)}"></td>'
        numbers = "".join(f'<td class="n">{n:.3g}</td>' for n in (site.mean, site.std, site.low, site.high))
        first = f"<td><code>{escape(site.name)}</code></td><td>{escape(site.shape)}</td>"
        lines.append(f"<tr>{first}{image}{numbers}<td>{escape(site.meaning)}</td></tr>")
    return (
        '<p class="how">The small images show each value at the last step. Tokens or rows run down; channels, heads or '
        "keys run across; neighbours are averaged where there are too many. Red is above zero and blue below; a value "
        "that is nowhere negative runs from dark (0) to bright.</p>"
        f'<div class="table"><table><thead><tr>{"".join(f"<th>{name}</th>" for name in names)}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def as_png(matrix: Tensor) -> str:
    """The matrix as a ``data:`` URL of a PNG, with one pixel per number."""
    numbers = matrix.double().numpy()
    signed = bool((numbers < 0).any())
    scaled = numbers / max(float(np.abs(numbers).max()), 1e-30)
    scaled = (scaled + 1) / 2 if signed else scaled
    image = Image.fromarray(np.round((THUMBNAIL_COLOURS - 1) * np.nan_to_num(scaled)).astype(np.uint8), "P")
    colour_map = matplotlib.colormaps[plots.DIVERGING if signed else plots.SEQUENTIAL]
    colours = colour_map(np.linspace(0, 1, THUMBNAIL_COLOURS))[:, :3]
    image.putpalette(np.round(255 * colours).astype(np.uint8).tobytes())
    png = io.BytesIO()
    image.save(png, format="png", optimize=True, bits=4)
    return _data_url(png)


def _figure_as_png(figure: Figure, dpi: int) -> str:
    """A figure as a PNG of 256 colours, which takes a third of the bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return _data_url(small)


def _data_url(png: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
