"""The command line: one function per ``fluxedu`` command. Imports happen inside, so that ``--help`` is fast."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from fluxedu.arena.cli import app as arena
from fluxedu.terminal import check_extra, check_writable, fail, report_errors, report_interrupts, write_result

app = typer.Typer(help="FLUX.1 in code that reads like its diagram.", no_args_is_help=True, add_completion=False)
app.add_typer(arena, name="arena")

Json = Annotated[Path | None, typer.Option("--json", help="Also write the results to this JSON file.")]
Model = Annotated[
    str,
    typer.Option(
        envvar="FLUXEDU_MODEL",
        help="nano (ships with fluxedu), nano-base, nano-fill and so on, a variant such as dev, a folder or a file.",
    ),
]
Like = Annotated[str | None, typer.Option(help="Use the sampling settings of this model, such as dev.")]
Variant = Annotated[str | None, typer.Option(help="The set of files of --model, such as fp16.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of a repository in the cache.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise; the same seed gives the same image.")]
Steps = Annotated[int | None, typer.Option(help="Number of steps; default: the model's own.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; default: the model's own.")]
Side = Annotated[int | None, typer.Option(help="Pixels; default: the model's own.")]


def _load(model: str, **options):
    import fluxedu as fe

    with report_errors():
        return fe.load(model, **options)


def _from_checkout(name: str):
    """Import ``training`` or ``benchmarks``, which are beside ``fluxedu/`` in a checkout and not installed."""
    import sys
    from importlib import import_module

    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file() or not (root / name).is_dir():
        raise fail(f"{name}/ is not part of the installed package; clone the repository, and pip install -e . there.")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module(name)


@app.command(epilog='Example: fluxedu sample "a red circle left of a blue square" -o out.png')
def sample(
    prompt: Annotated[str, typer.Argument(help="The prompt: a description of the image.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The image file to write.")] = Path("out.png"),
    model: Model = "nano",
    like: Like = None,
    variant: Variant = None,
    revision: Revision = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt, for classifier-free guidance (--cfg).")] = None,
    cfg: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")] = None,
    height: Side = None,
    width: Side = None,
    solver: Annotated[str, typer.Option(help="Solver: euler, midpoint or heun.")] = "euler",
    image: Annotated[Path | None, typer.Option(help="Start from this picture instead of noise.")] = None,
    strength: Annotated[float, typer.Option(help="How much --image may change, above 0 and up to 1.")] = 0.6,
    mask: Annotated[Path | None, typer.Option(help="fill: a mask, white where --image is painted anew.")] = None,
    control: Annotated[Path | None, typer.Option(help="canny, depth: the edges or the depth map.")] = None,
    edges: Annotated[bool, typer.Option("--edges", help="canny: compute the edges of --control first.")] = False,
    reference: Annotated[Path | None, typer.Option(help="kontext: the picture to edit.")] = None,
    image_prompt: Annotated[Path | None, typer.Option(help="redux: a picture as prompt, with or without text.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="A LoRA: a file or hollow, which ships; repeatable.")] = None,
    lora_scale: Annotated[
        list[float] | None, typer.Option(help="Factor of the LoRA's change; one for all, or one after each --lora.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; default: the model's own.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float64; default: the model's own.")] = None,
    memory: Annotated[str, typer.Option(help="Where weights are held: auto, full, no-modulations or stream.")] = "auto",
    quantise: Annotated[str | None, typer.Option(help="Quantise weights to int8, fp8 or nf4; not exact.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the blocks with torch.compile.")] = False,
) -> None:
    """Generate an image from a prompt and save it."""
    from PIL import Image

    from fluxedu.files import atomic_path
    from fluxedu.sampling.images import edges as detect_edges
    from fluxedu.sampling.images import open_picture

    file_format = Image.registered_extensions().get(output.suffix.lower())
    if file_format not in Image.SAVE:
        raise fail(f"{output.name} has no extension of an image format that can be written; use .png.")
    check_writable(output)
    if edges and control is None:
        raise fail("--edges needs --control, the picture whose edges are computed.")
    scale = lora_scale if lora_scale and len(lora_scale) > 1 else (lora_scale or [1.0])[0]
    pipe = _load(
        model, like=like, variant=variant, revision=revision, device=device, dtype=dtype, memory=memory,
        quantise=quantise, compile=compile, lora=lora or None, lora_scale=scale,
    )  # fmt: skip
    paths = {"image": image, "mask": mask, "control": control, "reference": reference, "image_prompt": image_prompt}
    with report_errors():
        pictures = {name: open_picture(path) for name, path in paths.items() if path}
        if edges:
            pictures["control"] = detect_edges(pictures["control"])
        picture = pipe(
            prompt, seed=seed, steps=steps, guidance=guidance, negative_prompt=negative, true_cfg_scale=cfg,
            height=height, width=width, solver=solver, strength=strength, trajectory=False, **pictures,
        ).images[0]  # fmt: skip
        with atomic_path(output, overwrite=True) as part:
            picture.save(part, format=file_format)
    typer.echo(f"wrote {output} ({picture.width} x {picture.height})")


@app.command(epilog='Example: fluxedu trace "a red circle left of a blue square" --html out.html')
def trace(
    prompt: Annotated[str, typer.Argument(help="The prompt: a description of the image.")],
    html: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("trace.html"),
    model: Model = "nano",
    like: Like = None,
    variant: Variant = None,
    revision: Revision = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
) -> None:
    """Generate an image and write an HTML page of the run: every stage of the model, with its recorded values."""
    from fluxedu.files import write_text
    from fluxedu.trace import page, stages

    check_writable(html)
    pipe = _load(model, like=like, variant=variant, revision=revision)
    with report_errors():
        out, found = stages(pipe, prompt, seed=seed, steps=steps, guidance=guidance, height=height, width=width)
        about = f"{model}, seed {seed}, {len(out.trajectory.times) - 1} steps. Click a stage; arrow keys move."
        write_text(html, page(prompt or "the empty prompt", about, found))
    typer.echo(f"wrote {html} ({html.stat().st_size / 1e6:.1f} MB)")


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
        pipe = model if model in VARIANTS else _load(model, like=like, variant=variant, revision=revision)
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


@app.command(epilog="Example: fluxedu train --all --out runs")
def train(
    all_stages: Annotated[bool, typer.Option("--all", help="Run every stage, in order.")] = False,
    stage: Annotated[
        str | None, typer.Option(help="One stage: autoencoder, t5, clip, latents, flow, dev, ship or card.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="schnell, fill, canny, depth, kontext, redux; hollow (a style LoRA); sd or twin (baselines)."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the state of the runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option(help="Continue from the state in --out, or start again.")] = True,
    ship_to: Annotated[Path | None, typer.Option(help="Folder for the weights; default: OUT/weights.")] = None,
) -> None:
    """Train the miniature's networks from scratch, in a checkout. If it is interrupted, the same command continues."""
    checkout = _from_checkout("training")
    with report_errors():
        import transformers  # noqa: F401  (a later stage needs it; if it is missing, say so now)
    with report_interrupts():
        checkout.train(all_stages, stage, variant, out, resume, ship_to or out / "weights")


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


@app.command(epilog="Example: fluxedu bench --json bench.json")
def bench(
    as_json: Json = None,
    quick: Annotated[bool, typer.Option(help="Run fewer rounds.")] = False,
) -> None:
    """Compare speed and memory with diffusers, in a checkout; all results are ratios measured in one run."""
    benchmarks = _from_checkout("benchmarks")
    check_writable(as_json)
    with report_errors():
        ratios = benchmarks.run(rounds=5 if quick else 15)
    typer.echo(benchmarks.table(ratios))
    write_result(as_json, ratios)


@app.command(epilog="Example: fluxedu lab --folder my-course")
def lab(
    port: Annotated[int, typer.Option(help="The port of JupyterLab.")] = 8888,
    folder: Annotated[Path, typer.Option(help="The folder of your copies; missing notebooks are added.")] = Path(
        "fluxedu-course"
    ),
) -> None:
    """Open your own copy of the course in JupyterLab. Notebooks that exist in your folder are never replaced."""
    import signal
    import subprocess
    import sys

    check_extra("lab", "jupyterlab")
    from fluxedu.course.build import copy_notebooks

    with report_errors():
        copied, existing = copy_notebooks(folder)
    typer.echo(f"{folder}: {len(copied)} notebooks copied, {len(existing)} left as they are")
    root = ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []  # the usual user of a container
    signal.signal(signal.SIGINT, lambda *_: None)  # Jupyter gets Ctrl-C itself, and asks; this process waits for it
    raise typer.Exit(subprocess.call([sys.executable, "-m", "jupyterlab", f"--port={port}", *root, str(folder)]))


@app.command(epilog="Example: fluxedu grade class/*/04*.ipynb --csv marks.csv")
def grade(
    notebooks: Annotated[
        list[Path], typer.Argument(help="Students' notebooks, each in a folder named after its student.")
    ],
    csv: Annotated[
        Path | None, typer.Option(help="Also write one line per student and exercise to this CSV file.")
    ] = None,
    by_student: Annotated[
        Path | None,
        typer.Option("--table", help="Also write a CSV file with one row per student, one column per exercise."),
    ] = None,
    timeout: Annotated[int, typer.Option(min=1, help="Time limit of a cell, in seconds.")] = 120,
    notebook_timeout: Annotated[int, typer.Option(min=1, help="Time limit of a notebook, in seconds.")] = 900,
    memory: Annotated[int, typer.Option(min=1, help="Memory limit of a notebook, in GB.")] = 16,
) -> None:
    """Run students' notebooks, each in its own process, and mark the exercises. The CSV file grows with each notebook.

    It is not a sandbox: a notebook's code has your rights. Answers are judged
    outside its process, also with new random inputs. A pasted solution passes,
    and so does a function that calls PyTorch, or hides that it calls fluxedu;
    marks are flagged where that is seen.
    """
    check_extra("lab", "jupyter_client")
    from fluxedu.course import grade as course
    from fluxedu.course.answers import printable

    for target in (csv, by_student):
        check_writable(target)
        if target is not None and os.path.realpath(target) in map(os.path.realpath, notebooks):
            raise fail(f"{printable(str(target))} is one of the notebooks; name another file.")
    marks: list[course.Mark] = []
    named, graded, status = course.students(notebooks), 0, 2
    grows = csv is not None and (csv.is_file() or not csv.exists())  # not a pipe, which is written to once
    files = course.fingerprint(notebooks)
    try:
        for path, student in named:
            if grows and marks and (problem := course.store_csv(marks, csv)):
                fail(problem)  # printed once; the rest of the class is still graded
                grows = False
            of_notebook = course.marks_of(path, student, timeout, notebook_timeout, memory)
            if course.fingerprint(notebooks) != files:
                status = fail(f"{path} has changed files of fluxedu or another notebook; restore them first.").exit_code
                break
            if not any(mark.exercise for mark in of_notebook):
                fail(of_notebook[0].message)  # printed; the other notebooks are still graded
                marks += of_notebook if os.path.exists(path) else []
                continue
            marks += of_notebook
            graded, status = graded + 1, 0
            typer.echo(course.summary(of_notebook))
    except KeyboardInterrupt:
        fail(f"interrupted; {graded} of {len(named)} notebooks are marked.")
        status = 2
    rows = course.class_table(marks)
    if len(rows) > 2:  # several students
        typer.echo(course.as_text(rows))
    if csv is not None and marks:
        if problem := course.store_csv(marks, csv):
            raise fail(problem)
        typer.echo(f"wrote {csv}")
    write_result(by_student, course.as_csv(rows))
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
