"""The miniature in the browser computes what Python computes: token ids, latents, pictures, attention maps, changes.

The longer version, ``FLUXEDU_PLAY=full``, compares 50 whole pictures of 20 steps.
"""

import base64
import io
import os
import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import fluxedu as fe
from fluxedu.instruments.interventions import positions
from fluxedu.nano.scenes import ASPECTS, caption, scenes
from fluxedu.play import make_server
from fluxedu.sampling.latents import draw_noise
from fluxedu.sampling.prompts import Conditioning
from fluxedu.sampling.solvers import schedule

PROMPT = "a red circle left of a blue square"
#: of a whole run in float32: two kinds of matrix products round differently, and the steps add up
LATENTS, MAPS = 1e-4, 1e-5
IS_FULL = os.environ.get("FLUXEDU_PLAY") == "full"


@pytest.fixture(scope="module")
def pipe():
    return fe.load("nano")


@pytest.fixture(scope="module")
def served():
    """The page's address, on any free port."""
    with make_server(0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def page(browser, served):
    """An empty page with ``engine``, and helpers; it must have asked no other host and reported no errors."""
    context = browser.new_context()
    page, problems = context.new_page(), []
    context.on("request", lambda r: None if r.url.startswith((served, "blob:", "data:")) else problems.append(r.url))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    html = "<!doctype html><link rel=icon href=data:,><title>engine</title>"
    page.route("**/bare.html", lambda route: route.fulfill(body=html, content_type="text/html"))
    page.goto(f"{served}bare.html")
    page.evaluate(
        """async () => {
          const { Engine } = await import("./engine.js");
          window.loaded = [];
          window.engine = await Engine.open({ onProgress: (progress) => loaded.push(progress) });
          const base64 = (array) => {
            const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
            let text = "";
            for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
            return btoa(text);
          };
          window.draw = async (request, inside, sites) => {
            const run = await engine.run(request);
            const values = inside === null ? [] : await engine.inside(run, inside, sites);
            return { times: [...run.times], latents: run.latents.map(base64), x0: run.x0.map(base64),
                     shape: run.shape, pixels: base64(run.image.data), size: [run.image.height, run.image.width],
                     values: [...values].map(([site, { dims, data }]) => [site, dims, base64(data)]) };
          };
        }"""
    )
    yield page
    assert problems == []
    context.close()


def decoded(text, dtype=np.float32):
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


class Drawn:
    """A run of the page: ``latents [S + 1, C, h, w]``, ``pixels [H, W, 3]``, ``values`` by site."""

    def __init__(self, page, request, inside=None, sites=None):
        found = page.evaluate("([request, inside, sites]) => draw(request, inside, sites)", [request, inside, sites])
        self.times = np.array(found["times"], dtype=np.float32)
        self.latents = np.stack([decoded(x) for x in found["latents"]]).reshape(-1, *found["shape"])
        self.pixels = decoded(found["pixels"], np.uint8).reshape(*found["size"], 4)[..., :3].astype(int)
        self.values = {site: decoded(data).reshape(dims) for site, dims, data in found["values"]}


def python_run(pipe, request):
    """The same in Python."""
    names = {"trueCfg": "true_cfg_scale", "negative": "negative_prompt"}
    request = {names.get(name, name): value for name, value in request.items() if name != "changes"}
    prompt, clip_prompt = request.pop("prompt"), request.pop("clipPrompt", None)
    if clip_prompt is not None:
        encoded, other = pipe.prompt_encoder([prompt]), pipe.prompt_encoder([clip_prompt])
        prompt = Conditioning(encoded.txt, other.pooled)
    return pipe(prompt, progress=False, **request)


def assert_same(drawn, out, request=None):
    """The page's run is Python's. With a request, a run that depends on the last bits may differ by more: at most by
    three times as much as Python's own float32 differs from float64, as both have such errors.
    """
    latents = out.trajectory.latents[:, 0].numpy()
    assert drawn.latents.shape == latents.shape
    difference = np.abs(drawn.latents - latents).max()
    if request is not None and difference >= LATENTS:
        exact = python_run(fe.load("nano", dtype="float64"), request).trajectory.latents[:, 0].numpy()
        assert difference < 3 * np.abs(latents - exact).max()
    else:
        assert difference < LATENTS
    assert np.array_equal(drawn.times, out.trajectory.times.numpy())
    assert np.abs(drawn.pixels - np.asarray(out.images[0]).astype(int)).max() <= 1


# ---------------------------------------------------------------- tokens, noise, times


def prompts(count):
    """Captions of the miniature's scenes, nonsense, other alphabets, and prompts that are too long."""
    rng, chooser, stream = np.random.default_rng(0), random.Random(0), scenes(0)
    found = ["", " ", "a", "A", "a  red   circle", " a red circle ", "a red circle.", "RED", "don't", "a-b", "</s>",
             "<pad>", "<extra_id_3>", "a <|endoftext|> b", "日本語", "naïve café", "🙂 a red circle", "e\u0301",
             "a\tred\ncircle", "a\u00a0red circle", "İstanbul ǅ ß", "１２ ﬁ", "Ω≈ç√",
             "x" * 200, "a red circle " * 40]  # fmt: skip
    alphabet = "abcdefghijklmnopqrstuvwxyzABCXYZ0123456789 .,;:!?'-()éüßñ漢字🙂_/\\\"#"
    while len(found) < count:
        kind = len(found) % 5
        text, _ = caption(next(stream), rng)
        if kind == 3:
            text = "".join(chooser.choices(alphabet, k=chooser.randrange(1, 60)))
        elif kind == 4:
            text = " ".join(chooser.choices([*text.split(), "cat", "three", "two", "Red", "x" * 9], k=12))
        found.append(text)
    return found


def test_tokenizers_give_pythons_ids(page, pipe):
    texts = prompts(500)
    found = page.evaluate("(texts) => Promise.all(texts.map((text) => engine.tokenize(text)))", texts)
    t5, clip = pipe.prompt_encoder.t5_tokenizer, pipe.prompt_encoder.clip_tokenizer
    for text, mine in zip(texts, found, strict=True):
        whole = t5.fast.encode(text).ids
        is_long = len(whole) > t5.length
        ids = [*whole[: t5.length - 1], t5.end_id] if is_long else whole + [t5.pad_id] * (t5.length - len(whole))
        assert (mine["t5"]["ids"], mine["truncated"]) == (ids, is_long), text
        assert mine["clip"]["ids"] == clip([text])[0].tolist(), text
        if not is_long:
            assert mine["t5"]["pieces"] == t5.pieces(text)


def test_unknown_words_are_pythons(page):
    from fluxedu.nano.vocabulary import split_words, unknown_words

    texts = [*prompts(60), "a Red cat, three “rings” in don't-know"]
    found = page.evaluate("(texts) => Promise.all(texts.map((text) => engine.tokenize(text)))", texts)
    for text, mine in zip(texts, found, strict=True):
        unknown = set(unknown_words(text))
        words = [word for word, _, _ in split_words(text) if word in unknown]
        assert [entry["word"] for entry in mine["unknown"]] == words


def test_noise_and_times_are_torchs(page):
    seeds = [0, 1, 7, 4294967295, 4294967296 + 5, 2**53 - 1]
    noise = page.evaluate(
        "(seeds) => Promise.all(seeds.map((seed) => engine.call('noise', {seed, size: 1536})))", seeds
    )
    for seed, mine in zip(seeds, noise, strict=True):
        assert np.abs(np.array(mine) - draw_noise(seed, 16, 8, 12).flatten().numpy()).max() < 1e-6
    for steps in (1, 3, 4, 7, 20, 33):
        times = page.evaluate("(steps) => engine.call('times', {steps})", steps)
        assert times == schedule(steps, 64, True, (1.0986, 1.0986)).tolist()


# ---------------------------------------------------------------- pictures


def cases():
    """(request) of each picture shape; the longer version has 50, of 20 steps."""
    rng, stream = np.random.default_rng(1), scenes(1)
    for i in range(50 if IS_FULL else len(ASPECTS)):
        height, width = ASPECTS[i % len(ASPECTS)]
        request = {"prompt": caption(next(stream), rng)[0], "seed": i * 37 + 5, "steps": 20 if IS_FULL else 6}
        yield request | {"height": height, "width": width, "guidance": (6.0, 2.5, 4.0)[i % 3]}


@pytest.mark.parametrize("request_", [*cases()], ids=lambda request: f"{request['height']}x{request['width']}")
def test_pictures_are_pythons(page, pipe, request_):
    assert_same(Drawn(page, request_), python_run(pipe, request_), request_)


@pytest.mark.parametrize(
    "options",
    [
        {"negative": "a blue square", "trueCfg": 2.0, "guidance": 1.5},
        {"clipPrompt": "a green star on a black background"},
        {"solver": "heun"},
        {"solver": "midpoint"},
        {"shift": 1.0},
    ],
    ids=str,
)
def test_options_of_a_run_are_pythons(page, pipe, options):
    request = {"prompt": PROMPT, "seed": 3, "steps": 4, "height": 128, "width": 128} | options
    assert_same(Drawn(page, request), python_run(pipe, request), request)


# ---------------------------------------------------------------- inside, and changes


def test_values_inside_are_those_that_python_records(page, pipe):
    request = {"prompt": PROMPT, "seed": 5, "steps": 4, "height": 96, "width": 160}
    drawn = Drawn(page, request, inside=2)
    globs = [name for name in drawn.values if not name.startswith(("sample.", "t5.", "clip."))]
    encoders = [name for name in drawn.values if name.startswith(("t5.", "clip."))]
    with fe.record(*globs, steps=2) as rec, fe.record(*encoders) as text:
        python_run(pipe, request)
    assert len(globs) > 250 and len(encoders) > 60
    assert sum(name.endswith("attn.map") for name in globs) == 8
    for name in (*globs, *encoders):
        value = (rec if name in globs else text)[name].tensor.float().numpy()
        mine = drawn.values[name]
        assert mine.size == value.size, name
        difference = np.abs(mine.reshape(-1) - value.reshape(-1)).max()
        is_map = name.endswith("map")
        assert difference < (MAPS if is_map else 1e-4 * max(1, np.abs(value).max())), name


def test_values_inside_the_decoder_are_computed_when_they_are_named(page, pipe):
    request = {"prompt": PROMPT, "seed": 5, "steps": 2, "height": 96, "width": 160}
    names = ["ae.decoder.mid", "ae.decoder.mid.attn_1.map", "ae.decoder.up.0.block.1.residual", "sample.latent"]
    drawn = Drawn(page, request, inside=1, sites=names)
    with fe.record(*names) as rec:
        python_run(pipe, request)
    assert set(drawn.values) == set(names)
    for name in names:
        value = rec[name].tensor.float().numpy()
        assert np.abs(drawn.values[name].reshape(-1) - value.reshape(-1)).max() < 1e-4 * max(1, np.abs(value).max())


def scaled(*sites, factor=0.0, **selection):
    return fe.intervene(*sites, lambda x, ctx: factor * x, **selection)


def mirrored(ids):
    return ids * torch.tensor([1, 1, -1]) + torch.tensor([0, 0, 1]) * ids[:, 2].max()


KEPT = {}  # the picture without a change
MODULATION = [f"{part}{i}" for part in ("shift", "scale", "gate") for i in (1, 2)]
CHANGES = {
    "a block": ([{"kind": "scale", "target": "double.1", "factor": 0}], lambda: fe.ablate("double.1")),
    "a single block, halved": (
        [{"kind": "scale", "target": "single.4", "factor": 0.5}],
        lambda: scaled("single.4.contribution", factor=0.5),
    ),
    "a head": (
        [{"kind": "scale", "target": "double.0.head.2", "factor": 0}],
        lambda: fe.ablate("double.0.heads", heads=[2]),
    ),
    "a head of a single block": (
        [{"kind": "scale", "target": "single.4.head.4", "factor": 0}],
        lambda: fe.ablate("single.4.heads", heads=[4]),
    ),
    "an attention": (
        [{"kind": "scale", "target": "double.0.attn", "factor": 0}],
        lambda: fe.ablate("double.0.img_attn_contribution", "double.0.txt_attn_contribution"),
    ),
    "an MLP": ([{"kind": "scale", "target": "single.1.mlp", "factor": 0}], lambda: fe.ablate("single.1.mlp_hidden")),
    "modulation": (
        [{"kind": "scale", "target": "double.1.mod.img", "factor": 0.5}],
        lambda: scaled(*(f"double.1.img_mod.{part}" for part in MODULATION), factor=0.5),
    ),
    "modulation of a single block": (
        [{"kind": "scale", "target": "single.3.mod", "factor": 0}],
        lambda: scaled("single.3.shift", "single.3.scale", "single.3.gate"),
    ),
    "CLIP's term": ([{"kind": "scale", "target": "vec.text", "factor": 0}], lambda: scaled("vec.text")),
    "some steps": (
        [{"kind": "scale", "target": "single.5", "factor": 2, "steps": [1]}],
        lambda: scaled("single.5.contribution", factor=2, steps=[1]),
    ),
    "a hidden word": ([{"kind": "hide", "token": 1}], lambda: fe.ablate("*.attn.map", tokens=[1])),
    "hidden words": ([{"kind": "hide", "tokens": [1, 2, 7]}], lambda: fe.ablate("*.attn.map", tokens=[1, 2, 7])),
    "moved positions": (
        [{"kind": "positions", "dx": 3, "dy": -1}],
        lambda: fe.intervene("*.attn.rope", positions(lambda ids: ids + torch.tensor([0, -1, 3]))),
    ),
    "mirrored columns": (
        [{"kind": "positions", "columns": "mirror"}],
        lambda: fe.intervene("*.attn.rope", positions(mirrored)),
    ),
    "one row": (
        [{"kind": "positions", "rows": "same"}],
        lambda: fe.intervene("*.attn.rope", positions(lambda ids: ids * torch.tensor([1, 0, 1]))),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_pythons_instruments(page, pipe, name):
    changes, instrument = CHANGES[name]
    request = {"prompt": PROMPT, "seed": 2, "steps": 2, "height": 112, "width": 144}
    with instrument():
        changed = python_run(pipe, request)
    if "unchanged" not in KEPT:
        KEPT["unchanged"] = python_run(pipe, request).latents
    assert (changed.latents - KEPT["unchanged"]).abs().max() > 0.01  # the test can see the change
    assert_same(Drawn(page, request | {"changes": changes}), changed)


def test_changes_act_on_the_prompts_pass_only(page, pipe):
    changes = CHANGES["a block"][0]
    request = {"prompt": PROMPT, "seed": 2, "steps": 2, "height": 128, "width": 128, "changes": changes, "trueCfg": 2.0}
    with fe.ablate("double.1"):
        out = python_run(pipe, request)
    assert_same(Drawn(page, request), out)


def test_a_wrong_target_is_an_error(page):
    request = {"prompt": PROMPT, "steps": 1, "height": 128, "width": 128}
    for target in ("double.7", "double.0.head.9", "nonsense"):
        changes = [{"kind": "scale", "target": target, "factor": 0}]
        message = page.evaluate("(r) => engine.run(r).catch((error) => error.message)", request | {"changes": changes})
        assert target in message


# ---------------------------------------------------------------- a run while it goes on, and the files


def test_a_run_reports_its_steps_and_can_be_aborted(page):
    found = page.evaluate(
        """async () => {
          const request = { prompt: "a red circle", seed: 0, steps: 4, height: 128, width: 128 }, seen = [];
          const onStep = ({ step, t, latents, x0, preview }) =>
            seen.push([step, t, latents.length, x0.length, preview.width, preview.data[3]]);
          const run = await engine.run(request, { onStep });
          const stop = new AbortController(), aborted = [];
          const onFirst = ({ step }) => { aborted.push(step); stop.abort(); };
          const stopped = engine.run({ ...request, steps: 20 }, { onStep: onFirst, signal: stop.signal });
          const error = await stopped.catch((error) => error);
          return { seen, times: [...run.times], error: error.name, aborted: aborted.length, tokens: run.tokens,
                   progress: loaded.at(-1) };
        }"""
    )
    assert [row[0] for row in found["seen"]] == [0, 1, 2, 3]
    assert [row[1] for row in found["seen"]] == found["times"][1:]
    assert all(row[2:] == [4096, 4096, 16, 255] for row in found["seen"])
    assert found["tokens"] == ["▁a", "▁red", "▁circle", "</s>"]
    assert found["error"] == "AbortError" and found["aborted"] < 5
    assert found["progress"]["loaded"] == found["progress"]["total"] > 10_000_000


def test_preview_is_near_the_picture(page, pipe):
    """A linear map of the latents shows the colours: the mean error of a finished picture is small."""
    request = {"prompt": "a red circle on a white background", "seed": 0, "steps": 4, "height": 128, "width": 128}
    found = page.evaluate(
        """async (request) => {
          const run = await engine.run(request), preview = engine.preview(run.latents.at(-1), run.shape);
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [run.image.width, run.image.height];
          canvas.getContext("2d").putImageData(run.image, 0, 0);
          return { preview: [...preview.data], image: canvas.toDataURL().split(",")[1] };
        }""",
        request,
    )
    image = Image.open(io.BytesIO(base64.b64decode(found["image"]))).convert("RGB").resize((16, 16), Image.BOX)
    preview = np.array(found["preview"]).reshape(16, 16, 4)[..., :3]
    assert np.abs(preview - np.asarray(image).astype(int)).mean() < 20


def test_it_works_again_without_a_network(browser, served):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{served}files.json")
    kept = page.evaluate(
        """async () => {
          const { Engine } = await import("./engine.js");
          return Engine.prototype.keepOffline.call({ base: new URL("./", location.href) });
        }"""
    )
    assert kept
    context.set_offline(True)
    page.goto(f"{served}files.json")
    drawn = page.evaluate(
        """async () => {
          const { Engine } = await import("./engine.js");
          const engine = await Engine.open({ base: new URL("./", location.href) });
          const run = await engine.run({ prompt: "a red circle", seed: 0, steps: 1, height: 128, width: 128 });
          return run.image.width;
        }"""
    )
    assert drawn == 128
    context.close()
