"""Guidance, sizes, seeds, batches, trajectories: what sampling promises."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sizes import NANO

from fluxedu.sampling.latents import draw_noise, image_ids, latent_size, pack, text_ids, unpack
from fluxedu.sampling.solvers import SOLVERS, active, guide, schedule

PROMPTS = ["a red circle left of a blue square", "a big green triangle", ""]
PROMPT, CFG = PROMPTS[0], {"true_cfg_scale": 4.0, "negative_prompt": "a blue square"}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8))
few = settings(max_examples=40, deadline=None, derandomize=True)


def relative(a, b):
    assert a.shape == b.shape
    return float((a.double() - b.double()).norm() / b.double().norm())


def same(a, b):
    """The same pictures and latents, to the last bit."""
    return torch.equal(a.latents, b.latents) and [im.tobytes() for im in a.images] == [im.tobytes() for im in b.images]


def draw(pipe, prompt=PROMPT, **options):
    return pipe(prompt, **{"progress": False, **options})


@pytest.fixture
def calls(pipe, plain_pipe, monkeypatch):
    """The batch size of each evaluation of the network."""
    made = []
    for p in (pipe, plain_pipe):
        ask = p.flux.velocity
        monkeypatch.setattr(p.flux, "velocity", lambda x, *rest, ask=ask: made.append(len(x)) or ask(x, *rest))
    return made


# --- solvers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_field_that_knows_its_picture_arrives(solver, steps, pipe, monkeypatch):
    """``v = (x - picture) / t`` leads along straight lines: every step foresees the picture, however few there are."""
    picture = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(pipe, "velocity_field", lambda *run: lambda x, t: (x - picture) / t)
    out = draw(pipe, steps=steps, solver=solver)
    assert relative(out.latents, picture) <= 1e-6
    assert relative(out.trajectory.x0, picture.expand_as(out.trajectory.x0)) <= 1e-6
    noise = draw_noise(0, 16, 4, 4)
    assert relative(out.trajectory.velocities, (noise - picture).expand_as(out.trajectory.velocities)) <= 1e-6


@pytest.mark.parametrize(("solver", "questions"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
@pytest.mark.parametrize("options", [{}, CFG], ids=["", "cfg"])
def test_a_planned_run_is_the_plain_forward_step_by_step(solver, questions, options, pipe, calls, make_pipe):
    """Compared in float64: guidance multiplies float32's rounding errors, which differ from processor to processor."""
    steps, guidance = 5, 2.0
    run = {"seed": [3, 4], "steps": steps, "solver": solver, "guidance": guidance, "height": 48, **options}
    draw(pipe, PROMPTS[:2], **run)
    both, passes = questions * steps, 2 if options else 1
    assert calls == [2 * passes] * both  # both pictures at once
    calls.clear()
    draw(pipe, PROMPTS[:2], batch=1, **run)
    assert calls == [passes] * both * 2  # picture by picture

    pipe = make_pipe().to(torch.float64)
    out = draw(pipe, PROMPTS[:2], **run)
    times = schedule(steps, 6).tolist()
    assert out.trajectory.times.tolist() == times
    planned = SOLVERS[solver].evaluation_times(times)
    assert len(planned) == questions * steps and planned[::questions] == times[:-1]
    if solver == "midpoint":
        assert planned[1::2] == [(a + b) / 2 for a, b in zip(times, times[1:], strict=False)]
    if solver == "heun":
        assert planned[1::2] == times[1:]

    def forward(x, t, prompts):
        texts = pipe.prompt_encoder(prompts)
        return pipe.flux(
            x, image_ids(6, 4), texts.txt, text_ids(32), torch.full((2,), t), texts.pooled, torch.full((2,), guidance)
        )

    def velocity(x, t):
        prompted = forward(x, t, PROMPTS[:2])
        if not options:
            return prompted
        negative = forward(x, t, [options["negative_prompt"]] * 2)
        return negative + options["true_cfg_scale"] * (prompted - negative)

    with torch.no_grad():
        x = pack(torch.cat([draw_noise(3, 16, 6, 4), draw_noise(4, 16, 6, 4)])).double()
        for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
            v, dt = velocity(x, t), t_next - t
            assert relative(pack(out.trajectory.velocities[i]), v) <= 1e-12
            if solver == "euler":
                x = x + dt * v
            elif solver == "midpoint":
                x = x + dt * velocity(x + dt / 2 * v, t + dt / 2)
            else:
                x = x + dt * (v + velocity(x + dt * v, t_next)) / 2
    assert relative(out.latents, unpack(x, 6, 4)) <= 1e-12


# --- guidance -------------------------------------------------------------------------------------


def test_guidance_goes_further_from_the_negative():
    negative, prompted = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert guide(negative, prompted, 3.0).tolist() == [4, -4]
    assert guide(negative, prompted, 0.0).tolist() == negative.tolist()
    assert guide(negative, prompted, 1.0).tolist() == prompted.tolist()


def test_scales_with_a_meaning(plain_pipe, calls):
    plain = draw(plain_pipe, guidance=0)
    assert calls == [1] * 4  # off: one pass a step
    assert same(draw(plain_pipe), plain)  # its default is off
    assert same(draw(plain_pipe, true_cfg_scale=1), plain)
    # of a model without the input, guidance is the classifier-free scale; the default negative is the empty prompt
    scaled = draw(plain_pipe, guidance=4)
    assert same(scaled, draw(plain_pipe, true_cfg_scale=4))
    assert same(scaled, draw(plain_pipe, guidance=4, negative_prompt=""))
    assert relative(scaled.latents, plain.latents) > 1e-2
    assert relative(draw(plain_pipe, guidance=4, negative_prompt="a blue square").latents, scaled.latents) > 1e-2
    # nothing of the prompt, and a prompt set against itself
    negative = draw(plain_pipe, "a blue square", guidance=0)
    assert relative(draw(plain_pipe, **{**CFG, "true_cfg_scale": 0}).latents, negative.latents) <= 1e-6
    assert relative(draw(plain_pipe, guidance=9, negative_prompt=PROMPT).latents, plain.latents) <= 2e-6


def test_guidance_as_an_input(pipe, calls):
    weak, strong = draw(pipe, guidance=1.0), draw(pipe, guidance=8.0)
    assert relative(weak.latents, strong.latents) > 1e-3
    assert same(draw(pipe), draw(pipe, guidance=3.5))  # the default
    assert set(calls) == {1}  # one pass a step


def test_a_limited_interval(plain_pipe, calls, make_pipe):
    unguided, guided = draw(plain_pipe, steps=8), draw(plain_pipe, steps=8, **CFG)
    assert relative(draw(plain_pipe, steps=8, guidance_interval=(0.0, 0.0), **CFG).latents, unguided.latents) <= 1e-6
    assert same(draw(plain_pipe, steps=8, guidance_interval=(0, 1), **CFG), guided)

    interval = (0.4, 0.8)
    calls.clear()
    run = draw(plain_pipe, steps=8, guidance_interval=interval, **CFG).trajectory
    made, times = list(calls), run.times.tolist()[:-1]
    on = [0.4 <= t <= 0.8 for t in times]
    assert made == [2 if twice else 1 for twice in on]  # outside, the negative prompt is not evaluated
    assert on == [active(t, interval) for t in times] and not on[0] and any(on) and not on[-1]

    pipe = make_pipe(embedded=False).to(torch.float64)  # guidance multiplies float32's rounding errors
    run = draw(pipe, steps=8, guidance_interval=interval, **CFG).trajectory

    def velocity(x, t, prompt):
        texts = pipe.prompt_encoder([prompt])
        with torch.no_grad():
            return pipe.flux(pack(x), image_ids(4, 4), texts.txt, text_ids(32), torch.tensor([t]), texts.pooled)

    for i, t in enumerate(times):
        prompted, negative = (velocity(run.latents[i], t, p) for p in (PROMPT, CFG["negative_prompt"]))
        expected = negative + 4 * (prompted - negative) if on[i] else prompted
        assert relative(run.velocities[i], unpack(expected, 4, 4)) <= 1e-12


# --- sizes ----------------------------------------------------------------------------------------


@few
@given(st.integers(16, 4096), st.integers(16, 4096))
def test_both_roundings(height, width):
    """Latent cells come in pairs of 16 pixels; both conventions agree where nothing is to be rounded."""
    up, down = latent_size(height, width), latent_size(height, width, rounding="down")
    assert up == (2 * -(-height // 16), 2 * -(-width // 16))
    assert down == (2 * (height // 16), 2 * (width // 16))
    size = (height // 16 * 16, width // 16 * 16)
    assert latent_size(*size) == latent_size(*size, rounding="down") == down


def test_a_thousand_pixels():
    assert latent_size(1000, 1000) == (126, 126)
    assert latent_size(1000, 1000, rounding="down") == (124, 124)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 80), (57, 33), (64, 48)])
def test_any_size(height, width, pipe):
    for rounding, to_integer in (("up", math.ceil), ("down", math.floor)):
        out = draw(pipe, height=height, width=width, steps=1, rounding=rounding)
        rows, cols = 16 * to_integer(height / 16), 16 * to_integer(width / 16)
        assert out.images[0].size == (cols, rows) and out.latents.shape == (1, 16, rows // 8, cols // 8)
    assert draw(pipe, steps=1).images[0].size == (32, 32)  # the pipeline's own


@few
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7))
def test_packing(batch, channels, rows, cols):
    """Token (row, col) holds the 2 x 2 cells at (2 row, 2 col), channel by channel; unpacking undoes it."""
    latent = torch.arange(batch * channels * rows * cols * 4.0).reshape(batch, channels, 2 * rows, 2 * cols)
    tokens = pack(latent)
    assert tokens.shape == (batch, rows * cols, 4 * channels)
    assert torch.equal(unpack(tokens, 2 * rows, 2 * cols), latent)
    row, col = rows - 1, cols // 2
    cells = latent[-1, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
    assert torch.equal(tokens[-1, row * cols + col], cells.flatten())
    ids = image_ids(2 * rows, 2 * cols)
    assert ids.shape == (rows * cols, 3) and ids[row * cols + col].tolist() == [0, row, col]
    assert not text_ids(rows).any() and text_ids(rows).shape == (rows, 3)


def test_a_latent_that_cannot_be_packed():
    for shape in ((3, 4), (4, 5)):
        with pytest.raises(ValueError, match="even number of rows and columns"):
            pack(torch.zeros(1, 4, *shape))
    with pytest.raises(ValueError, match="do not fill a latent of 4 x 6"):
        unpack(torch.zeros(1, 5, 16), 4, 6)


# --- from a picture -------------------------------------------------------------------------------


def test_full_strength_forgets_the_picture(pipe):
    assert same(draw(pipe, image=PICTURE, strength=1.0), draw(pipe, height=48, width=32))


def test_it_begins_between_the_picture_and_the_noise(pipe):
    out = draw(pipe, [PROMPT] * 2, seed=[1, 2], image=PICTURE, strength=0.5, steps=10)
    times = schedule(10, 6)[5:]
    assert torch.equal(out.trajectory.times, times) and len(out.trajectory.velocities) == 5
    pixels = torch.from_numpy(np.asarray(PICTURE).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    noise = torch.cat([draw_noise(s, 16, 6, 4) for s in (1, 2)])
    with torch.no_grad():
        mixed = (1 - times[0]) * pipe.autoencoder.encode(pixels) + times[0] * noise
    assert relative(out.trajectory.latents[0], mixed) <= 1e-6
    # little strength, little change
    far, near = (
        relative(draw(pipe, image=PICTURE, strength=s, steps=50).latents, pipe.autoencoder.encode(pixels).detach())
        for s in (0.8, 0.02)
    )
    assert near < far / 3


def test_ways_to_give_a_picture(pipe):
    pixels = np.asarray(PICTURE)
    as_tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
    first = draw(pipe, image=PICTURE)
    assert first.images[0].size == PICTURE.size
    for image in (pixels, as_tensor, as_tensor[None], PICTURE.convert("RGBA")):
        assert same(draw(pipe, image=image), first)
    # a picture for each
    both = draw(pipe, image=torch.stack([as_tensor, -as_tensor]), seed=[0, 0], batch=1)
    assert torch.equal(both.latents[:1], first.latents)
    assert relative(both.latents[1:], first.latents) > 1e-2
    # another size
    assert draw(pipe, image=PICTURE, height=64, width=64).images[0].size == (64, 64)


# --- seeds and batches ----------------------------------------------------------------------------


def test_noise_depends_on_the_seed_only():
    before = torch.get_rng_state()
    noise = draw_noise(7, 16, 4, 6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw_noise(7, 16, 4, 6), noise) and noise.shape == (1, 16, 4, 6)
    assert relative(draw_noise(8, 16, 4, 6), noise) > 1
    large = draw_noise(7, 16, 64, 64)
    assert abs(float(large.mean())) < 0.02 and abs(float(large.std()) - 1) < 0.02


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_twice_is_the_same_to_the_last_bit(solver, pipe):
    options = {"seed": [4, 5], "solver": solver, **CFG}
    first = draw(pipe, PROMPTS[:2], **options)
    torch.manual_seed(123)
    assert same(draw(pipe, PROMPTS[:2], **options), first)
    assert same(draw(pipe, PROMPTS[:2], trajectory=False, **options), first)


@pytest.mark.parametrize("options", [{}, CFG, {"image": PICTURE}], ids=["", "cfg", "image"])
def test_alone_or_in_a_list(options, make_pipe):
    """To the last bit, at the miniature's own size, where a batched matrix product would round differently."""
    nano = make_pipe(sizes=NANO)
    batch = draw(nano, PROMPTS, seed=[1, 2, 3], steps=3, height=128, width=128, batch=1, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = draw(nano, prompt, seed=i + 1, steps=3, height=128, width=128, **options)
        assert alone.images[0].tobytes() == batch.images[i].tobytes()
        assert torch.equal(alone.trajectory.latents, batch.trajectory.latents[:, i : i + 1])
        assert torch.equal(alone.trajectory.velocities, batch.trajectory.velocities[:, i : i + 1])
        assert torch.equal(alone.latents, batch.latents[i : i + 1])


class Counting:
    """A tokenizer that notes every prompt."""

    def __init__(self, tokenizer, prompts):
        self.tokenizer, self.prompts, self.length = tokenizer, prompts, tokenizer.length

    def __call__(self, prompts):
        self.prompts += prompts
        return self.tokenizer(prompts)


def test_a_prompt_is_encoded_once(pipe, monkeypatch):
    """However many pictures are drawn of it; and all before the first step, so that a bad one is refused in time."""
    encoded, tokenize = [], pipe.prompt_encoder.t5_tokenizer
    monkeypatch.setattr(pipe.prompt_encoder, "t5_tokenizer", Counting(tokenize, encoded))
    draw(pipe, seed=[1, 2, 3], steps=1, **CFG)
    assert sorted(encoded) == sorted([PROMPT, CFG["negative_prompt"]])


def test_pairing(pipe):
    one = draw(pipe, seed=5)
    many = draw(pipe, seed=[5, 6, 5], batch=1)  # a prompt, a picture per seed
    assert len(many.images) == 3 and many.latents.shape[0] == 3
    assert torch.equal(many.latents[:1], one.latents) and relative(many.latents[1:2], one.latents) > 1e-2
    assert torch.equal(many.latents[0], many.latents[2])
    words = draw(pipe, PROMPTS, seed=5, batch=1)  # a picture per prompt, all of one seed
    assert torch.equal(words.trajectory.latents[0, 0], words.trajectory.latents[0, 1])
    assert torch.equal(words.latents[:1], one.latents) and relative(words.latents[1:2], one.latents) > 1e-3
    pairs = draw(pipe, PROMPTS, seed=[7, 6, 5], true_cfg_scale=3, negative_prompt=["red", "", "blue"], batch=1)
    last = draw(pipe, PROMPTS[2], seed=5, true_cfg_scale=3, negative_prompt="blue")
    assert torch.equal(pairs.latents[2:], last.latents)


def test_double_precision_agrees(make_pipe):
    pipe = make_pipe()
    single = draw(pipe)
    double = draw(pipe.to(torch.float64))
    assert double.latents.dtype == torch.float64
    assert relative(single.latents, double.latents) <= 2e-6


# --- trajectory and progress ----------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_trajectory(solver, pipe):
    out = draw(pipe, PROMPTS[:2], steps=5, height=48, solver=solver)
    run, shape = out.trajectory, (2, 16, 6, 4)
    assert run.times.shape == (6,)
    assert run.latents.shape == (6, *shape) and run.velocities.shape == run.x0.shape == (5, *shape)
    assert torch.equal(run.latents[-1], out.latents) and not out.latents.requires_grad
    assert torch.equal(run.latents[0], draw_noise(0, 16, 6, 4).expand(shape))
    for i, t in enumerate(run.times[:-1]):  # predicted x0: x_t = (1 - t) picture + t noise, v = noise - picture
        assert relative(run.x0[i], run.latents[i] - t * run.velocities[i]) <= 1e-7
        if solver == "euler":
            assert relative(run.latents[i + 1], run.latents[i] + (run.times[i + 1] - t) * run.velocities[i]) <= 1e-6
    if solver == "euler":
        assert relative(run.x0[-1], out.latents) <= 1e-6
    assert draw(pipe, trajectory=False).trajectory is None


def test_pictures_are_the_latents_decoded(pipe):
    out = draw(pipe)
    with torch.no_grad():
        pixels = pipe.autoencoder.decode(out.latents)[0]
    expected = ((pixels.clamp(-1, 1) + 1) / 2 * 255).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(out.images[0]) - expected).max() <= 0.5001


def test_progress_shows_after_a_second(pipe, monkeypatch, capsys):
    draw(pipe, progress=True)
    assert "".join(capsys.readouterr()) == ""  # over too soon to be worth a bar

    monkeypatch.setattr(pipe, "velocity_field", lambda *run: lambda x, t: time.sleep(0.4) or x)
    draw(pipe, steps=4, progress=False)
    assert "".join(capsys.readouterr()) == ""
    draw(pipe, steps=4, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "sampling" in shown.err and "4/4" in shown.err
    draw(pipe, [PROMPT] * 2, steps=4, progress=True, image=PICTURE, strength=0.5, batch=1)
    assert "4/4" in capsys.readouterr().err  # two steps each are all there are
