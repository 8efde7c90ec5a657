"""The miniature FLUX.2 and FLUX.1 with one change of it: what each change is, and that training resumes exactly."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from fluxedu.checkpoints import load_model, save_file
from fluxedu.loading import WEIGHTS
from fluxedu.models import Flux2
from fluxedu.nano import exam, networks
from fluxedu.nano.scenes import render, sample_scene
from training import VARIANTS, baselines, flux2, flux2_exam
from training.data import Tokens, make_shard
from training.flow import averaged_flow
from training.loop import Recipe

RECIPE = Recipe(steps=3, lr=2e-3, batch=2, warmup=1, ema=0.5, muon=True)
PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def small_pipe(make_pipe, tiny):
    """Tiny networks; CLIP reads as many tokens as in the miniature, on whose captions it is trained."""
    clip, *others = tiny
    return make_pipe(embedded=False, sizes=(clip.with_(max_position_embeddings=networks.TEXT_LENGTH), *others))


@pytest.fixture(scope="module")
def folder(small_pipe, tmp_path_factory):
    """A folder with one small shard of latents."""
    path = tmp_path_factory.mktemp("runs")
    (path / "latents").mkdir()
    save_file(make_shard(0, small_pipe.autoencoder, Tokens(), size=32), path / "latents" / "0000.safetensors")
    return path


@pytest.mark.parametrize("name", flux2.NAMES)
def test_each_model_trains_resumes_to_the_bit_and_draws(name, folder, small_pipe, monkeypatch):
    """Three steps; the same with Ctrl-C in the second one and the command given again; an image of the result."""
    monkeypatch.setattr(baselines, "make_shards", lambda *args: None)
    whole = flux2.train(name, 88, folder, small_pipe, RECIPE)
    shutil.rmtree(whole.folder)
    loss, called = flux2.flow_loss, []

    def interrupted(*args):
        called.append(1)
        if len(called) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(flux2, "flow_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flux2.train(name, 88, folder, small_pipe, RECIPE)
    resumed = flux2.train(name, 88, folder, small_pipe, RECIPE)
    assert len(called) == 3 and resumed.step == 3
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
        assert torch.equal(whole.average[key], resumed.average[key]), key

    flux = averaged_flow(resumed)
    assert type(flux) is type(whole.model.flux) and flux.config == whole.model.flux.config
    drawing = flux2.pipeline_with(flux, small_pipe)
    out = drawing(PROMPT, seed=1, steps=2, guidance=5.0, height=32, width=48, progress=False)
    velocities = out.trajectory.velocities
    assert out.images[0].size == (48, 32) and velocities.isfinite().all() and velocities.std() > 1e-4


def test_all_are_as_large_as_the_twin():
    twin = networks.FLUX
    with torch.device("meta"):
        counts = {n: sum(p.numel() for p in flux2.build(c).parameters()) for n, c in flux2.configs(twin).items()}
    assert counts[flux2.TWIN] == json.loads((WEIGHTS / "baselines.json").read_text())["twin"]["parameters"]
    assert all(abs(count / counts[flux2.TWIN] - 1) < 0.01 for count in counts.values())
    table = flux2.sizes_table(twin)
    assert all(f"{count:,}" in table for count in counts.values())
    assert set(flux2.NAMES) <= set(VARIANTS)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in flux2.NAMES if name != "flux2"])
def test_one_change_is_that_change_only(name, small_pipe):
    """From its effects: which inputs the output depends on, whether blocks differ in modulation, and the MLP's zero."""
    torch.manual_seed(0)
    flux = flux2.build(flux2.configs(small_pipe.flux.config)[name]).eval()
    config, ids = flux.config, torch.zeros(6, 3)
    ids[:, 1], ids[:, 2] = torch.arange(6) // 3, torch.arange(6) % 3
    img, txt = torch.randn(1, 6, 64), torch.randn(1, 4, config.context_in_dim)
    t, y = torch.tensor([0.5]), torch.randn(1, config.vec_in_dim)

    def differs(a, b):
        return not torch.allclose(a, b, atol=1e-5)

    out = flux(img, ids, txt, torch.zeros(4, 3), t, y)
    assert differs(flux(img, ids, txt.flip(1), torch.zeros(4, 3), t, y), out) == (name == "flux2-positions")
    assert differs(flux(img, ids, txt, torch.zeros(4, 3), t, 2 * y), out) == (name != "flux2-no-pooled")
    assert differs(flux(img, ids.flip(0), txt, torch.zeros(4, 3), t, y), out)  # all of them know where a patch is
    plan = flux.plan(t, None, y)
    assert torch.equal(plan.single[0], plan.single[1]) == (name == "flux2-modulation")
    assert torch.equal(plan.double[0]["img"], plan.double[1]["img"]) == (name == "flux2-modulation")
    assert differs(plan.double[0]["img"], plan.double[0]["txt"])
    widths = {block.linear2.in_features for block in flux.single_blocks}
    widths |= {48 + block.img_mlp[2].in_features for block in flux.double_blocks}
    assert widths == {48 + config.mlp_hidden}
    gated = flux.single_blocks[0].linear1.out_features == 3 * 48 + 2 * config.mlp_hidden
    assert gated == (flux.double_blocks[0].txt_mlp[0].out_features == 2 * config.mlp_hidden) == (name == "flux2-swiglu")


def test_steps_are_measured_once(tmp_path, monkeypatch, small_pipe):
    """A model whose step takes twice as long has half the steps; the twin has those of the shipped one."""
    seconds = dict.fromkeys(flux2.NAMES, 2.0) | {flux2.TWIN: 1.0}
    monkeypatch.setattr(flux2, "seconds_per_step", lambda pipe: seconds)
    assert flux2.steps_of("flux2", tmp_path, small_pipe) == 3630
    seconds["flux2"] = 7.0
    assert flux2.steps_of("flux2", tmp_path, small_pipe) == 3630
    assert flux2.steps_of(flux2.TWIN, tmp_path, small_pipe) == baselines.RECIPES[baselines.TWIN].steps


def test_the_time_of_models_is_measured(small_pipe, monkeypatch):
    few = {name: config for name, config in flux2.configs(small_pipe.flux.config).items() if name in flux2.NAMES[:2]}
    monkeypatch.setattr(flux2, "ROUNDS", 1)
    monkeypatch.setattr(flux2, "NAMES", tuple(few))
    monkeypatch.setattr(flux2, "configs", lambda base: few)
    seconds = flux2.seconds_per_step(small_pipe, batch=1)
    assert set(seconds) == {flux2.TWIN, "flux2"} and all(0 < s < 60 for s in seconds.values())


@pytest.mark.parametrize("variant", ["flux2-biases", "flux2@", "flux2@x", "flux2@-1", "flux"])
def test_a_variant_that_there_is_not(variant):
    with pytest.raises(ValueError, match="there is no variant .* choose one of flux2-twin, flux2, "):
        flux2.parse(variant)
    assert flux2.parse("flux2-swiglu@89") == ("flux2-swiglu", 89)
    assert flux2.run_name("flux2-twin", 88) == "twin" and flux2.run_name("flux2", 89) == "flux2@89"


def test_intervals_cover_what_they_should():
    """The difference of 500 paired prompts, against the normal approximation of a paired proportion."""
    rng = np.random.default_rng(3)
    twin = rng.random(500) < 0.4
    better = twin | (rng.random(500) < 0.2)
    cells = [[[int(ok), 1] for ok in row] for row in (better, twin)]
    gap, low, high = flux2_exam.difference(*cells)
    each = better.astype(float) - twin
    half = 1.96 * 100 * each.std() / 500**0.5
    assert gap == pytest.approx(100 * each.mean())
    assert (low, high) == (pytest.approx(gap - half, abs=0.4), pytest.approx(gap + half, abs=0.4))


def test_figures_of_finished_runs(tmp_path):
    about = {"parameters": 4_369_024, "steps": 7260, "batch": 32, "minutes": 95}
    for name, right in (("twin", 1), ("flux2", 3)):
        rows = {"everything": [[int(i < 2 * right), 1] for i in range(10)], "letter": [[0, 0]] * 10}
        (tmp_path / name).mkdir()
        (tmp_path / name / "exam.json").write_text(json.dumps(about | {"rows": rows}))
    table = flux2.figures_table(tmp_path).splitlines()
    assert "20.0 (" in table[4] and "twin" not in table[4]
    assert "60.0 (31.3 to 83.2)" in table[6] and "twin +40.0 (" in table[6] and "two samples" not in table[6]
    assert len(table) == 7


def test_without_a_run_of_the_twin_its_stored_sums_are_compared(tmp_path):
    """As two independent samples: Newcombe's formula with scipy's Wilson intervals."""
    stored = json.loads((WEIGHTS / "baselines.json").read_text())["twin"]["exam"]["rows"]
    assert "39.0 (34.8 to 43.3)" in flux2.figures_table(tmp_path)
    rows = {row: [[int(i < round(cell["percent"] * cell["n"] / 100)), 1] for i in range(cell["n"])]
            for row, cell in stored.items()}  # fmt: skip
    rows["everything"] = [[int(i < 220), 1] for i in range(500)]
    (tmp_path / "flux2").mkdir()
    file = tmp_path / "flux2" / "exam.json"
    about = {"parameters": 4_370_560, "steps": 6560, "batch": 32, "minutes": 95}
    file.write_text(json.dumps(about | {"rows": rows}))
    table = flux2.figures_table(tmp_path)
    new, old = (binomtest(right, 500).proportion_ci(0.95, "wilson") for right in (220, 195))
    low, high = 0.05 - math.hypot(0.44 - new.low, old.high - 0.39), 0.05 + math.hypot(new.high - 0.44, 0.39 - old.low)
    assert f"twin +5.0 ({100 * low:+.1f} to {100 * high:+.1f}) as two samples" in table


def any_scenes(prompts, seeds, size):
    """Images that have little to do with the prompts."""
    return [render(sample_scene(np.random.default_rng(seed), size=size)) for seed in seeds]


def test_the_claims_are_those_of_the_exam(monkeypatch):
    monkeypatch.setattr(exam, "batch_sampler", lambda *args: any_scenes)
    expected = exam.run_exam(any_scenes, 7, diversity_prompts=0)["rows"]
    claims = flux2_exam.examine(None, 7)
    assert set(claims) == set(expected) and all(len(cells) == 7 for cells in claims.values())
    for row, cells in claims.items():
        right, claimed = np.sum(cells, 0)
        assert claimed == expected[row]["n"] and 100 * right / claimed == pytest.approx(expected[row]["percent"])


def test_from_nothing_to_the_table(folder, small_pipe, monkeypatch, capsys, tmp_path):
    """All that the command does, with the smallest numbers; what is written opens again as a FLUX.2."""
    shutil.copytree(folder / "latents", tmp_path / "latents")
    folder, threads = tmp_path, torch.get_num_threads()
    monkeypatch.setattr(baselines, "make_shards", lambda *args: None)
    monkeypatch.setattr(flux2, "RECIPE", RECIPE)
    monkeypatch.setattr(flux2, "load", lambda name: small_pipe)
    monkeypatch.setattr(flux2, "steps_of", lambda *args: 2)
    monkeypatch.setattr(exam, "batch_sampler", lambda *args: any_scenes)
    path = flux2.train_flux2("flux2@5", folder, True, folder / "weights", prompts=7)
    assert json.loads(path.read_text())["steps"] == 2 and not (folder / "weights").exists()
    path = flux2.train_flux2("flux2", folder, True, folder / "weights", prompts=7)
    assert len(json.loads(path.read_text())["rows"]["everything"]) == 7
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "flux2@5: " in printed and "2 steps of 2" in printed
    written = load_model(folder / "weights" / "transformer_flux2")
    assert isinstance(written, Flux2) and written.config == flux2.flux2_config(small_pipe.flux.config)
