"""Commands that look at a model or convert its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from fluxedu.cli.options import Guidance, Json, Like, Model, Out, Revision, Variant, load
from fluxedu.terminal import check_writable, fail, print_json, report_errors, write_result

app = typer.Typer()


@app.command(epilog="Example: fluxedu info klein")
def info(
    model: Annotated[
        str,
        typer.Argument(
            help="A variant such as dev or klein, a miniature such as nano, a file or a folder; default: all."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Show the configuration and the number of parameters of every variant and miniature, or of a file."""
    from fluxedu.models.config import FLUX2_MODELS, VARIANTS
    from fluxedu.nano.shipped import SHIPPED_MODELS

    known = dict.fromkeys([*VARIANTS, *FLUX2_MODELS], variant_info) | dict.fromkeys(SHIPPED_MODELS, miniature_info)
    with report_errors():
        if not model:
            rows = {name: describe(name) for name, describe in known.items()}
        elif model in known:
            rows = {model: known[model](model)}
        elif Path(model).exists():
            rows = file_info(Path(model))
        else:
            raise fail(f"there is no model or file {model!r}; there are {', '.join(known)}.")
    if as_json:
        print_json(rows)
        return
    for name, row in rows.items():
        channels = f"  {row['in_channels']} in" if "in_channels" in row else ""
        typer.echo(f"{name:<13} {row['parameters']:>14,} parameters  {row['tensors']} tensors{channels}")
        if model:
            for key, value in list(row.items())[2:]:
                typer.echo(f"  {key:<30} {value}")


def variant_info(name: str) -> dict:
    """The counts and the configuration of a variant's transformer, and its sampling settings."""
    from fluxedu.models.config import FLUX2_MODELS, VARIANTS

    variant = VARIANTS[name] if name in VARIANTS else FLUX2_MODELS[name]
    steps, guidance = variant.sampling.steps, variant.sampling.guidance
    return _transformer_info(variant.flux) | {"steps": steps, "guidance": guidance}


def miniature_info(name: str) -> dict:
    """The same for a model that ships; with its sampling settings, and the file of its LoRA or Redux head."""
    from fluxedu.nano.shipped import SHIPPED_FLUX2, SHIPPED_MODELS, WEIGHTS
    from fluxedu.nano.sizes import FLUX, FLUX2

    shipped, config = SHIPPED_MODELS[name], FLUX2
    if name not in SHIPPED_FLUX2:
        stored = json.loads((WEIGHTS / shipped.transformer / "config.json").read_text())
        config = FLUX.with_(in_channels=stored["in_channels"], guidance_embed=stored["guidance_embeds"])
    steps, guidance = shipped.sampling.steps, shipped.sampling.guidance
    more = {"with": str(shipped.folder(WEIGHTS))} if shipped.lora or shipped.head else {}
    return _transformer_info(config) | {"steps": steps, "guidance": guidance} | more


def _transformer_info(config) -> dict:
    from fluxedu.models.counting import count_parameters, flux_shapes

    return {"parameters": count_parameters(config), "tensors": len(flux_shapes(config)), **config.to_dict()}


def file_info(path: Path) -> dict[str, dict]:
    """The counts, the dtypes and the configuration of every network in a file or a folder."""
    from fluxedu.checkpoints import config_of, read
    from fluxedu.checkpoints.contents import stored_networks
    from fluxedu.checkpoints.headers import read_entries

    names = read_entries(path)[0]
    rows = {}
    for part in stored_networks(names, path.name) or [None]:
        tensors = read(path, part)
        entries = tensors.entries.values()
        dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})
        about = {"parameters": sum(math.prod(entry.shape) for entry in entries), "tensors": len(entries)}
        config = {} if part is None else config_of(tensors).to_dict()
        rows[part or "tensors"] = about | {"dtypes": ", ".join(dtypes)} | config
    return rows


@app.command(epilog="Example: fluxedu sites attn.map --model dev")
def sites(
    containing: Annotated[str, typer.Argument(help="Only sites whose name contains this text.")] = "",
    model: Model = "nano",
    like: Like = None,
    variant: Variant = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """List the sites, the values that can be recorded or changed: name, shape, meaning, source line."""
    from dataclasses import asdict

    from fluxedu.instruments.catalogue import LEGEND, sites
    from fluxedu.models import FLUX2_MODELS, VARIANTS

    with report_errors():
        pipe = (
            model
            if model in VARIANTS or model in FLUX2_MODELS
            else load(model, like=like, variant=variant, revision=revision)
        )
        found = [s for s in sites(pipe) if containing in s.name]
    if not found:
        raise fail(f"no site has {containing!r} in its name; fluxedu sites lists all of them.")
    if as_json:
        print_json([asdict(s) for s in found])
        return
    for site in found:
        typer.echo(str(site))
    used = {letter for s in found for letter in s.shape if letter in LEGEND}
    typer.echo("\n".join(f"{letter}  {meaning}" for letter, meaning in LEGEND.items() if letter in used))


@app.command(epilog="Example: fluxedu judge --model nano --prompts 500 --out judge.json")
def judge(
    model: Model = "nano",
    like: Like = None,
    variant: Variant = None,
    revision: Revision = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of held-out prompts.")] = 500,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps.")] = 20,
    guidance: Guidance = None,
    for_shapes: Annotated[int, typer.Option(min=0, help="Prompts per aspect ratio, if more than --prompts.")] = 0,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Generate images of held-out prompts, score them with the scene judge, and print the table."""
    from fluxedu.sampling.limits import check_settings

    check_writable(out)
    with report_errors():  # before PyTorch is imported, which takes seconds
        check_settings(steps=steps, guidance=guidance)
    from fluxedu.arena.stable_diffusion import open_model
    from fluxedu.nano.exam import evaluate, format_table

    with report_errors():
        opened = open_model(model, like=like, variant=variant, revision=revision)
        scores = evaluate(opened, model, prompts, steps, guidance, for_shapes)
    print_json(scores) if as_json else typer.echo(format_table(scores))
    write_result(out, scores, quiet=as_json)


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
