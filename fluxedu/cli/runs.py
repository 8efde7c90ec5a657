"""Commands that run for a long time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxedu.cli.options import Json, Out
from fluxedu.terminal import check_writable, fail, print_json, report_errors, report_interrupts, write_result

app = typer.Typer()


def from_checkout(name: str):
    """Import ``training`` or ``benchmarks``, which are beside ``fluxedu/`` in a checkout and not installed."""
    import sys
    from importlib import import_module

    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / name).is_dir():
        raise fail(f"{name}/ is not part of the installed package; clone the repository, and pip install -e . there.")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module(name)


@app.command(epilog="Example: fluxedu train --all --out runs")
def train(
    all_stages: Annotated[bool, typer.Option("--all", help="Run every stage, in order.")] = False,
    stage: Annotated[
        str | None, typer.Option(help="One stage: autoencoder, t5, clip, latents, flow, dev, ship or card.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="schnell, fill, canny, depth, kontext, redux; hollow (a style LoRA); sd or twin (baselines); "
            "flux2, or flux2-twin, -modulation, -positions, -no-pooled, -swiglu (one change each)."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the state of the runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option(help="Continue from the state in --out, or start again.")] = True,
    ship_to: Annotated[Path | None, typer.Option(help="Folder for the weights; default: OUT/weights.")] = None,
) -> None:
    """Train the miniature's networks from scratch, in a checkout. If it is interrupted, the same command continues."""
    checkout = from_checkout("training")
    with report_errors():
        import transformers  # noqa: F401  (a later stage needs it; if it is missing, say so now)
    with report_interrupts():
        checkout.train(all_stages, stage, variant, out, resume, ship_to or out / "weights")


@app.command(epilog="Example: fluxedu sweep gates.yaml --workers 4")
def sweep(
    config: Annotated[
        Path, typer.Argument(help="A YAML file: prompts, seeds, interventions; see fluxedu/sweep/config.py.")
    ],
    out: Annotated[Path | None, typer.Option(help="The folder of the results; default: the config's name.")] = None,
    workers: Annotated[int, typer.Option(help="The number of processes on this machine.")] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(envvar="DASK_SCHEDULER_ADDRESS", help="The address of a Dask scheduler to use instead."),
    ] = None,
) -> None:
    """Run every combination of prompts, seeds and interventions. If it is interrupted, the same command continues."""
    from fluxedu.errors import SweepError
    from fluxedu.sweep import read_config, run_sweep

    with report_interrupts():
        described, folder = read_config(config), out or config.with_suffix("")
        if folder == config or folder.is_file():
            raise SweepError(f"{folder} is a file; name a folder for the results with --out.")
        run_sweep(described, folder, workers, scheduler, progress=True)
    typer.echo(f"wrote {folder} ({len(described):,} cells)")


@app.command(epilog="Example: fluxedu bench --out bench.json")
def bench(
    as_json: Json = False,
    out: Out = None,
    quick: Annotated[bool, typer.Option(help="Run fewer rounds.")] = False,
) -> None:
    """Compare speed and memory with diffusers, in a checkout; all results are ratios measured in one run."""
    benchmarks = from_checkout("benchmarks")
    check_writable(out)
    with report_errors():
        ratios = benchmarks.run(rounds=5 if quick else 15)
    print_json(ratios) if as_json else typer.echo(benchmarks.table(ratios))
    write_result(out, ratios, quiet=as_json)
