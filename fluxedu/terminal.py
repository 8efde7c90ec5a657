"""How every command speaks: what is wrong in one sentence and exit status 2, and files written whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


def fail(error: Exception | str) -> typer.Exit:
    """Say it in one line of red; what is returned ends the command when raised."""
    typer.secho(f"fluxedu: {' '.join(str(error).split())}", fg="red", err=True)
    return typer.Exit(2)


@contextmanager
def sentences() -> Iterator[None]:
    """What the user can mend, in one sentence instead of a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise fail(f"this needs {error.name}: pip install {error.name}.") from None
    except (ValueError, OSError, FloatingPointError) as error:
        raise fail(error) from None


@contextmanager
def resumable() -> Iterator[None]:
    """:func:`sentences`, for work that Ctrl-C stops and the same command takes up again."""
    try:
        with sentences():
            yield
    except KeyboardInterrupt:
        raise fail("stopped; the same command goes on from here.") from None


def can_write(path: Path | None) -> None:
    """Refuse a file that cannot be written before the work that fills it, not after."""
    if path is not None and path.is_dir():
        raise fail(f"{path} is a folder, and a file is to be written there.")
    if path is not None and not path.parent.is_dir():
        raise fail(f"there is no folder {path.parent} to write {path.name} into.")


def write_json(path: Path | None, figures: dict) -> None:
    """Write ``figures`` and say so; nothing where no file was asked for."""
    if path is not None:
        from fluxedu.checkpoints.save import write_text

        with sentences():
            write_text(path, json.dumps(figures, indent=2) + "\n")
        typer.echo(f"wrote {path}")
