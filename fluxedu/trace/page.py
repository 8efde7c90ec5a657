"""Stages to HTML."""

from __future__ import annotations

import base64
import io
from html import escape
from importlib import resources
from string import Template

from matplotlib.figure import Figure

from fluxedu.plots.canvas import SHADES
from fluxedu.trace.stages import Stage


def page(title: str, about: str, stages: list[Stage]) -> str:
    """The whole page as a string."""
    template = Template(resources.files("fluxedu.trace").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        about=escape(about),
        buttons="\n".join(_button(stage) for stage in stages),
        panels="\n".join(_panel(stage) for stage in stages),
    )


def _id(stage: Stage) -> str:
    return stage.part.name.replace(".", "-").replace(" ", "-")


def _button(stage: Stage) -> str:
    beside = ' class="beside"' if stage.beside else ""
    return (
        f'<li role="presentation"{beside} style="--shade: {SHADES[stage.part.kind]}"><button role="tab" type="button" '
        f'aria-controls="panel-{_id(stage)}" id="tab-{_id(stage)}">{escape(stage.part.title)}</button></li>'
    )


def _panel(stage: Stage) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(caption)}" src="{_png(figure)}"><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, figure in stage.figures
    )
    return (
        f'<section role="tabpanel" id="panel-{_id(stage)}" aria-labelledby="tab-{_id(stage)}">'
        f"<h2>{escape(stage.part.title)}</h2><p>{escape(stage.text)}</p>{figures}{_table(stage)}</section>"
    )


def _table(stage: Stage) -> str:
    if not stage.rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("site", "shape", "mean", "spread", "least", "most", "what it is"))
    lines = []
    for site, shape, numbers, meaning in stage.rows:
        cells = "".join(f'<td class="n">{n:.3g}</td>' for n in numbers)
        lines.append(
            f"<tr><td><code>{escape(site)}</code></td><td>{escape(shape)}</td>{cells}<td>{escape(meaning)}</td></tr>"
        )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=80)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
