"""The command line and sweeps with arguments that make no sense: a sentence and exit 2, or a result, nothing else."""

import random
from pathlib import Path

import pytest
import yaml
from fuzzing import PLAIN, bytes_changed, fuzz, plain_changed
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu import cli
from fluxedu.course.errors import CourseError
from fluxedu.sweep import from_dict, read_config
from fluxedu.sweep.draw import Draughtsman

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
    "trace": (["a red circle"], ["--html", "--model", "--seed", "--steps", "--height", "--width"]),
    "info": (["dev", "schnell", ""], ["--json"]),
    "sites": (["attn.map"], ["--model", "--json"]),
    "train": ([], ["--stage", "--out", "--ship-to"]),
    "judge": ([], ["--model", "--prompts", "--steps", "--guidance", "--json"]),
    "convert": (["in.safetensors", "."], ["--to", "--shard-gb", "--overwrite"]),
    "bench": ([], ["--json"]),
    "lab": ([], ["--port"]),
    "grade": (["in.ipynb", "."], ["--csv", "--timeout"]),
    "sweep": (["sweep.yaml", "in.safetensors", "."], ["--out", "--workers", "--on"]),
}
VALUES = {
    "--steps": ["1", "2"],
    "--height": ["16"],
    "--model": ["nano", "nowhere"],
    "--output": ["a.png", "a.jpg", "a.psd"],
    "--html": ["a.html"],
    "--json": ["a.json"],
    "--to": ["bfl", "diffusers"],
    "--out": ["out", "sweep.yaml"],
    "--workers": ["1", "0"],
    "--csv": ["a.csv"],
}
ALONE = ("--overwrite",)


@pytest.fixture
def quick(pipe, tmp_path, monkeypatch):
    """A folder to be in, a small model for the shipped one, and nothing that takes minutes."""
    monkeypatch.chdir(tmp_path)
    real = fe.load
    small = lambda model="nano", **options: pipe if model == "nano" else real(model, **options)  # noqa: E731
    monkeypatch.setattr("fluxedu.load", small, raising=False)
    monkeypatch.setattr("fluxedu.nano.training.stages.run_stages", refusing(ValueError("not now.")))
    monkeypatch.setattr("fluxedu.nano.report.examine", refusing(ValueError("not now.")))
    monkeypatch.setattr("fluxedu.bench.run", refusing(ModuleNotFoundError(name="diffusers")))
    monkeypatch.setattr("fluxedu.course.files.copied", refusing(CourseError("not now.")))
    return tmp_path


def refusing(error: Exception):
    def refuse(*_, **__):
        raise error

    return refuse


def files(folder: Path) -> None:
    """What a command may find where it runs."""
    (folder / "in.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "in.ipynb").write_text("{}")
    (folder / "sweep.yaml").write_text("{prompts: [a], seeds: [0], settings: {steps: 1, height: 16, width: 16}}")


def test_commands(quick):
    def case(chance):
        files(quick)
        command = chance.choice(list(COMMANDS))
        arguments, options = COMMANDS[command]
        words = [chance.choice(arguments + ODD) if chance.random() < 0.3 else word for word in arguments[:2]]
        for option in chance.sample(options, chance.randrange(len(options) + 1)):
            value = chance.choice(ODD if chance.random() < 0.5 else VALUES.get(option, ["1"]))
            words += [option] if option in ALONE else [option, value]
        if chance.random() < 0.2:
            words.insert(chance.randrange(len(words) + 1), chance.choice(ODD + ["--nonsense", "--help"]))
        result = run(cli.app, [command, *words])
        ends = result.exception is None or isinstance(result.exception, SystemExit)
        assert ends and result.exit_code in (0, 1, 2), (words, repr(result.exception), result.exc_info)
        assert "Traceback" not in result.output, words
        if result.exit_code and "fluxedu: " in result.output:
            assert len(result.stderr.strip().splitlines()) == 1 or command == "grade", (words, result.output)

    fuzz("commands", 0.06, case, quick)


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
    "model": "nano",
    "device": "cpu",
    "dtype": "float32",
    "shard": 3,
    "threads": 1,
}


def test_sweeps(pipe, tmp_path):
    """What is read is drawn, or said to be undrawable; and it can be read again from what it writes down."""
    path = tmp_path / "sweep.yaml"

    def case(chance):
        if chance.random() < 0.6:
            path.write_text(yaml.safe_dump(plain_changed(chance, SWEEP, PLAIN), allow_unicode=False), encoding="utf-8")
        else:
            path.write_bytes(bytes_changed(chance, yaml.safe_dump(SWEEP).encode()))
        sweep = read_config(path)
        assert from_dict(sweep.to_dict()) == sweep
        sizes = [sweep.settings.get(name) or 1 for name in ("steps", "height", "width")]
        if all(not isinstance(size, int) or size <= 64 or size > 5000 for size in sizes):
            for number in {0, chance.randrange(len(sweep)), len(sweep) - 1}:
                Draughtsman(sweep, pipe).cell(sweep.cell(number))

    fuzz("sweeps", 0.12, case, tmp_path)


def test_the_cases_are_the_same_every_time():
    """A failure that is named can be looked at again."""
    same = [plain_changed(random.Random("a"), SWEEP) for _ in range(2)]
    assert repr(same[0]) == repr(same[1])
