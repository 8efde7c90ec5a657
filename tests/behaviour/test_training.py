"""The training loop: a run that was stopped and resumed is the run that never stopped."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import training
from fluxedu.errors import CheckpointError
from fluxedu.models import AutoEncoder, AutoEncoderConfig
from fluxedu.nano.scenes import caption, render, sample_scene
from fluxedu.nano.text_tasks import facts
from training import data, stages, t5
from training.files import read_file
from training.loop import Muon, Recipe, Run, bfloat16_is_faster, mixed_precision, orthogonalise

KEYS = ("latents", "labels", "t5", "clip")
RECIPE = Recipe(steps=8, lr=0.01, batch=4, warmup=2, decay=0.5, muon=True)


def run_of(folder, recipe=RECIPE):
    torch.manual_seed(0)
    return Run("toy", nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), recipe, folder)


def loss_for(run, stop_at=None):
    def loss(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        return (run.model(x) - x[:, :3]).square().mean(), {}

    return loss


def test_resumed_is_uninterrupted(tmp_path):
    full = run_of(tmp_path / "whole")
    full.train(loss_for(full))

    first = run_of(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        first.train(loss_for(first, stop_at=5))
    first.save()
    second = run_of(tmp_path / "parts")
    assert second.step == 5
    second.train(loss_for(second))

    for key, value in full.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
        assert torch.equal(full.average[key], second.average[key]), key


def test_ctrl_c_stops_between_steps_and_loses_none(tmp_path):
    """The signal comes in the middle of step 5: that step is finished, saved and resumed from."""
    full = run_of(tmp_path / "whole")
    full.train(loss_for(full))

    def interrupted(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss_for(first)(step)

    first, before = run_of(tmp_path / "parts"), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        first.train(interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    second = run_of(tmp_path / "parts")
    assert second.step == 6
    second.train(loss_for(second))
    for key, value in full.average.items():
        assert torch.equal(value, second.average[key]), key


def test_a_state_made_from_something_else_is_not_resumed(tmp_path):
    run = run_of(tmp_path)
    run.train(loss_for(run))
    for other in (dict(recipe=dataclasses.replace(RECIPE, steps=9)), dict(made_from="other weights")):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        with pytest.raises(ValueError, match="made by another recipe or from other weights; .*--no-resume"):
            Run("toy", model, other.get("recipe", RECIPE), tmp_path, made_from=other.get("made_from", ""))
        assert Run("toy", model, other.get("recipe", RECIPE), tmp_path, resume=False).step == 0
    (tmp_path / "toy" / "state.safetensors").write_bytes(b"12345678{")
    with pytest.raises(ValueError, match="damaged"):
        run_of(tmp_path)


def test_a_step_without_a_gradient_is_an_error_and_not_saved(tmp_path):
    run = run_of(tmp_path)

    def loss(step):
        x = run.model(torch.ones(4, 6)).sum()
        return (x if step < 7 else x + (0 * x).sqrt()), {}  # still finite, but not its gradient

    with pytest.raises(FloatingPointError, match="gradient of toy is nan at step 7"):
        run.train(loss)
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_no_resume_is_for_the_named_stage_only(tmp_path, monkeypatch):
    overwrite = {}

    def stand_in(name):
        return lambda *args: overwrite.setdefault(name, args[-1])

    monkeypatch.setattr(stages.autoencoder, "train", stand_in("autoencoder"))
    monkeypatch.setattr(stages.t5, "train", stand_in("t5"))
    monkeypatch.setattr(
        stages.clip, "train", lambda *args: overwrite.setdefault("clip", args[-1]) and SimpleNamespace(text=0)
    )
    monkeypatch.setattr(stages.data, "make_shards", stand_in("latents"))
    monkeypatch.setattr(stages.flow, "train", stand_in("flow"))
    monkeypatch.setattr(stages, "fingerprint", lambda *networks: "")
    monkeypatch.setattr(stages, "sample_report", lambda *args: None)
    stages.run_stages(["flow"], tmp_path, resume=False, ship_to=tmp_path)
    assert overwrite == {"autoencoder": True, "t5": True, "clip": True, "latents": True, "flow": False}


def test_latents_of_another_autoencoder_are_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        data, "make_shard", lambda index, *_: made.append(index) or dict(zip(KEYS, torch.zeros(4, 1), strict=True))
    )
    torch.manual_seed(0)
    one, other = (AutoEncoder(AutoEncoderConfig(ch=4, ch_mult=(1,), num_res_blocks=1, norm_groups=2)) for _ in range(2))
    data.make_shards(2, tmp_path, one)
    data.make_shards(3, tmp_path, one)
    assert made == [0, 1, 2]
    data.make_shards(3, tmp_path, other)
    assert made == [0, 1, 2] * 2


def test_a_finished_stage_is_taken_as_it_is(tmp_path):
    run = run_of(tmp_path)
    run.train(loss_for(run))
    again = run_of(tmp_path)
    again.train(lambda step: pytest.fail("a finished run made a step"))
    for key, value in run.average.items():
        assert torch.equal(value, again.average[key])


def test_the_rate_warms_up_stays_and_falls_to_nothing():
    rates = [Recipe(steps=100, lr=1, batch=1, warmup=10, decay=0.4).rate(s) for s in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[30] == 1 and rates[60] == 1
    assert rates[80] == pytest.approx(0.5) and rates[100] == 0


def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path):
    run = run_of(tmp_path)
    with pytest.raises(FloatingPointError, match="loss of toy is nan at step 0"):
        run.train(lambda step: (torch.tensor(float("nan"), requires_grad=True), {}))


def test_batches_depend_on_the_step_only():
    captions = t5.Captions()
    a, b, c = captions(3, 4), captions(3, 4), captions(4, 4)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["source"], c["source"])


def test_facts_keep_what_the_caption_says():
    rng = np.random.default_rng(0)
    for _ in range(50):
        _, claim = caption(sample_scene(rng), rng)
        stated = facts(claim)
        assert all(color in stated and form in stated for color, form, _ in claim.objects)
        assert all(name in stated for _, name, _ in claim.relations)


def test_patch_labels_name_what_is_drawn():
    rng = np.random.default_rng(1)
    scene = dataclasses.replace(sample_scene(rng, size=(128, 128), count=1), texture=0)
    labels = data.patch_labels(scene)
    thing = scene.objects[0]
    assert labels.shape == (2, 8, 8)
    here = labels[:, int(thing.y) // 16, int(thing.x) // 16]
    assert thing.form in ("ring", "C", "U", "L") or (here > 0).all()
    ground = np.abs(render(scene).astype(int) - render(scene)[0, 0]).max(-1) < 30
    empty = ground.reshape(8, 16, 8, 16).all(axis=(1, 3))
    assert (labels[:, empty] == 0).all()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (24, 24)])
def test_muon_is_torchs(shape):
    """Step by step beside torch's own, in the dtype that torch's uses."""
    mine, theirs = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    ours = Muon([mine], lr=0.01, weight_decay=0.1, dtype=torch.bfloat16)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(10 + step))
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        ours.step(), reference.step()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_muon_makes_all_directions_alike(shape):
    """Against the singular value decomposition: the same directions, all singular values near 1."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalise(matrix, torch.float32) @ v.T  # diagonal, where the directions are the same
    assert (inside - inside.diag().diag()).abs().max() < 1e-4
    assert 0.5 < inside.diag().min() and inside.diag().max() < 1.5


def test_bfloat16_only_where_it_pays():
    """What autocast does is what was measured, and float32 where bfloat16 is emulated."""
    with mixed_precision():
        product = torch.ones(4, 4) @ torch.ones(4, 4)
    assert product.dtype == (torch.bfloat16 if bfloat16_is_faster() else torch.float32)


# ---------------------------------------------------------------- damaged states, full disks, killed processes


def states_of(run) -> dict:
    """Damages of a state file, each a function of its metadata and tensors."""
    optimizer = "optimizer/0/0/exp_avg"
    return {
        "no step": lambda m, t: m.pop("step"),
        "a step that is no number": lambda m, t: m.update(step="x"),
        "a step after the end": lambda m, t: m.update(step="9"),
        "a negative step": lambda m, t: m.update(step="-1"),
        "no seconds": lambda m, t: m.pop("seconds"),
        "seconds that are no number": lambda m, t: m.update(seconds="nan"),
        "a weight is missing": lambda m, t: t.pop("model/0.weight"),
        "an average is missing": lambda m, t: t.pop("average/0.weight"),
        "a weight too many": lambda m, t: t.update({"model/9.weight": torch.ones(1)}),
        "another shape": lambda m, t: t.update({"average/0.weight": torch.ones(3, 3)}),
        "another dtype": lambda m, t: t.update({"model/0.weight": t["model/0.weight"].double()}),
        "no optimiser": lambda m, t: [t.pop(key) for key in list(t) if key.startswith("optimizer/0")],
        "half an optimiser": lambda m, t: t.pop(optimizer),
        "an optimiser of another shape": lambda m, t: t.update({optimizer: torch.ones(5)}),
        "an optimiser of another weight": lambda m, t: t.update({"optimizer/0/99/step": torch.tensor(1.0)}),
        "an optimiser without a number": lambda m, t: t.update({"optimizer/0/x/step": torch.tensor(1.0)}),
        "an optimiser without a slot": lambda m, t: t.update({"optimizer/0/0": torch.tensor(1.0)}),
    }


@pytest.mark.parametrize("damage", states_of(None))
def test_a_damaged_state_is_one_sentence(tmp_path, damage):
    run = run_of(tmp_path)
    run.train(loss_for(run))
    metadata, tensors = read_file(run.path)
    states_of(run)[damage](metadata, tensors)
    save_file(tensors, run.path, metadata)
    with pytest.raises(CheckpointError, match=r"state.safetensors is damaged; .* start this stage again with --no-re"):
        run_of(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_state_that_is_no_file(tmp_path, make):
    (tmp_path / "toy").mkdir()
    make(tmp_path / "toy" / "state.safetensors")
    with pytest.raises(CheckpointError, match="but a file is to be written there"):
        run_of(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path):
    (tmp_path / "toy").write_text("mine")
    with pytest.raises(CheckpointError, match=r"state.safetensors cannot be written: "):
        run_of(tmp_path)


def test_a_place_for_the_weights_that_cannot_be_written_to_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "run_stages", lambda *_: pytest.fail("it trained first"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file.README.md cannot be written: "):
        training.train(True, None, None, tmp_path / "runs", True, tmp_path / "file")


def test_a_full_disk_stops_training_with_a_sentence_and_keeps_the_last_state(tmp_path):
    """No file may become longer than 100 bytes, which fails as a full disk does."""
    resource = pytest.importorskip("resource", reason="limits exist only on Unix")
    run = run_of(tmp_path)
    run.train(loss_for(run))
    before = run.path.read_bytes()
    run.step = 3
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written at step 3: .*too large.*; the same command cont"):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.path.read_bytes() == before and os.listdir(run.folder) == ["state.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "other keys"])
def test_damaged_latents_are_made_again(tmp_path, monkeypatch, damage):
    made = []
    shard = dict(zip(KEYS, torch.zeros(4, 1), strict=True))
    monkeypatch.setattr(data, "make_shard", lambda index, *_: made.append(index) or shard)
    encoder = AutoEncoder(AutoEncoderConfig(ch=4, ch_mult=(1,), num_res_blocks=1, norm_groups=2))
    data.make_shards(3, tmp_path, encoder)
    path = tmp_path / "latents" / "0001.safetensors"
    if damage == "other keys":
        save_file({"x": torch.zeros(1)}, path, read_file(path)[0])
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size - 1)
    data.make_shards(3, tmp_path, encoder)
    assert made == [0, 1, 2, 1] and len(data.Latents(tmp_path).shards) == 3
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="0001.safetensors is not a file; delete it"):
        data.make_shards(3, tmp_path, encoder)


TRAINING = """
import time
from training.loop import Prefetch
if __name__ == "__main__":
    with Prefetch(divmod, batch=2) as batches:
        batches(0)
        print(*batches.pool._processes, flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_training_leaves_no_process_behind(tmp_path):
    """The process that makes the batches ends with the one that trains."""
    (tmp_path / "script.py").write_text(TRAINING)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "script.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        worker = int(process.stdout.readline())
        os.kill(worker, 0)  # it is there
        process.kill()
    end = time.monotonic() + 10
    try:
        while time.monotonic() < end and is_running(worker):
            time.sleep(0.05)
        assert not is_running(worker)
    finally:
        if is_running(worker):
            os.kill(worker, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """A zombie, which nobody has waited for, does not run."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return False
