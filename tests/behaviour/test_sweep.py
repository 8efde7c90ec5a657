"""Sweeps: what a cell holds, the same bytes after a kill at any moment, and one sentence for a bad description."""

import csv
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import fluxedu as fe
from fluxedu.errors import SweepError
from fluxedu.sweep import from_dict, open_sweep, read_config, run_sweep

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


def written(folder: Path, text: str = CONFIG) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The description, and the folder that one process draws without interruption."""
    folder = tmp_path_factory.mktemp("sweep")
    config = written(folder)
    return config, run_sweep(read_config(config), folder / "out")


# ---------------------------------------------------------------- what a cell is


def test_cells_are_the_product_in_order():
    sweep = from_dict({"prompts": ["a", "b"], "seeds": [5, 1], "interventions": {"x": [], "y": []}, "shard": 3})
    cells = [(c["prompt"], c["seed"], c["intervention"]) for c in sweep.cells()]
    assert cells == [(p, s, i) for p in "ab" for s in (5, 1) for i in "xy"]
    assert [len(sweep.cells(file)) for file in range(len(sweep.files()))] == [3, 3, 2]
    assert sum((sweep.cells(file) for file in range(3)), []) == sweep.cells()
    assert [c["file"] for c in sweep.cells()[2:4]] == sweep.files()[:2]
    assert from_dict(json.loads(json.dumps(vars(sweep)))) == sweep


def test_a_cell_holds_what_the_instruments_give(reference):
    """Each kind of intervention, beside the same one made by hand."""
    results, pipe = open_sweep(reference[1]), fe.load()
    options = {"seed": 4, "steps": 2, "height": 64, "width": 64, "progress": False}
    prompt = "a red circle left of a blue square"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fe.record("double.1.attn.map", reduce="head-mean", tokens=["a"], steps=0) as map_:
            plain = pipe(prompt, **options)
        with fe.ablate("double.1.heads", heads=[2]):
            ablated = pipe(prompt, **options)
        with fe.record("double.1.img_mlp_contribution") as blue:
            pipe("a blue circle", **{**options, "seed": 0})
        half = fe.intervene("single.*.gate", lambda x, ctx: 0.5 * x, times=(0.5, 1.0))
        with half, fe.patch("double.1.img_mlp_contribution", blue):
            both = pipe(prompt, **options)
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
    with pytest.raises(SweepError, match=r"cell 0 \(prompt 'a red circle', seed 0, 'x'\).* does not contain 'blue'"):
        run_sweep(sweep, tmp_path)
    assert not list(tmp_path.glob("shards/*"))


def test_everything_can_be_kept_at_once(tmp_path):
    """The last latent of the trajectory is the latent: both are written, and from memory of their own."""
    settings = {"steps": 2, "height": 32, "width": 32}
    sweep = from_dict({"prompts": ["a"], "keep": ["image", "latent", "trajectory"], "settings": settings})
    cell = open_sweep(run_sweep(sweep, tmp_path))[0]
    assert set(cell) == {"image", "latent", *(f"trajectory/{name}" for name in ("latents", "velocities", "times"))}
    assert torch.equal(cell["trajectory/latents"].tensor[-1], cell["latent"].tensor)


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("when", ["the file is written", "the table is written", "the manifest is written"])
def test_killed_between_writing_and_naming(reference, tmp_path, when):
    """The worst moment: all bytes are there under the temporary name, and the process dies before the rename."""
    last = {"the table is written": "cells.csv", "the manifest is written": "manifest.json"}
    target = last.get(when, "00003.safetensors")
    code = f"""
import os, signal
from fluxedu import files
from fluxedu.sweep import read_config, run_sweep
replace = files._replace
def killed(part, target, *options):
    os.kill(os.getpid(), signal.SIGKILL) if target.name == {target!r} else replace(part, target, *options)
files._replace = killed
run_sweep(read_config({str(reference[0])!r}), {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in (tmp_path / "out").rglob("*.part")] and not list((tmp_path / "out").rglob(target))
    run_sweep(read_config(reference[0]), tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(reference[1])


def test_the_table_as_parquet_is_the_same_table(reference):
    """Row for row what ``cells.csv`` and :func:`open_sweep` say, with numbers as numbers; and it is in the manifest.

    That it has the same bytes after a kill, the other tests show: they compare every file of the folder.
    """
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(reference[1] / "cells.parquet").to_pylist()
    results = open_sweep(reference[1])
    assert rows == results.cells and [type(row["seed"]) for row in rows] == [int] * len(results)
    with (reference[1] / "cells.csv").open(newline="") as file:
        assert [{name: str(value) for name, value in row.items()} for row in rows] == list(csv.DictReader(file))
    assert "cells.parquet" in results.manifest["files"] and results.damaged() == []


def test_killed_while_the_parquet_is_written(reference, tmp_path):
    """Half of it is on the disk, under another name: the next run writes it anew, the same."""
    pytest.importorskip("pyarrow")
    code = f"""
import os, signal
import pyarrow.parquet as parquet
from fluxedu.sweep import read_config, run_sweep
write = parquet.write_table
def half(table, path):
    write(table, path)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
parquet.write_table = half
run_sweep(read_config({str(reference[0])!r}), {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    out = tmp_path / "out"
    assert list(out.glob(".cells.parquet.*")) and not (out / "cells.parquet").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("shards/*")}
    run_sweep(read_config(reference[0]), out)
    assert hashes(out) == hashes(reference[1])
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


# ---------------------------------------------------------------- refusals


def test_a_folder_is_for_one_sweep(reference, tmp_path):
    before = hashes(reference[1])
    with pytest.raises(SweepError, match=r"holds another sweep \(prompts differs\)"):
        run_sweep(from_dict({"prompts": ["something else"]}), reference[1])
    described = yaml.safe_load(CONFIG)
    described["interventions"] = dict(reversed(described["interventions"].items()))
    with pytest.raises(SweepError, match=r"holds another sweep \(the order of interventions differs\)"):
        run_sweep(from_dict(described), reference[1])
    assert hashes(reference[1]) == before
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(SweepError, match="holds 'diary.txt' and no sweep"):
        run_sweep(from_dict({"prompts": ["a"]}), tmp_path)
    with pytest.raises(SweepError, match="no finished sweep"):
        open_sweep(tmp_path)


def test_a_damaged_result_is_found(reference, tmp_path):
    run_sweep(read_config(reference[0]), tmp_path / "out")
    (tmp_path / "out/shards/00001.safetensors").write_bytes(b"x")
    (tmp_path / "out/shards/00002.safetensors").unlink()
    assert open_sweep(tmp_path / "out").damaged() == ["shards/00001.safetensors", "shards/00002.safetensors"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a sweep must be a mapping of names to values, not None."),
        ("seeds: [1]", "a sweep needs the key 'prompts'."),
        ("prompts: []", "prompts must be a list with at least 1 item, not []."),
        ("prompts: a", "prompts must be a list with at least 1 item, not 'a'."),
        ("prompts: [no]", "a prompt must be text (in quotes where YAML reads something else), not False."),
        ("prompts: [a, a]", "prompts contains 'a' twice."),
        ("{prompts: [a], seed: [0]}", "a sweep has an unknown key 'seed'; the keys are prompts, seeds,"),
        ("{prompts: [a], prompts: [b]}", "the key 'prompts' occurs twice, again in line 1."),
        ("{prompts: [a], seeds: [-1]}", "a seed must be a whole number from 0 to 9223372036854775807, not -1."),
        ("{prompts: [a], seeds: {from: 0}}", "seeds needs the key 'count'."),
        (
            "{prompts: [a], seeds: {from: 0, count: 1000000}, interventions: {x: [], y: []}}",
            "2,000,000 cells; 1,000,000 is the maximum.",
        ),
        (
            "{prompts: [a], interventions: {x: {ablat: y}}}",
            "'x' has a change that is not {ablate: SITES}, {scale: SITES, by: FACTOR} or",
        ),
        (
            "{prompts: [a], interventions: {x: {scale: y}}}",
            "'x' has a change that is not {ablate: SITES}, {scale: SITES, by: FACTOR} or",
        ),
        (
            "{prompts: [a], interventions: {x: {scale: y, by: .inf}}}",
            "a value needs quotes, or is not finite",
        ),
        (
            "{prompts: [a], interventions: {x: {ablate: y, by: 1}}}",
            "ablate in 'x' has an unknown key 'by'; the keys are heads,",
        ),
        (
            "{prompts: [a], interventions: {x: {patch: [y, z], from: {}}}}",
            "{patch: SITE, from: {prompt: TEXT, seed: SEED}}: {",
        ),
        ("{prompts: [a], settings: {stepz: 3}}", "settings has an unknown key 'stepz'; the keys are steps,"),
        ("{prompts: [a], keep: [video]}", "an item of keep must be one of image, latent, trajectory, not 'video'."),
        ("{prompts: [a], record: [{sites: x, reduce: y}]}", "reduce must be one of head-mean,"),
        ("{prompts: [a], lens: [word_maps]}", "lens must be a mapping of names to values, not ['word_maps']."),
        ("{prompts: [a], lens: {word_map: {}}}", "lens has an unknown key 'word_map'; the keys are word_maps,"),
        ("{prompts: [a], lens: {word_maps: {}}}", "lens word_maps needs the key 'words'."),
        (
            "{prompts: [a], lens: {contributions: {at_steps: 0}}}",
            "lens contributions has an unknown key 'at_steps'; the keys are",
        ),
        ("{prompts: [a], threads: 0}", "threads must be a whole number from 1 to 1024, not 0."),
        ("a: &x [1]\nb: *x", "it uses the alias *x; write the value out instead."),
        ("[" * 50, "it cannot be read as YAML in line 2:"),
        ("[" * 100_000, "it cannot be read as YAML in line 1: exceeded maximum nesting depth."),
        ("prompts: [a", "it cannot be read as YAML in line 2:"),
        (
            "prompts: !!python/object/apply:os.system [ls]",
            "it cannot be read as YAML in line 1: could not determine a constructor",
        ),
        ("prompts: [2020-01-01]", "a value needs quotes, or is not finite (Object of type date"),
        ("{prompts: [a], interventions: {}}", "are 0 cells; 1,000,000 is the maximum."),
        ("{prompts: [a], interventions: {x: {scale: y, by: 1, from: 0}}}", "scale in 'x' has an unknown key 'from'"),
        ("{prompts: [a], interventions: {x: 0}}", "'x' has a change that is not {ablate: SITES},"),
        ("{prompts: [a], interventions: {x: {patch: y, from: {prompt: a, seed: 0, step: 1}}}}", "unknown key 'step'"),
        ("{prompts: [a], interventions: {x: {ablate: y, times: [2, 3]}}}", "times"),
        (
            "{prompts: [a], interventions: {x: {scale: y, by: 1e3}}}",
            "by must be a number from -1e+30 to 1e+30, not '1e3'",
        ),
        ("{prompts: [a], device: 0}", "device must be text"),
        ("prompts: [2020-99-99]", "it cannot be read as YAML: month must be in 1..12"),
    ],
)
def test_a_config_is_read_strictly(text, says, tmp_path):
    with pytest.raises(SweepError) as error:
        read_config(written(tmp_path, text))
    sentence = str(error.value)
    assert sentence.startswith("sweep.yaml: ") and says in sentence and sentence.endswith(".") and "\n" not in sentence


def test_an_intervention_of_too_many_changes_is_refused_and_many_interventions_are_quick():
    change = [{"ablate": "double.1.heads", "heads": [0]}]
    with pytest.raises(SweepError, match=r"'many' has 1,001 changes; 1,000 is the maximum\."):
        from_dict({"prompts": ["a"], "interventions": {"many": change * 1001}})
    started = time.monotonic()
    assert len(from_dict({"prompts": ["a"], "interventions": {f"change {n}": change for n in range(20_000)}})) == 20_000
    assert time.monotonic() - started < 10
