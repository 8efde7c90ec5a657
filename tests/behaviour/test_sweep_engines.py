"""A sweep elsewhere: on Ray, on Dask, and its table as parquet. Each where it is installed."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_sweep import COMMAND, CONFIG, hashes, until, written

from fluxedu.errors import SweepError
from fluxedu.sweep import open_sweep, read_config, work
from fluxedu.sweep.command import sweep
from fluxedu.sweep.folder import missing

ENGINES = {"ray": "ray", "dask": "distributed"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config, and the folder that one undisturbed process makes of it."""
    folder = tmp_path_factory.mktemp("sweep")
    config = written(folder)
    return config, work(read_config(config), folder / "out")


def holders(folder: Path) -> set[int]:
    """Who is drawing at this moment: the processes that hold a claim, as Linux tells."""
    claims = {path.stat().st_ino for path in folder.glob(".claims/[0-9]*")}
    lines = [
        line.split() for line in Path("/proc/locks").read_text().splitlines() if "FLOCK" in line and "->" not in line
    ]
    return {int(pid) for *_, pid, file, _, _ in lines if int(file.split(":")[-1]) in claims and int(pid) > 0}


@pytest.mark.parametrize("engine", ENGINES)
def test_on_an_engine_of_which_a_worker_is_killed(engine, whole, tmp_path):
    """The engine starts another, and the folder is that of one undisturbed process."""
    pytest.importorskip(ENGINES[engine])
    out, asked = tmp_path / "out", read_config(whole[0])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [*COMMAND, str(whole[0]), "--out", str(out), "--workers", "2", "--on", engine]
    runs = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        if Path("/proc/locks").exists():
            until(lambda: holders(out) or runs.poll() is not None, 120)
            drawing = holders(out)
            assert drawing and missing(asked, out), "it was too fast to be killed, or did not begin"
            os.kill(drawing.pop(), signal.SIGKILL)
        said, _ = runs.communicate(timeout=180)
    finally:
        runs.kill()
    assert runs.returncode == 0, said[-2000:]
    assert hashes(out) == hashes(whole[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_on_an_engine_is_one_sentence(engine, tmp_path):
    """The worker's own, as without an engine."""
    pytest.importorskip(ENGINES[engine])
    config = written(tmp_path, CONFIG.replace("tokens: [a]", "tokens: [purple]"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    command = [*COMMAND, str(config), "--out", str(tmp_path / "out"), "--on", engine]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    own = [line for line in done.stderr.splitlines() if line.startswith("fluxedu: ")]
    assert done.returncode == 2 and len(own) == 1 and "cell 0 " in own[0] and "'purple'" in own[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_not_installed(engine, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, ENGINES[engine], None)
    with pytest.raises(
        SweepError, match=f"^a sweep on {engine} needs {ENGINES[engine]}, which is not installed here.$"
    ):
        sweep(written(tmp_path), on=engine)


def test_the_table_as_parquet_says_the_same(whole):
    """Row for row what ``cells.csv`` and :func:`open_sweep` say, with numbers as numbers; and it is in the manifest.

    That it is the same to the last byte after a kill, the other tests see: they compare every file of the folder.
    """
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(whole[1] / "cells.parquet").to_pylist()
    results = open_sweep(whole[1])
    assert rows == results.cells and [type(row["seed"]) for row in rows] == [int] * len(results)
    with (whole[1] / "cells.csv").open(newline="") as file:
        assert [{name: str(value) for name, value in row.items()} for row in rows] == list(csv.DictReader(file))
    assert "cells.parquet" in results.manifest["files"] and results.damaged() == []


def test_killed_as_the_parquet_is_written(whole, tmp_path):
    """Half of it is on the disk, under another name: the next run writes it anew, the same."""
    pytest.importorskip("pyarrow")
    code = f"""
import os, signal
import pyarrow.parquet as parquet
from fluxedu.sweep import read_config, work
write = parquet.write_table
def half(table, path):
    write(table, path)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
parquet.write_table = half
work(read_config({str(whole[0])!r}), {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    out = tmp_path / "out"
    assert list(out.glob(".cells.parquet.*")) and not (out / "cells.parquet").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("shards/*")}
    work(read_config(whole[0]), out)
    assert hashes(out) == hashes(whole[1])
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
