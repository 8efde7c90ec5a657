"""Training and benchmarks are in a checkout only: the commands find them there, and say what they need elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fluxedu import cli

ROOT = Path(__file__).parents[2]


def python(*arguments, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(("command", "folder"), [("train", "training"), ("bench", "benchmarks")])
def test_elsewhere_the_command_says_that_it_needs_a_checkout(tmp_path, monkeypatch, command, folder):
    monkeypatch.setattr(cli.runs, "__file__", str(tmp_path / "site-packages" / "fluxedu" / "cli" / "runs.py"))
    result = CliRunner().invoke(cli.app, [command])
    assert result.exit_code == 2
    assert f"{folder}/ is not part of the installed package; clone the repository" in result.output


def test_the_commands_find_the_checkout_from_any_folder(tmp_path):
    pytest.importorskip("transformers")
    done = python("-m", "fluxedu.cli", "train", "--stage", "nothing", cwd=tmp_path)
    assert done.returncode == 2 and "--stage with one of autoencoder, t5, clip" in done.stderr


@pytest.mark.parametrize("module", ["training", "benchmarks"])
def test_both_are_commands_of_their_own(module):
    done = python("-m", module, "--help", cwd=ROOT)
    assert done.returncode == 0 and f"python -m {module}" in done.stdout


def test_the_package_never_imports_them():
    imports = re.compile(r"^\s*(from|import) (training|benchmarks)\b", re.MULTILINE)
    assert not [path for path in (ROOT / "fluxedu").rglob("*.py") if imports.search(path.read_text())]
