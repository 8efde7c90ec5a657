"""The arena for its users: in a notebook, as figures, on the command line."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fluxedu import arena, plots
from fluxedu.arena import AXES, Arena, Contestant
from fluxedu.arena.server import booth_view
from fluxedu.cli import app
from fluxedu.errors import ArenaError, InstrumentError

run = CliRunner().invoke


def flat(name, colour):
    return Contestant(name, lambda prompt, seed, height, width: Image.new("RGB", (width, height), colour))


@pytest.fixture
def two(tmp_path):
    return Arena([flat("alpha", (255, 0, 0)), flat("beta", (0, 0, 255))], tmp_path / "v.sqlite", prompts=4)


# ---------------------------------------------------------------- the notebook


def test_a_booth_shows_the_two_sides_of_its_ballot(two):
    booth = arena.booth(two, voter="ann")
    shown = [tuple(panel.image[0, 0]) for panel in booth.current_view().panels]
    colours = {"alpha": (255, 0, 0), "beta": (0, 0, 255)}
    assert shown == [colours[booth.ballot.left], colours[booth.ballot.right]]
    assert booth.ballot.prompt in booth.view["text"]


def test_a_vote_is_stored_and_the_next_ballot_opens(two):
    booth = arena.booth(two, voter="ann")
    first = booth.ballot
    booth.set("left")
    assert booth.ballot != first and "Votes so far: 1." in booth.view["text"]
    booth.set("the same")
    assert [(r["id"] == first.id, r["choice"]) for r in two.votes.rows()] == [(True, "left"), (False, "tie")]


def test_a_key_pressed_twice_answers_one_question(two):
    booth = arena.booth(two, voter="ann")
    for moves in (1, 2, 3):  # as the browser would send it: always for ballot number 0
        booth.state = {"vote": [0, 3], "moves": moves}
        assert booth.view["moves"] == moves, "the page waits for an answer"
    assert [r["choice"] for r in two.votes.rows()] == ["right"]


def test_a_booth_is_blind(two):
    booth = arena.booth(two, voter="ann")
    for _ in range(3):
        content = repr((booth.state, booth.view, booth.controls, booth.title))
        assert "alpha" not in content and "beta" not in content
        booth.set("right")


def test_the_last_ballot_is_followed_by_a_sentence(two):
    booth = arena.booth(two, voter="ann")
    for _ in range(6):
        booth.set("left")
    assert len(two.votes.rows()) == 4 and "has judged every pair" in booth.view["text"]
    with pytest.raises(ArenaError, match="use more prompts"):
        arena.booth(two, voter="ann")


def test_a_booth_left_open_goes_on_with_the_same_ballot(two):
    assert arena.booth(two, voter="ann").ballot == arena.booth(two, voter="ann").ballot


def test_without_a_kernel_there_is_a_figure(two, tmp_path):
    arena.booth(two).figure().savefig(tmp_path / "x.png")
    assert np.asarray(Image.open(tmp_path / "x.png")).std() > 20


def test_the_view_is_a_function_of_pictures():
    red, blue = (Image.new("RGB", (8, 6), c) for c in ("red", "blue"))
    view = booth_view("Which?", "a circle", [red], [blue] * 3, 7)
    assert [p.image.shape for p in view.panels] == [(6, 8, 3), (6, 32, 3)]
    assert view.text == "“a circle”. Which? Votes so far: 7."


@pytest.mark.parametrize("wrong", [lambda a: arena.booth(a).set("up"), lambda a: arena.booth(a, axis="beauty")])
def test_errors_are_one_sentence(two, wrong):
    with pytest.raises((InstrumentError, ArenaError), match="must be one of"):
        wrong(two)
    assert two.votes.rows() == []


# ---------------------------------------------------------------- figures


def rows(**elo):
    return {name: {"elo": e, "low": e - 40, "high": e + 60, "votes": 12} for name, e in elo.items()}


def test_the_overall_figure_shows_dots_where_the_ratings_are():
    ax = plots.elo(rows(a=950.0, b=1050.0)).axes[0]
    dots = [(float(line.get_xdata()[0]), line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "o"]
    assert dots == [(1050.0, 0), (950.0, 1)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a"]
    bars = [list(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 2]
    assert bars == [[1010.0, 1110.0], [910.0, 1010.0]]


def test_axes_share_a_scale_and_an_order():
    tables = {"Overall": rows(a=950.0, b=1050.0), "Typography": rows(a=1020.0, b=980.0)}
    panels = plots.elo_axes(tables).axes
    assert [ax.get_title() for ax in panels] == ["Overall\n12 votes", "Typography\n12 votes"]
    assert panels[0].get_xlim() == panels[1].get_xlim()
    dots = [[line.get_color() for line in ax.lines if line.get_marker() == "o"] for ax in panels]
    assert dots[0] == dots[1], "a model has one place and one colour"
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["b", "a"], "the strongest over all axes first"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: plots.elo({}), "not empty"),
        (lambda: plots.elo({"a": {"elo": 1}}), "elo, low, high and votes"),
        (lambda: plots.elo_axes({"x": rows(a=1.0, b=2.0), "y": rows(a=1.0)}), "the same models"),
    ],
)
def test_malformed_rows_are_refused(wrong, says):
    with pytest.raises(InstrumentError, match=says):
        wrong()


# ---------------------------------------------------------------- the command line


def test_the_judge_votes_and_the_ratings_are_printed_drawn_and_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(app, ["arena", "run", "nano@1", "nano@2", "--count", "3", "--axis", "prompt", "--axis", "quality"])
    assert result.exit_code == 0, result.output
    assert "3 votes given" in result.output and "nano@2" in result.output
    result = run(app, ["arena", "table", "--who", "judge", "--out", "t.json", "--figures", "figures"])
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "t.json").read_text())
    assert set(table) == {"prompt", "quality"} and sum(r["votes"] for r in table["prompt"].values()) == 4
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"overall.png", "axes.png"}
    assert run(app, ["arena", "table", "--who", "people"]).output.strip() == "no votes yet"
    assert run(app, ["arena", "export", "votes.csv"]).output.strip() == "wrote votes.csv (3 votes)"
    assert len((tmp_path / "votes.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("command", ["run", "serve", "table", "voters", "drop", "export"])
def test_every_command_helps_with_an_example(command):
    result = run(app, ["arena", command, "--help"])
    assert f"Example: fluxedu arena {command}" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "nano"], "at least two contestants"),
        (["run", "nano", "nano@0"], "a number of steps from 1 to 1000"),
        (["run", "nano", "sdxl"], "there is no model 'sdxl'"),
        (["run", "nano", "nano@2", "--axis", "beauty"], "axis must be one of overall"),
        (["run", "nano", "nano@2", "--votes", "no/folder.sqlite"], "no/folder.sqlite cannot be used"),
        (["serve", "nano@1", "nano@2", "--host", "256.1.1.1"], "256.1.1.1:8765 cannot be served"),
        (["table"], "there is no file of votes votes.sqlite"),
        (["export", "x.csv", "--votes", "none.sqlite"], "there is no file of votes none.sqlite"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(app, ["arena", *words])
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    assert says in line


def test_axes_are_those_of_the_published_comparison():
    assert [axis.title for axis in AXES.values()] == [
        "Overall",
        "Prompt following",
        "Size/aspect variability",
        "Typography",
        "Output diversity",
        "Visual quality",
    ]
