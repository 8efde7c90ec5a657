"""``fluxedu arena run | serve | table | export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxedu.terminal import sentences, write_json

app = typer.Typer(
    help="Which model draws better: votes on pairs of pictures, and ratings with intervals.",
    epilog="Example: fluxedu arena run nano nano@4 nano-base --count 150",
    no_args_is_help=True,
)

Models = Annotated[
    list[str], typer.Argument(help="Two models or more: nano, nano-base or a folder; @4 after it for 4 steps.")
]
File = Annotated[Path, typer.Option("--votes", help="The file of votes; made when it is not there.")]
Prompts = Annotated[int, typer.Option(min=1, max=10_000, help="How many held-out prompts.")]
Pictures = Annotated[Path | None, typer.Option(help="Keep the pictures in this folder for the next time.")]
Axes = Annotated[
    list[str] | None, typer.Option("--axis", help="overall, prompt, size, typography, diversity, quality; all if none.")
]
Who = Annotated[str, typer.Option(help="Whose votes count: judge, people or all.")]


def _there(votes: Path):
    from fluxedu.arena.votes import Votes
    from fluxedu.errors import ArenaError

    if not votes.is_file():
        raise ArenaError(f"there is no file of votes {votes}; fluxedu arena run or serve makes one.")
    return Votes(votes)


def _axes(axes: list[str] | None) -> tuple[str, ...]:
    from fluxedu.arena.axes import AXES, checked_axis

    return tuple(dict.fromkeys(map(checked_axis, axes or AXES)))


def _opened(models: list[str], votes: Path, axis: list[str] | None, prompts: int, pictures: Path | None, seed: int):
    """The axes asked for, and the arena."""
    from fluxedu.arena.match import Arena

    axes = _axes(axis)
    return axes, Arena(models, votes, prompts=prompts, folder=pictures, seed=seed)


@app.command(epilog="Example: fluxedu arena run nano nano@4 nano-base --count 150")
def run(
    models: Models,
    votes: File = Path("votes.sqlite"),
    count: Annotated[int, typer.Option(min=1, help="How many votes, the axes in turn.")] = 150,
    axis: Axes = None,
    prompts: Prompts = 40,
    pictures: Pictures = None,
    seed: int = 0,
) -> None:
    """Let the judge of the scene world vote, and print its ratings."""
    from fluxedu.arena.judges import judged

    with sentences():
        axes, arena = _opened(models, votes, axis, prompts, pictures, seed)
        given = judged(arena, count, axes)
        typer.echo(f"{given} votes given" + (": every pair has been judged" if given < count else ""))
        for name in axes:
            typer.echo(f"\n{name}\n{arena.ratings(name, 'judge').table()}")


@app.command(epilog="Example: fluxedu arena serve nano nano@4 nano-base --host 0.0.0.0")
def serve(
    models: Models,
    votes: File = Path("votes.sqlite"),
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    axis: Axes = None,
    prompts: Prompts = 20,
    pictures: Pictures = None,
    seed: int = 0,
) -> None:
    """Let a class vote in the browser. All pictures are drawn first; Ctrl-C ends it, and no vote is lost."""
    from fluxedu.arena.server import serving

    with sentences():
        axes, arena = _opened(models, votes, axis, prompts, pictures, seed)
        with serving(arena, host, port, axes) as server:  # the port is taken before the minutes of drawing
            arena.prepare(axes)
            typer.echo(f"voting at {server.url}")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                typer.echo(f"{len(arena.votes.rows())} votes in {votes}")


@app.command(epilog="Example: fluxedu arena table --votes votes.sqlite --figures figures")
def table(
    votes: File = Path("votes.sqlite"),
    who: Who = "all",
    axis: Axes = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Also draw overall.png and axes.png into this folder.")] = None,
) -> None:
    """Print the ratings of everyone in a file of votes."""
    from fluxedu.arena.axes import AXES
    from fluxedu.arena.rating import rated

    with sentences():
        axes, there = _axes(axis), _there(votes)
        found = {name: outcomes for name in axes if (outcomes := there.outcomes(name, who))}
        names = sorted({name for outcomes in found.values() for vote in outcomes for name in vote[:2]})
        ratings = {axis: rated(names, outcomes) for axis, outcomes in found.items()}
        for name, result in ratings.items():
            typer.echo(f"{name}\n{result.table()}\n")
        if not ratings:
            typer.echo("no votes yet")
        rows = {name: result.rows() for name, result in ratings.items()}
        write_json(as_json, rows)
        if figures is not None and rows:
            _draw({AXES[name].title: table for name, table in rows.items()}, figures)


def _draw(rows: dict[str, dict], folder: Path) -> None:
    """The two figures: one axis (overall, if there are votes on it), and all."""
    from fluxedu.plots import elo, elo_axes

    folder.mkdir(parents=True, exist_ok=True)
    first = "Overall" if "Overall" in rows else next(iter(rows))
    elo(rows[first], first).savefig(folder / "overall.png", dpi=150)
    elo_axes(rows).savefig(folder / "axes.png", dpi=150)
    typer.echo(f"wrote {folder / 'overall.png'} and {folder / 'axes.png'}")


@app.command(epilog="Example: fluxedu arena export votes.csv --votes votes.sqlite")
def export(
    target: Annotated[Path, typer.Argument(help="The .csv or .json file to write.")],
    votes: File = Path("votes.sqlite"),
) -> None:
    """Write every vote with its ballot to a file that other programs read."""
    with sentences():
        typer.echo(f"wrote {target} ({_there(votes).export(target)} votes)")
