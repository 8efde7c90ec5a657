"""Commands that generate an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxedu.cli.options import Guidance, Like, Model, Overwrite, Revision, Seed, Side, Steps, Variant, load
from fluxedu.terminal import check_writable, fail, free_name, report_errors

app = typer.Typer()


@app.command(epilog='Example: fluxedu sample "a red circle left of a blue square" -o out.png')
def sample(
    prompt: Annotated[str, typer.Argument(help="The prompt: a description of the image.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The image file; - is the standard output; default: out.png, out-2.png, ..."
        ),
    ] = None,
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
    reference: Annotated[
        list[Path] | None, typer.Option(help="kontext: the picture to edit; for FLUX.2 repeatable.")
    ] = None,
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
    overwrite: Overwrite = False,
) -> None:
    """Generate an image from a prompt and save it."""
    import sys
    from io import BytesIO

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from fluxedu import __version__
    from fluxedu.files import atomic_path
    from fluxedu.sampling.limits import check_settings

    output, to_terminal = output or free_name(Path("out.png")), str(output) == "-"
    file_format = "PNG" if to_terminal else Image.registered_extensions().get(output.suffix.lower())
    if file_format not in Image.SAVE:
        raise fail(f"{output.name} has no extension of an image format that can be written; use .png.")
    check_writable(None if to_terminal else output, overwrite)
    if edges and control is None:
        raise fail("--edges needs --control, the picture whose edges are computed.")
    with report_errors():  # before PyTorch is imported, which takes seconds
        check_settings(seed=seed, steps=steps, guidance=guidance, true_cfg_scale=cfg, strength=strength)
        check_settings(height=height, width=width)
    from fluxedu.sampling.images import edges as detect_edges
    from fluxedu.sampling.images import open_picture

    scale = lora_scale if lora_scale and len(lora_scale) > 1 else (lora_scale or [1.0])[0]
    pipe = load(
        model, like=like, variant=variant, revision=revision, device=device, dtype=dtype, memory=memory,
        quantise=quantise, compile=compile, lora=lora or None, lora_scale=scale,
    )  # fmt: skip
    paths = {"image": image, "mask": mask, "control": control, "image_prompt": image_prompt}
    with report_errors():
        pictures = {name: open_picture(path) for name, path in paths.items() if path}
        if reference:
            pictures["reference"] = [open_picture(path) for path in reference]
        if edges:
            pictures["control"] = detect_edges(pictures["control"])
        picture = pipe(
            prompt, seed=seed, steps=steps, guidance=guidance, negative_prompt=negative, true_cfg_scale=cfg,
            height=height, width=width, solver=solver, strength=strength, trajectory=False, **pictures,
        ).images[0]  # fmt: skip
        about = PngInfo()
        made_with = {"prompt": prompt, "seed": seed, "model": model, "steps": steps, "guidance": guidance}
        for name, value in {**made_with, "software": f"fluxedu {__version__}"}.items():
            if value is not None:
                about.add_itxt(name, str(value))
        options = {"pnginfo": about} if file_format == "PNG" else {}
        if to_terminal:
            content = BytesIO()
            picture.save(content, format=file_format, **options)
            sys.stdout.buffer.write(content.getvalue())
            return
        with atomic_path(output, overwrite=True) as part:
            picture.save(part, format=file_format, **options)
    typer.echo(f"wrote {output} ({picture.width} x {picture.height})")


@app.command(epilog='Example: fluxedu trace "a red circle left of a blue square" --html out.html')
def trace(
    prompt: Annotated[str, typer.Argument(help="The prompt: a description of the image.")],
    html: Annotated[
        Path | None, typer.Option(help="The HTML file to write; default: trace.html, trace-2.html, ...")
    ] = None,
    model: Model = "nano",
    like: Like = None,
    variant: Variant = None,
    revision: Revision = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    overwrite: Overwrite = False,
) -> None:
    """Generate an image and write an HTML page of the run: every stage of the model, with its recorded values."""
    from fluxedu.files import write_text
    from fluxedu.sampling.limits import check_settings

    html = html or free_name(Path("trace.html"))
    check_writable(html, overwrite)
    with report_errors():  # before PyTorch is imported, which takes seconds
        check_settings(seed=seed, steps=steps, guidance=guidance, height=height, width=width)
    from fluxedu.trace import page, stages

    pipe = load(model, like=like, variant=variant, revision=revision)
    with report_errors():
        out, found = stages(pipe, prompt, seed=seed, steps=steps, guidance=guidance, height=height, width=width)
        about = f"{model}, seed {seed}, {len(out.trajectory.times) - 1} steps. Click a stage; arrow keys move."
        write_text(html, page(prompt or "the empty prompt", about, found))
    typer.echo(f"wrote {html} ({html.stat().st_size / 1e6:.1f} MB)")
