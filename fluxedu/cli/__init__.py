"""The command line: one function per ``fluxedu`` command. Imports happen inside, so that ``--help`` is fast."""

from __future__ import annotations

from typing import Annotated

import typer

from fluxedu.arena.cli import app as arena
from fluxedu.cli import course, models, pictures, play, runs

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
for commands in (pictures, play, models, runs, course):
    app.add_typer(commands.app)
app.add_typer(arena, name="arena")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("fluxedu"))
        raise typer.Exit


@app.callback()
def fluxedu(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """FLUX.1 in code that reads like its diagram."""
