"""The measurements for a GPU, tried with small widths on this machine: that they run, and what they say."""

import json
import os
import subprocess
import sys

import pytest
import torch
from pretend_gpu import pretend_gpu

import fluxedu as fe
from fluxedu.bench import full
from fluxedu.bench.full import BARS, flop
from fluxedu.bench.synthetic import SMALL, synthetic
from fluxedu.models import Flux, FluxConfig
from fluxedu.sampling.request import checked_device


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("transformers")  # for the tokenizers
    return synthetic(tmp_path_factory.mktemp("bench") / "dev", small=True)


def measured(module: str, *words, **environment) -> dict:
    """What ``python -m fluxedu.bench.module words`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"fluxedu.bench.{module}", *map(str, words)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[: done.stdout.rindex("}") + 1])


def test_a_step_of_dev_is_the_arithmetic_that_is_published():
    """74.4 TFLOP of 1024 x 1024 with 512 words, counted by hand from the shapes."""
    assert flop(FluxConfig(), 64, 512) / 1e12 == pytest.approx(74.4, abs=0.05)


def test_the_synthetic_checkpoint_has_the_true_layout(checkpoint):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.FluxTransformer2DModel.from_pretrained(checkpoint / "transformer")
    assert pipe.config.attention_head_dim == 128 and pipe.config.guidance_embeds
    ours = fe.load(checkpoint, dtype="bfloat16")
    assert ours.defaults.steps == 50 and ours.defaults.text_length == 512
    out = ours("a red circle", height=64, width=64, steps=2, progress=False)
    assert out.latents.isfinite().all()
    with pytest.raises(ValueError, match="exists"):
        synthetic(checkpoint, small=True)


@pytest.mark.slow
def test_a_step_is_measured_beside_diffusers_and_the_floor(checkpoint, tmp_path):
    pytest.importorskip("diffusers")
    found = measured(
        "full", "--device", "cpu", "--dtype", "float32", "--small", "--rounds", 1,
        "--folder", checkpoint, "--json", tmp_path / "f.json", TORCH_COMPILE_DISABLE="1",
    )  # fmt: skip
    assert found == json.loads((tmp_path / "f.json").read_text())
    assert found["gpu"] is None and found["command"].startswith("python -m fluxedu.bench.full --device cpu")
    assert all(found[name] > 0 for name in BARS) and found["recorded the same when compiled"]
    assert found["to the floor"] == pytest.approx(found["step_s"] / found["floor_s"])
    assert len(found["sizes and batches"]) == 5 and found["cold start"]["seconds"] > 0
    assert found["hover"]["tokens"] == 48


@pytest.mark.slow
def test_cards_are_measured_with_a_checkpoint_and_foreseen_without(checkpoint):
    foreseen = measured("memory")
    assert foreseen["measured"] is False and [row["card"] for row in foreseen["rows"]][-1] == "8 GB"
    small = measured("memory", "--quantise", "nf4")
    assert all(a["peak"] > b["peak"] for a, b in zip(foreseen["rows"], small["rows"], strict=True))
    one = measured("memory", "--device", "cpu", "--folder", checkpoint, "--size", 64, "--only", 8)
    assert one["peak_bytes"] > 0 and one["load_s"] > 0 and {"step_s", "rest_s"} < set(one)


def test_on_a_gpu_the_inputs_are_where_the_weights_are(checkpoint):
    """On a pretend one, which refuses what CUDA refuses: mixed devices, and some calls without a GPU's number."""
    with pretend_gpu():
        checked = checked_device("cuda")
        config = FluxConfig().with_(**SMALL[Flux])
        flux = full.random_flux(config, checked, torch.float32)
        found = full.sizes(flux, (2, 4), 32, 1, checked, torch.float32, 1e12)
        looked = full.maps(full.a_step(flux, full.inputs_of(config, 2, 32, device=checked)), 1, checked)
        pipe = fe.load(checkpoint, device="cuda", memory="full")
    assert checked == torch.device("cuda", 0) == pipe.device
    assert len(found) == 4 and looked["maps, time"] > 0


def test_schnell_has_no_guidance_to_be_measured_with():
    pytest.importorskip("diffusers")
    config = FluxConfig.variant("schnell").with_(**SMALL[Flux])
    flux, cpu = full.random_flux(config, torch.device("cpu"), torch.float32), torch.device("cpu")
    assert full.steps(flux, 2, 32, 1, cpu, torch.float32, 1e12)["to diffusers"] > 0


def test_a_word_that_is_no_format_is_said():
    done = subprocess.run(
        [sys.executable, "-m", "fluxedu.bench.memory", "--quantise", "int3"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "quantised to one of int8, fp8, nf4, not 'int3'" in done.stderr
    assert "Traceback" not in done.stderr
