"""The miniature FLUX.2 that ships: which parts it has, how it is opened, and whether it draws as its figures say."""

import numpy as np
import pytest
import torch

import fluxedu as fe
from fluxedu.course import evidence
from fluxedu.errors import CheckpointError, RequestError
from fluxedu.nano import exam, networks, sizes
from fluxedu.nano.shipped import SHIPPED_MODELS, WEIGHTS
from fluxedu.sampling import FluxPipeline, T5Prompts
from training.flux2 import flux2_config

PROMPT = "a red circle left of a blue square"
FOLDER = SHIPPED_MODELS["nano-flux2"].transformer


@pytest.fixture(scope="module")
def pipe():
    return fe.load("nano-flux2")


@pytest.fixture(scope="module")
def base():
    """FLUX.1 in miniature, with the same encoders."""
    return fe.load("nano-base")


def test_it_reads_t5_alone(pipe, base):
    """The same text tokens as FLUX.1 in miniature, to the last bit; no CLIP and no pooled vector anywhere."""
    assert pipe.flux.config == sizes.FLUX2 == flux2_config(networks.FLUX)
    assert list(pipe.networks()) == ["t5", "flux", "ae"]
    encoded, flux1 = pipe.prompt_encoder([PROMPT, ""]), base.prompt_encoder([PROMPT, ""])
    assert torch.equal(encoded.txt, flux1.txt) and encoded.pooled.shape == (2, 0)
    names = {site.name for site in fe.sites(pipe)}
    assert "sample.txt" in names
    assert not any(name.startswith("clip.") or name in ("sample.pooled", "vec.text") for name in names)


def test_word_order_reaches_the_transformer(pipe, base):
    """The same tokens in another order: FLUX.1 gives the same velocity, FLUX.2 another one."""
    for model, depends in ((base, False), (pipe, True)):
        encoded = model.prompt_encoder([PROMPT])
        swapped = type(encoded)(encoded.txt.flip(1), encoded.pooled)
        a, b = (model(e, seed=1, steps=1, decode=False, progress=False).latents for e in (encoded, swapped))
        assert bool((a - b).norm() / a.norm() > 1e-3) == depends


def test_it_opens_from_a_folder_of_weights_too(pipe):
    again = fe.load(WEIGHTS, transformer=FOLDER)
    a, b = (p(PROMPT, seed=1, steps=1, decode=False, progress=False).latents for p in (pipe, again))
    assert torch.equal(a, b) and again.defaults == pipe.defaults and isinstance(again.prompt_encoder, T5Prompts)
    assert again.prompt_problem("an elephant")


def test_what_cannot_be_opened_says_so(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="changes 'double_blocks.* which this model does not have"):
        fe.load("nano-flux2", lora="hollow")
    for part in WEIGHTS.iterdir():
        if part.name != "scheduler":
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(CheckpointError, match=rf"{FOLDER} is FLUX\.2, which is loaded"):
        fe.load(tmp_path, transformer=FOLDER)  # no miniature, as far as one can see
    (tmp_path / FOLDER).unlink()
    monkeypatch.setattr("fluxedu.loading.WEIGHTS", tmp_path)
    with pytest.raises(RequestError, match="nano-flux2 does not ship yet; `fluxedu train --variant flux2 --ship-to"):
        fe.load("nano-flux2")


def test_networks_of_two_models_do_not_fit(pipe, base):
    with pytest.raises(RequestError, match="the pooled vector's width is 96, not 0"):
        FluxPipeline(base.prompt_encoder, pipe.flux, pipe.autoencoder, pipe.defaults, pipe.size)


def test_its_images_match_its_figures(pipe):
    """The first 20 of the 500 prompts again: no row may differ by more than chance allows."""
    stored = evidence.load("flux2")["runs"]["flux2"]["right"]
    rows = exam.run_exam(exam.batch_sampler(pipe, steps=20, guidance=5.0), count=20, diversity_prompts=0)["rows"]
    for row, entry in stored.items():
        share, n = entry["value"], rows[row]["n"]
        allowed = 4 * np.sqrt(share * (1 - share) / n) + 1 / n  # four standard errors and one item
        assert abs(rows[row]["percent"] / 100 - share) <= allowed, (row, rows[row], share)


def test_the_card_has_its_figures():
    card, run = (WEIGHTS / "README.md").read_text(), evidence.load("flux2")["runs"]["flux2"]
    (row,) = (line for line in card.splitlines() if line.startswith("| `flux2` |"))
    assert f"{run['parameters']:,} | {run['steps']} x {run['batch']}" in row
    assert all(f" {100 * entry['value']:.1f} " in row for entry in run["right"].values())
