"""Existing files and folders are replaced atomically, restored, or left alone; never partly, and no other files."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints_errors import TINY

from fluxedu import files
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


def appears(kind: str, target: Path) -> None:
    """Somebody else's thing, in the place of a result."""
    if kind in ("a folder", "a file in it"):
        target.mkdir(exist_ok=kind == "a file in it")
        (target / "thesis.txt").write_text("mine")
    elif kind == "a file":
        target.write_text("mine")
    else:
        (target.parent / "elsewhere").mkdir()
        target.symlink_to("elsewhere" if kind == "a link" else "nowhere")


def everything_in(folder: Path) -> dict:
    """What is in a folder: the target of a link, the bytes of a file, None for a folder."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {
        name: p.readlink() if p.is_symlink() else None if p.is_dir() else p.read_bytes() for name, p in found.items()
    }


@pytest.mark.parametrize("kind", ["a folder", "a file", "a link", "a broken link", "a file in it"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_appears_while_a_result_is_written_stays(what, kind, tmp_path, monkeypatch):
    """A conversion takes minutes. Its target is checked again at the rename, by the system."""
    here, overwrite = tmp_path / "here", kind == "a file in it"
    here.mkdir()
    target, sync, seen = here / ("t.safetensors" if what == "file" else "t"), files._sync, {}
    save_file(Flux(TINY).state_dict(), tmp_path / "source.safetensors", config=TINY)
    if overwrite and what == "folder":
        save_folder(Flux(TINY).state_dict(), target, TINY)

    def sync_late(part):
        sync(part)
        appears(kind, target)
        seen.update({name: data for name, data in everything_in(here).items() if not name.startswith(".")})

    monkeypatch.setattr(files, "_sync", sync_late)
    with pytest.raises(CheckpointError, match="was created while this was written|also holds 'thesis.txt'"):
        to = "bfl" if what == "file" else "diffusers"
        convert_file(tmp_path / "source.safetensors", target, to, overwrite=overwrite)
    assert everything_in(here) == seen


def test_a_drive_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    file = save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(FileExistsError):
        files._rename_to_free_name(file, file)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"] and file.stat().st_size > 8


def test_links_are_followed(folder, tmp_path):
    """The link stays, what it leads to is replaced, and nothing is left beside either."""
    (tmp_path / "far").mkdir()
    folder = folder.rename(tmp_path / "far" / "transformer")
    (tmp_path / "link").symlink_to("far/transformer")
    (tmp_path / "new").symlink_to("far/new.safetensors")
    save_folder(Flux(TINY).state_dict(), tmp_path / "link", TINY, overwrite=True, max_shard_bytes=20_000)
    save_file({"w": torch.ones(2)}, tmp_path / "far" / "w.safetensors")
    (tmp_path / "w.safetensors").symlink_to("far/w.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors", overwrite=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert load_file(tmp_path / "far" / "w.safetensors")["w"].tolist() == [0, 0]
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="a symbolic link that leads back to itself"):
            save_file({"w": torch.ones(2)}, tmp_path / "loop.safetensors", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["far", "link", "loop.safetensors", "new", "w.safetensors"]
    assert sorted(os.listdir(tmp_path / "far")) == ["transformer", "w.safetensors"]


def test_an_old_folder_with_other_files_is_never_deleted(folder):
    """A writer was killed between its renames, and somebody took the name before the next one came."""
    old = folder.rename(folder.parent / ".transformer.12345678.old")
    (old / "thesis.txt").write_text("mine")
    save_folder(Flux(TINY).state_dict(), folder.parent / "other", TINY).rename(folder)
    save_folder(Flux(TINY).state_dict(), folder, TINY, overwrite=True)
    assert (old / "thesis.txt").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "w.safetensors")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is a pipe or device, but a file is to be written there"):
            save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors", overwrite=overwrite)
    assert (tmp_path / "w.safetensors").is_fifo()


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
