"""The benchmarks, run with small widths on this machine: that they run, and that their figures are consistent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretend_gpu import pretend_gpu

import benchmarks
import fluxedu as fe
from benchmarks import full, instruments, memory
from benchmarks.full import BARS, step_flop
from benchmarks.synthetic import SMALL, synthetic
from fluxedu import probe
from fluxedu.errors import check_device
from fluxedu.models import Flux, FluxConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("transformers")  # for the tokenizers
    return synthetic(tmp_path_factory.mktemp("bench") / "dev", small=True)


def run_module(module: str, *words, **environment) -> dict:
    """What ``python -m benchmarks.module words`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[: done.stdout.rindex("}") + 1])


def test_a_step_of_dev_has_the_published_number_of_flop():
    """74.4 TFLOP of 1024 x 1024 with 512 words, counted by hand from the shapes."""
    assert step_flop(FluxConfig(), 64, 512) / 1e12 == pytest.approx(74.4, abs=0.05)


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
def test_a_step_is_measured_beside_diffusers_and_the_roofline(checkpoint, tmp_path):
    pytest.importorskip("diffusers")
    found = run_module(
        "full", "--device", "cpu", "--dtype", "float32", "--small", "--rounds", 1,
        "--folder", checkpoint, "--out", tmp_path / "f.json", TORCH_COMPILE_DISABLE="1",
    )  # fmt: skip
    assert found == json.loads((tmp_path / "f.json").read_text())
    assert found["gpu"] is None and found["command"].startswith("python -m benchmarks.full --device cpu")
    assert all(found[name] > 0 for name in BARS) and found["same map when compiled"]
    assert found["step / roofline"] == pytest.approx(found["step_s"] / found["roofline_s"])
    assert len(found["sizes and batches"]) == 5 and found["cold start"]["seconds"] > 0
    assert found["hover"]["tokens"] == 48


def test_cards_are_measured_with_a_checkpoint_and_predicted_without(checkpoint, capsys):
    printed = lambda **options: memory.main(**options) or json.loads(capsys.readouterr().out)  # noqa: E731
    predicted, small = printed(), printed(quantise="nf4")
    assert predicted["measured"] is False and [row["card"] for row in predicted["rows"]][-1] == "8 GB"
    assert all(a["peak"] > b["peak"] for a, b in zip(predicted["rows"], small["rows"], strict=True))
    one = printed(device="cpu", folder=checkpoint, size=64, only=8)
    assert one["peak_bytes"] > 0 and one["load_s"] > 0 and {"step_s", "rest_s"} < set(one)


def test_on_a_gpu_the_inputs_are_where_the_weights_are(checkpoint):
    """On a simulated one, which refuses what CUDA refuses: mixed devices, and some calls without a GPU's number."""
    with pretend_gpu():
        checked = check_device("cuda")
        config = FluxConfig().with_(**SMALL[Flux])
        flux = full.random_flux(config, checked, torch.float32)
        found = full.sizes_and_batches(flux, (2, 4), 32, 1, checked, torch.float32, 1e12)
        step = full.velocity_step(flux, full.random_inputs(config, 2, 32, device=checked))
        maps = full.cost_of_maps(step, 1, checked)
        pipe = fe.load(checkpoint, device="cuda", memory="full")
    assert checked == torch.device("cuda", 0) == pipe.device
    assert len(found) == 4 and maps["step with maps / step"] > 0


def test_schnell_has_no_guidance_to_be_measured_with():
    pytest.importorskip("diffusers")
    config = FluxConfig.variant("schnell").with_(**SMALL[Flux])
    flux, cpu = full.random_flux(config, torch.device("cpu"), torch.float32), torch.device("cpu")
    with torch.compiler.set_stance("force_eager"):  # compiling takes half a minute
        assert full.compare_step(flux, 2, 32, 1, cpu, torch.float32, 1e12)["step / diffusers"] > 0


def test_an_unknown_format_is_refused_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--quantise", "int3"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "quantise must be one of int8, fp8, nf4, not 'int3'" in done.stderr
    assert "Traceback" not in done.stderr


def test_idle_sites_are_counted_and_cost_next_to_nothing():
    config = FluxConfig().with_(**SMALL[Flux])
    found = instruments.idle_sites(config, 4, 32, 3)
    assert found["calls"] > 10 * (config.depth + config.depth_single_blocks)
    assert 0 < found["call_s"] < 1e-5 and 1 < found["ratio"] < 2
    assert not probe.is_watching()


def test_the_table_has_a_row_for_every_bar():
    ratio = {"ratio": 1.0, "memory_ratio": 1.0, "bytes": 1, "least_bytes": 1}
    training = {"samples_per_second": 1.0, "steps_per_second": 1.0, "share_of_matmul_peak": 0.5, "dtype": "float32"}
    table = benchmarks.table({name: ratio for name in benchmarks.BARS} | {"training": training, "threads": 2})
    assert all(name in table for name in benchmarks.BARS)
