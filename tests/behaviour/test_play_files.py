"""The files of the page in which the miniature runs, and its server; tests/browser/test_engine.py runs it."""

import gzip
import json
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.cli import app
from fluxedu.nano.scenes import ASPECTS
from fluxedu.nano.vocabulary import VOCABULARY
from fluxedu.play import GRAPHS, WEIGHTS, copy_to, files, make_server, version
from web.graphs import factor_sites

MANIFEST = json.loads((GRAPHS / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pipe():
    return fe.load("nano")


def numbers(weights):
    """The weights of a graph in float32, from the bytes that the manifest names."""
    parts = [
        np.fromfile(WEIGHTS / file, np.uint8)[first:end].view(np.uint16) for file, first, end in weights["segments"]
    ]
    return (np.concatenate(parts).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("name", MANIFEST["graphs"])
def test_a_graphs_weights_are_the_networks(pipe, name):
    """Every parameter is a place among the shipped weights, and holds what Python loads there."""
    known = {f"{network}.{key}": value for network, module in pipe.networks().items() for key, value in
             module.state_dict().items()}  # fmt: skip
    values = numbers(MANIFEST["weights"][MANIFEST["graphs"][name]["weights"]])
    graph = onnx.load(GRAPHS / f"{name}.onnx", load_external_data=False).graph
    parameters = [tensor for tensor in graph.initializer if tensor.external_data]
    assert len(parameters) > 40 and (GRAPHS / f"{name}.onnx").stat().st_size < 200_000
    for tensor in parameters:
        place = {entry.key: entry.value for entry in tensor.external_data}
        first, length = int(place["offset"]) // 4, int(place["length"]) // 4
        mine = values[first : first + length].reshape(tuple(tensor.dims))
        assert np.array_equal(mine, known[tensor.name].numpy()), tensor.name
    assert [output.name for output in graph.output] == [f"site:{o}" for o in MANIFEST["graphs"][name]["outputs"]]


def test_the_manifest_says_what_the_code_says(pipe):
    assert MANIFEST["factors"] == factor_sites(pipe.flux.config)
    assert MANIFEST["vocabulary"] == {kind: list(words) for kind, words in VOCABULARY.items()}
    assert MANIFEST["shapes"] == [list(shape) for shape in ASPECTS]
    assert (MANIFEST["defaults"]["steps"], MANIFEST["defaults"]["guidance"]) == (pipe.defaults.steps, 6.0)
    names = {site.name for site in fe.sites(pipe)}
    for graph, own in {"inside": 1, "text": 2, "decoder_inside": 1}.items():
        assert set(MANIFEST["graphs"][graph]["outputs"][own:]) <= names
    assert set(MANIFEST["factors"]) <= names


def test_the_folder_for_a_web_host_has_everything_and_is_small(tmp_path):
    total = copy_to(tmp_path)
    written = {str(path.relative_to(tmp_path)): path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    listing = json.loads((tmp_path / "files.json").read_text())
    assert total == sum(written.values()) <= 15_000_000
    assert listing["version"] == version()
    urls = {name: entry.get("url", name) for name, entry in listing["files"].items()}
    assert set(urls) == set(files()) and set(written) == {*urls.values(), "files.json"}
    for name, entry in listing["files"].items():
        if name != "sw.js":  # begins with the version
            assert written[urls[name]] == entry["bytes"]
        if urls[name] != name:
            assert gzip.decompress((tmp_path / urls[name]).read_bytes()) == files()[name].read_bytes()


def test_the_server_gives_the_page_and_nothing_else():
    import threading

    with make_server(0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert server.server_address[0] == "127.0.0.1"  # nobody else's computer reaches it
        for name, kind in {"": "text/html", "worker.js": "text/javascript", "files.json": "application/json"}.items():
            with urlopen(f"{address}/{name}?x=1") as answer:
                assert answer.headers["Content-Type"].startswith(kind)
        with urlopen(f"{address}/sw.js") as answer:
            assert answer.read().startswith(f'self.VERSION="{version()}";'.encode())
        for name in ("../pyproject.toml", "%2e%2e/pyproject.toml", "graphs/", "nothing"):
            with pytest.raises(HTTPError) as found:
                urlopen(f"{address}/{name}")
            assert found.value.code == 404
        with pytest.raises(fe.errors.RequestError, match=f"port must be free, but {server.server_port}"):
            make_server(server.server_port)
        result = CliRunner().invoke(app, ["play", "--no-browser", "--port", str(server.server_port)])
        assert result.exit_code != 0 and "port must be free" in result.output
        server.shutdown()
