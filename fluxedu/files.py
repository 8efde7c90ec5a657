"""A result appears whole or not at all: it is written under another name and renamed at the end.

Whatever stops the writing (an error, Ctrl-C, a full disk, SIGKILL, the power), the target is what it
was before. What a killed process leaves is called ``.name.xxxxxxxx.part`` and is swept away by the next
writer of the same target. A folder takes two renames to replace, since no system does it in one; what is
killed between them leaves the old folder as ``.name.xxxxxxxx.old``, and the next writer puts it back.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fluxedu.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is swept
    fcntl = None

#: what diffusers and transformers call the weights in a folder
WEIGHTS = r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors"
#: what a folder of weights is made of; a folder with anything else in it is never replaced
_OURS = re.compile(rf"config\.json|{WEIGHTS}(\.index\.json)?")


@contextmanager
def atomic_path(target: Path, overwrite: bool = False, folder: bool = False) -> Iterator[Path]:
    """A path to write to (a file, or with ``folder`` an empty folder) that becomes ``target`` at the end."""
    target = Path(os.path.abspath(target))
    _sweep(target)
    _refuse(target, overwrite, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    part, lock = _begun(target, folder)
    try:
        yield part
        _sync(part)
        _put(part, target)
    except BaseException:
        _remove(part)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _refuse(target: Path, overwrite: bool, folder: bool) -> None:
    """What is there stays there, unless ``overwrite`` and of the same kind."""
    if not target.exists():
        return
    if target.is_dir() != folder:
        there, wanted = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise CheckpointError(f"{target} is a {there}, but a {wanted} is to be written there.")
    if folder and not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists already; choose another name, or say overwrite.")
    strangers = sorted(p.name for p in target.iterdir() if not _OURS.fullmatch(p.name)) if folder else []
    if strangers:
        raise CheckpointError(f"{target} also holds {strangers[0]!r}, so it is not replaced.")


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """No other process is in here for the same folder: what is read in between is still so when it is written."""
    handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        if handle is not None:
            with suppress(OSError):  # a drive without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _begun(target: Path, folder: bool) -> tuple[Path, int | None]:
    """A new name to write to, and the lock on it. If another's :func:`_sweep` comes between the two, once more."""
    while True:
        part = _fresh(target, folder)
        if fcntl is None:
            return part, None
        lock, alone = _lock(part)
        if part.exists() and (lock is not None or alone):
            return part, lock
        if lock is not None:
            os.close(lock)


def _fresh(target: Path, folder: bool) -> Path:
    make = tempfile.mkdtemp if folder else tempfile.mkstemp
    made = make(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    if not folder:
        os.close(made[0])
        made = made[1]
    with suppress(FileNotFoundError):  # swept away already
        os.chmod(made, (0o777 if folder else 0o666) & ~_umask())
    return Path(made)


def _umask() -> int:
    """The user's own permissions, which temporary files do not get by themselves."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _lock(part: Path) -> tuple[int | None, bool]:
    """Hold ``part`` for as long as this process lives; None if that cannot be, and whether nobody else holds it."""
    try:
        handle = os.open(part, os.O_RDONLY)
    except FileNotFoundError:  # swept away
        return None, False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        return None, not isinstance(error, BlockingIOError)  # a drive without locks
    return handle, True


def _sweep(target: Path) -> None:
    """Remove what killed writers of the same target have left; an old folder without a new one goes back."""
    named = re.compile(rf"\.{re.escape(target.name)}\..{{8}}\.(part|old)")
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    for left in [path for path in beside if named.fullmatch(path.name)]:
        if left.suffix == ".old":
            with suppress(FileNotFoundError):  # another did it
                _remove(left) if target.exists() else left.rename(target)
            continue
        handle = _lock(left)[0] if fcntl is not None else None
        if handle is not None:  # nobody writes to it any more
            _remove(left)
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(part: Path) -> None:
    """Have the bytes on the disk before the name says that they are."""
    for path in [*part.iterdir(), part] if part.is_dir() else [part]:
        if path.is_dir() and os.name == "nt":  # Windows has no such thing for folders
            continue
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put(part: Path, target: Path) -> None:
    """Rename. A full folder cannot be replaced in one step, so the old one moves out of the way first."""
    if target.is_dir() and any(target.iterdir()):
        old = part.with_suffix(".old")
        target.rename(old)
        try:
            part.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(part, target)
