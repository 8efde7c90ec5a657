"""Commands that look at a model or convert its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fluxedu.cli.options import Guidance, Json, Like, Model, Revision, Variant, load
from fluxedu.terminal import check_writable, fail, report_errors, write_result

app = typer.Typer()


@app.command(epilog="Example: fluxedu info dev")
def info(
    variant: Annotated[str, typer.Argument(help="A variant such as dev; default: all of them.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the configuration and the number of parameters of every variant of FLUX.1."""
    from fluxedu.models import VARIANTS, Flux, FluxConfig
    from fluxedu.models.meta_init import meta_init

    rows = {}
    with report_errors():
        for name in [variant] if variant else VARIANTS:
            config = FluxConfig.variant(name)
            with meta_init():
                flux = Flux(config)
            count = sum(p.numel() for p in flux.parameters())
            rows[name] = {"parameters": count, "tensors": len(flux.state_dict()), **config.to_dict()}
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for name, row in rows.items():
        typer.echo(f"{name:<11} {row['parameters']:>14,} parameters  {row['tensors']} tensors  {row['in_channels']} in")
        if variant:
            for key, value in list(row.items())[2:]:
                typer.echo(f"  {key:<20} {value}")


@app.command(epilog="Example: fluxedu sites attn.map --model dev")
def sites(
    containing: Annotated[str, typer.Argument(help="Only sites whose name contains this text.")] = "",
    model: Model = "nano",
    like: Like = None,
    variant: Variant = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the sites, the values that can be recorded or changed: name, shape, meaning, source line."""
    from dataclasses import asdict

    from fluxedu.instruments.catalogue import LEGEND, sites
    from fluxedu.models import VARIANTS

    with report_errors():
        pipe = model if model in VARIANTS else load(model, like=like, variant=variant, revision=revision)
        found = [s for s in sites(pipe) if containing in s.name]
    if not found:
        raise fail(f"no site has {containing!r} in its name; fluxedu sites lists all of them.")
    if as_json:
        typer.echo(json.dumps([asdict(s) for s in found], indent=2))
        return
    for site in found:
        typer.echo(str(site))
    used = {letter for s in found for letter in s.shape if letter in LEGEND}
    typer.echo("\n".join(f"{letter}  {meaning}" for letter, meaning in LEGEND.items() if letter in used))


@app.command(epilog="Example: fluxedu judge --model nano --prompts 500 --json judge.json")
def judge(
    model: Model = "nano",
    like: Like = None,
    variant: Variant = None,
    revision: Revision = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of held-out prompts.")] = 500,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps.")] = 20,
    guidance: Guidance = None,
    for_shapes: Annotated[int, typer.Option(min=0, help="Prompts per aspect ratio, if more than --prompts.")] = 0,
    as_json: Json = None,
) -> None:
    """Generate images of held-out prompts, score them with the scene judge, and print the table."""
    from fluxedu.arena.stable_diffusion import open_model
    from fluxedu.nano.exam import evaluate, format_table

    check_writable(as_json)
    with report_errors():
        opened = open_model(model, like=like, variant=variant, revision=revision)
        scores = evaluate(opened, model, prompts, steps, guidance, for_shapes)
    typer.echo(format_table(scores))
    write_result(as_json, scores)


@app.command(epilog="Example: fluxedu convert flux1-dev.safetensors transformer/ --to diffusers")
def convert(
    source: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder of them.")],
    target: Annotated[Path, typer.Argument(help="The file or folder to write; it must not exist (see --overwrite).")],
    to: Annotated[str, typer.Option(help="The layout to write: bfl (one file) or diffusers (a folder).")],
    part: Annotated[str | None, typer.Option(help="One of several networks in SOURCE, such as transformer.")] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, max=1e6, help="Largest file of a folder, in GB.")] = 10.0,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing target.")] = False,
) -> None:
    """Convert a transformer or an autoencoder between the official layout (bfl) and diffusers'."""
    from fluxedu.checkpoints import convert_file
    from fluxedu.progress import progress_bar

    with report_errors():
        with progress_bar(unit="B", unit_scale=True, desc="convert") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            options = {"part": part, "shard_bytes": int(shard_gb * 1e9), "overwrite": overwrite, "progress": progress}
            convert_file(source, target, to=to, **options)
    typer.echo(f"wrote {target}")
