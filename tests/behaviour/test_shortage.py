"""Out of memory: one sentence with numbers, on the command line too, and the pipeline works afterwards."""

import re
import subprocess
import sys

import pytest
import torch

import fluxedu as fe
from fluxedu.errors import OutOfMemory
from fluxedu.memory.placement import GB, Networks, Placement, advice, is_out_of_memory


def networks(pipe):
    return Networks(pipe.flux, pipe.autoencoder, pipe.prompt_encoder.clip, pipe.prompt_encoder.t5, pipe.dtype)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: not enough memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    ],
)
def test_errors_of_allocators_become_advice(pipe, monkeypatch, error):
    def fails(*args):
        raise error

    monkeypatch.setattr("fluxedu.sampling.pipeline.to_images", fails)
    with pytest.raises(
        OutOfMemory, match=r"an image of 64 x 96 needs about [\d.]+ GB with memory='full'"
    ) as error_info:
        pipe("a red circle", steps=1, height=64, width=96, progress=False)
    assert isinstance(error_info.value, ValueError) and isinstance(error_info.value, MemoryError)
    monkeypatch.undo()
    assert pipe("a red circle", steps=1, progress=False).images


def test_other_errors_are_not_changed(pipe, monkeypatch):
    def fails(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr("fluxedu.sampling.pipeline.to_images", fails)
    with pytest.raises(RuntimeError, match="something else"):
        pipe("a red circle", steps=1, progress=False)
    assert not is_out_of_memory(KeyError("memory"))


def test_the_numbers_are_those_by_which_auto_chooses():
    official = Networks.official()
    message = advice(official, torch.device("cpu"), 1024, 1024, 512)
    numbers = [float(n) for n in re.findall(r"about ([\d.]+) GB", message)]
    blocks = Placement("stream", 57)
    expected = [official.need(p, 1024, 1024, 512).peak / GB for p in (Placement(), Placement("no-modulations"), blocks)]
    assert numbers[:3] == pytest.approx(expected, abs=0.006)
    assert numbers[0] > numbers[1] > numbers[2]
    assert numbers[3] == pytest.approx(official.need(Placement(), 512, 512, 512).peak / GB, abs=0.006)


def test_a_swapped_block_does_not_hide_the_advice(pipe):
    with fe.swap("double.0.img_mlp", torch.nn.Identity(), pipe):
        assert "memory ran out on cpu" in advice(networks(pipe), torch.device("cpu"), 64, 64, 8)


@pytest.mark.slow
def test_memory_really_runs_out_on_the_command_line(tmp_path):
    """The address space is limited to what is in use and a little more; a large image does not fit."""
    pytest.importorskip("resource")
    code = """
import resource, sys
import fluxedu as fe
pipe = fe.load()
pipe("a red circle", steps=1)
try:
    with fe.sampling.pipeline.memory_advice(fe.memory.Networks.official(), pipe.device, 64, 64, 8):  # its imports
        raise MemoryError
except fe.memory.OutOfMemory:
    pass
now = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + 400_000_000, now + 400_000_000))
from fluxedu.cli import app
size = ["--height", "1024", "--width", "1024", "--steps", "1"]
sys.argv = ["fluxedu", "sample", "a red circle", *size, "-o", sys.argv[1]]
app()
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "o.png")], capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "fluxedu: memory ran out on cpu: an image of 1024 x 1024 needs" in ran.stderr
    assert not (tmp_path / "o.png").exists()
