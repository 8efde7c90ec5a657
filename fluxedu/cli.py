"""The command line: ``fluxedu sample | trace | info | sites | train | judge | convert | sweep | bench | lab | …``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fluxedu.arena.cli import app as arena
from fluxedu.terminal import can_write, fail, resumable, sentences, write_json

app = typer.Typer(help="FLUX.1 in code that reads like its diagram.", no_args_is_help=True, add_completion=False)
app.add_typer(arena, name="arena")

Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
Model = Annotated[
    str,
    typer.Option(
        envvar="FLUXEDU_MODEL",
        help="nano (shipped, guidance built in), nano-base (shipped, real CFG), a variant such as dev, or a folder.",
    ),
]


def _load(model: str, device: str | None = None, dtype: str | None = None, **how):
    import fluxedu as fe

    with sentences():
        return fe.load(model, device=device, dtype=dtype, **how)


def _from_checkout(name: str):
    """The module ``training`` or ``benchmarks``, which only a checkout has, beside ``fluxedu/``."""
    import sys
    from importlib import import_module

    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file() or not (root / name).is_dir():
        raise fail(f"{name}/ is not installed with the package; git clone the repository and pip install -e it first.")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module(name)


def _picture(path: Path):
    """A picture from a file, wholly read."""
    from PIL import Image

    if not path.is_file():
        raise fail(f"there is no picture {path}.")
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise fail(f"{path} is no picture that can be read: {str(error).rstrip('.')}.") from None
    return picture


@app.command(epilog='Example: fluxedu sample "a red circle left of a blue square" -o out.png')
def sample(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the picture goes.")] = Path("out.png"),
    model: Model = "nano",
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(help="The model's own number if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="The model's own strength if not given.")] = None,
    negative: Annotated[str | None, typer.Option(help="What to steer away from (with --cfg).")] = None,
    cfg: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    height: int | None = None,
    width: int | None = None,
    solver: Annotated[str, typer.Option(help="euler, midpoint or heun.")] = "euler",
    image: Annotated[Path | None, typer.Option(help="Begin from this picture instead of from noise.")] = None,
    strength: Annotated[float, typer.Option(help="How much of --image to change, above 0 up to 1.")] = 0.6,
    variant: Annotated[str | None, typer.Option(help="A member of the miniature's family: fill, canny, …")] = None,
    mask: Annotated[Path | None, typer.Option(help="fill: white where --image is to be painted.")] = None,
    control: Annotated[Path | None, typer.Option(help="canny, depth: the picture to follow.")] = None,
    edges: Annotated[
        bool, typer.Option("--edges", help="canny: --control is any picture, its edges are wanted.")
    ] = False,
    reference: Annotated[Path | None, typer.Option(help="kontext: the picture to edit.")] = None,
    image_prompt: Annotated[Path | None, typer.Option(help="redux: a picture instead of, or beside, words.")] = None,
    lora: Annotated[str | None, typer.Option(help="A LoRA to merge: a file, or hollow, the style that ships.")] = None,
    lora_scale: Annotated[float, typer.Option(help="How much of its change.")] = 1.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the model's own choice if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float64.")] = None,
    memory: Annotated[str, typer.Option(help="auto, full, no-modulations or stream.")] = "auto",
    quantise: Annotated[str | None, typer.Option(help="The blocks' weights as int8, fp8 or nf4; not exact.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Let torch.compile fuse the blocks.")] = False,
) -> None:
    """Draw a prompt into a PNG file."""
    from PIL import Image

    from fluxedu.files import atomic_path
    from fluxedu.sampling.images import edges as edges_of

    kind = Image.registered_extensions().get(output.suffix.lower())
    if kind not in Image.SAVE:
        raise fail(f"{output.name} does not end like a picture; call it something.png.")
    can_write(output)
    if edges and control is None:
        raise fail("--edges are those of --control; give that picture too.")
    how = {"memory": memory, "quantise": quantise, "compile": compile, "lora": lora, "lora_scale": lora_scale}
    pipe = _load(f"nano-{variant}" if variant else model, device, dtype, **how)
    given = {"image": image, "mask": mask, "control": control, "reference": reference, "image_prompt": image_prompt}
    with sentences():
        pictures = {name: _picture(path) for name, path in given.items() if path}
        if edges:
            pictures["control"] = edges_of(pictures["control"])
        drawn = pipe(
            prompt, seed=seed, steps=steps, guidance=guidance, negative_prompt=negative, true_cfg_scale=cfg,
            height=height, width=width, solver=solver, strength=strength, trajectory=False, **pictures,
        )  # fmt: skip
        picture = drawn.images[0]
        with atomic_path(output, overwrite=True) as part:
            picture.save(part, format=kind)
    typer.echo(f"wrote {output} ({picture.width} x {picture.height})")


@app.command(epilog='Example: fluxedu trace "a red circle left of a blue square" --html out.html')
def trace(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    html: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("trace.html"),
    model: Model = "nano",
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(help="The model's own number if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="The model's own strength if not given.")] = None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Draw a prompt and write down the whole run as one page, every stage of the diagram to click on."""
    from fluxedu.files import write_text
    from fluxedu.trace import page, stages

    can_write(html)
    pipe = _load(model)
    with sentences():
        asked = {"seed": seed, "steps": steps, "guidance": guidance, "height": height, "width": width}
        out, found = stages(pipe, prompt, **asked)
        about = f"{model}, seed {seed}, {len(out.trajectory.times) - 1} steps. Click a stage; arrow keys move."
        write_text(html, page(prompt or "the empty prompt", about, found))
    typer.echo(f"wrote {html} ({html.stat().st_size / 1e6:.1f} MB)")


@app.command(epilog="Example: fluxedu info dev")
def info(
    variant: Annotated[str, typer.Argument(help="A variant's name; all of them if not given.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every variant of FLUX.1: its numbers, and how many parameters they make."""
    from fluxedu.models import VARIANTS, Flux, FluxConfig
    from fluxedu.models.meta_init import meta_init

    rows = {}
    with sentences():
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
    containing: Annotated[str, typer.Argument(help="Only sites whose name contains this.")] = "",
    model: Model = "nano",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every value that can be recorded or changed: its name, its shape, what it means, where it passes."""
    from dataclasses import asdict

    from fluxedu.instruments.catalogue import LEGEND, sites
    from fluxedu.models import VARIANTS

    with sentences():
        found = [s for s in sites(model if model in VARIANTS else _load(model)) if containing in s.name]
    if not found:
        raise fail(f"no site's name contains {containing!r}; fluxedu sites lists them all.")
    if as_json:
        typer.echo(json.dumps([asdict(s) for s in found], indent=2))
        return
    for site in found:
        typer.echo(str(site))
    used = {letter for s in found for letter in s.shape if letter in LEGEND}
    typer.echo("\n".join(f"{letter}  {meaning}" for letter, meaning in LEGEND.items() if letter in used))


@app.command(epilog="Example: fluxedu train --all --out runs")
def train(
    all_stages: Annotated[bool, typer.Option("--all", help="Every stage, in order.")] = False,
    stage: Annotated[str | None, typer.Option(help="autoencoder, t5, clip, latents, flow, dev, ship or card.")] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="schnell, fill, canny, depth, kontext, redux; hollow, a style; sd and twin, to compare."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the runs keep their state.")] = Path("runs"),
    resume: Annotated[bool, typer.Option(help="Go on from what is there, or begin anew.")] = True,
    ship_to: Annotated[
        Path | None, typer.Option(help="Where the finished weights go; OUT/weights if not given.")
    ] = None,
) -> None:
    """Train the miniature's networks from scratch. Stopped at any time, the same command continues from there."""
    checkout = _from_checkout("training")
    with sentences():
        import transformers  # noqa: F401  (makes the tokenizers; better missed now than in an hour)
    with resumable():
        checkout.train(all_stages, stage, variant, out, resume, ship_to or out / "weights")


@app.command(epilog="Example: fluxedu judge --model nano --prompts 500 --json judge.json")
def judge(
    model: Model = "nano",
    prompts: Annotated[int, typer.Option(min=1, help="How many held-out prompts.")] = 500,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[float | None, typer.Option(help="The model's own strength if not given.")] = None,
    for_shapes: Annotated[
        int, typer.Option(min=0, help="Compare shapes of picture over so many prompts, if more than --prompts.")
    ] = 0,
    as_json: Json = None,
) -> None:
    """Draw held-out prompts, let the judge read them, print the table."""
    from fluxedu.nano.exam import evaluate, format_table
    from fluxedu.nano.stable_diffusion import open_model

    can_write(as_json)
    with sentences():
        figures = evaluate(open_model(model), model, prompts, steps, guidance, for_shapes)
    typer.echo(format_table(figures))
    write_json(as_json, figures)


@app.command(epilog="Example: fluxedu convert flux1-dev.safetensors transformer/ --to diffusers")
def convert(
    source: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder of them.")],
    target: Annotated[Path, typer.Argument(help="The file or folder to write; it must not exist.")],
    to: Annotated[str, typer.Option(help="bfl (one file) or diffusers (a folder).")],
    shard_gb: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Largest file of a diffusers folder, in GB.")
    ] = 10.0,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Carry a transformer or an autoencoder between the official layout and diffusers', both ways."""
    from tqdm.auto import tqdm

    from fluxedu.checkpoints import convert_file

    with sentences():
        with tqdm(unit="B", unit_scale=True, desc="convert", delay=1) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            convert_file(source, target, to=to, shard_bytes=int(shard_gb * 1e9), overwrite=overwrite, progress=progress)
    typer.echo(f"wrote {target}")


@app.command(epilog="Example: fluxedu sweep gates.yaml --workers 4")
def sweep(
    config: Annotated[
        Path, typer.Argument(help="A YAML file: prompts, seeds, interventions; see fluxedu/sweep/config.py.")
    ],
    out: Annotated[Path | None, typer.Option(help="The folder of the results; the config's name if not given.")] = None,
    workers: Annotated[int, typer.Option(help="The number of processes on this machine.")] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(envvar="DASK_SCHEDULER_ADDRESS", help="The address of a Dask scheduler to use instead."),
    ] = None,
) -> None:
    """Draw prompts x seeds x interventions into one folder. If it is interrupted, the same command continues."""
    from fluxedu.errors import SweepError
    from fluxedu.sweep import read_config, run_sweep

    with resumable():
        described, folder = read_config(config), out or config.with_suffix("")
        if folder == config or folder.is_file():
            raise SweepError(f"{folder} is a file; name a folder for the results with --out.")
        run_sweep(described, folder, workers, scheduler, progress=True)
    typer.echo(f"wrote {folder} ({len(described):,} cells)")


@app.command(epilog="Example: fluxedu bench --json bench.json")
def bench(
    as_json: Json = None,
    quick: Annotated[bool, typer.Option(help="Fewer rounds.")] = False,
) -> None:
    """Time the models beside diffusers', as ratios in one run."""
    benchmarks = _from_checkout("benchmarks")
    can_write(as_json)
    with sentences():
        figures = benchmarks.run(rounds=5 if quick else 15)
    typer.echo(benchmarks.table(figures))
    write_json(as_json, figures)


@app.command(epilog="Example: fluxedu lab --folder my-course")
def lab(
    port: int = 8888,
    folder: Annotated[Path, typer.Option(help="Where to work: notebooks it lacks are copied there.")] = Path(
        "fluxedu-course"
    ),
) -> None:
    """Open the course in JupyterLab, on a copy of your own; what you have written there is never replaced."""
    import os
    import subprocess
    import sys

    from fluxedu.course.build import copy_notebooks

    with sentences():
        new, kept = copy_notebooks(folder)
    typer.echo(f"{folder}: {len(new)} notebooks copied, {len(kept)} left as they are")
    root = ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []  # as in most containers
    raise typer.Exit(subprocess.call([sys.executable, "-m", "jupyterlab", f"--port={port}", *root, str(folder)]))


@app.command(epilog="Example: fluxedu grade class/*/04-rotary-positions.ipynb --csv marks.csv")
def grade(
    notebooks: Annotated[
        list[Path], typer.Argument(help="Students' notebooks, each in a folder named as its student.")
    ],
    csv: Annotated[Path | None, typer.Option(help="Also write a line a student and exercise to this file.")] = None,
    by_student: Annotated[
        Path | None, typer.Option("--table", help="Also write a row a student, an exercise a column, to this CSV file.")
    ] = None,
    timeout: Annotated[int, typer.Option(min=1, help="Seconds that a cell may take.")] = 120,
    whole: Annotated[int, typer.Option(min=1, help="Seconds that a notebook may take.")] = 900,
    memory: Annotated[int, typer.Option(min=1, help="GB of memory that a notebook may ask for.")] = 16,
) -> None:
    """Run students' notebooks, each in a process of its own, and mark the exercises. This is no sandbox."""
    from fluxedu.files import write_text
    from fluxedu.course.grade import as_csv, class_table, grade_notebook, write_csv
    from fluxedu.errors import CourseError

    can_write(csv)
    can_write(by_student)
    marks = []
    for path in notebooks:
        try:
            marks += (mine := grade_notebook(path, timeout, whole, memory))
        except CourseError as error:
            fail(error)  # said, and on to the next
            continue
        typer.echo(f"{mine[0].student}: {sum(m.passed for m in mine)} of {len(mine)}  {path.name}")
        for mark in mine:
            typer.echo(f"  {'✓' if mark.passed else '✗'} {mark.exercise}: {mark.message}")
    rows = class_table(marks)
    if len(rows) > 2:  # of one student all is said already
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        typer.echo("\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows))
    for path, write in (
        (csv, lambda: write_csv(marks, csv)),
        (by_student, lambda: write_text(by_student, as_csv(rows))),
    ):
        if path is not None:
            with sentences():
                write()
            typer.echo(f"wrote {path}")
    raise typer.Exit(0 if marks else 2)


if __name__ == "__main__":
    app()
