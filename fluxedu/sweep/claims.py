"""Who works on what: a lock that the system itself lets go of when its holder ends, however it ends.

Nothing depends on it but time: every file is written aside and renamed, and says the same whoever writes it. Where
locks do not reach (Windows, some network drives) two may draw the same cells, and the later one puts the same
bytes in the same place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CLAIMS = ".claims"


@contextmanager
def claimed(folder: Path, name: str, wait: bool = False) -> Iterator[bool]:
    """Is ``name`` ours for as long as the ``with`` lasts? False: a process that is alive has it."""
    if fcntl is None:
        yield True
        return
    (folder / CLAIMS).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / CLAIMS / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _lock(handle, wait)
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a drive without locks
        return True
    return True


def forget_claims(folder: Path) -> None:
    """All is done: what is left of the locks goes."""
    shutil.rmtree(folder / CLAIMS, ignore_errors=True)
