"""Stages to HTML."""

from __future__ import annotations

import io
import re
from html import escape
from importlib import resources
from string import Template

from matplotlib.figure import Figure
from PIL import Image

from fluxedu.plots.canvas import SHADES
from fluxedu.trace.stages import Stage
from fluxedu.trace.values import address, as_png

MOST = 4_500_000  # bytes of a page; of a large model the figures are drawn smaller
SHARP, BLURRED = 80, 24  # dots an inch of the figures, at most and at least
_HOW_TO_READ = (
    '<p class="how">The small pictures are the values themselves at the end of the run: tokens or rows downwards, '
    "channels, heads or keys across, neighbours averaged where there are too many; red above zero, blue below, or from "
    "dark to bright where nothing is below.</p>"
)


def page(title: str, about: str, stages: list[Stage]) -> str:
    """The whole page as a string, of at most 4.5 MB as long as the figures can be drawn smaller."""
    dpi, html = SHARP, _page(title, about, stages, SHARP)
    while len(html) > MOST and dpi > BLURRED:
        figures = sum(len(address) for address in re.findall(r'<figure><img [^>]*src="([^"]*)', html))
        room = max(MOST - (len(html) - figures), 1)
        dpi = max(BLURRED, int(0.95 * dpi * min(1, room / figures)))  # bytes fall a little slower than dots
        html = _page(title, about, stages, dpi)
    return html


def _page(title: str, about: str, stages: list[Stage], dpi: int) -> str:
    template = Template(resources.files("fluxedu.trace").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        about=escape(about),
        buttons="\n".join(_button(stage) for stage in stages),
        panels="\n".join(_panel(stage, dpi) for stage in stages),
    )


def _id(stage: Stage) -> str:
    return stage.part.name.replace(".", "-").replace(" ", "-")


def _button(stage: Stage) -> str:
    beside = ' class="beside"' if stage.beside else ""
    return (
        f'<li role="presentation"{beside} style="--shade: {SHADES[stage.part.kind]}"><button role="tab" type="button" '
        f'aria-controls="panel-{_id(stage)}" id="tab-{_id(stage)}">{escape(stage.part.title)}</button></li>'
    )


def _panel(stage: Stage, dpi: int) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(caption)}" src="{_png(figure, dpi)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, figure in stage.figures
    )
    return (
        f'<section role="tabpanel" id="panel-{_id(stage)}" aria-labelledby="tab-{_id(stage)}">'
        f"<h2>{escape(stage.part.title)}</h2><p>{escape(stage.text)}</p>{figures}{_table(stage)}</section>"
    )


def _table(stage: Stage) -> str:
    if not stage.rows:
        return ""
    names = ("site", "shape", "at the end", "mean", "spread", "least", "most", "what it is")
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = []
    for site, shape, numbers, meaning, value in stage.rows:
        said = f"the value of {site} at the end, {shape}"
        look = f'<td><img class="value" alt="{escape(said)}" title="{escape(said)}" src="{as_png(value)}"></td>'
        cells = "".join(f'<td class="n">{n:.3g}</td>' for n in numbers)
        named = f"<td><code>{escape(site)}</code></td><td>{escape(shape)}</td>"
        lines.append(f"<tr>{named}{look}{cells}<td>{escape(meaning)}</td></tr>")
    return (
        _HOW_TO_READ
        + f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _png(figure: Figure, dpi: int) -> str:
    """A figure as a PNG of 256 colours, which is a third of the bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return address(small)
