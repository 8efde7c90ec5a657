"""The page of a run: whole, self-contained, small, and true."""

import re
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.cli import app
from fluxedu.trace import page, stages

PROMPT = 'a red circle left of a <b>blue</b> & "green" square'


class Reader(HTMLParser):
    """Ids, what controls what, and everything a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.ids, self.controls, self.fetched, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.controls += [attrs["aria-controls"]] if "aria-controls" in attrs else []
        self.fetched += [attrs[k] for k in ("src", "href") if k in attrs]


@pytest.fixture(scope="module")
def made(pipe):
    _, found = stages(pipe, PROMPT, steps=3, progress=False)
    return found, page(PROMPT, "about", found)


def test_it_fetches_nothing_and_is_small(made):
    _, html = made
    reader = Reader()
    reader.feed(html)
    assert all(f.startswith("data:image/png;base64,") for f in reader.fetched)
    assert len(reader.fetched) > 10
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(html) < 5e6


def test_every_button_opens_a_panel(made):
    found, html = made
    reader = Reader()
    reader.feed(html)
    assert len(reader.controls) == len(found) == len(set(reader.controls))
    assert set(reader.controls) <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))


def test_a_prompt_is_text_not_markup(made):
    _, html = made
    assert "<b>blue" not in html
    assert "&lt;b&gt;blue" in html


def test_the_diagram_is_whole_and_in_order(made, pipe):
    found, _ = made
    names = [stage.part.name for stage in found]
    blocks = ["double.0", "double.1", "single.0", "single.1"]
    assert names == ["clip", "t5", "noise", "vec", "in", *blocks, "final", "solver", "image"]
    shown = {row[0] for stage in found for row in stage.rows}
    left_out = {s.name for s in fe.sites(pipe)} - shown
    # the encoder, since no picture went in, and the passes of a guidance that was not on
    left_out = {name for name in left_out if not name.startswith("ae.encoder.")}
    assert left_out == {"ae.latent", "sample.negative", "sample.prompted"}


def test_the_numbers_are_the_runs(made, pipe):
    found, _ = made
    with fe.record("single.1.gate") as rec:
        pipe(PROMPT, steps=3, progress=False)
    (row,) = (row for stage in found for row in stage.rows if row[0] == "single.1.gate")
    gate = rec["single.1.gate"].tensor
    mean, _, least, most = row[2]
    assert torch.allclose(
        torch.tensor([mean, least, most]), torch.stack([gate.mean(), gate.min(), gate.max()]), atol=1e-6
    )


def test_the_command_line(tmp_path):
    out = tmp_path / "out.html"
    said = CliRunner().invoke(app, ["trace", "a red circle", "--steps", "2", "--html", str(out)])
    assert said.exit_code == 0, said.output
    assert "a red circle" in out.read_text()
    wrong = CliRunner().invoke(app, ["trace", "a red circle", "--html", str(tmp_path / "no" / "out.html")])
    assert wrong.exit_code == 2
    assert "there is no folder" in wrong.output
    empty = CliRunner().invoke(app, ["trace", "", "--steps", "1", "--html", str(out)])
    assert empty.exit_code == 0, empty.output


def test_a_run_is_drawn_once(pipe, monkeypatch):
    drawn, draw = [], type(pipe).draw
    monkeypatch.setattr(type(pipe), "draw", lambda self, *given: drawn.append(1) or draw(self, *given))
    stages(pipe, PROMPT, steps=2, progress=False)
    assert len(drawn) == 1
