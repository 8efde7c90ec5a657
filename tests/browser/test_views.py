"""Explorers on the site's pages: the page's engine gives the views that Python gives, and a figure becomes alive.

One page with the figure of each explorer that the page can compute, served below a path, as on any static host.
"""

import base64
import json
import re
import threading
from functools import partial
from html import escape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from axe import complaints

import fluxedu as fe
from fluxedu import play, widgets
from fluxedu.widgets.panels import colour_table

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle left of a blue square"
FEW = {"steps": 3, "seed": 4, "height": 96, "width": 96, "progress": False}
#: explorer -> how it is made, and two states besides its first one
CASES = {
    "attention": (
        lambda pipe: widgets.attention(pipe, PROMPT, **FEW),
        [{"block": 1, "step": 1, "head": 3, "patch": (0, 5), "word": 1}, {"patch": (5, 5), "word": 8, "step": 2}],
    ),
    "trajectory": (
        lambda pipe: widgets.trajectory(pipe, PROMPT, **FEW),
        [{"step": 0}, {"step": 2}],
    ),
    "latents": (
        lambda pipe: widgets.latents(pipe, PROMPT, **FEW).set(channel=14, cell=(5, 11)),
        [{"area": 2, "amount": 3}, {"channel": 3, "cell": (0, 11), "area": 0}],
    ),
    "tokens": (lambda pipe: widgets.tokens(pipe, PROMPT), [{"layer": 0, "first": 2}, {"second": 9, "layer": 3}]),
    "modulation": (
        lambda pipe: widgets.modulation(pipe, [PROMPT, "a green star"], times=5),
        [{"cell": (6, 2), "kind": 1}, {"cell": (13, 4), "kind": 2, "prompt": 1, "guidance": 9}],
    ),
    "similarity": (widgets.similarity, [{"first": 3}, {"second": 2, "word": 3, "index": 4}]),
    "contributions": (
        lambda pipe: widgets.contributions(pipe, PROMPT, **FEW),
        [{"source": 1, "stream": 1, "cell": (0, 0)}, {"source": 2, "cell": (7, 2)}],
    ),
    "streams": (
        lambda pipe: widgets.streams(pipe, PROMPT, **FEW),
        [{"quantity": 1, "block": 7, "word": 4}, {"quantity": 2, "step": 0}],
    ),
    "velocity": (
        lambda pipe: widgets.velocity(pipe, [PROMPT, "a green star above a yellow ring"], seeds=2, steps=2),
        [{"step": 0, "particle": 3}, {"step": 2, "particle": 1}],
    ),
    "solvers": (
        lambda pipe: widgets.solvers(
            pipe, PROMPT, seed=4, evaluations=[2, 4], height=96, width=96, shifts=[3.0], reference=4
        ),
        [{"cell": (0, 1)}, {"cell": (2, 0)}],
    ),
    "grid": (
        lambda pipe: widgets.grid(pipe, PROMPT, steps=[1, 4], guidance_scales=[1.0, 6.0], shifts=[3.0], seed=4),
        [{"cell": (0, 1)}, {"cell": (0, 0)}],
    ),
    "heads": (
        lambda pipe: widgets.heads(pipe, PROMPT, steps=1, height=96, width=96, progress=False),
        [{"cell": (0, 4)}, {"cell": (7, 2), "removed": 1}],
    ),
    "parameters": (lambda pipe: widgets.parameters(), [{"part": 4, "variant": 0}, {"part": 99, "tensor": 3}]),
    "positions": (lambda pipe: widgets.positions(pipe, side=8), [{"query": (0, 0), "key": (7, 2)}, {"vectors": 1}]),
}

STATE = """async ([name, state]) => {
  const { model } = document.querySelector(`#${name} .fluxedu-page`), moves = model.get("state").moves + 1;
  model.set("state", { ...model.get("state"), ...state, moves });
  model.save_changes();
  while (model.get("view").moves < moves) await new Promise((resolve) => setTimeout(resolve, 10));
  return JSON.stringify(model.get("view"), (_, value) => {
    if (!ArrayBuffer.isView(value)) return value;
    if (value instanceof Float64Array) return Array.from(value);
    const bytes = new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
    let text = "";
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    return { bytes: btoa(text) };
  });
}"""


@pytest.fixture(scope="module")
def explorers():
    pipe = fe.load("nano")
    return {name: make(pipe) for name, (make, _) in CASES.items()}


@pytest.fixture(scope="module")
def page(browser, explorers, tmp_path_factory):
    """The page, with nothing alive yet; it must have asked no other host and reported no errors."""
    folder = tmp_path_factory.mktemp("host")
    site = folder / "any" / "path"
    for name, data in play.contents().items():
        (site / "play" / name).parent.mkdir(parents=True, exist_ok=True)
        (site / "play" / name).write_bytes(data)
    (site / "_static").mkdir()
    for name in ("explorers.js", "explorers.css", "site.css"):
        (site / "_static" / name).write_bytes((ROOT / "docs" / "_static" / name).read_bytes())
    figures = []
    for name, explorer in explorers.items():
        assert explorer.call["name"] == name
        message = escape(explorer._repeatable(), quote=True)
        figures.append(
            f'<section id="{name}"><div><img class="fluxedu-still" alt="still" data-fluxedu="{message}"></div>'
        )
        figures.append("</section>")
    figures.append('<section id="dead"><div><img class="fluxedu-still" alt="still"></div></section>')
    (site / "notebooks").mkdir()
    (site / "notebooks" / "x.html").write_text(
        '<!doctype html><html lang="en"><link rel=icon href=data:,><meta charset="utf-8"><title>x</title>'
        '<link rel="stylesheet" href="../_static/explorers.css"><script src="../_static/explorers.js" defer></script>'
        f'<meta name="viewport" content="width=device-width"><body><main><h1>x</h1>{"".join(figures)}</main>',
        encoding="utf-8",
    )

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    with ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, problems = f"http://localhost:{server.server_port}/any/path/", []
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.on("request", lambda r: None if r.url.startswith((address, "blob:", "data:")) else problems.append(r.url))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(f"{address}notebooks/x.html")
        yield tab
        tab.close()
        server.shutdown()
        assert problems == []


def make_live(page, name):
    if page.locator(f"#{name} .fluxedu-page").count():
        return
    page.locator(f"#{name} .fluxedu-live button").click()
    page.wait_for_function("(name) => !document.querySelector(`#${name} button:disabled`)", arg=name, timeout=60_000)
    failed = page.locator(f"#{name} .fluxedu-live")
    assert failed.count() == 0, failed.inner_text()


# ---------------------------------------------------------------- comparing views

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def same_text(ours, python):
    """Equal words; numbers may differ by one unit of their last digit, since the engines round differently."""
    if NUMBER.split(ours) != NUMBER.split(python):
        return False
    for a, b in zip(NUMBER.findall(ours), NUMBER.findall(python), strict=True):
        unit = 10 ** -len(b.partition(".")[2])
        if abs(float(a) - float(b)) > 1.01 * unit:
            return False
    return True


def levels(value):
    if isinstance(value, dict):
        value = base64.b64decode(value["bytes"])
    return np.frombuffer(value, np.uint8).astype(int)


def compare(ours, python, path="view"):
    """Numbers within float error, pixels within one grey level; raises AssertionError with the place."""
    if isinstance(python, bytes) and path.endswith(".data"):
        a, b = levels(ours), levels(python)
        assert a.shape == b.shape, path
        far = np.abs(a - b)
        # where a number lies between two colours of a scale, the engines may take one or the other
        assert far.max() <= 8 and (far > 1).mean() <= 0.03, (path, far.max(), (far > 1).mean())
    elif isinstance(python, bytes):
        a = np.frombuffer(base64.b64decode(ours["bytes"]), "<f4")
        b = np.frombuffer(python, "<f4")
        assert a.shape == b.shape, path
        assert np.abs(a - b).max() <= 1e-3 * max(np.abs(b).max(), 1e-6), (path, np.abs(a - b).max(), np.abs(b).max())
    elif isinstance(python, dict):
        assert list(sorted(ours)) == list(sorted(python)), path
        if python.get("title", "").startswith("Difference"):  # of two images, each of which may be one level off
            a, b = (np.frombuffer(x, "<f4") for x in (base64.b64decode(ours["values"]["bytes"]), python["values"]))
            assert np.abs(a - b).max() <= 2.01 / 255, path
            python = {name: value for name, value in python.items() if name not in ("values", "data")}
        for name in python:
            compare(ours[name], python[name], f"{path}.{name}")
    elif isinstance(python, (list, tuple)):
        assert len(ours) == len(python), path
        if python and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in python):
            most = max(max(map(abs, python)), 1e-6)
            assert np.abs(np.subtract(ours, python)).max() <= 1e-3 * most, (path, ours, python)
        else:
            for i, (a, b) in enumerate(zip(ours, python, strict=True)):
                compare(a, b, f"{path}[{i}]")
    elif isinstance(python, str) and re.fullmatch("#[0-9a-f]{6}", python):
        assert np.abs(levels(bytes.fromhex(ours[1:])) - levels(bytes.fromhex(python[1:]))).max() <= 1, (
            path,
            ours,
            python,
        )
    elif isinstance(python, str):
        assert same_text(ours, python), (path, ours, python)
    elif isinstance(python, float):
        assert abs(ours - python) <= 1e-4 * max(abs(python), 1), (path, ours, python)
    else:
        assert ours == python, (path, ours, python)


@pytest.mark.parametrize("name", CASES)
def test_the_page_gives_pythons_views(page, explorers, name):
    make_live(page, name)
    explorer = explorers[name]
    for moves in [{}, *CASES[name][1]]:
        ours = json.loads(page.evaluate(STATE, [name, moves]))
        python = explorer._message(explorer._view_of(explorer.values | moves))
        explorer.state = explorer.state | moves
        ours.pop("moves")
        compare(ours, python)


def test_a_figure_becomes_an_explorer_that_moves(page, explorers):
    """Its texts are Python's, the figure goes, and a key moves it. What cannot be computed stays, with one line."""
    make_live(page, "tokens")
    section = page.locator("#tokens")
    assert section.locator("img").is_hidden()
    assert section.locator(".question").inner_text() == explorers["tokens"].title
    assert section.locator(".instruction").inner_text() == explorers["tokens"].instruction
    before = section.locator(".caption").inner_text()
    section.locator("input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("(text) => document.querySelector('#tokens .caption').textContent !== text", arg=before)
    assert complaints(page, "#tokens") == []
    dead = page.locator("#dead")
    assert dead.locator("img").is_visible()
    assert dead.inner_text() == "Open this notebook in the lab to move it."


def test_the_colours_are_pythons():
    colours = json.loads((ROOT / "web" / "src" / "views" / "colours.json").read_text())
    assert colours == {name: colour_table(name).tobytes().hex() for name in colours}
