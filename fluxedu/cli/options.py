"""Options that several commands share, and opening the model that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxedu.terminal import report_errors

#: every command that prints figures has both; errors stay one sentence on the standard error, with exit status 2
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Out = Annotated[Path | None, typer.Option("--out", help="Also write the results to this JSON file.")]
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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]


def load(model: str, **options):
    """A pipeline; an error of the user's ends the command in a sentence."""
    import fluxedu as fe

    with report_errors():
        return fe.load(model, **options)
