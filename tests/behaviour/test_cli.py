"""The command line: what it prints, what it writes, and how it refuses bad input."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.arena.votes import Votes
from fluxedu.checkpoints.official import OFFICIAL_FLUX2
from fluxedu.cli import app
from fluxedu.models import FLUX2_MODELS, FLUX2_VARIANTS, VARIANTS, Flux, Flux2, Flux2Config
from fluxedu.models.counting import count_parameters, flux_shapes
from fluxedu.models.meta_init import meta_init
from fluxedu.nano import sizes
from fluxedu.nano.shipped import SHIPPED_MODELS, WEIGHTS

run = CliRunner().invoke
FLUX2_CONFIGS = {f"flux2-{name}": config for name, config in FLUX2_VARIANTS.items()} | {"nano-flux2": sizes.FLUX2}


def error_of(*arguments: str) -> str:
    """The one sentence that a command prints when it fails; it may print nothing else."""
    result = run(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = result.output.strip().splitlines()
    return line


COMMANDS = ["sample", "trace", "info", "sites", "train", "judge", "convert", "sweep", "bench", "lab", "grade", "arena"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command):
    result = run(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: fluxedu {command}" in " ".join(result.output.split())


def test_info_counts_every_variant_and_every_miniature():
    rows = json.loads(run(app, ["info", "--json"]).output)
    assert set(rows) == {*VARIANTS, *FLUX2_MODELS, *SHIPPED_MODELS}
    assert rows["klein"]["parameters"] == 3_875_544_576 and (rows["klein"]["steps"], rows["dev"]["steps"]) == (4, 50)
    assert {*OFFICIAL_FLUX2, "klein-4b"} == FLUX2_MODELS.keys()
    assert rows["schnell"]["parameters"] == 11_891_178_560 and rows["schnell"]["tensors"] == 776
    assert "11,901,408,320 parameters" in run(app, ["info", "dev"]).output
    assert "32,223,281,152 parameters" in run(app, ["info", "flux2-dev"]).output
    assert "4,435,904 parameters" in run(app, ["info", "nano"]).output
    assert "4,370,560 parameters" in run(app, ["info", "nano-flux2"]).output


@pytest.mark.parametrize("name", [*VARIANTS, *FLUX2_CONFIGS, "nano", "nano-schnell", "nano-fill"])
def test_counting_needs_no_network(name):
    """The names and shapes that are computed from a configuration are those of the network."""
    known = {name: variant.flux for name, variant in VARIANTS.items()} | FLUX2_CONFIGS
    config = known[name] if name in known else fe.load(name).flux.config
    with meta_init():
        state = (Flux2 if isinstance(config, Flux2Config) else Flux)(config).state_dict()
    assert flux_shapes(config) == {key: tuple(value.shape) for key, value in state.items()}
    assert count_parameters(config) == sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    ("path", "part", "parameters", "field"),
    [
        ("transformer", "transformer", 4_435_904, "guidance_embed"),
        ("vae/diffusion_pytorch_model.safetensors", "vae", 1_049_603, "z_channels"),
        ("lora_hollow/pytorch_lora_weights.safetensors", "tensors", 512_000, "dtypes"),
    ],
)
def test_info_describes_a_file(path, part, parameters, field):
    rows = json.loads(run(app, ["info", str(WEIGHTS / path), "--json"]).output)
    assert rows[part]["parameters"] == parameters and field in rows[part]
    state = load_file(WEIGHTS / path) if path.endswith("tensors") else None
    assert state is None or sum(value.numel() for value in state.values()) == parameters


def test_json_is_one_document_on_the_standard_output(tmp_path, monkeypatch):
    """Whatever the command; errors stay a sentence on the standard error. (judge is tested below.)"""
    monkeypatch.chdir(tmp_path)
    votes = Votes(tmp_path / "votes.sqlite")
    ballot = votes.issue("overall", "nano", "nano@4", "a red circle", 0, (128, 128), "judge")
    votes.vote(ballot.id, "left", "judge")
    votes.close()
    commands = [["info"], ["info", "nano"], ["sites", "attn.map"], ["arena", "table", "--figures", "figures"]]
    for command in [*commands, ["arena", "table", "--out", "t.json"], ["arena", "voters"]]:
        result = run(app, [*command, "--json"])
        assert result.exit_code == 0 and json.loads(result.stdout), command
    assert json.loads((tmp_path / "t.json").read_text()).keys() == {"overall"}
    failed = run(app, ["info", "nowhere", "--json"])
    assert failed.exit_code == 2 and failed.stdout == "" and failed.stderr.startswith("fluxedu: there is no model")


AT_ONCE = [
    ["--version"], ["--help"], ["info"], ["info", "dev"], ["info", "nano", "--json"], ["info", "nowhere"], ["sample"],
    ["sample", "-h"], ["sample", "x", "--steps", "0"], ["sample", "x", "-o", "out.xyz"], ["sample", "x", "--nosuch"],
    ["trace", "x", "--height", "1"], ["judge", "--steps", "0"], ["judge", "--help"], ["nosuch"], ["arena", "--help"],
]  # fmt: skip


def test_what_needs_no_network_is_answered_without_pytorch():
    """Its import takes a second or more; these commands take less, errors of arguments among them."""
    code = f"""
import sys
from typer.testing import CliRunner
from fluxedu.cli import app
print([CliRunner().invoke(app, arguments).exit_code for arguments in {AT_ONCE}], "torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == f"{[0, 0, 0, 0, 0, 2, 2, 0, 2, 2, 2, 2, 2, 0, 2, 0]} False"


def test_sample_writes_the_image_and_nothing_else(tmp_path):
    out = tmp_path / "out.png"
    result = run(app, ["sample", "a red circle", "-o", str(out), "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    assert "128 x 128" in result.output


def test_a_png_says_how_it_was_made(tmp_path):
    out = tmp_path / "out.png"
    assert run(app, ["sample", "a red círcle", "-o", str(out), "--steps", "2", "--seed", "7"]).exit_code == 0
    about = Image.open(out).text
    assert about.pop("software").startswith("fluxedu ")
    assert about == {"prompt": "a red círcle", "seed": "7", "model": "nano", "steps": "2"}
    assert run(app, ["sample", "a", "-o", str(tmp_path / "out.jpg"), "--steps", "1"]).exit_code == 0


def test_a_picture_can_be_written_to_the_standard_output(tmp_path):
    command = [sys.executable, "-m", "fluxedu.cli", "sample", "a red circle", "--steps", "1", "-o", "-"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert Image.open(io.BytesIO(done.stdout)).size == (128, 128) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "option", "name"), [("sample", "-o", "out.png"), ("trace", "--html", "trace.html")]
)
def test_a_file_is_never_replaced_silently(command, option, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("mine")
    assert f"{name} exists" in error_of(command, "a", "--steps", "1", option, name)
    assert (tmp_path / name).read_text() == "mine"
    assert run(app, [command, "a", "--steps", "1"]).exit_code == 0
    assert (tmp_path / name).read_text() == "mine" and (tmp_path / name.replace(".", "-2.")).stat().st_size > 4
    assert run(app, [command, "a", "--steps", "1", option, name, "--overwrite"]).exit_code == 0
    assert (tmp_path / name).stat().st_size > 4


def test_version_and_short_help():
    assert run(app, ["--version"]).output.strip() == version("fluxedu")
    assert run(app, ["-h"]).output == run(app, ["--help"]).output
    assert run(app, ["sample", "-h"]).output == run(app, ["sample", "--help"]).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "x", "--steps", "0"], "steps must be a whole number from 1"),
        (["sample", "x", "--height", "0"], "height must be a whole number from 16"),
        (["sample", "x", "--guidance", "nan"], "guidance must be a number"),
        (["sample", "x", "--model", "nowhere"], "there is no model 'nowhere'"),
        (["sample", "x", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["sample", "x", "--dtype", "int3"], "dtype must be one of"),
        (["sample", "x", "--quantise", "int3"], "quantise must be one of int8, fp8, nf4, not 'int3'"),
        (["sample", "x", "--quantise", "nf4", "--memory", "stream"], "streamed blocks cannot be quantised"),
        (["sample", "red " * 60], "at most 32 T5 tokens"),
        (["sample", "x", "--image", "nowhere.png"], "nowhere.png"),
        (["sample", "x", "-o", "no/such/folder/out.png"], "no/such/folder"),
        (["sample", "x", "-o", "out.xyz"], "out.xyz"),
        (["sample", "x", "-o", "out.psd"], "out.psd has no extension of an image format"),
        (["sample", "x", "--device", "meta"], "device 'meta' cannot be used here"),
        (["judge", "--guidance", "200"], "guidance must be a number from 0 to 100"),
        (["judge", "--model", "sd", "--like", "dev"], "like= does not apply to sd"),
        (["judge", "--steps", "2000"], "steps must be a whole number from 1"),
        (["judge", "--out", "."], ". is a folder"),
        (["bench", "--out", "no/folder.json"], "there is no folder no"),
        (["sample", "x", "--negative", "blue"], "true_cfg_scale"),
        (["info", "flux-9"], "there is no model or file 'flux-9'; there are schnell, dev"),
        (["train"], "give --all"),
        (["train", "--stage", "bake"], "give --all"),
        (["train", "--stage", ""], "give --all"),
        (["convert", "nowhere.safetensors", "out", "--to", "diffusers"], "nowhere.safetensors"),
        (["lab", "--folder", "/dev/null/course"], "cannot be copied to /dev/null/course"),
        (["sweep", "nowhere.yaml"], "nowhere.yaml: it cannot be read"),
        (["grade", "nowhere.ipynb"], "there is no notebook nowhere.ipynb"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(*arguments)
    assert not list(Path(tmp_path).iterdir()), "the command left a file"


@pytest.mark.parametrize(("arguments", "hidden"), [(["bench"], "diffusers"), (["train", "--all"], "transformers")])
def test_a_missing_package_is_named_before_any_work(arguments, hidden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, hidden, None)  # as if it were not installed
    assert f"this needs {hidden}: pip install {hidden}" in error_of(*arguments)
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(
    ("arguments", "module"), [(["lab"], "jupyterlab"), (["grade", "04-rotary-positions.ipynb"], "jupyter_client")]
)
def test_a_missing_extra_is_named(arguments, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fluxedu.terminal.find_spec", lambda name: None)
    assert f"this needs {module}: pip install 'fluxedu[lab]'" in error_of(*arguments)
    assert not list(Path(tmp_path).iterdir())


def test_an_image_does_not_replace_a_folder(tmp_path):
    (tmp_path / "out.png").mkdir()
    assert "is a folder" in error_of("sample", "x", "--steps", "1", "-o", tmp_path / "out.png")
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_judge_prints_the_table_and_writes_it(tmp_path):
    path = tmp_path / "judge.json"
    result = run(app, ["judge", "--prompts", "2", "--steps", "2", "--json", "--out", str(path)])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures == json.loads(path.read_text())
    assert figures["prompts"] == 2 and figures["rows"]["everything"]["n"] == 2
    assert "everything" in result.output and "ground" not in figures["rows"]


def test_a_picture_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Too many pixels, half a file, no file, a folder: the message contains the path."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "half.png")
    data = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "huge.png")
    for name in ("half.png", "huge.png", "none.png", "."):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10 if name == "huge.png" else None)
        message = error_of("sample", "a", "--image", tmp_path / name, "-o", tmp_path / "o.png")
        assert str(tmp_path / name) in message and "picture" in message


PLACES = {"in a file": "file/out.png", "too long": "x" * 250 + ".png", "a link into a file": "link.png"}


@pytest.mark.parametrize("option", ["-o", "--out", "--html", "--csv"])
@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_to_is_found_before_the_work(option, place, tmp_path, monkeypatch):
    for work in ("cli.pictures.load", "arena.stable_diffusion.open_model", "course.grade.grade_notebook"):
        monkeypatch.setattr(f"fluxedu.{work}", lambda *_, **__: pytest.fail("the work was done first"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link.png").symlink_to("file/out.png")
    command = {"-o": ["sample", "x"], "--out": ["judge"], "--html": ["trace", "x"], "--csv": ["grade", "x.ipynb"]}
    message = error_of(*command[option], option, tmp_path / PLACES[place])
    assert ("there is no folder" if place == "in a file" else "cannot be written: ") in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link.png"]


NOBODY = """
import os, sys
from pathlib import Path
import fluxedu.files
from fluxedu.terminal import check_writable
os.setuid(65534)  # root may write everywhere
check_writable(Path(sys.argv[1]))
"""


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can become somebody else")
def test_a_folder_without_permission_is_found_before_the_work():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        code = [sys.executable, "-c", NOBODY, f"{folder}/out.png"]
        done = subprocess.run(code, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert "out.png cannot be written: Permission denied." in done.stderr and done.returncode != 0
        assert not os.listdir(folder)


JUPYTER = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[-1])
def ask(*_):
    time.sleep(1)  # the user thinks about the question
    (folder / "shut down").touch()
    sys.exit(7)
signal.signal(signal.SIGINT, ask)
(folder / "ready").touch()
time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows sends Ctrl-C in another way")
def test_ctrl_c_lets_jupyter_ask(tmp_path):
    """A terminal sends the signal to both processes. The command waits for Jupyter to end."""
    (tmp_path / "jupyterlab.py").write_text(JUPYTER)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "fluxedu.cli", "lab", "--folder", str(tmp_path / "course")]
    with subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL) as lab:
        try:
            while not (tmp_path / "course" / "ready").exists():
                assert lab.poll() is None
                time.sleep(0.05)
            os.killpg(lab.pid, signal.SIGINT)
            assert lab.wait(20) == 7 and (tmp_path / "course" / "shut down").exists()
        finally:
            if lab.poll() is None:
                os.killpg(lab.pid, signal.SIGKILL)
