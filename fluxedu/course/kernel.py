"""A student's notebook in a process of its own, which cannot reach another student's and is killed whole at the end.

It is always a Python kernel of this installation. Its home, its temporary files and its Jupyter folders are in a new
folder, and its environment holds only what Python needs. What its cells print never leaves it, because only the channel
of replies is connected, and a reply that is too large is dropped. It is not a sandbox: code has all rights of the user.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import site
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty
from subprocess import DEVNULL

import matplotlib
import psutil
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec

GRACE = 5  # seconds that a cell has to stop after an interrupt
STARTUP = 120  # seconds until the first reply
MOST_BYTES = 48 << 20  # of a reply
#: the environment variables that a notebook gets; no other may hold a secret that a student could read
ALLOWED = re.compile(
    r"PATH|LANG|LANGUAGE|LC_\w+|TZ|PYTHONPATH|(DY)?LD_LIBRARY_PATH|CONDA_PREFIX|VIRTUAL_ENV"
    r"|(OMP|MKL|OPENBLAS)_NUM_THREADS|SYSTEMROOT|WINDIR|SYSTEMDRIVE|COMSPEC|PATHEXT|NUMBER_OF_PROCESSORS",
    re.IGNORECASE,
)
#: runs before the student's cells, which therefore need not wait for imports; a system may lack such limits
FIRST_CELL = """
import fluxedu.course.answers as _fluxedu
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, ({bytes}, {bytes}))
except (ImportError, ValueError, OSError):
    pass
"""


class Stopped(Exception):
    """The notebook cannot run any further; the message is a clause that says why."""


class _OwnKernel(KernelManager):
    """Starts this installation's kernel, whatever kernels the user or a notebook has."""

    kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
    )


class Kernel:
    """Use as a context manager: ``with Kernel(120, 900, 16) as kernel: kernel.execute("x = 1", "code cell 1")``.

    - cell_limit, notebook_limit: seconds of one call of :meth:`execute`, and of all of them
    - memory: the limit of the address space in GB, where the system supports one
    """

    def __init__(self, cell_limit: float, notebook_limit: float, memory: int):
        self.cell_limit, self.notebook_limit, self.memory = cell_limit, notebook_limit, memory
        self.what = "the start"  # the cell that runs
        self.notes: list[str] = []  # which limits interrupted or refused a cell, without ending the run

    def __enter__(self) -> Kernel:
        self.folder = tempfile.TemporaryDirectory(prefix="fluxedu-", ignore_cleanup_errors=True)
        _adopt_orphans()
        self.others = set(psutil.Process().children(recursive=True))
        self.deadline = time.monotonic() + 2 * STARTUP
        try:
            root = Path(self.folder.name)
            self.manager = _OwnKernel(connection_file=str(root / "kernel.json"))
            self.manager.start_kernel(env=_environment(root), cwd=str(root / "work"), stdout=DEVNULL, stderr=DEVNULL)
            self.client = self.manager.client()
            context = self.client.context  # a larger message ends the connection
            context.maxmsgsize, context.rcvhwm, context.sndtimeo = MOST_BYTES, 4, 1000 * GRACE
            self.client.start_channels(iopub=False, stdin=False, hb=False, control=False)
            if self._reply(self.client.kernel_info(), STARTUP) is None:
                raise Stopped(f"its process did not start within {STARTUP} s")
            first = self.client.execute(FIRST_CELL.format(bytes=self.memory * 10**9), store_history=False)
            if (self._reply(first, STARTUP) or {}).get("status") != "ok":
                raise Stopped("its process could not import fluxedu")
            self.deadline = time.monotonic() + self.notebook_limit
        except BaseException:
            self.__exit__()
            raise
        return self

    def execute(self, code: str, what: str, expression: str = "None") -> str | None:
        """Run a cell, which errors need not end; returns the repr of ``expression``, or None if there is none.

        ``what`` names the cell. Raises Stopped if its process ended, or had to be ended, because of a limit.
        """
        self.what = what
        message = self.client.execute(
            code, allow_stdin=False, stop_on_error=False, user_expressions={"wanted": expression}
        )
        reply = self._reply(message, self.cell_limit)
        if reply is None:
            limit = f"{self.cell_limit:g} s, the limit of a cell"
            if time.monotonic() >= self.deadline:
                raise Stopped(f"the notebook reached its limit of {self.notebook_limit:g} s in {what}")
            self.notes.append(f"{what} was stopped after {limit}")
            self.manager.interrupt_kernel()
            try:
                question = self.client.kernel_info()  # answered when the cell has ended
            except Exception:  # noqa: BLE001 - the connection has ended
                most = f"a reply, with the text of an error, may have {MOST_BYTES >> 20} MB"
                raise Stopped(f"its process cannot be reached since {what}; {most}") from None
            if self._reply(question, GRACE) is None:
                raise Stopped(f"{what} took longer than {limit}, and ignored its interrupt")
            return None
        error = f"{reply.get('ename')} {reply.get('evalue')}"[:1000]
        if re.search("MemoryError|bad_alloc|[Cc]an.?not allocate|can't allocate|not enough memory", error):
            self.notes.append(f"{what} needed more memory than the limit of {self.memory} GB")
        try:
            return reply["user_expressions"]["wanted"]["data"]["text/plain"]
        except (KeyError, TypeError):  # the cell raised an error, or its process replies what it likes
            return None

    def _reply(self, message: str, seconds: float) -> dict | None:
        """The content of the reply to a message, or None if there is none in time. Raises Stopped if none can come."""
        end = min(time.monotonic() + seconds, self.deadline)
        while (left := end - time.monotonic()) > 0:
            try:
                reply = self.client.get_shell_msg(timeout=min(left, 0.5))
                if reply["parent_header"]["msg_id"] == message and isinstance(reply["content"], dict):
                    return reply["content"]
            except Empty:
                if not self.manager.is_alive():
                    code = getattr(self.manager.provisioner.process, "returncode", None) or 0
                    end = f"signal {-code}" if code < 0 else f"status {code}"
                    limit = f"; its limit of memory is {self.memory} GB" if code < 0 else ""
                    raise Stopped(f"its process ended ({end}) in {self.what}{limit}") from None
            except (ValueError, KeyError, TypeError, RecursionError):  # a message that is none
                continue
        return None

    def __exit__(self, *_) -> None:
        if hasattr(self, "client"):
            self.client.stop_channels()
            self.client.context.destroy(linger=0)
        self._kill_all()
        _adopt_orphans(False)
        with suppress(Exception):  # it is dead; this closes what is left of it here
            self.manager.shutdown_kernel(now=True)
        self.folder.cleanup()

    def _kill_all(self) -> None:
        """Kill the process with all that it has started, also what has left its group or its session.

        Linux gives orphans to this process, so that none can hide; elsewhere, one that left its group may live on.
        """
        process = getattr(getattr(self.manager, "provisioner", None), "process", None)
        for _ in range(100):  # one that starts others faster than they are killed wins, after some seconds
            left = [p for p in psutil.Process().children(recursive=True) if p not in self.others]
            if process is not None and hasattr(os, "killpg"):
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
            for call in ("suspend", "kill"):  # first all are stopped, so that none starts another one
                for p in left:
                    with suppress(psutil.Error):
                        getattr(p, call)()
            if not left:
                return
            psutil.wait_procs(left, timeout=0.1)


def _adopt_orphans(adopt: bool = True) -> None:
    """On Linux, make processes whose parent ended children of this one, and not of the first process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, int(adopt), 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _environment(root: Path) -> dict[str, str]:
    """The variables of a notebook's process; the folders that they name are made in ``root``."""
    home, temporary = root / "home", root / "tmp"
    fonts = home / "matplotlib"
    for folder in (home, temporary, fonts, root / "work"):
        folder.mkdir()
    with suppress(OSError):  # the list of the system's fonts takes seconds to make
        for file in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
            shutil.copy(file, fonts)
    folders = {"IPYTHONDIR": home / "ipython", "MPLCONFIGDIR": fonts}
    folders |= {f"JUPYTER_{name}_DIR": home / "jupyter" / name.lower() for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= dict.fromkeys(("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA"), home)
    folders |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), temporary)
    kept = {name: value for name, value in os.environ.items() if ALLOWED.fullmatch(name)}
    own = {"MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}  # a GPU's address space exceeds the limit of memory
    own |= {"PYTHONUSERBASE": site.getuserbase()}  # the packages of `pip install --user`
    return kept | own | {name: str(folder) for name, folder in folders.items()}
