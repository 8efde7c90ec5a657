"""A sweep on disk: what it is, its files, and at the end the manifest.

sweep.json                  what was asked, of which model, on which device and dtype; another sweep is refused here
shards/00000.safetensors    cells 0 to 7, and so on; each written once and whole
cells.csv                   a line a cell: prompt, seed, intervention, file (and cells.parquet if pyarrow is there)
manifest.json               written last: every file with its size and SHA-256

sweep = open_sweep("gates")
sweep.cells[12]             # {"cell": 12, "prompt": "a red circle", "seed": 0, ...}
sweep[12]["latent"]         # a Named tensor
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

import torch
from safetensors import safe_open

from fluxedu import __version__
from fluxedu.checkpoints.save import write_text
from fluxedu.errors import SweepError
from fluxedu.files import atomic_path
from fluxedu.instruments.named import Named
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sweep.claims import claimed, forget_claims
from fluxedu.sweep.config import Sweep, from_dict

MANIFEST = "manifest.json"


def shard_path(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}.safetensors"


def missing(sweep: Sweep, folder: Path) -> list[int]:
    """The numbers of the files that are not there yet."""
    return [number for number in sweep.shards if not shard_path(folder, number).is_file()]


def begin(sweep: Sweep, folder: Path, pipe: FluxPipeline) -> None:
    """Write down what the folder is for; raises SweepError where it is for something else."""
    by = {"fluxedu": __version__, "torch": torch.__version__, **numerics(pipe), "model": fingerprint(pipe)}
    asked = json.dumps({"sweep": sweep.to_dict(), "by": by}, indent=1, ensure_ascii=False) + "\n"
    path = folder / "sweep.json"
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder, "sweep", wait=True):
        if not path.exists():
            if strangers := [p.name for p in folder.iterdir() if not p.name.startswith(".")]:
                raise SweepError(f"{folder} holds {strangers[0]!r} and no sweep; name a new folder.")
            write_text(path, asked)
    if (there := _text(path)) != asked:
        raise SweepError(f"{folder} holds another sweep ({_difference(there, asked)}); name a new folder.")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _difference(there: str, asked: str) -> str:
    """The first name whose value differs."""
    try:
        old, new = json.loads(there), json.loads(asked)
        names = [(part, name) for part in new for name in new[part] if old[part].get(name) != new[part][name]]
        return f"{names[0][1]} is not the same" if names else "interventions are in another order"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its sweep.json cannot be read"


def numerics(pipe: FluxPipeline) -> dict[str, str]:
    """What decides how numbers are rounded: a set begun with one is not continued with another."""
    device = pipe.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    decoded = "in tiles" if "decode" in vars(pipe.autoencoder) else "whole"  # as memory="auto" may choose
    return {"device": f"{device.type} {kind}", "dtype": str(pipe.dtype).removeprefix("torch."), "decoded": decoded}


def fingerprint(pipe: FluxPipeline) -> str:
    """Of which weights: names, shapes and a few values of every tensor."""
    found = hashlib.sha256()
    for network, module in pipe.networks().items():
        for name, tensor in module.state_dict().items():
            flat = tensor.detach().reshape(-1)
            few = flat[:: max(1, len(flat) // 8)].double().cpu().numpy().tobytes()
            found.update(f"{network}.{name} {list(tensor.shape)}".encode() + few)
    return found.hexdigest()[:16]


def finish(sweep: Sweep, folder: Path) -> None:
    """All files are there: write the table and, last, the manifest."""
    with claimed(folder, "manifest", wait=True):
        if not (folder / MANIFEST).exists():
            write_text(folder / "cells.csv", _table(sweep))
            tables = ["cells.csv", *_parquet(sweep, folder)]
            files = [*tables, *(str(shard_path(Path(), n)) for n in sweep.shards)]
            whole = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in files}
            write_text(folder / MANIFEST, json.dumps({"cells": len(sweep), "files": whole}, indent=1) + "\n")
    forget_claims(folder)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def rows(sweep: Sweep) -> list[dict]:
    """A row a cell."""
    return [
        {**vars(cell), "file": str(shard_path(Path(), number))}
        for number in sweep.shards
        for cell in sweep.cells(number)
    ]


def _table(sweep: Sweep) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, ["number", "prompt", "seed", "intervention", "file"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows(sweep))
    return text.getvalue()


def _parquet(sweep: Sweep, folder: Path) -> list[str]:
    """The same table for those who have pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        return []
    with atomic_path(folder / "cells.parquet", overwrite=True) as part:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(sweep)), part)
    return ["cells.parquet"]


class Results:
    """A finished sweep: ``cells``, a dictionary each, and ``results[number]``, what is kept of a cell by name."""

    def __init__(self, folder: Path, sweep: Sweep, manifest: dict):
        self.folder, self.sweep, self.manifest = folder, sweep, manifest
        self.cells = rows(sweep)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, number: int) -> dict[str, Named]:
        prefix, found = f"{self.cells[number]['number']:06d}/", {}
        with safe_open(self.folder / self.cells[number]["file"], "pt") as file:
            told = json.loads(file.metadata()["fluxedu_sweep"])
            for key in (key for key in file.keys() if key.startswith(prefix)):
                value = told[key]
                found[key.removeprefix(prefix)] = Named(
                    file.get_tensor(key), tuple(value["axes"]), value.get("labels", {})
                )
        return found

    def damaged(self) -> list[str]:
        """Files that are not as the manifest says, or not there."""
        paths = {name: self.folder / name for name in self.manifest["files"]}
        told = {name: values["sha256"] for name, values in self.manifest["files"].items()}
        return [name for name, path in paths.items() if not path.is_file() or sha256(path) != told[name]]


def open_sweep(folder: str | Path) -> Results:
    """Read a finished sweep; raises SweepError where there is none."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise SweepError(f"{folder} holds no finished sweep (there is no {MANIFEST}).")
    try:
        asked, manifest = (json.loads(_text(folder / name)) for name in ("sweep.json", MANIFEST))
        return Results(folder, from_dict(asked["sweep"]), manifest)
    except (ValueError, KeyError, TypeError, OSError):
        raise SweepError(f"{folder} holds a sweep whose sweep.json or {MANIFEST} cannot be read.") from None
