"""PyTorch's default dtype and default device change nothing: the images and the measurements have the same bits."""

from contextlib import contextmanager

import pytest
import torch

import fluxedu as fe
from fluxedu.instruments import lenses
from fluxedu.memory.offload import decode_tiled
from fluxedu.sampling.latents import draw_noise

DEFAULTS = ["float64", "bfloat16", "meta"]
PICTURE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(7)) * 2 - 1
RUNS = {
    "nano": {"solver": "heun", "shift": 2.0},
    "nano-base": {"true_cfg_scale": 2.0, "times": [1, 0.5, 0.3, 0]},
    "nano-fill": {"image": PICTURE, "mask": (PICTURE[0, 0] > 0).float()},
    "nano-canny": {"control": PICTURE},
    "nano-kontext": {"reference": PICTURE, "solver": "midpoint"},
    "nano-redux": {"image_prompt": PICTURE},
}


@contextmanager
def default(name):
    """Another default dtype, or the default device ``meta``, on which a tensor has no values."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(name):
    options = {"steps": None if "times" in RUNS[name] else 2, "progress": False} | RUNS[name]
    out = fe.load(name)("a red circle", seed=[3, 4], **options)
    trajectory = out.trajectory
    return [trajectory.times, trajectory.latents, trajectory.velocities], [image.tobytes() for image in out.images]


@pytest.mark.parametrize("name", RUNS)
def test_every_model_draws_the_same_image(name):
    tensors, images = run(name)
    for other in DEFAULTS:
        with default(other):
            found, found_images = run(name)
        assert [x.dtype for x in found] == [x.dtype for x in tensors], other
        assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True)), other
        assert found_images == images, other


def measure(pipe):
    """One measurement for every place in the lenses that makes a tensor of its own."""
    options = {"seed": 1, "steps": 2, "progress": False}
    times = lenses.modulation(pipe, "a red circle", times=3).tensor
    listed = lenses.modulation(pipe, "a red circle", times=[1, 0.4], guidance=2.0).tensor
    predictions = lenses.x0_by_block(pipe, "a red circle", **options).tensor
    divergence = lenses.divergence(pipe, "a red circle", probes=1, **options).tensor
    field = lenses.velocity_field(pipe, "a red circle", size=2, **options).tensor
    tiled = decode_tiled(pipe.autoencoder, draw_noise(0, 16, 16, 12), tile=8, overlap=2)
    mean = lenses.word_maps(pipe, "a red circle", ["red"], **options).tensor
    balance = lenses.attention_balance(pipe, "a red circle", **options).tensor
    noise = fe.invert(pipe, PICTURE, "a red circle", steps=2, progress=False)
    without = fe.ablate("*.heads", tokens=fe.region(box=(0, 0, 0.5, 1)), streams="img")
    ablated = fe.ablate_each(pipe, [[], without], "a red circle", steps=2, progress=False).latents
    concepts = lenses.concept_maps(pipe, "a red circle", ["green", "red"], **options).tensor
    return [times, listed, predictions, divergence, field, tiled, mean, balance, noise, ablated, concepts]


@pytest.mark.parametrize("other", DEFAULTS)
def test_every_measurement_is_the_same(other):
    pipe = fe.load("nano")
    expected = measure(pipe)
    with default(other):
        found = measure(pipe)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_noise_is_drawn_in_float32_on_the_cpu_and_then_converted():
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(5))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(draw_noise(5, 16, 4, 6, dtype=dtype), noise.to(dtype))
    assert draw_noise(5, 16, 4, 6).dtype == torch.float32
    assert draw_noise(5, 16, 4, 6, device="meta").device.type == "meta"
