"""``python -m evidence NAME [--samples N]``: run an experiment and write its table; without a name, all of them."""

from __future__ import annotations

import json
import platform
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer

import fluxedu as fe
from fluxedu.files import write_text
from fluxedu.threads import fixed_threads

HERE = Path(__file__).parent
RESULTS = HERE.parent / "fluxedu" / "course" / "evidence"
EXPERIMENTS = sorted(p.stem for p in HERE.glob("*.py") if "\ndef run(" in p.read_text())


def main(names: Annotated[list[str] | None, typer.Argument()] = None, samples: int | None = None) -> None:
    """Run experiments, each into its own file; one that has a file already is left alone unless it is named."""
    torch.set_num_threads(1)
    for name in names or [name for name in EXPERIMENTS if not (RESULTS / f"{name}.json").exists()]:
        if name not in EXPERIMENTS:
            raise typer.BadParameter(f"{name} is none of {', '.join(EXPERIMENTS)}.")
        started, chosen = time.monotonic(), {} if samples is None else {"samples": samples}
        with fixed_threads():
            table = import_module(f"evidence.{name}").run(**chosen)
        about = {
            "command": " ".join(["python -m evidence", name, *(f"--{k} {v}" for k, v in chosen.items())]),
            "versions": {"fluxedu": fe.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "minutes": round((time.monotonic() - started) / 60, 1),
        }
        write_text(RESULTS / f"{name}.json", json.dumps({"about": about, "table": table}, indent=1) + "\n")
        print(f"{name}: {about['minutes']} minutes")


if __name__ == "__main__":
    typer.run(main)
