"""The measurements for a GPU, tried with small widths on this machine: that they run, and what they say."""

import json
import os
import subprocess
import sys

import pytest

import fluxedu as fe
from fluxedu.bench.full import BARS, flop
from fluxedu.bench.synthetic import synthetic
from fluxedu.models import FluxConfig


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
