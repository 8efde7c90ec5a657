"""Sweeps on Dask, on a local cluster and on a scheduler's: the same bytes as from one process, whatever is killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_sweep import CONFIG, hashes, written
from typer.testing import CliRunner

from fluxedu import cli
from fluxedu.errors import SweepError
from fluxedu.sweep import from_dict, open_sweep, read_config, run, run_sweep

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")
psutil = pytest.importorskip("psutil")  # comes with it
FILES = 6
SMALL = {"prompts": ["a"], "settings": {"steps": 1, "height": 32, "width": 32}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The description, and the folder that one process draws without interruption."""
    folder = tmp_path_factory.mktemp("sweep")
    config = written(folder)
    return config, run_sweep(read_config(config), folder / "out")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a scheduler that runs by itself, and the process that keeps its two workers alive."""
    folder = tmp_path_factory.mktemp("cluster")
    address_file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}
    with (
        ended(subprocess.Popen([*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                                "--scheduler-file", address_file], **quiet)),
        ended(subprocess.Popen([*dask, "worker", "--scheduler-file", address_file, "--nworkers", "2",
                                "--nthreads", "1", "--memory-limit", "0", "--no-dashboard"], **quiet)) as workers,
    ):  # fmt: skip
        until(address_file.exists)
        with distributed.Client(scheduler_file=str(address_file)) as client:
            client.wait_for_workers(2, timeout=60)
            address = client.scheduler.address
        yield address, workers


@contextmanager
def ended(process: subprocess.Popen):
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def start(config: Path, folder: Path, *options: str, start_new_session=False, **variables: str) -> subprocess.Popen:
    """The command, as a user runs it."""
    command = [sys.executable, "-m", "fluxedu.cli", "sweep", str(config), "--out", str(folder), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(**variables), start_new_session=start_new_session, **pipes)


def until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.002)


def drawn(folder: Path) -> list[Path]:
    return list(folder.glob("shards/*.safetensors"))


def workers_of(pid: int) -> list:
    """The workers among the processes that a process has started."""
    return [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]


def unfinished(folder: Path) -> bool:
    return len(drawn(folder)) < FILES and not (folder / "manifest.json").exists()


def run_and_kill_a_worker(config: Path, out: Path, pid: int, **options) -> None:
    """Kill a worker of ``pid`` as soon as the next file is there, as the system does when memory runs out."""
    errors, done = [], len(drawn(out))

    def run() -> None:
        try:
            run_sweep(read_config(config), out, **options)
        except BaseException as error:
            errors.append(error)

    running = threading.Thread(target=run)
    running.start()
    until(lambda: len(drawn(out)) > done or not running.is_alive())
    workers_of(pid)[0].kill()
    late = not unfinished(out)
    running.join(120)
    assert not late, "it was killed too late to prove anything"
    assert not errors and not running.is_alive(), errors


# ---------------------------------------------------------------- a local cluster


def test_a_killed_worker_is_replaced(reference, tmp_path):
    run_and_kill_a_worker(reference[0], tmp_path / "out", os.getpid(), workers=2)
    assert hashes(tmp_path / "out") == hashes(reference[1]) and open_sweep(tmp_path / "out").damaged() == []


def test_a_killed_command_goes_on(reference, tmp_path):
    """Its workers end with it; finished files stay, the others come, and nothing else is left."""
    out = tmp_path / "out"
    with ended(start(reference[0], out, "--workers", "2")) as command:
        until(lambda: drawn(out) or command.poll() is not None)
        workers = workers_of(command.pid)
        command.kill()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive and unfinished(out)
    before = {path: path.stat().st_mtime_ns for path in drawn(out)}
    run_sweep(read_config(reference[0]), out)
    assert hashes(out) == hashes(reference[1])
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "a finished file was written again"


def test_ctrl_c_is_one_sentence(reference, tmp_path):
    """A terminal sends it to the workers as well, which say nothing."""
    out = tmp_path / "out"
    with ended(start(reference[0], out, "--workers", "2", start_new_session=True)) as command:
        until(lambda: drawn(out) or command.poll() is not None)
        os.killpg(command.pid, signal.SIGINT)
        _, errors = command.communicate(timeout=120)
    assert command.returncode == 2 and "Traceback" not in errors, errors[-2000:]
    sentence = "fluxedu: interrupted; the same command continues from here."
    assert sentence in errors.splitlines(), errors[-2000:]


# ---------------------------------------------------------------- a scheduler


def test_on_a_cluster_whose_workers_and_command_are_killed(reference, cluster, tmp_path):
    """The command first, then a worker; the cluster stays, and does not keep the model."""
    (address, workers), out = cluster, tmp_path / "out"
    with ended(start(reference[0], out, DASK_SCHEDULER_ADDRESS=address)) as command:
        until(lambda: drawn(out) or command.poll() is not None)
        command.kill()
    time.sleep(1)  # the cluster goes on with what it was drawing
    assert unfinished(out)
    run_and_kill_a_worker(reference[0], out, workers.pid, scheduler=address)
    assert hashes(out) == hashes(reference[1])
    with distributed.Client(address) as client:
        assert {info.currsize for info in client.run(run._load.cache_info).values()} == {0}


def test_an_error_on_a_worker_is_one_sentence(cluster, tmp_path):
    """The worker's own, as without Dask; the command prints it and nothing else."""
    config = written(tmp_path, CONFIG.replace("tokens: [a]", "tokens: [purple]"))
    command = ["sweep", str(config), "--out", str(tmp_path / "out"), "--scheduler", cluster[0]]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2 and "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if line.startswith("fluxedu: ")]
    assert len(lines) == 1 and re.fullmatch(r"fluxedu: cell \d+ \(.*\) cannot be drawn: .*'purple'.*\.", lines[0]), (
        lines
    )


def test_a_cluster_draws_in_one_environment_and_one_folder(cluster, tmp_path, monkeypatch):
    sweep, out = from_dict(SMALL), tmp_path / "out"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(run, "begin", lambda sweep, folder, environment: environment.update(torch="another"))
        with pytest.raises(SweepError, match="^worker .* but the sweep began with .*'another'"):
            run_sweep(sweep, out, scheduler=cluster[0])
    assert not drawn(out)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(run.Runner, "write", None)  # not on the workers
        run_sweep(sweep, out, scheduler=cluster[0])
    drawn(out)[0].unlink()
    with pytest.raises(SweepError, match="lacks shards/00000.safetensors: the workers must write into the folder"):
        run.finish(sweep, out)


def test_workers_that_die_of_a_file_again_and_again(cluster, tmp_path, monkeypatch):
    """Dask gives up after some attempts, and the sweep says so."""
    monkeypatch.setattr(run, "_work", lambda file, **options: os._exit(1))
    with pytest.raises(SweepError, match=r"^the workers were killed \(KilledWorker\); run the sweep again\.$"):
        run_sweep(from_dict(SMALL), tmp_path, scheduler=cluster[0])


# ---------------------------------------------------------------- refusals


def test_no_scheduler_and_no_workers(tmp_path):
    sweep = from_dict(SMALL)
    with distributed.LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as empty:
        with pytest.raises(SweepError, match=r"needs Dask workers of one thread each; those of tcp.* have \[\]\.$"):
            run_sweep(sweep, tmp_path, scheduler=empty.scheduler_address)
        address = empty.scheduler_address
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "0.5s"}),
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        silent_address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        for nobody in (silent_address, address, "nowhere", "tcp://127.0.0.1", "a b", "\x00", "http://127.0.0.1:1"):
            with pytest.raises(SweepError, match=r"^no Dask scheduler answers at .*\)\.$") as error:
                run_sweep(sweep, tmp_path, scheduler=nobody)
            assert "\n" not in str(error.value)
    for workers, scheduler in ((0, None), (1025, None), (True, None), (2, address)):
        reason = "a scheduler has its own" if scheduler else "four per core"
        with pytest.raises(SweepError, match=rf"^workers must be a whole number from 1 to .*{reason}"):
            run_sweep(sweep, tmp_path, workers, scheduler)
    assert not list(tmp_path.iterdir())


def test_dask_is_not_installed(reference, tmp_path, monkeypatch):
    """One process draws without it; several name what installs it."""
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SweepError, match=r"^several workers need distributed: pip install 'fluxedu\[sweep\]'\.$"):
        run_sweep(read_config(reference[0]), tmp_path / "out", workers=2)
    assert len(open_sweep(run_sweep(from_dict(SMALL), tmp_path / "out"))) == 1
