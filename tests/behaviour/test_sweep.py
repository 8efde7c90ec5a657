"""A sweep's promises: what a cell holds, one folder for any number of processes, and that none of them is needed."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fluxedu as fe
from fluxedu.errors import SweepError
from fluxedu.sweep import from_dict, open_sweep, read_config, work
from fluxedu.sweep.claims import claimed
from fluxedu.sweep.folder import missing

CONFIG = """
prompts: [a red circle left of a blue square, a green triangle]
seeds: {from: 3, count: 2}
interventions:
  as it is: []
  no head 2: {ablate: double.1.heads, heads: [2]}
  gates and blue:
    - {scale: single.*.gate, by: 0.5, times: [0.5, 1.0]}
    - {patch: double.1.img_mlp_contribution, from: {prompt: a blue circle, seed: 0}}
settings: {steps: 2, height: 64, width: 64}
record: [{sites: double.1.attn.map, reduce: head-mean, tokens: [a], steps: 0}]
lens: {word_maps: {words: [a], at_steps: [0]}}
shard: 2
"""
COMMAND = [sys.executable, "-m", "fluxedu.cli", "sweep"]


def written(folder: Path, text: str = CONFIG) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config, and the folder that one undisturbed process makes of it."""
    folder = tmp_path_factory.mktemp("sweep")
    config = written(folder)
    return config, work(read_config(config), folder / "out")


def start(config: Path, folder: Path, **env: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [*COMMAND, str(config), "--out", str(folder)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.002)


# ---------------------------------------------------------------- what a cell is


def test_cells_are_the_product_in_order():
    sweep = from_dict({"prompts": ["a", "b"], "seeds": [5, 1], "interventions": {"x": [], "y": []}, "shard": 3})
    cells = [(c.prompt, c.seed, c.intervention) for shard in sweep.shards for c in sweep.cells(shard)]
    assert cells == [(p, s, i) for p in "ab" for s in (5, 1) for i in "xy"]
    assert [len(sweep.cells(shard)) for shard in sweep.shards] == [3, 3, 2]
    assert from_dict(json.loads(json.dumps(sweep.to_dict()))) == sweep


def test_a_cell_holds_what_the_instruments_give(whole):
    """Each kind of intervention, beside the same one made by hand."""
    results, pipe = open_sweep(whole[1]), fe.load()
    asked = {"seed": 4, "steps": 2, "height": 64, "width": 64, "progress": False}
    prompt = "a red circle left of a blue square"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fe.record("double.1.attn.map", reduce="head-mean", tokens=["a"], steps=0) as map_:
            plain = pipe(prompt, **asked)
        with fe.ablate("double.1.heads", heads=[2]):
            ablated = pipe(prompt, **asked)
        with fe.record("double.1.img_mlp_contribution") as blue:
            pipe("a blue circle", **{**asked, "seed": 0})
        half = fe.intervene("single.*.gate", lambda x, ctx: 0.5 * x, times=(0.5, 1.0))
        with half, fe.patch("double.1.img_mlp_contribution", blue):
            both = pipe(prompt, **asked)
    finally:
        torch.set_num_threads(threads)
    for number, expected in ((3, plain), (4, ablated), (5, both)):
        cell = results.cells[number]
        assert (cell["prompt"], cell["seed"]) == (prompt, 4)
        assert torch.equal(results[number]["latent"].tensor, expected.latents[0])
        assert np.array_equal(results[number]["image"].tensor, np.asarray(expected.images[0]))
    assert not torch.equal(plain.latents, ablated.latents) and not torch.equal(plain.latents, both.latents)
    seen = results[3]["double.1.attn.map"]
    assert torch.equal(seen.tensor, map_["double.1.attn.map"].tensor) and seen.axes == ("step", "query", "key")


def test_a_cell_that_cannot_be_drawn_is_named(tmp_path):
    sweep = from_dict(
        {"prompts": ["a red circle"], "interventions": {"x": {"ablate": "*.attn.map", "tokens": ["blue"]}}}
    )
    with pytest.raises(SweepError, match=r"cell 0 \(prompt 'a red circle', seed 0, 'x'\).* does not say 'blue'"):
        work(sweep, tmp_path)
    assert not list(tmp_path.glob("shards/*"))


# ---------------------------------------------------------------- processes


def test_the_number_of_processes_cannot_be_seen(whole, tmp_path):
    done = subprocess.run(
        [*COMMAND, str(whole[0]), "--out", str(tmp_path / "out"), "--workers", "2"], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(whole[1])
    assert open_sweep(tmp_path / "out").damaged() == []


def test_a_worker_killed_in_the_middle_is_replaced_by_the_others(whole, tmp_path):
    config, sweep, out = whole[0], read_config(whole[0]), tmp_path / "out"
    workers = [start(config, out, RANK=str(rank), WORLD_SIZE="3") for rank in range(3)]
    until(lambda: any(out.glob("shards/*.safetensors")))
    workers[1].send_signal(signal.SIGKILL)
    left = missing(sweep, out)
    codes = [worker.wait(120) for worker in workers]
    assert left, "it was killed too late to prove anything"
    assert codes == [0, -signal.SIGKILL, 0], [worker.stderr.read() for worker in workers]
    assert hashes(out) == hashes(whole[1])


def test_all_killed_and_run_again(whole, tmp_path):
    """Some at once, some later, over and over: what is there stays, what is not comes, and nothing else is left."""
    config, sweep, out = whole[0], read_config(whole[0]), tmp_path / "out"
    for kept in (1, 3):
        workers = [start(config, out, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
        until(lambda kept=kept: len(list(out.glob("shards/*.safetensors"))) >= kept)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        assert missing(sweep, out) and not (out / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("shards/*.safetensors")}
    work(sweep, out)
    assert hashes(out) == hashes(whole[1])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "a finished file was written again"


@pytest.mark.parametrize("when", ["the file is written", "the table is written", "the manifest is written"])
def test_killed_between_writing_and_naming(whole, tmp_path, when):
    """The worst moment: all bytes are there under the temporary name, and the process dies before the rename."""
    last = {"the table is written": "cells.csv", "the manifest is written": "manifest.json"}
    target = last.get(when, "00003.safetensors")
    code = f"""
import os, signal
from fluxedu import files
from fluxedu.sweep import read_config, work
put = files._put
def killed(part, target):
    os.kill(os.getpid(), signal.SIGKILL) if target.name == {target!r} else put(part, target)
files._put = killed
work(read_config({str(whole[0])!r}), {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in (tmp_path / "out").rglob("*.part")] and not list((tmp_path / "out").rglob(target))
    work(read_config(whole[0]), tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(whole[1])


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_under_a_launcher(whole, tmp_path, launcher):
    """Both processes take part, and the folder is the same. (Accelerate starts several by this flag only.)"""
    module, *options = launcher
    script = tmp_path / "sweep.py"
    script.write_text(
        "import os, pathlib, fluxedu.cli\n"
        '(pathlib.Path(__file__).parent / f\'{os.environ["RANK"]} of {os.environ["WORLD_SIZE"]}\').touch()\n'
        "fluxedu.cli.app()\n"
    )
    words = [str(script), "sweep", str(whole[0]), "--out", str(tmp_path / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", module, *options, *words], capture_output=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert hashes(tmp_path / "out") == hashes(whole[1])
    assert sorted(p.name for p in tmp_path.glob("* of *")) == ["0 of 2", "1 of 2"]


def test_a_claim_ends_with_its_holder(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from fluxedu.sweep.claims import claimed
with claimed(Path({str(tmp_path)!r}), "00000") as ours:
    print(ours, flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True\n"
        with claimed(tmp_path, "00000") as ours:
            assert not ours
        with claimed(tmp_path, "00001") as ours:
            assert ours
    finally:
        holder.kill()
        holder.wait()
    with claimed(tmp_path, "00000") as ours:
        assert ours


def test_what_another_is_drawing_is_waited_for_and_taken_over(whole, tmp_path):
    """A claim held by a process that never draws, and dies at last."""
    code = f"""
import time
from pathlib import Path
from fluxedu.sweep.claims import claimed
with claimed(Path({str(tmp_path / "out")!r}), "00002") as ours:
    print(ours, flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    worker = start(whole[0], tmp_path / "out")
    sweep = read_config(whole[0])
    until(lambda: (tmp_path / "out").is_dir() and missing(sweep, tmp_path / "out") == [2])
    time.sleep(0.5)
    assert worker.poll() is None and missing(sweep, tmp_path / "out") == [2]
    holder.kill()
    holder.wait()
    assert worker.wait(60) == 0
    assert hashes(tmp_path / "out") == hashes(whole[1])


# ---------------------------------------------------------------- refusals


def test_a_folder_is_for_one_sweep(whole, tmp_path):
    before = hashes(whole[1])
    with pytest.raises(SweepError, match=r"holds another sweep \(prompts is not the same\)"):
        work(from_dict({"prompts": ["something else"]}), whole[1])
    assert {k: v for k, v in hashes(whole[1]).items() if not k.startswith(".claims")} == before
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(SweepError, match="holds 'diary.txt' and no sweep"):
        work(from_dict({"prompts": ["a"]}), tmp_path)
    with pytest.raises(SweepError, match="no finished sweep"):
        open_sweep(tmp_path)


def test_a_damaged_result_is_found(whole, tmp_path):
    work(read_config(whole[0]), tmp_path / "out")
    (tmp_path / "out/shards/00001.safetensors").write_bytes(b"x")
    (tmp_path / "out/shards/00002.safetensors").unlink()
    assert open_sweep(tmp_path / "out").damaged() == ["shards/00001.safetensors", "shards/00002.safetensors"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a sweep is made of names and values, not None."),
        ("seeds: [1]", "a sweep lacks 'prompts'."),
        ("prompts: []", "prompts is a list of texts, at least one, not []."),
        ("prompts: a", "prompts is a list of texts, at least one, not 'a'."),
        ("prompts: [no]", "each of prompts is text, in quotes where YAML reads something else, not False."),
        ("prompts: [a, a]", "prompts has 'a' twice."),
        ("{prompts: [a], seed: [0]}", "a sweep has an unknown 'seed'; known are prompts, seeds,"),
        ("{prompts: [a], prompts: [b]}", "'prompts' is there twice, the second time in line 1."),
        ("{prompts: [a], seeds: [-1]}", "a seed is a whole number from 0 to 9223372036854775807, not -1."),
        ("{prompts: [a], seeds: {from: 0}}", "seeds lacks 'count'."),
        (
            "{prompts: [a], seeds: {from: 0, count: 1000000}, interventions: {x: [], y: []}}",
            "2,000,000 cells; 1,000,000",
        ),
        ("{prompts: [a], interventions: {x: {ablat: y}}}", "'x' has a change that says none of ablate, scale, patch."),
        ("{prompts: [a], interventions: {x: {scale: y}}}", "'x' lacks 'by'."),
        ("{prompts: [a], interventions: {x: {scale: y, by: .inf}}}", "by is a number"),
        ("{prompts: [a], interventions: {x: {ablate: y, by: 1}}}", "'x' has an unknown 'by'; known are ablate, heads,"),
        ("{prompts: [a], interventions: {x: {patch: [y, z], from: {}}}}", "'x' patches 2 globs; a patch is at one."),
        ("{prompts: [a], settings: {stepz: 3}}", "settings has an unknown 'stepz'; known are steps,"),
        ("{prompts: [a], keep: [video]}", "keep has 'video'; what can be kept is image, latent, trajectory."),
        ("{prompts: [a], record: [{sites: x, reduce: y}]}", "reduce must be one of head-mean,"),
        ("{prompts: [a], lens: [word_maps]}", "lens is made of names and values, not ['word_maps']."),
        ("{prompts: [a], lens: {word_map: {}}}", "lens has an unknown 'word_map'; known are attention_balance,"),
        ("{prompts: [a], lens: {word_maps: {}}}", "lens word_maps lacks 'words'."),
        ("{prompts: [a], lens: {contributions: {at_steps: 0}}}", "lens contributions has an unknown 'at_steps'; known"),
        ("{prompts: [a], lens: {word_maps: {words: a}}}", "words is a list of texts, at least one, not 'a'."),
        ("{prompts: [a], lens: {head_gallery: {query: [1]}}}", "query is a word or a patch, [row, column], not [1]."),
        ("{prompts: [a], lens: {padding_mass: {at_steps: []}}}", "at_steps is empty; leave it out for all of them."),
        ("{prompts: [a], threads: 0}", "threads is a whole number from 1 to 1024, not 0."),
        ("a: &x [1]\nb: *x", "it uses the alias *x; write the value out."),
        ("[" * 50, "it is nested more than 20 deep."),
        ("prompts: [a", "it is no YAML (line 2):"),
        ("prompts: !!python/object/apply:os.system [ls]", "it is no YAML (line 1): could not determine a constructor"),
        ("prompts: [2020-99-99]", "it has a value that is none: month must be in 1..12"),
    ],
)
def test_a_config_is_read_strictly(text, says, tmp_path):
    with pytest.raises(SweepError) as error:
        read_config(written(tmp_path, text))
    sentence = str(error.value)
    assert sentence.startswith("sweep.yaml: ") and says in sentence and sentence.endswith(".") and "\n" not in sentence


def test_the_environment_says_a_sensible_place(tmp_path):
    worker = start(written(tmp_path), tmp_path / "out", RANK="2", WORLD_SIZE="2")
    assert worker.wait(60) == 2
    assert re.fullmatch(r"fluxedu: RANK and WORLD_SIZE .*\.\n", worker.stderr.read())
