"""Ballots and votes: each counts once, none is lost, and mistakes are reported in one sentence."""

import csv
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxedu.arena import Arena, Contestant, Votes, booth, contestant, rate
from fluxedu.arena.match import Gallery, axis_questions, contact_sheet, judge_votes, preference, score, side_images
from fluxedu.arena.votes import AXES
from fluxedu.errors import ArenaError, FluxeduError
from fluxedu.nano.exam import questions
from fluxedu.nano.scenes import LETTERS, caption, render, sample_scene


def flat(name, colour):
    return Contestant(name, lambda prompt, seed, height, width: Image.new("RGB", (width, height), colour))


@pytest.fixture
def votes(tmp_path):
    return Votes(tmp_path / "votes.sqlite")


@pytest.fixture
def arena(tmp_path):
    return Arena([flat("alpha", "red"), flat("beta", "blue"), flat("gamma", "green")], tmp_path / "votes.sqlite")


def issue(votes, voter="ann", axis="overall", left="alpha", right="beta", seed=0):
    return votes.issue(axis, left, right, "a red circle", seed, (128, 128), voter)


# ---------------------------------------------------------------- the file


def test_a_vote_counts_once(votes):
    ballot = issue(votes)
    assert votes.vote(ballot.id, "left", "ann") is True
    assert votes.vote(ballot.id, "left", "ann") is False
    with pytest.raises(ArenaError, match="has already been answered with left"):
        votes.vote(ballot.id, "right", "ann")
    assert votes.outcomes("overall") == [("alpha", "beta", 1.0, 1)]


def test_one_ballot_answered_by_many_at_once_counts_once(votes):
    ballot = issue(votes)
    with ThreadPoolExecutor(16) as pool:
        counted = list(pool.map(lambda _: votes.vote(ballot.id, "tie", "ann"), range(64)))
    assert sum(counted) == 1 and votes.outcomes("overall") == [("alpha", "beta", 0.5, 1)]


def test_two_processes_share_a_file(votes):
    ballots = [issue(votes, seed=i) for i in range(20)]
    code = "import sys; from fluxedu.arena import Votes; v = Votes(sys.argv[1])\n"
    code += "print(sum(v.vote(b, 'left', 'ann') for b in sys.argv[2:]))"
    command = [sys.executable, "-c", code, str(votes.path), *(b.id for b in ballots)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    mine = sum(votes.vote(b.id, "left", "ann") for b in reversed(ballots))
    assert mine + int(other.communicate(timeout=60)[0]) == 20
    assert votes.outcomes("overall") == [("alpha", "beta", 1.0, 20)]


def test_axes_and_kinds_of_voter_are_apart(votes):
    for voter, axis, choice in (("ann", "overall", "left"), ("judge", "overall", "right"), ("judge", "quality", "tie")):
        votes.vote(issue(votes, voter, axis).id, choice, voter)
    assert votes.outcomes("overall", "people") == [("alpha", "beta", 1.0, 1)]
    assert votes.outcomes("overall", "judge") == [("alpha", "beta", 0.0, 1)]
    assert len(votes.outcomes("overall")) == 2 and votes.outcomes("typography") == []


def test_votes_are_there_when_the_file_is_opened_again(votes):
    votes.vote(issue(votes).id, "left", "ann")
    left_open = issue(votes)
    votes.close()
    again = Votes(votes.path)
    assert again.outcomes("overall") == [("alpha", "beta", 1.0, 1)]
    assert again.open("overall", "ann") == [left_open]
    assert sqlite3.connect(votes.path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_export_holds_every_vote(votes, tmp_path):
    for i, choice in enumerate(("left", "right", "tie")):
        votes.vote(issue(votes, seed=i).id, choice, "ann")
    issue(votes)  # not answered
    assert votes.export(tmp_path / "x.csv") == votes.export(tmp_path / "x.json") == 3
    table = json.loads((tmp_path / "x.json").read_text())
    with open(tmp_path / "x.csv", newline="") as lines:
        same = list(csv.DictReader(lines))
    assert [r["choice"] for r in table] == [r["choice"] for r in same] == ["left", "right", "tie"]
    assert [str(r["seed"]) for r in table] == [r["seed"] for r in same] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda v: v.vote("nonsense", "left", "ann"), "there is no ballot 'nonsense'"),
        (lambda v: v.vote(None, "left", "ann"), "there is no ballot None"),
        (lambda v: v.vote(issue(v).id, "up", "ann"), "a vote must be one of left, right, tie, not 'up'"),
        (lambda v: v.vote(issue(v).id, ["left"], "ann"), "a vote must be one of left, right, tie"),
        (lambda v: v.vote(issue(v).id, "left", "bob"), "issued to another voter"),
        (lambda v: issue(v, voter="=1+1"), "a voter's name must be"),
        (lambda v: issue(v, voter=""), "a voter's name must be"),
        (lambda v: issue(v, axis="beauty"), "axis must be one of overall, prompt"),
        (lambda v: v.outcomes("overall", "cats"), "who must be one of judge, people, all"),
        (lambda v: v.export("votes.xlsx"), "to a .csv or .json file"),
    ],
)
def test_errors_are_one_sentence(wrong, says, votes):
    with pytest.raises(ArenaError, match=says):
        wrong(votes)
    assert votes.rows() == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda a: Votes(5), "path must be of the type Path | str, not 5"),
        (lambda a: a.votes.export(5), "path must be of the type Path | str, not 5"),
        (lambda a: Arena(5, a.votes), "models must be of the type"),
        (lambda a: Arena("ab", a.votes), "models must be of the type"),
        (lambda a: Arena(["nano", 5], a.votes), "models must be of the type"),
        (lambda a: Arena([flat("x", "red"), flat("y", "red")], 5), "votes must be of the type"),
        (lambda a: Arena([flat("x", "red"), flat("y", "red")], a.votes, prompts=0), "prompts must be a whole number"),
        (lambda a: Arena([flat("x", "red"), flat("y", "red")], a.votes, seed=-1), "seed must be a whole number"),
        (lambda a: booth("x"), "arena must be of the type Arena, not 'x'"),
        (lambda a: booth(a, voter=5), "voter must be of the type str, not 5"),
        (lambda a: contestant(5), "spec must be of the type str, not 5"),
        (lambda a: contestant("nano@" + 5000 * "9"), "a number of steps from 1 to 1000"),
        (lambda a: rate(3, 4), "names must be of the type"),
        (lambda a: rate("ab", 4), "votes must be of the type"),
        (lambda a: rate("ab", [("a", "b")]), "votes must be of the type"),
        (lambda a: rate("ab", [("a", "b", 1.0, -3)]), "a vote needs two different models"),
        (lambda a: rate("ab", [], level=5), "level must be a number from 0 to 1"),
        (lambda a: rate("ab", [], rounds=0), "rounds must be a whole number"),
        (lambda a: rate("ab", [], seed=-1), "seed must be a whole number"),
    ],
)
def test_arguments_of_a_wrong_type_or_size_are_named(wrong, says, arena):
    with pytest.raises(ArenaError, match=re.escape(says)):
        wrong(arena)


def test_another_programs_file_is_not_touched(tmp_path):
    (tmp_path / "text.sqlite").write_text("dear diary, " * 100)
    with pytest.raises(ArenaError, match="cannot be used as a file of votes"):
        Votes(tmp_path / "text.sqlite")
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE votes (x)")
    other.close()
    with pytest.raises(ArenaError, match="belongs to another program"):
        Votes(tmp_path / "other.sqlite")
    with pytest.raises(ArenaError, match="cannot be used as a file of votes"):
        Votes(tmp_path / "no" / "folder.sqlite")


# ---------------------------------------------------------------- ballots


def test_an_open_ballot_is_shown_again_and_no_pair_twice(tmp_path):
    arena = Arena([flat("alpha", "red"), flat("beta", "blue")], tmp_path / "v.sqlite", prompts=5)
    seen = []
    for _ in range(5):
        ballot = arena.ballot("ann")
        assert arena.ballot("ann") == ballot
        seen.append((ballot.prompt, ballot.seed))
        arena.vote(ballot.id, "tie", "ann")
    assert len(set(seen)) == 5
    with pytest.raises(ArenaError, match="voter ann has judged every pair on the axis overall"):
        arena.ballot("ann")
    assert arena.ballot("bob").voter == "bob"


def test_an_arena_is_reproducible(tmp_path):
    def first(seed, name):
        arena = Arena([flat("alpha", "red"), flat("beta", "blue")], tmp_path / name, seed=seed)
        issued = []
        for _ in range(6):
            ballot = arena.ballot("ann")
            arena.vote(ballot.id, "left", "ann")
            issued.append((ballot.left, ballot.right, ballot.prompt))
        return issued

    assert first(1, "a.sqlite") == first(1, "b.sqlite") != first(2, "c.sqlite")


def test_votes_on_absent_contestants_are_ignored(arena, tmp_path):
    gone = issue(arena.votes, left="alpha", right="delta")
    assert arena.ballot("ann") != gone
    arena.vote(gone.id, "left", "ann")
    assert arena.ratings().total == 0


def test_pictures_are_drawn_once_and_kept_for_the_next_time(tmp_path):
    drawn = []

    def draw(prompt, seed, height, width):
        drawn.append(seed)
        return Image.new("RGB", (width, height), (seed, 0, 0))

    for version, count in (("1", 2), ("1", 2), ("2", 4)):  # the same weights, and others
        gallery = Gallery([Contestant("x", draw, version), flat("y", "red")], tmp_path / "pictures")
        for seed in (3, 4, 3):
            assert gallery.image("x", "p", seed, 8, 16).getpixel((0, 0)) == (seed, 0, 0)
        assert len(drawn) == count


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: contestant("nano@x"), "a number of steps from 1 to 1000"),
        (lambda: contestant("nano@0"), "a number of steps from 1 to 1000"),
        (lambda: contestant("sdxl"), "there is no model 'sdxl'"),
        (lambda: Gallery([flat("x", "red")]), "at least two contestants"),
        (lambda: Gallery([flat("x", "red"), flat("x", "blue")]), "different names, not x, x"),
        (
            lambda: Gallery([flat("x", "red"), flat("y", "red")]).image("z", "p", 0, 8, 8),
            "'z' is not a contestant here",
        ),
    ],
)
def test_wrong_contestants_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def test_the_number_of_steps_follows_the_name():
    one, two, again = (contestant(name) for name in ("nano@1", "nano@2", "nano@1"))
    pictures = [c.draw("a red circle", 0, 64, 96) for c in (one, two, again)]
    assert pictures[0].size == (96, 64) and pictures[0].tobytes() == pictures[2].tobytes() != pictures[1].tobytes()
    assert one.version == two.version != contestant("nano-base").version


def test_a_side_shows_what_its_axis_is_about():
    assert len(side_images("overall", 5, (96, 160))) == 1
    assert len({(h, w) for _, h, w in side_images("size", 5, (128, 128))}) == 3
    assert len({seed for seed, _, _ in side_images("diversity", 5, (96, 160))}) == 4
    assert all(any(form in LETTERS for _, form, _ in q.claim.objects) for q in axis_questions("typography", 30))
    assert len(axis_questions("typography", 30)) == 30
    four = contact_sheet([Image.new("RGB", (10, 6), c) for c in ("red", "green", "blue", "black")])
    assert four.size == (24, 16) and four.getpixel((14, 10)) == (0, 0, 0)


# ---------------------------------------------------------------- the judge


def truth(index=0):
    """A rendered scene and the claim of its caption."""
    rng = np.random.default_rng(100 + index)
    scene = sample_scene(rng, size=(128, 128), count=2)
    return Image.fromarray(render(scene)), caption(scene, rng)[1]


@pytest.mark.parametrize("axis", ["overall", "prompt", "quality"])
def test_the_judge_prefers_the_true_picture_and_calls_equals_equal(axis):
    good, claim = truth()
    bad = Image.new("RGB", (128, 128), "white")
    grain = np.random.default_rng(0).normal(0, 40, (128, 128, 3))
    noisy = Image.fromarray(np.clip(np.asarray(bad) + grain, 0, 255).astype(np.uint8))
    assert preference(axis, [good], [noisy], claim) == "left"
    assert preference(axis, [noisy], [good], claim) == "right"
    assert preference(axis, [good], [good], claim) == "tie"


def test_the_judge_of_letters_and_of_diversity():
    lettered = next(q for q in questions(50) if any(form in LETTERS for _, form, _ in q.claim.objects))
    assert score("typography", [Image.new("RGB", (128, 128))], lettered.claim) == (0.0,)
    good, claim = truth()
    moved = [Image.fromarray(np.roll(np.asarray(good), 9 * k, 1)) for k in range(4)]
    assert preference("diversity", [good] * 4, moved, claim) == "right"


def test_the_judge_votes_on_all_axes_and_stops_when_all_is_judged(tmp_path):
    scenes = {q.prompt: q for q in questions(60)}

    def other(prompt, seed, height, width):
        return Image.fromarray(render(sample_scene(np.random.default_rng([seed, height]), size=(height, width))))

    arena = Arena([Contestant("other", other), flat("black", "black")], tmp_path / "v.sqlite", prompts=2)
    assert judge_votes(arena, 8) == 8
    counts = [arena.ratings(axis, "judge").total for axis in AXES]
    assert sum(counts) == 8 and max(counts) - min(counts) <= 1
    assert judge_votes(arena, 100) == 4  # two prompts on each of six axes, one pair
    assert arena.ratings("diversity").order == [0, 1] and arena.ratings("overall", "people").total == 0
    assert set(r["prompt"] for r in arena.votes.rows()) <= set(scenes)


READ_ONLY = """
import os, sys
from pathlib import Path
import fluxedu.files
from fluxedu.arena import match
from fluxedu.arena.votes import Votes
os.setuid(65534)  # root may write everywhere
match.contestant = lambda name: sys.exit("the models were loaded first")
print(len(Votes(sys.argv[1]).rows()))
try:
    match.Arena(["a", "b"], sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can become somebody else")
def test_a_file_that_can_only_be_read_is_found_before_the_models_are_loaded():
    """Its votes can still be read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        file = Path(folder, "votes.sqlite")
        Votes(file).close()
        file.chmod(0o444)
        code = [sys.executable, "-c", READ_ONLY, str(file)]
        done = subprocess.run(code, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        sentence = f"{file} cannot be used as a file of votes: attempt to write a readonly database."
        assert done.stdout.splitlines() == ["0", sentence], done.stderr


def test_a_place_where_no_votes_can_be_is_found_before_the_models_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("fluxedu.arena.match.contestant", lambda name: pytest.fail("the models were loaded first"))
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("file/votes.sqlite", "file", "pipe", "folder", "x" * 300):
        with pytest.raises(FluxeduError, match=r"cannot be (used as a file of votes|written): .*\.$"):
            Arena(["a", "b"], tmp_path / name)
