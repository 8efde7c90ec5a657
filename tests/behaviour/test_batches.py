"""Several images at once are the images that are drawn one at a time: compared in float64, where rounding is 1e-16."""

from dataclasses import replace

import pytest
import torch
from runs import MAP, relative

import fluxedu as fe
from fluxedu.instruments.interventions import positions
from fluxedu.memory.placement import Networks, Placement, activations, free_bytes
from fluxedu.sampling import batches

PROMPTS = ["a red circle left of a blue square", "a red star", "two green rings and a red cross", "red"]
SEEDS = [3, 4, 5, 6]
CFG = {"true_cfg_scale": 3.0, "negative_prompt": ["a blue square", "", "red", "a star"]}
INTERVAL = CFG | {"guidance_interval": (0.0, 0.8)}
SAME = 1e-11  # relative, in float64, after several steps


@pytest.fixture(scope="module")
def pipe(make_pipe):
    return make_pipe().to(torch.float64)


def draw(pipe, **options):
    return pipe(PROMPTS, **{"seed": SEEDS, "steps": 3, "height": 48, "width": 32, "progress": False} | options)


def assert_same(a, b, bound=SAME):
    assert relative(a.latents, b.latents) <= bound
    assert relative(a.trajectory.velocities, b.trajectory.velocities) <= bound
    assert [image.size for image in a.images] == [image.size for image in b.images]
    for one, other in zip(a.images, b.images, strict=True):
        levels = zip(one.tobytes(), other.tobytes(), strict=True)
        assert max(abs(x - y) for x, y in levels) <= 1  # of 255


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("options", [{}, CFG, INTERVAL, {"latents": torch.randn(4, 16, 6, 4)}])
def test_at_once_or_one_at_a_time(options, solver, pipe):
    alone = draw(pipe, batch=1, solver=solver, **options)
    assert_same(draw(pipe, solver=solver, **options), alone)
    assert_same(draw(pipe, batch=3, solver=solver, **options), alone)  # and one more by itself
    without = draw(pipe, solver=solver, trajectory=False, **options)
    assert without.trajectory is None and relative(without.latents, alone.latents) <= SAME


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("nano", ("image",)),
        ("nano-fill", ("image", "mask")),
        ("nano-canny", ("control",)),
        ("nano-kontext", ("reference",)),
        ("nano-redux", ("image_prompt",)),
    ],
)
def test_a_picture_for_each_image(name, inputs):
    pipe = fe.load(name).to(torch.float64)
    noise = torch.rand(2, 3, 48, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    pictures = {key: (noise[:, :1] > 0.5).float() if key == "mask" else 2 * noise - 1 for key in inputs}
    options = {"seed": [3, 4], "steps": 2, "strength": 0.5, "height": 48, "width": 64, "progress": False, **pictures}
    both, alone = (pipe(PROMPTS[:2], batch=batch, **options) for batch in (None, 1))
    assert_same(both, alone)
    swapped = pipe(PROMPTS[:2], **options | {key: value.flip(0) for key, value in pictures.items()})
    assert relative(swapped.latents, alone.latents) > 1e-3


def test_the_network_and_the_encoders_are_called_once_for_a_batch(pipe, monkeypatch):
    calls = []
    for network in (pipe.flux, pipe.prompt_encoder.t5, pipe.prompt_encoder.clip):
        forward, kind = network.forward, type(network).__name__
        monkeypatch.setattr(
            network, "forward", lambda x, *rest, f=forward, k=kind, **o: calls.append((k, len(x))) or f(x, *rest, **o)
        )
    draw(pipe, batch=3)
    texts = [("T5Encoder", 3), ("CLIPTextEncoder", 3), ("T5Encoder", 1), ("CLIPTextEncoder", 1)]
    assert calls == texts + [("Flux", 3)] * 3 + [("Flux", 1)] * 3
    calls.clear()
    draw(pipe, **CFG)
    assert calls[2:] == [("T5Encoder", 4), ("CLIPTextEncoder", 4)] + [("Flux", 8)] * 3


@pytest.mark.parametrize(("tokens", "count", "expected"), [(96, 40, 8), (192, 40, 4), (5000, 40, 1), (96, 3, 3)])
def test_the_default_on_a_cpu(tokens, count, expected, make_pipe):
    requests = _requests(make_pipe(), count)
    shaped = [replace(request, shape=(2, 2 * (tokens - 32))) for request in requests]
    assert batches.batch_size(None, shaped, None, torch.device("cpu"), 32) == expected


def test_the_default_on_a_gpu_fills_the_memory(make_pipe, monkeypatch):
    pipe = make_pipe()
    requests = _requests(pipe, 40)
    texts = pipe.prompt_encoder
    networks = Networks(pipe.flux, pipe.autoencoder, texts.clip, texts.t5, torch.float32)
    size = (pipe.flux.config, pipe.autoencoder.config, 48, 32, 32, torch.float32)
    largest = max(activations(*size, Placement().tiled))
    sizes = []
    for factor in (0.1, 5, 10, 1000):
        monkeypatch.setattr(batches, "free_bytes", lambda device, factor=factor: factor * largest)
        sizes.append(batches.batch_size(None, requests, networks, torch.device("cuda"), 32))
    assert sizes[0] == 1 and 2 <= sizes[1] <= 5 and sizes[1] < sizes[2] <= 10 and sizes[3] == 40
    with fe.gradients():
        assert batches.batch_size(None, requests, networks, torch.device("cuda"), 32) == 1
    assert free_bytes(torch.device("cpu")) == float("inf")


def _requests(pipe, count):
    """The requests of a run."""
    found = []
    with fe.intervene("sample.noise", lambda x, ctx: found.append(ctx.step_context.request) or x):
        pipe("a red circle", num_images=count, steps=1, height=48, width=32, decode=False, progress=False)
    return found


# --- instruments ----------------------------------------------------------------------------------

EVERYTHING = ("*", "sample.*", "t5.*", "clip.*", "ae.*")


def recorded(pipe, batch, *globs, options=None, **selection):
    with fe.record(*globs, **selection) as rec:
        out = draw(pipe, batch=batch, **options or {})
    return rec.saved(), out


def assert_same_recordings(a, b):
    assert sorted(a) == sorted(b) and len(a)
    for name in a:
        for (key, value), (other_key, other) in zip(a.entries(name), b.entries(name), strict=True):
            assert replace(key, run=0) == replace(other_key, run=0), name
            assert (value.axes, value.shape, value.coords) == (other.axes, other.shape, other.coords), name
            difference, size = (value.tensor - other.tensor).abs().max(), other.tensor.abs().max()
            assert float(difference) <= 1e-10 * float(size), name
    assert [list(rec.requests.values()) for rec in (a, b)][0] == list(b.requests.values())


@pytest.mark.parametrize("options", [{}, CFG, INTERVAL, {"solver": "heun", "batch": 3}], ids=["", "cfg", "late", "3"])
def test_every_site_is_recorded_as_one_at_a_time(options, pipe):
    batch = options.get("batch")
    options = {name: value for name, value in options.items() if name != "batch"}
    at_once, out = recorded(pipe, batch, *EVERYTHING, options=options, budget=10**12)
    alone, _ = recorded(pipe, 1, *EVERYTHING, options=options, budget=10**12)
    assert_same_recordings(at_once, alone)
    assert torch.equal(out.latents, draw(pipe, batch=batch, **options).latents)  # not one bit differs


@pytest.mark.parametrize(
    "selection",
    [
        {"tokens": ["red"], "reduce": "head-mean"},
        {"reduce": "entropy", "steps": [1, 2], "heads": [1]},
        {"reduce": "step-mean"},
        {"reduce": ["head-mean", "cosine"]},
        {"tokens": ["red"], "passes": "prompted"},
    ],
    ids=str,
)
def test_what_is_selected_and_reduced(selection, pipe, tmp_path):
    alone, _ = recorded(pipe, 1, MAP, "single.1.attn.map", options=CFG, **selection)
    for to in ("memory", tmp_path / "recording"):
        at_once, _ = recorded(pipe, 3, MAP, "single.1.attn.map", options=CFG, to=to, **selection)
        assert_same_recordings(at_once, alone)


def test_a_folder_has_a_file_per_image_and_step(pipe, tmp_path):
    at_once, _ = recorded(pipe, 3, "sample.x", "sample.txt", "img_in", to=tmp_path / "folder")
    alone, _ = recorded(pipe, 1, "sample.x", "sample.txt", "img_in")
    assert_same_recordings(at_once, alone)
    names = [path.name.partition("-")[2] for path in sorted((tmp_path / "folder").iterdir())]
    steps = ["none", "0000", "0001", "0002"]
    labels = [f"picture-{i:04d}-step-{step}.safetensors" for part in (range(3), [3]) for step in steps for i in part]
    assert names == labels


def noisy(x, ctx):
    """Random numbers of the image's own seed."""
    return x + 0.1 * torch.randn(x.shape, generator=ctx.generator).to(x)


def moved(ids):
    return ids + torch.tensor([0, 1, 0])


def at_second(change):
    """The change, in the second and in the last image only."""
    return lambda x, ctx: change(x, ctx) if ctx.step_context.picture in (1, 3) else x


INTERVENTIONS = {
    "noise": ("single.0.added", noisy),
    "one image": ("single.0.added", at_second(noisy)),
    "initial noise": ("sample.noise", noisy),
    "x0": ("sample.x0", at_second(lambda x, ctx: 0.9 * x)),
    "modulation": ("vec", at_second(noisy)),
    "map": (MAP, at_second(lambda m, ctx: m.weights().flip(-1))),
    "positions": ("*.attn.rope", positions(moved)),
    "positions of one image": ("*.attn.rope", at_second(positions(moved))),
    "text encoder": ("t5.encoder.block.0.attn_out", lambda x, ctx: x * len(ctx.step_context.text)),
    "bias of T5": ("t5.*.bias", lambda x, ctx: x * len(ctx.step_context.text)),
    "decoder": ("ae.decoder.mid", at_second(noisy)),
}


@pytest.mark.parametrize("options", [{}, INTERVAL], ids=["", "cfg"])
@pytest.mark.parametrize("which", INTERVENTIONS)
def test_a_change_sees_one_image(which, options, pipe):
    results = []
    for batch in (4, 1):
        with fe.intervene(*INTERVENTIONS[which]):
            results.append(draw(pipe, batch=batch, **options))
    assert_same(*results)
    plain = draw(pipe, **options)
    assert which == "decoder" or relative(results[0].latents, plain.latents) > 1e-6


@pytest.mark.parametrize(
    "ablate",
    [
        lambda: fe.ablate("*.attn.map", tokens=["red"]),
        lambda: fe.ablate("double.1.heads", heads=[1]),
        lambda: fe.ablate("single.*", steps=[1], tokens=["red"]),
        lambda: fe.ablate("double.0", to="mean", streams="img"),
    ],
)
def test_words_and_heads_are_ablated_in_every_image(ablate, pipe):
    results = []
    for batch in (4, 1):
        with ablate():
            results.append(draw(pipe, batch=batch, **CFG))
    assert_same(*results)


def test_a_change_that_changes_nothing(pipe):
    plain = draw(pipe, batch=4, **CFG)
    with fe.intervene("*", "sample.*", "t5.*", lambda x, ctx: x if hasattr(x, "lse") else x.clone()):
        assert torch.equal(draw(pipe, batch=4, **CFG).latents, plain.latents)


def test_a_function_that_keeps_values_from_site_to_site_keeps_those_of_the_same_image(pipe):
    """By default, one image at a time is computed while an intervention is active."""
    state = {}

    def keep(x, ctx):
        state["x"] = x
        return x

    def towards_zero(v, ctx):  # the velocity that leads from the state straight to 0
        return state["x"] / ctx.time

    with fe.intervene("sample.x", keep), fe.intervene("sample.velocity", towards_zero):
        assert draw(pipe).latents.abs().max() < 1e-12


def test_gradients(pipe):
    noise = torch.randn(4, 16, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for batch in (None, 1):
        latents = noise.clone().requires_grad_()
        with fe.gradients(steps=[1, 2]), fe.record("single.1.out", "sample.txt", steps=[1, 2], detach=False) as rec:
            out = draw(pipe, latents=latents, batch=batch)
        out.latents.square().sum().backward()
        found.append([latents.grad, rec.grad("single.1.out").tensor, rec.grad("sample.txt").tensor])
    for at_once, alone in zip(*found, strict=True):
        assert relative(at_once, alone) <= 1e-9 and float(alone.abs().max()) > 0


def test_a_run_stops_after_a_site_of_the_first_batch(pipe):
    with fe.record("double.0.img") as rec:
        out = draw(pipe, batch=3, stop_after="double.0.img")
    assert out.images == [] and [key.picture for key, _ in rec.entries("double.0.img")] == [0, 1, 2]
    assert draw(pipe, batch=3, stop_after=0).trajectory.latents.shape == (2, 4, 16, 6, 4)
