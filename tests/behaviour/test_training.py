"""The training loop: a run that was stopped and resumed is the run that never stopped."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fluxedu.models import AutoEncoder, AutoEncoderConfig
from fluxedu.nano.scenes import caption, render, sample_scene
from fluxedu.nano.text_tasks import facts
from training import data, stages, t5
from training.loop import Muon, Recipe, Run, bfloat16_is_faster, mixed_precision, orthogonalise

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
    monkeypatch.setattr(data, "make_shard", lambda index, *_: made.append(index) or {"latents": torch.zeros(1)})
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
