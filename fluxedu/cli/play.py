"""The miniature in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from fluxedu.terminal import report_errors

app = typer.Typer()


@app.command(epilog="Example: fluxedu play --port 8899")
def play(
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port of the page; 0 takes any that is free.")] = 8899,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Open the miniature in the browser, where it runs without Python; the page is served by this computer alone."""
    from fluxedu.play import serve

    with report_errors():
        serve(port, browser)
