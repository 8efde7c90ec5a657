"""Existing files and folders are replaced atomically, restored, or left alone; never partly, and no other files."""

import os
from pathlib import Path

import pytest
import torch
from test_checkpoints_errors import TINY

from fluxedu.checkpoints import convert_file, load_model, save_file, save_folder
from fluxedu.errors import CheckpointError
from fluxedu.files import write_text
from fluxedu.models import AutoEncoder, AutoEncoderConfig, Flux


@pytest.fixture
def folder(tmp_path):
    """A transformer's folder as diffusers has it."""
    return save_folder(Flux(TINY).state_dict(), tmp_path / "transformer", TINY)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut may keep a rename and lose data that was not synced: a name without the contents."""
    done, fsync, replace, rename = [], os.fsync, os.replace, Path.rename

    def noting(event, original):
        return lambda *arguments: (done.append((event, os.stat(arguments[0]).st_ino)), original(*arguments))[1]

    monkeypatch.setattr(os, "fsync", noting("sync", fsync))
    monkeypatch.setattr(os, "replace", noting("rename", replace))
    monkeypatch.setattr(Path, "rename", noting("rename", rename))
    file = write_text(tmp_path / "notes.txt", "contents")
    assert done == [("sync", file.stat().st_ino), ("rename", file.stat().st_ino)]
    for overwrite in (False, True):  # the second time in two renames
        done.clear()
        folder = save_folder(Flux(TINY).state_dict(), tmp_path / "t", TINY, max_shard_bytes=20_000, overwrite=overwrite)
        named = done.index(("rename", folder.stat().st_ino))
        synced = {inode for event, inode in done[:named] if event == "sync"}
        assert len(list(folder.iterdir())) > 3
        assert synced >= {folder.stat().st_ino, *(path.stat().st_ino for path in folder.iterdir())}


@pytest.mark.parametrize("other", ["flux.safetensors", "my-lora.safetensors", "notes.json"])
def test_a_folder_with_other_files_is_not_replaced(folder, other):
    (folder / other).write_bytes(b"mine")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=f"also holds '{other}', so it is not replaced"):
        save_folder(Flux(TINY).state_dict(), folder, TINY, overwrite=True)
    assert contents(folder) == before


def test_old_shards_are_replaced(folder):
    save_folder(Flux(TINY).state_dict(), folder, TINY, overwrite=True, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    save_folder(Flux(TINY).state_dict(), folder, TINY, overwrite=True)
    assert sorted(contents(folder)) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_failure_between_the_two_renames_restores_the_old_folder(folder, monkeypatch):
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
def test_the_old_folder_left_by_a_killed_writer_is_restored_or_deleted(folder, replaced):
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
def test_pipes_and_links_are_written_to_directly(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 10) == b"text" and pipe.is_fifo()
    os.close(reader)
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


def test_a_file_in_a_folder_has_the_folders_configuration(tmp_path):
    """Norm groups and scale do not follow from the shapes; with the official values the images would be wrong."""
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
    # the config.json does not belong to a file with another name
    save_file(Flux(TINY).state_dict(), tmp_path / "vae" / "flux.safetensors", config=TINY)
    assert load_model(tmp_path / "vae" / "flux.safetensors").config == TINY
