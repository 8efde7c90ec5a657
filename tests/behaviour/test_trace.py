"""The page of a run: complete, self-contained, small, and correct."""

import base64
import io
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sizes import TINY
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.cli import app
from fluxedu.trace import as_png, map_data, page, stages

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
    assert not re.search(r"https?://|@import|url\((?!#)", html)  # url(#...) is an arrowhead of the page itself
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
    shown = {site.name for stage in found for site in stage.sites}
    left_out = {s.name for s in fe.sites(pipe)} - shown
    # the encoder, since no picture went in, and the passes of a guidance that was not on
    left_out = {name for name in left_out if not name.startswith("ae.encoder.")}
    assert left_out == {"ae.latent", "sample.negative", "sample.prompted"}


def test_the_numbers_are_the_runs(made, pipe):
    found, _ = made
    with fe.record("single.1.gate") as rec:
        pipe(PROMPT, steps=3, progress=False)
    (site,) = (site for stage in found for site in stage.sites if site.name == "single.1.gate")
    gate = rec["single.1.gate"].tensor
    assert torch.allclose(
        torch.tensor([site.mean, site.low, site.high]), torch.stack([gate.mean(), gate.min(), gate.max()]), atol=1e-6
    )


def test_the_command_line(tmp_path):
    out = tmp_path / "out.html"
    result = CliRunner().invoke(app, ["trace", "a red circle", "--steps", "2", "--html", str(out)])
    assert result.exit_code == 0, result.output
    assert "a red circle" in out.read_text()
    wrong = CliRunner().invoke(app, ["trace", "a red circle", "--html", str(tmp_path / "no" / "out.html")])
    assert wrong.exit_code == 2
    assert "there is no folder" in wrong.output
    empty = CliRunner().invoke(app, ["trace", "", "--steps", "1", "--html", str(out), "--overwrite"])
    assert empty.exit_code == 0, empty.output


def test_a_run_is_drawn_once(pipe, monkeypatch):
    drawn, denoise = [], type(pipe).denoise
    monkeypatch.setattr(type(pipe), "denoise", lambda self, *given: drawn.append(1) or denoise(self, *given))
    stages(pipe, PROMPT, steps=2, progress=False)
    assert len(drawn) == 1


def test_every_value_can_be_seen(made, pipe):
    """Behind a site stands its last value, averaged over neighbours where it is larger than the picture."""
    found, html = made
    values = {site.name: site.thumbnail for stage in found for site in stage.sites}
    with fe.record("single.1.attn.map", "double.0.img_attn.q", "sample.noise", "vec", steps=-1) as rec:
        pipe(PROMPT, steps=3, progress=False)
    full = rec["single.1.attn.map"].tensor[0].mean(0)
    assert values["single.1.attn.map"].shape == (16, 36)  # of 36 x 36
    assert torch.allclose(values["single.1.attn.map"][0], full[:3].mean(0), atol=1e-6)
    q = rec["double.0.img_attn.q"].tensor[0]  # [head, image, channel]
    assert torch.allclose(values["double.0.img_attn.q"], q.transpose(0, 1).flatten(1), atol=1e-6)
    assert torch.allclose(values["sample.noise"], rec["sample.noise"].tensor.mean(0), atol=1e-6)
    assert torch.allclose(values["vec"][0], rec["vec"].tensor[0], atol=1e-6)
    assert html.count('class="value"') + html.count('class="value picture"') == len(values)


def test_pictures_keep_their_shape(pipe):
    """Latents and images are averaged over squares of neighbours, in the table as well as on the map."""
    _, found = stages(pipe, PROMPT, steps=1, height=96, width=160, progress=False)
    for stage in found:
        for site in stage.sites:
            if site.shape.endswith("h×w"):
                height, width = site.thumbnail.shape
                assert abs(width / height - 160 / 96) < 0.1 and height * width <= 16 * 48 + 48, site.name
    data = json.loads(map_data(found))
    _, _, rows, columns, _, _, _, ratio = data["sites"]["sample.x"]
    assert (rows, columns) == (12, 20) and ratio == pytest.approx(160 / 96, abs=0.03)


def test_the_map_has_the_values_of_every_step(made, pipe):
    """What the page unpacks: thumbnails within one of fifteen levels, and four numbers per step."""
    found, _ = made
    data = json.loads(map_data(found))
    packed = zlib.decompress(base64.b64decode(data["values"]))
    curves = np.frombuffer(packed[data["curves"] :], "<f4")
    with fe.record("single.1.modulated", reduce="summary") as summary, fe.record("single.1.modulated") as rec:
        pipe(PROMPT, steps=3, progress=False)
    names = list(data["sites"])
    before = 4 * sum(data["sites"][name][6] for name in names[: names.index("single.1.modulated")])
    start, frames, rows, columns, is_signed, largest, count, _ = data["sites"]["single.1.modulated"]
    assert (frames, count, is_signed) == (3, 3, 1)
    numbers = curves[before : before + 12].reshape(3, 4)
    assert np.allclose(numbers, summary["single.1.modulated"].tensor, atol=1e-5)
    levels = np.frombuffer(packed, np.uint8, 3 * rows * columns, start).reshape(3, rows, columns)
    values = (levels / 7.0 - 1) * largest
    exact = F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(rec["single.1.modulated"].tensor, (16, 48)), (rows, columns))
    assert np.abs(values - exact.numpy()).max() <= largest / 14 * 1.02
    assert data["times"] == pytest.approx(rec["single.1.modulated"].coords["step"], abs=1e-4)


def test_the_colours_say_what_the_numbers_are():
    """Red above zero, blue below, white for nothing; with nothing below, from dark to bright."""
    image = lambda numbers: np.asarray(  # noqa: E731
        Image.open(io.BytesIO(base64.b64decode(as_png(torch.tensor(numbers)).partition(",")[2]))).convert("RGB"), int
    )
    ((least, nothing, most),) = image([[-2.0, 0.0, 2.0]])
    assert least[2] > least[0] + 50 and most[0] > most[2] + 50 and nothing.min() > 240
    ((dark, bright),) = image([[0.0, 1.0]])
    assert dark.sum() < 50 and bright.sum() > 600


def test_a_model_as_deep_as_the_official_one_fits_too(make_pipe):
    """19 double blocks, 38 single ones: the figures are drawn smaller until the page is under 5 MB."""
    clip, t5, flux, ae = TINY
    deep = flux.with_(hidden_size=6 * 8, num_heads=6, axes_dim=(2, 2, 4), depth=19, depth_single_blocks=38)
    words = "a red circle left of a blue square"
    _, found = stages(make_pipe(sizes=(clip, t5, deep, ae)), words, steps=1, progress=False)
    assert sum(len(stage.sites) for stage in found) > 1800
    assert len(page("", "", found)) < 5e6
