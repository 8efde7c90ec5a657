"""``fluxedu arena run | serve | table | voters | drop | export``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from fluxedu.errors import ArenaError, printable
from fluxedu.terminal import print_json, report_errors, write_result

app = typer.Typer(
    help="Compare models by votes on pairs of images; ratings with intervals.",
    epilog="Example: fluxedu arena run nano nano@4 nano-base --count 150",
    no_args_is_help=True,
)

Models = Annotated[
    list[str], typer.Argument(help="Two or more models: nano, nano-base or a folder; @4 after the name means 4 steps.")
]
File = Annotated[Path, typer.Option("--votes", help="The file of votes; created if it does not exist.")]
Prompts = Annotated[int, typer.Option(min=1, max=10_000, help="Number of held-out prompts.")]
Pictures = Annotated[Path | None, typer.Option(help="Store the images in this folder and use them again next time.")]
Axes = Annotated[
    list[str] | None,
    typer.Option("--axis", help="overall, prompt, size, typography, diversity or quality; default: all of them."),
]
Who = Annotated[str, typer.Option(help="Whose votes to count: judge, people or all.")]


def _axes(axes: list[str] | None) -> tuple[str, ...]:
    from fluxedu.arena.votes import AXES, check_axis

    return tuple(dict.fromkeys(map(check_axis, axes or AXES)))


def _open_votes(path: Path):
    from fluxedu.arena.votes import Votes

    if not path.is_file():
        raise ArenaError(f"there is no file of votes {path}; fluxedu arena run or serve creates one.")
    return Votes(path)


@app.command(epilog="Example: fluxedu arena run nano nano@4 nano-base --count 150")
def run(
    models: Models,
    votes: File = Path("votes.sqlite"),
    count: Annotated[int, typer.Option(min=1, help="Number of votes, spread over the axes.")] = 150,
    axis: Axes = None,
    prompts: Prompts = 40,
    pictures: Pictures = None,
    seed: int = 0,
) -> None:
    """Let the scene judge vote, and print the ratings from its votes."""
    from fluxedu.arena.match import Arena, judge_votes

    with report_errors():
        axes = _axes(axis)
        arena = Arena(models, votes, prompts=prompts, folder=pictures, seed=seed)
        given = judge_votes(arena, count, axes)
        typer.echo(f"{given} votes given" + (": every pair has been judged" if given < count else ""))
        for name in axes:
            typer.echo(f"\n{name}\n{arena.ratings(name, 'judge').table()}")


@app.command(epilog="Example: fluxedu arena serve nano nano@4 nano-base --host 0.0.0.0")
def serve(
    models: Models,
    votes: File = Path("votes.sqlite"),
    host: Annotated[str, typer.Option(help="0.0.0.0 makes the page available to other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free port.")] = 8765,
    axis: Axes = None,
    prompts: Prompts = 20,
    pictures: Pictures = None,
    seed: int = 0,
    no_code: Annotated[bool, typer.Option("--no-code", help="Let everybody vote who can reach the page.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Also answer at this name, such as that of a proxy; may be repeated.")
    ] = None,
) -> None:
    """Let a class vote in the browser. All images are generated first. Ctrl-C stops the server; no vote is lost.

    The printed link contains a class code, without which nobody can vote.
    """
    from fluxedu.arena.match import Arena
    from fluxedu.arena.server import create_server

    with report_errors():
        axes = _axes(axis)
        arena = Arena(models, votes, prompts=prompts, folder=pictures, seed=seed)
        code = "" if no_code else None  # None: a random one
        with create_server(
            arena, host, port, axes, code=code, allowed_hosts=allow_host or ()
        ) as server:  # before the images, which take minutes
            arena.prepare(axes)
            typer.echo(f"voting at {server.url}" + (f" (class code: {server.code})" if server.code else ""))
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                typer.echo(f"{len(arena.votes.rows())} votes in {votes}")


@app.command(epilog="Example: fluxedu arena table --votes votes.sqlite --figures figures")
def table(
    votes: File = Path("votes.sqlite"),
    who: Who = "all",
    axis: Axes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the ratings to this JSON file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Also save overall.png and axes.png in this folder.")] = None,
) -> None:
    """Print the ratings of all models in a file of votes."""
    from fluxedu.arena.rating import rate
    from fluxedu.arena.votes import AXES

    with report_errors():
        axes, file = _axes(axis), _open_votes(votes)
        outcomes = {name: found for name in axes if (found := file.outcomes(name, who))}
        models = sorted({model for found in outcomes.values() for vote in found for model in vote[:2]})
        ratings = {name: rate(models, found) for name, found in outcomes.items()}
        rows = {name: result.rows() for name, result in ratings.items()}
        if as_json:
            print_json(rows)
        else:
            for name, result in ratings.items():
                typer.echo(f"{name}\n{result.table()}\n")
            if not ratings:
                typer.echo("no votes yet")
        write_result(out, rows, quiet=as_json)
        if figures is not None and rows:
            from fluxedu.plots import elo, elo_axes

            figures.mkdir(parents=True, exist_ok=True)
            first = "overall" if "overall" in rows else next(iter(rows))
            elo(rows[first], AXES[first].title).savefig(figures / "overall.png", dpi=150)
            elo_axes({AXES[name].title: row for name, row in rows.items()}).savefig(figures / "axes.png", dpi=150)
            if not as_json:
                typer.echo(f"wrote {figures / 'overall.png'} and {figures / 'axes.png'}")


@app.command(epilog="Example: fluxedu arena voters --votes votes.sqlite")
def voters(
    votes: File = Path("votes.sqlite"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """List the voters with their numbers of votes, most votes first."""
    with report_errors():
        if as_json:
            print_json(_open_votes(votes).voters())
            return
        typer.echo(f"{'voter':<40}  votes  first vote        last vote")
        for v in _open_votes(votes).voters():
            when = [min(max(v[key] or 0, 0), 4e9) for key in ("first", "last")]  # a damaged file may hold any time
            times = "  ".join(f"{datetime.fromtimestamp(t):%Y-%m-%d %H:%M}" for t in when) if v["votes"] else ""
            dropped = "dropped" * v["dropped"]
            typer.echo(f"{printable(v['voter']):<40}  {v['votes']:>5}  {times:<34}  {dropped}".rstrip())


@app.command(epilog="Example: fluxedu arena drop voter-1a2b3c4d voter-5e6f7a8b --votes votes.sqlite")
def drop(
    voters: Annotated[list[str], typer.Argument(help="One or more names, as fluxedu arena voters prints them.")],
    votes: File = Path("votes.sqlite"),
    undo: Annotated[bool, typer.Option("--undo", help="Count the votes of these voters again.")] = False,
) -> None:
    """Leave voters' votes out of all ratings; they stay in the file. A running server notices at once."""
    with report_errors():
        number, whose = _open_votes(votes).drop(*voters, undo=undo), ", ".join(dict.fromkeys(voters))
        typer.echo(f"{number} vote{'s' * (number != 1)} of {whose} {'count again' if undo else 'no longer count'}")


@app.command(epilog="Example: fluxedu arena export votes.csv --votes votes.sqlite")
def export(
    target: Annotated[Path, typer.Argument(help="The .csv or .json file to write.")],
    votes: File = Path("votes.sqlite"),
) -> None:
    """Write every vote and its ballot to a file for other programs."""
    with report_errors():
        typer.echo(f"wrote {target} ({_open_votes(votes).export(target)} votes)")
