"""Pipelines small enough to run in milliseconds: the real classes, the real tokenizers, random weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from runs import latents
from sizes import TINY

from fluxedu import probe
from fluxedu.models import AutoEncoder, CLIPTextEncoder, Flux, T5Encoder
from fluxedu.models.config import Sampling
from fluxedu.nano.sizes import TEXT_LENGTH
from fluxedu.nano.tokenizers import save_tokenizers
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import PromptEncoder, Tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with ``tokenizer`` and ``tokenizer_2``, as in the official repositories."""
    folder = tmp_path_factory.mktemp("tokenizers")
    save_tokenizers(folder)
    return folder


@pytest.fixture
def nothing_stays():
    """After the test nobody is watching."""
    yield
    assert not probe.is_watching()


@pytest.fixture
def everything_is_restored(pipe, nothing_stays):
    """After the test the pipeline draws what it drew before, and nobody is watching."""
    before = latents(pipe)
    yield
    assert torch.equal(latents(pipe), before)


@pytest.fixture
def noted():
    """``noted(name, figures)``: what a test measured, kept in the JSON file that FLUXEDU_FIGURES names, if it does."""

    def note(name, figures):
        if "FLUXEDU_FIGURES" in os.environ:
            path = Path(os.environ["FLUXEDU_FIGURES"])
            known = json.loads(path.read_text()) if path.exists() else {"command": "make bench", "gpu": None}
            path.write_text(json.dumps(known | {name: figures}, indent=2) + "\n")

    return note


@pytest.fixture(scope="session")
def tiny():
    """The sizes of the pipelines: CLIP's, T5's, the flow's and the autoencoder's."""
    return TINY


@pytest.fixture(scope="session")
def make_pipe(tokenizer_folder):
    """``make_pipe(embedded=True, shift=True, steps=4, sizes=TINY)``: a new pipeline, always the same one."""

    def make(embedded=True, shift=True, steps=4, sizes=TINY):
        clip, t5, flux, ae = sizes
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            models = [
                CLIPTextEncoder(clip),
                T5Encoder(t5),
                Flux(flux.with_(guidance_embed=embedded)),
                AutoEncoder(ae),
            ]
            for p in (p for network in models for p in network.parameters() if p.ndim > 1):
                p *= 3**0.5  # torch's own scale keeps a third of the variance: a network that hardly hears its input
        clip_ids = Tokenizer(
            tokenizer_folder / "tokenizer",
            "<|endoftext|>",
            "<|endoftext|>",
            clip.max_position_embeddings,
            truncate=True,
        )
        t5_ids = Tokenizer(tokenizer_folder / "tokenizer_2", "<pad>", "</s>", TEXT_LENGTH, truncate=False)
        prompts = PromptEncoder(clip_ids, models[0], t5_ids, models[1])
        defaults = Sampling(steps, 3.5 if embedded else 0.0, TEXT_LENGTH, shift)
        return FluxPipeline(prompts, models[2], models[3], defaults, size=32)

    return make


@pytest.fixture(scope="session")
def pipe(make_pipe):
    """With guidance as an input, as FLUX.1-dev. Shared: patch it with monkeypatch only."""
    return make_pipe()


@pytest.fixture(scope="session")
def plain_pipe(make_pipe):
    """Without that input, as FLUX.1-schnell: guidance is classifier-free."""
    return make_pipe(embedded=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"
