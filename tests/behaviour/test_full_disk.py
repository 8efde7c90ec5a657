"""The disk fills up while something is written: the old file stays intact, nothing is half-written, work can resume.

The system itself stops the writing, also in native code: this process may write no file larger than a limit
(RLIMIT_FSIZE), which fails as a full disk does.
"""

from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu import cli
from fluxedu.checkpoints import convert_file, save_file, save_folder
from fluxedu.course.grade import Mark, write_csv
from fluxedu.files import write_text
from fluxedu.models import Flux, FluxConfig
from fluxedu.sweep import from_dict, open_sweep, run_sweep

resource = pytest.importorskip("resource", reason="limits exist only on Unix")
FLUX = FluxConfig(
    in_channels=4, out_channels=4, vec_in_dim=6, context_in_dim=5, hidden_size=64, num_heads=2, axes_dim=(8, 12, 12),
    depth=1, depth_single_blocks=1,
)  # fmt: skip
SWEEP = from_dict({"prompts": ["a red circle"], "settings": {"steps": 1}})


@contextmanager
def room_for(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def record(here: Path, pipe) -> None:
    with fe.record("double.*.attn.map", to=here / "target"):
        pipe("a red circle", steps=1, height=64, width=64)


FILE, FOLDER = "target.safetensors", "target/diffusion_pytorch_model.safetensors"
WRITERS = {
    "a file": (FILE, lambda here, _: save_file(Flux(FLUX).state_dict(), here / FILE, overwrite=True)),
    "a folder": (FOLDER, lambda here, _: save_folder(Flux(FLUX).state_dict(), here / "target", FLUX, overwrite=True)),
    "shards": (
        FOLDER,
        lambda here, _: save_folder(
            Flux(FLUX).state_dict(), here / "target", FLUX, max_shard_bytes=9_000, overwrite=True
        ),
    ),
    "a conversion": (
        FOLDER,
        lambda here, _: convert_file(here.parent / "source.safetensors", here / "target", "diffusers", overwrite=True),
    ),
    "text": ("target.json", lambda here, _: write_text(here / "target.json", "x" * 20_000)),
    "marks": (
        "target.csv",
        lambda here, _: write_csv([Mark("a", "n", "b", True, "c" * 99)] * 200, here / "target.csv"),
    ),
    "a recording": (None, record),
}


@pytest.mark.parametrize("what", WRITERS)
def test_nothing_is_half_written_and_the_old_file_stays(what, tmp_path, pipe):
    old, write = WRITERS[what]
    here = tmp_path / "here"
    here.mkdir()
    save_file(Flux(FLUX).state_dict(), tmp_path / "source.safetensors", config=FLUX)
    for there in [None, old] if old else [None]:
        if there:
            (here / there).parent.mkdir(exist_ok=True)
            (here / there).write_bytes(b"old")
        with room_for(5_000), pytest.raises(OSError, match="File too large"):
            write(here, pipe)
        assert contents(here) == ({there: b"old"} if there else {})
    if old:
        write(here, pipe)
        assert contents(here) and b"old" not in contents(here).values()


def test_a_sweep_resumes_when_there_is_room_again(tmp_path):
    with room_for(5_000), pytest.raises(OSError, match="File too large"):
        run_sweep(SWEEP, tmp_path)
    assert list(contents(tmp_path)) == ["sweep.json"]
    run_sweep(SWEEP, tmp_path)
    assert open_sweep(tmp_path).damaged() == []


def test_a_command_reports_it_in_one_line(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(cli.pictures, "load", lambda *_, **__: pipe)
    with room_for(500):
        result = CliRunner().invoke(cli.app, ["sample", "a red circle", "-o", str(tmp_path / "out.png")])
    assert result.exit_code == 2 and result.output == "fluxedu: [Errno 27] File too large\n"
    assert not list(tmp_path.iterdir())
