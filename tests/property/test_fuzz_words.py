"""The command line and sweeps with arguments that make no sense: a sentence and exit 2, or a result, nothing else."""

import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fuzzing import PLAIN, bytes_changed, fuzz, plain_changed
from PIL import Image
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu import cli
from fluxedu.arena.votes import Votes
from fluxedu.errors import CourseError
from fluxedu.sweep import from_dict, read_config
from fluxedu.sweep.run import Runner

run = CliRunner().invoke
ODD = [
    "",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    "9" * 30,
    "x",
    "../../escaped",
    "/dev/null/x",
    "a\nb",
    "é",
    ".",
    "..",
    "--",
    "-",
]
COMMANDS = {
    "sample": (["a red circle", ""], ["--output", "--model", "--seed", "--steps", "--guidance", "--negative", "--cfg"]),
    "sample of the family": (
        ["a red circle"],
        ["--model", "--image", "--strength", "--mask", "--control", "--edges", "--reference", "--image-prompt"],
    ),
    "sample as": (
        ["a red circle"],
        [
            "--like",
            "--variant",
            "--revision",
            "--lora",
            "--lora-scale",
            "--device",
            "--dtype",
            "--memory",
            "--quantise",
            "--solver",
            "--height",
            "--width",
        ],
    ),
    "trace": (
        ["a red circle"],
        ["--html", "--model", "--like", "--revision", "--seed", "--steps", "--height", "--width"],
    ),
    "info": (["dev", "schnell", "nano", "in.safetensors", ""], ["--json"]),
    "sites": (["attn.map"], ["--model", "--like", "--variant", "--revision", "--json"]),
    "train": ([], ["--stage", "--out", "--ship-to"]),
    "train one": ([], ["--variant", "--out", "--no-resume", "--all"]),
    "judge": (
        [],
        [
            "--model",
            "--like",
            "--variant",
            "--revision",
            "--prompts",
            "--steps",
            "--guidance",
            "--for-shapes",
            "--json",
            "--out",
        ],
    ),
    "convert": (["in.safetensors", "."], ["--to", "--part", "--shard-gb", "--overwrite"]),
    "bench": ([], ["--json", "--out", "--quick"]),
    "lab": ([], ["--port", "--folder"]),
    "grade": (["in.ipynb", "."], ["--csv", "--table", "--timeout", "--notebook-timeout", "--memory"]),
    "sweep": (["sweep.yaml", "in.safetensors", "."], ["--out", "--workers", "--scheduler"]),
    "arena run": (["nano", "nano@4"], ["--votes", "--count", "--axis", "--prompts", "--pictures", "--seed"]),
    "arena serve": (
        ["nano", "nano@4"],
        ["--votes", "--port", "--axis", "--prompts", "--pictures", "--seed", "--allow-host", "--no-code"],
    ),
    "arena table": ([], ["--votes", "--axis", "--who", "--json", "--out", "--figures"]),
    "arena voters": ([], ["--votes", "--json"]),
    "arena drop": (["judge"], ["--votes", "--undo"]),
    "arena export": (["a.csv"], ["--votes"]),
}
VALUES = {
    "--steps": ["1", "2"],
    "--height": ["16"],
    "--model": ["nano", "nowhere", "nano-schnell", "nano-fill", "nano-canny", "nano-kontext", "nano-redux"],
    "--output": ["a.png", "a.jpg", "a.psd"],
    "--html": ["a.html"],
    "--to": ["bfl", "diffusers"],
    "--part": ["transformer", "vae"],
    "--like": ["dev", "schnell"],
    "--out": ["out", "a.json", "sweep.yaml"],
    "--workers": ["1", "0"],
    "--csv": ["a.csv"],
    "--table": ["b.csv"],
    "--variant": ["schnell", "fill", "canny", "depth", "kontext", "redux", "hollow", "sd", "twin"],
    **dict.fromkeys(("--image", "--mask", "--control", "--reference", "--image-prompt"), ["in.png", "in.ipynb"]),
    "--lora": ["hollow", "in.safetensors", "."],
    "--lora-scale": ["0.5", "-1"],
    "--device": ["cpu", "cuda", "meta"],
    "--dtype": ["float32", "bfloat16", "float64", "int8"],
    "--memory": ["full", "no-modulations", "stream"],
    "--quantise": ["int8", "fp8", "nf4"],
    "--strength": ["0.5"],
    "--solver": ["heun", "midpoint"],
    "--votes": ["in.sqlite", "new.sqlite", "in.png"],
    "--axis": ["overall", "diversity"],
    "--who": ["judge", "people"],
    "--figures": ["drawn"],
    "--scheduler": ["tcp://127.0.0.1:1"],
}
ALONE = ("--json", "--overwrite", "--edges", "--no-resume", "--all", "--quick", "--no-code", "--undo")
DAMAGED = {"in.png": 0.2, "in.sqlite": 0.3}  # how often


@pytest.fixture
def quick(pipe, tmp_path, monkeypatch):
    """A folder to be in, two below the one that is watched; small models; and nothing that takes minutes."""
    real, kept = fe.load, {}

    def small(model="nano", **options):
        changed_options = {name: value for name, value in options.items() if value not in (None, "auto", False, 1.0)}
        if model in ("nano", "") and not changed_options:
            return pipe
        if (key := (model, repr(changed_options))) not in kept:
            kept[key] = real(model, **changed_options)
            kept[key].defaults, kept[key].size = replace(kept[key].defaults, steps=1), 32
        return kept[key]

    monkeypatch.setattr("fluxedu.load", small, raising=False)
    for slow in ("stages.run_stages", "family.load", "baselines.load"):
        monkeypatch.setattr(f"training.{slow}", refusing(ValueError("not now.")))
    monkeypatch.setattr("fluxedu.nano.exam.evaluate", refusing(ValueError("not now.")))
    monkeypatch.setattr("benchmarks.run", refusing(ModuleNotFoundError(name="diffusers")))
    monkeypatch.setattr("fluxedu.course.build.copy_notebooks", refusing(CourseError("not now.")))
    monkeypatch.setattr("fluxedu.arena.match.sample_image", lambda p, _, seed, h, w, n: Image.new("RGB", (w, h)))
    monkeypatch.setattr("fluxedu.arena.match._load", lambda *_: None)
    monkeypatch.setattr("socketserver.BaseServer.serve_forever", refusing(KeyboardInterrupt()))
    monkeypatch.setitem(sys.modules, "distributed", None)  # a cluster takes seconds to start
    here = tmp_path / "one" / "two"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    return tmp_path


def refusing(error: Exception):
    def refuse(*_, **__):
        raise error

    return refuse


@pytest.fixture
def found(tmp_path_factory):
    """What a command may find where it runs: names and bytes."""
    folder = tmp_path_factory.mktemp("found")
    Image.new("RGB", (16, 16), "red").save(folder / "in.png")
    votes = Votes(folder / "in.sqlite")
    for choice in ("left", "tie"):
        ballot = votes.issue("overall", "nano", "nano@4", "a red circle", 0, (128, 128), "judge")
        votes.vote(ballot.id, choice, "judge")
    votes.close()
    (folder / "in.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "in.ipynb").write_text("{}")
    (folder / "sweep.yaml").write_text("{prompts: [a], seeds: [0], settings: {steps: 1, height: 16, width: 16}}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def laid_out(chance, found: dict[str, bytes], folder: Path) -> None:
    """A fresh folder with those files, some of them damaged; nothing of the case before is left."""
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for name, data in found.items():
        (folder / name).write_bytes(bytes_changed(chance, data) if chance.random() < DAMAGED.get(name, 0) else data)


def test_commands(quick, found):
    def case(chance):
        laid_out(chance, found, quick / "one" / "two")
        command = chance.choice(list(COMMANDS))
        arguments, options = COMMANDS[command]
        words = [chance.choice(arguments + ODD) if chance.random() < 0.3 else word for word in arguments[:2]]
        for option in chance.sample(options, chance.randrange(len(options) + 1)):
            value = chance.choice(ODD if chance.random() < 0.5 else VALUES.get(option, ["1"]))
            words += [option] if option in ALONE else [option, value]
        if chance.random() < 0.2:
            words.insert(chance.randrange(len(words) + 1), chance.choice(ODD + ["--nonsense", "--help"]))
        name = command.split()[:2] if command.startswith("arena") else command.split()[:1]
        result = run(cli.app, [*name, *words])
        ends = result.exception is None or isinstance(result.exception, SystemExit)
        assert ends and result.exit_code in (0, 1, 2), (words, repr(result.exception), result.exc_info)
        assert "Traceback" not in result.output, words
        if result.exit_code and "fluxedu: " in result.output:
            assert len(result.stderr.strip().splitlines()) == 1 or command == "grade", (words, result.output)

    fuzz("commands", 0.12, case, quick)


SWEEP = {
    "prompts": ["a red circle", "a green triangle"],
    "seeds": [0, 5],
    "interventions": {
        "as it is": [],
        "no head": {"ablate": "double.1.heads", "heads": [1], "to": "mean", "streams": ["img"]},
        "gates": [{"scale": ["single.*.gate"], "by": 0.5, "times": [0.5, 1.0]}, {"ablate": "double.0", "steps": [0]}],
        "patched": {"patch": "double.1.img_mlp_contribution", "from": {"prompt": "a blue circle", "seed": 0}},
    },
    "settings": {
        "steps": 1,
        "height": 16,
        "width": 16,
        "guidance": 3.5,
        "solver": "euler",
        "guidance_interval": [0.0, 1.0],
    },
    "keep": ["image", "latent", "trajectory"],
    "record": [{"sites": "double.1.attn.map", "reduce": ["head-mean"], "tokens": ["a", 0], "steps": [0]}],
    "lens": {"word_maps": {"words": ["a"], "at_steps": [0]}, "head_gallery": {"query": [0, 0], "at_step": 0}},
    "model": "nano",
    "device": "cpu",
    "dtype": "float32",
    "shard": 3,
    "threads": 1,
}


def test_sweeps(pipe, tmp_path):
    """A sweep that can be read is either run or refused, and can be read again from its own values."""
    path = tmp_path / "sweep.yaml"

    def case(chance):
        if chance.random() < 0.6:
            path.write_text(yaml.safe_dump(plain_changed(chance, SWEEP, PLAIN), allow_unicode=False), encoding="utf-8")
        else:
            path.write_bytes(bytes_changed(chance, yaml.safe_dump(SWEEP).encode()))
        sweep = read_config(path)
        assert from_dict(vars(sweep)) == sweep
        sizes = [sweep.settings.get(name) or 1 for name in ("steps", "height", "width")]
        if all(not isinstance(size, int) or size <= 64 or size > 5000 for size in sizes):
            for number in {0, chance.randrange(len(sweep)), len(sweep) - 1}:
                Runner(sweep, pipe).draw(sweep.cell(number))

    fuzz("sweeps", 0.12, case, tmp_path)


def test_the_cases_are_the_same_every_time():
    """A failure that is named can be looked at again."""
    same = [plain_changed(random.Random("a"), SWEEP) for _ in range(2)]
    assert repr(same[0]) == repr(same[1])
