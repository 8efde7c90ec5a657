"""What is there is replaced whole, put back, or left alone; never half, and never a stranger's."""

import os
from pathlib import Path

import pytest
import torch
from test_checkpoints_errors import TINY

from fluxedu.checkpoints import convert_file, load_model, save_file, save_folder
from fluxedu.files import write_text
from fluxedu.errors import CheckpointError
from fluxedu.models import AutoEncoder, AutoEncoderConfig, Flux


@pytest.fixture
def folder(tmp_path):
    """A transformer's folder as diffusers has it."""
    return save_folder(Flux(TINY).state_dict(), tmp_path / "transformer", TINY)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stranger", ["flux.safetensors", "my-lora.safetensors", "notes.json"])
def test_a_folder_with_anything_elses_weights_is_not_replaced(folder, stranger):
    (folder / stranger).write_bytes(b"mine")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=f"also holds '{stranger}', so it is not replaced"):
        save_folder(Flux(TINY).state_dict(), folder, TINY, overwrite=True)
    assert contents(folder) == before


def test_shards_of_before_are_replaced(folder):
    save_folder(Flux(TINY).state_dict(), folder, TINY, overwrite=True, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    save_folder(Flux(TINY).state_dict(), folder, TINY, overwrite=True)
    assert sorted(contents(folder)) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_failure_between_the_two_renames_puts_the_old_folder_back(folder, monkeypatch):
    before, rename = contents(folder), Path.rename

    def fails(self, target):
        if self.suffix == ".part" and self.is_dir():
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        save_folder(Flux(TINY).state_dict(), folder, TINY, overwrite=True)
    assert contents(folder) == before
    assert os.listdir(folder.parent) == [folder.name]


@pytest.mark.parametrize("replaced", [True, False])
def test_what_a_kill_between_the_two_renames_left_is_put_back_or_swept(folder, replaced):
    before, old = contents(folder), folder.parent / ".transformer.12345678.old"
    if replaced:  # killed after the second rename: the new folder is there
        save_folder(Flux(TINY).state_dict(), old, TINY)
    else:
        folder.rename(old)
    with pytest.raises(CheckpointError, match="exists already"):
        save_folder(Flux(TINY).state_dict(), folder, TINY)
    assert contents(folder) == before
    assert os.listdir(folder.parent) == [folder.name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_and_a_link_stay_what_they_are(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "told")
    assert os.read(reader, 10) == b"told" and pipe.is_fifo()
    os.close(reader)
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "told")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "told"


def test_a_file_from_a_folder_has_the_folders_configuration(tmp_path):
    """No shape tells norm groups and scale: taken for the official ones, the pictures would be wrong."""
    config = AutoEncoderConfig(
        ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, scale_factor=0.5, shift_factor=0.25
    )
    autoencoder = AutoEncoder(config).eval()
    file = save_folder(autoencoder.state_dict(), tmp_path / "vae", config) / "diffusion_pytorch_model.safetensors"
    loaded = load_model(file)
    assert loaded.config == config
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(image), autoencoder.encode(image))
    assert load_model(convert_file(file, tmp_path / "ae.safetensors", to="bfl")).config == config
    # beside a file with a name of its own, a config.json is somebody else's
    save_file(Flux(TINY).state_dict(), tmp_path / "vae" / "flux.safetensors", config=TINY)
    assert load_model(tmp_path / "vae" / "flux.safetensors").config == TINY
