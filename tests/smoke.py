"""What a fresh installation must do; without a test framework, for any Python with the wheel: `make pythons`."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fluxedu as fe

print("Python", sys.version.split()[0], "and torch", torch.__version__)
for name in fe.__all__:  # every public name can be imported
    getattr(fe, name)


def draw() -> bytes:
    return pipe("a red circle", steps=4, seed=1, progress=False).images[0].tobytes()


pipe = fe.load()
plain = draw()
with fe.record("single.1.attn.map", "double.*.img_attn_out", "velocity") as recording:
    assert draw() == plain
assert recording["velocity"].sizes["step"] == 4
with fe.ablate("single.1.heads", heads=[0]):
    assert draw() != plain
fe.widgets.attention(pipe, "a red circle", steps=2)
assert not fe.check("clip.quick_gelu", torch.relu)

with tempfile.TemporaryDirectory() as folder:
    commands = (
        "sample circle --steps 4 -o image.png",
        "trace circle --steps 2 --html trace.html",
        "info",
        "sites",
        "lab --help",
    )
    for command in commands:
        run = [sys.executable, "-m", "fluxedu.cli", *command.split()]
        subprocess.run(run, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    assert {file.name for file in Path(folder).iterdir()} == {"image.png", "trace.html"}
print("The smoke test passed.")
