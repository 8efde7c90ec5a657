"""Recordings in folders read headers first and tensors when they are used; datasets, pickles, prompts and settings."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.instruments.recording import Recording, StoredNamed, open_recording

PROMPTS = ["a red circle left of a blue square", "a green star"]
OPTIONS = {"steps": 3, "height": 32, "width": 48, "progress": False}


@pytest.fixture
def folder(pipe, tmp_path):
    with fe.record("double.0.img_out", "single.*.out", "vec", to=tmp_path / "run"):
        pipe(PROMPTS, seed=[3, 4], **OPTIONS)
    return tmp_path / "run"


@pytest.fixture
def in_memory(pipe):
    with fe.record("double.0.img_out", "single.*.out", "vec") as rec:
        pipe(PROMPTS, seed=[3, 4], **OPTIONS)
    return rec


@pytest.fixture
def reads(monkeypatch):
    """The tensors that are read from files, by name."""
    names, tensor = [], StoredNamed.tensor.fget
    monkeypatch.setattr(StoredNamed, "tensor", property(lambda self: names.append(self.key) or tensor(self)))
    return names


def test_only_what_is_used_is_read(folder, in_memory, reads):
    rec = open_recording(folder)
    assert "vec" in rec and "double.9.x" not in rec and len(rec) == len(in_memory) and list(rec) == rec.keys()
    assert rec.entries("vec")[0][1].shape == in_memory.entries("vec")[0][1].shape and reads == []
    found, expected = rec["double.0.img_out"], in_memory["double.0.img_out"]
    assert (
        torch.equal(found.tensor, expected.tensor) and found.axes == expected.axes and found.coords == expected.coords
    )
    assert set(reads) == {"double.0.img_out#0"} and len(reads) == 2 * 3  # images x steps


def test_a_patch_reads_one_tensor_for_each_step(pipe, tmp_path, reads):
    with fe.record("double.0.img_out", to=tmp_path / "one") as source:
        pipe(PROMPTS[0], **OPTIONS)
    expected = pipe(PROMPTS[0], **OPTIONS).latents
    with fe.patch("double.0.img_out", source):
        patched = pipe(PROMPTS[0], **OPTIONS)
    assert torch.equal(patched.latents, expected) and len(reads) == OPTIONS["steps"]


def test_prompt_seed_and_settings_are_kept(folder, in_memory):
    for rec in (open_recording(folder), in_memory):
        first, second = (rec.requests[key] for key in sorted(rec.requests))
        assert (first["prompt"], first["seed"]) == (PROMPTS[0], 3) and (second["prompt"], second["seed"]) == (
            PROMPTS[1],
            4,
        )
        assert first["steps"] == 3 and first["solver"] == "euler" and first["latent shape"] == [4, 6]


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_recordings_pickle(folder, in_memory, where):
    rec = in_memory if where == "memory" else open_recording(folder)
    again = pickle.loads(pickle.dumps(rec))
    assert isinstance(again, Recording) and again.keys() == rec.keys()
    assert torch.equal(again["vec"].tensor, rec["vec"].tensor) and again.requests == rec.requests


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_of_tokens(folder, in_memory, workers):
    dataset = open_recording(folder).dataset("single.0.out", flatten="token")
    every = in_memory["single.0.out"].tensor  # [picture, step, token, channel]
    assert len(dataset) == every.shape[:3].numel()
    loader = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=workers)
    tokens = torch.cat(list(loader))
    expected = every.flatten(0, 2)
    assert tokens.shape == expected.shape and torch.equal(tokens.sum(1).sort().values, expected.sum(1).sort().values)
    for i in (0, 7, len(dataset) - 1, -1):
        assert torch.equal(dataset[i], expected[i])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_dataset_of_whole_values(in_memory):
    dataset = in_memory.dataset("vec")
    assert len(dataset) == 6 and torch.equal(dataset[4], in_memory["vec"].tensor[1, 1])
    with pytest.raises(InstrumentError, match="there is no axis 'token'; the axes are"):
        in_memory.dataset("vec", flatten="token")
