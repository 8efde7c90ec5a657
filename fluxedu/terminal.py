"""What all commands share: errors are printed as one sentence with exit status 2; JSON files are written atomically."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path

import typer

from fluxedu.errors import PromptWarning


def fail(error: Exception | str) -> typer.Exit:
    """Print the message in red on one line; raise the result to end the command."""
    typer.secho(f"fluxedu: {' '.join(str(error).split())}", fg="red", err=True)
    return typer.Exit(2)


@contextmanager
def report_errors() -> Iterator[None]:
    """Print errors that the user can correct as one sentence, without a traceback, and warnings of prompts too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", PromptWarning)
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            yield
    except ModuleNotFoundError as error:
        raise fail(f"this needs {error.name}: pip install {error.name}.") from None
    except (ValueError, OSError, FloatingPointError) as error:
        raise fail(error) from None


def _show_warning(usual: Callable, message: Warning, category: type, *where) -> None:
    """Print a warning of a prompt as one yellow sentence, and others in the usual way."""
    if issubclass(category, PromptWarning):
        typer.secho(f"fluxedu: {message}", fg="yellow", err=True)
    else:
        usual(message, category, *where)


@contextmanager
def report_interrupts() -> Iterator[None]:
    """:func:`report_errors`, for work that can be interrupted with Ctrl-C and continued."""
    try:
        with report_errors():
            yield
    except KeyboardInterrupt:
        raise fail("interrupted; the same command continues from here.") from None


def check_extra(extra: str, module: str) -> None:
    """End the command if ``module`` is missing, which an extra of the package installs."""
    if find_spec(module) is None:
        raise fail(f"this needs {module}: pip install 'fluxedu[{extra}]'.")


def free_name(path: Path) -> Path:
    """The path, or if there is such a file the first free one of ``out-2.png``, ``out-3.png``, ..."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(name for name in chain([path], names) if not os.path.lexists(name))


def check_writable(path: Path | None, overwrite: bool = True) -> None:
    """End the command if a file cannot be written; called before the work that produces its content."""
    if path is None:
        return
    from fluxedu import files

    with report_errors():
        if path.is_dir():
            raise fail(f"{path} is a folder; name a file.")
        if not path.parent.is_dir():
            raise fail(f"there is no folder {path.parent} to write {path.name} into.")
        if path.is_file() and not overwrite:
            raise fail(f"{path} exists; choose another name, or replace it with --overwrite.")
        if not path.exists() or path.is_file():  # a pipe or /dev/stdout is written to directly
            files.check_writable(path)


def print_json(result: dict | list) -> None:
    """Print values as one JSON document, which is all that ``--json`` prints on the standard output."""
    typer.echo(json.dumps(result, indent=2))


def write_result(path: Path | None, result: dict | str, quiet: bool = False) -> None:
    """Write a text, or values as JSON, to a file if there is one, and print its name unless ``quiet``."""
    if path is not None:
        from fluxedu.files import write_text

        with report_errors():
            write_text(path, result if isinstance(result, str) else json.dumps(result, indent=2) + "\n")
        if not quiet:
            typer.echo(f"wrote {path}")
