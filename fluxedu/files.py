"""Files that are written atomically, and locks between processes.

A result is written under a temporary name and renamed at the end. Whatever stops the writing (an error, Ctrl-C, a full
disk, SIGKILL, a power cut), the target is what it was before.

The temporary name is ``.name.xxxxxxxx.part``. The file ``.name.xxxxxxxx.lock`` beside it is locked for as long as the
writer lives, so the next writer of the same target can tell which parts were left by a killed process, and deletes
them. Replacing a folder takes two renames. A process killed between them leaves the old folder as
``.name.xxxxxxxx.old``, and the next writer restores it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from secrets import token_hex

import yaml
from filelock import FileLock, Timeout

from fluxedu.errors import CheckpointError

#: what diffusers and transformers call the weights in a folder
WEIGHTS = r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors"
MOST_JSON = 1 << 27  # bytes of a JSON file that is read
#: the files of a folder of weights; a folder that holds any other file is never replaced
_FOLDER_FILES = re.compile(rf"config\.json|{WEIGHTS}(\.index\.json)?")


@contextmanager
def atomic_path(target: Path, overwrite: bool = False, folder: bool = False) -> Iterator[Path]:
    """A path to write to (a file, or with ``folder`` an empty folder) that is renamed to ``target`` at the end.

    Raises CheckpointError if ``target`` exists and may not be replaced, now or at the end. Symbolic links are followed.
    """
    with _reported(target):
        target = Path(os.path.realpath(target))
        _remove_leftovers(target)
        _check_replaceable(target, overwrite, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.{token_hex(4)}.part"
    with _locked(part.with_suffix(".lock")):
        try:
            with _reported(target):
                part.mkdir() if folder else part.touch()
            yield part
            _sync(part)
            _replace(part, target, overwrite, folder)
        except BaseException:
            _remove(part)
            raise


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    """Turn the system's reason why nothing can be written at ``target`` into CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}.") from None
    except ValueError as error:  # a name that no file can have, or an error of ours
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{target}: {error}.") from None


def check_path(path: str | Path, error: type = CheckpointError) -> Path:
    """The path of a file, of a folder, or of nothing so far; raises ``error`` for all else.

    Opening a pipe, a socket or a device may block for ever, or never end, so they are refused by their kind.
    """
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Path(path)
    except (OSError, ValueError) as fault:  # no permission, links in a circle, a name that no file can have
        raise error(f"{path} cannot be opened: {getattr(fault, 'strerror', None) or fault}.") from None
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise error(f"{path} is a pipe, a socket or a device, not a file.")
    return Path(path)


def check_writable(target: Path) -> None:
    """Raise CheckpointError now if :func:`atomic_path` could not write a file to ``target``."""
    with suppress(InterruptedError), atomic_path(target, overwrite=True):
        raise InterruptedError  # nothing is written


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``: only one process at a time is inside, so it can read, change and write back."""
    with _locked(Path(folder) / ".lock"):
        yield


def write_text(path: str | Path, text: str) -> Path:
    """Write a small text file, replacing an existing one; it is written atomically.

    A path that is not an ordinary file (``/dev/stdout``, a pipe, a link) is written to directly and stays what it is.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
        path.write_text(text, encoding="utf-8")
        return path
    with atomic_path(path, overwrite=True) as part:
        part.write_text(text, encoding="utf-8")
    return path


def read_json(text: str | bytes):
    """Parse JSON; raises ValueError for invalid JSON, for a key that occurs twice, and for too deep nesting."""

    def without_duplicates(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except RecursionError:
        raise ValueError("the nesting is too deep") from None


def read_json_file(path: Path):
    """Parse a JSON file; raises CheckpointError, one sentence, also for a folder or a pipe in its place."""
    try:
        if not check_path(path).is_file():
            raise ValueError("it is not a file")
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"it has more than {MOST_JSON:,} bytes")
        return read_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML keeps the last value of a repeated key; here a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            if str(key.value) in keys:
                raise yaml.YAMLError(f"the key {key.value!r} occurs twice, again in line {key.start_mark.line + 1}")
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, most_bytes: int = 4 << 20):
    """Parse a YAML file into values that JSON can hold; raises ValueError, one sentence, if that is not possible.

    A key that occurs twice is an error, and so is an alias, with which a small file could become a huge object.
    """
    try:
        with check_path(path).open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise ValueError(f"more than {most_bytes:,} bytes")
        for token in yaml.scan(data.decode(), _StrictLoader):
            if isinstance(token, yaml.AliasToken):
                raise ValueError(f"it uses the alias *{token.value}; write the value out instead")
        values = yaml.load(data.decode(), _StrictLoader)
        try:
            json.dumps(values, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"a value needs quotes, or is not finite ({error})") from None
        return values
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        line = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"it cannot be read as YAML{line}: {problem}.") from None


def _check_replaceable(target: Path, overwrite: bool, folder: bool) -> None:
    """An existing target is only replaced with ``overwrite``, by the same kind, and if it holds only weights."""
    if target.is_symlink():
        raise CheckpointError(f"{target} is a symbolic link that leads back to itself.")
    if not target.exists():
        return
    if folder != target.is_dir() or not (folder or target.is_file()):
        existing = "folder" if target.is_dir() else "file" if target.is_file() else "pipe or device"
        raise CheckpointError(
            f"{target} is a {existing}, but a {'folder' if folder else 'file'} is to be written there."
        )
    if folder and not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists already; choose another name, or set overwrite.")
    if folder and (others := _other_files(target)):
        raise CheckpointError(f"{target} also holds {others[0]!r}, so it is not replaced.")


def _other_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not _FOLDER_FILES.fullmatch(path.name))


@contextmanager
def _locked(path: Path, timeout: float = -1) -> Iterator[bool]:
    """Hold the lock file ``path`` and delete it afterwards; yields whether the lock was obtained."""
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except (Timeout, OSError, NotImplementedError):  # another process holds it, or the drive has no locks
        pass
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows cannot delete an open file; there, release deletes it
                path.unlink()
            lock.release()


def _remove_leftovers(target: Path) -> None:
    """Delete what killed writers of ``target`` have left; restore an old folder if there is no new one."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\..{{8}}\.(part|lock|old)")
    siblings = list(target.parent.iterdir()) if target.parent.is_dir() else []
    for path in siblings:
        if not pattern.fullmatch(path.name):
            continue
        with _locked(path.with_suffix(".lock"), timeout=0) as writer_is_gone:
            if not writer_is_gone:
                continue
            if path.suffix == ".old" and not target.exists():
                with suppress(OSError):  # another process was faster
                    path.rename(target)
            elif path.suffix != ".old" or not _other_files(path):
                _remove(path if path.suffix == ".old" else path.with_suffix(".part"))


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _sync(part: Path) -> None:
    """Have all bytes on the disk, so that the rename cannot get there before them."""
    for path in [*part.iterdir(), part] if part.is_dir() else [part]:
        if path.is_dir() and os.name == "nt":  # Windows cannot sync folders
            continue
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(part: Path, target: Path, overwrite: bool, folder: bool) -> None:
    """Rename ``part`` to ``target``; raises CheckpointError if something appeared there that may not be replaced.

    The system checks this itself, at the moment of the rename: a link to a file needs a free name, and a folder can be
    renamed to a free name or an empty folder only. No system replaces a full folder in one step, so the old one is
    renamed first, and is not deleted if somebody has put other files into it.
    """
    old = part.with_suffix(".old")
    with _locked(target.parent / f".{target.name}.replaced.lock") if folder else nullcontext():
        try:
            if not folder:
                os.replace(part, target) if overwrite else _rename_to_free_name(part, target)
                return
            if os.name == "nt":  # Windows renames to free names only
                with suppress(OSError):
                    target.rmdir()
            if overwrite and target.is_dir() and not target.is_symlink():
                target.rename(old)
                if others := _other_files(old):
                    raise CheckpointError(f"{target} also holds {others[0]!r}, so it is not replaced.")
            part.rename(target)
        except BaseException as error:
            if old.exists():
                with suppress(OSError):  # somebody has taken the name: the next writer decides what to do with the old
                    old.rename(target)
            taken = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
            if isinstance(error, OSError) and error.errno in taken:
                raise CheckpointError(f"{target} was created while this was written; choose another name.") from None
            raise
        if old.exists():
            shutil.rmtree(old, ignore_errors=True)


def _rename_to_free_name(part: Path, target: Path) -> None:
    try:
        os.link(part, target)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL))  # a drive without links: an empty file reserves the name
        os.replace(part, target)
    else:
        part.unlink()
