"""The catalogue of sites is complete, true and readable."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu import probe
from fluxedu.cli import app
from fluxedu.errors import InstrumentError

PACKAGE = Path(fe.__file__).parent


@pytest.fixture(scope="module")
def walked(pipe, plain_pipe):
    """Every site that passes in a run from a picture and in a guided one, and the shape of what passes."""
    passed = {}

    def watcher(owner, name, value):
        passed[probe.site(owner, name)] = tuple(value.shape)
        return value

    from PIL import Image

    probe.watch(watcher)
    try:
        pipe("a red circle", steps=1, progress=False, image=Image.new("RGB", (32, 32)))
        plain_pipe("a red circle", steps=1, guidance=2.0, progress=False)
    finally:
        probe.watch(None)
    return passed


def test_every_site_is_described_and_every_description_is_a_site(walked, pipe):
    assert {s.name for s in fe.sites(pipe)} == set(walked)


def test_the_shapes_are_true(walked, pipe):
    for site in fe.sites(pipe):
        shape = walked[site.name]
        assert len(site.axes) == len(site.shape) == len(shape), site
        pairs = list(zip(site.shape, shape, strict=True))
        assert all(stated == actual for stated, actual in pairs if isinstance(stated, int)), site
        letters = {"B": (1, 2), "L": (32, 12), "N": (4,), "T": (36,)}
        assert all(actual in letters.get(stated, (actual,)) for stated, actual in pairs), site


def test_the_source_is_where_the_value_passes(walked, pipe):
    """The line named is in the file, and within the statement, from which the site was called."""
    for site in fe.sites(pipe):
        file, line = site.source.split(":")
        text = (PACKAGE / file).read_text().splitlines()[int(line) - 1]
        last = site.name.rpartition(".")[2]
        assert last in text or "level." in text or "vec." in text or f'_{last.partition("_")[2]}"' in text, (site, text)


def test_every_site_has_a_meaning(pipe):
    for site in fe.sites(pipe):
        assert len(site.meaning) > 10, site
        assert all(axis and not axis[0].isdigit() for axis in site.axes)


def test_the_official_size_without_its_weights():
    sites = {s.name: s for s in fe.sites("dev")}
    assert sites["double.18.attn.map"].shape == ("B", 24, "T", "T")
    assert sites["single.37.mlp_hidden"].shape == ("B", "T", 12288)
    assert "vec.guidance" in sites
    assert "vec.guidance" not in {s.name for s in fe.sites("schnell")}


def test_one_network(pipe):
    assert {s.name for s in fe.sites(pipe.flux)} == {s.name for s in fe.sites(pipe) if s.name[:3] not in PARTS}


PARTS = ("t5.", "cli", "ae.", "sam")


def test_a_variant_that_is_not_there():
    with pytest.raises(InstrumentError, match="nano-large"):
        fe.sites("nano-large")


def test_the_command_line():
    result = CliRunner().invoke(app, ["sites", "attn.map"])
    assert result.exit_code == 0
    assert "double.1.attn.map" in result.output
    assert "vec.text" not in result.output
    as_json = json.loads(CliRunner().invoke(app, ["sites", "--model", "dev", "--json"]).output)
    assert {"name", "axes", "shape", "meaning", "source"} == set(as_json[0])
    assert len(as_json) > 2000
    wrong = CliRunner().invoke(app, ["sites", "--model", "nano-large"])
    assert wrong.exit_code == 2
    assert "nano-large" in wrong.output
