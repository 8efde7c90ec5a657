"""Ballot stuffing: made-up voters without the class code move nothing; with it, limits and the teacher stop them."""

import json
import re
import sqlite3
import subprocess
import sys
from http.client import HTTPConnection

import pytest
from test_arena_server import Browser, ask, at_once
from test_arena_server import server as server  # the fixture
from typer.testing import CliRunner

from fluxedu.arena import Votes, create_server
from fluxedu.arena.limits import Limit, client_network
from fluxedu.cli import app
from fluxedu.errors import ArenaError

run = CliRunner().invoke


def elo(arena):
    return arena.ratings("overall", "people").rows()


def vote(browser, favourite, votes, count=1):
    """Vote for ``favourite`` wherever it is shown; returns the statuses."""
    statuses = []
    for _ in range(count):
        ballot = votes.ballot(browser.request("/ballot", {"axis": "overall"})[1]["id"])
        choice = {ballot.left: "left", ballot.right: "right"}.get(favourite, "tie")
        statuses.append(browser.request("/vote", {"ballot": ballot.id, "choice": choice})[0])
    return statuses


def test_128_made_up_names_without_the_code_move_nothing(server):
    for number in range(4):
        vote(Browser(server.port, server.code, f"student {number}"), "beta", server.arena.votes, 3)
    before, ballots = elo(server.arena), server.arena.votes.issued()
    for number in range(128):
        for path, sent in [
            ("/join", {"voter": f"fake {number}", "code": f"{number:06d}"}),
            ("/ballot", {"voter": f"fake {number}", "axis": "overall"}),
            ("/vote", {"voter": "student 0", "ballot": "x", "choice": "left"}),
        ]:
            status, body = ask(server.port, path, sent)
            assert status in (401, 403, 429), body
    assert elo(server.arena) == before and server.arena.votes.issued() == ballots


def test_with_the_code_the_votes_of_a_stuffer_are_visible_and_can_be_dropped(server, tmp_path):
    """The ratings are then what they were, to the last digit, in the running server too; --undo counts them again."""
    student, votes = Browser(server.port, server.code, "student"), server.arena.votes
    vote(student, "beta", votes, 6)
    honest = student.request("/ratings")[1]
    stuffer = Browser(server.port, server.code, "stuffer")
    vote(stuffer, "alpha", votes, 30)
    stuffed = student.request("/ratings")[1]
    assert stuffed["overall"]["alpha"]["elo"] > honest["overall"]["alpha"]["elo"] + 50
    rows = student.request("/voters")[1]
    assert rows == [
        {"voter": "stuffer", "votes": 30, "dropped": False},
        {"voter": "student", "votes": 6, "dropped": False},
    ]
    words, open_ballot = ["--votes", str(votes.path)], stuffer.request("/ballot", {"axis": "overall"})[1]["id"]
    result = run(app, ["arena", "voters", *words])
    assert re.search(r"stuffer +30 +20\d\d-\d\d-\d\d \d\d:\d\d", result.output), result.output
    result = run(app, ["arena", "drop", "stuffer", *words])
    assert result.output.strip() == "30 votes of stuffer no longer count", result.output
    assert student.request("/ratings")[1] == honest
    assert student.request("/voters")[1][0] == {"voter": "stuffer", "votes": 30, "dropped": True}
    status, body = stuffer.request("/vote", {"ballot": open_ballot, "choice": "left"})
    assert status == 403 and "voter stuffer has been dropped" in body["error"]
    assert stuffer.request("/ballot", {"axis": "quality"})[0] == 403
    assert "dropped" in run(app, ["arena", "voters", *words]).output
    assert sum(row["voter"] == "stuffer" for row in votes.rows()) == 30, "the votes stay in the file"
    votes.export(tmp_path / "x.json")
    assert sum(row["dropped"] is not None for row in json.loads((tmp_path / "x.json").read_text())) == 30
    assert run(app, ["arena", "drop", "stuffer", "--undo", *words]).output.strip() == "30 votes of stuffer count again"
    assert student.request("/ratings")[1] == stuffed


def test_dropping_beside_eleven_voters_loses_no_vote(server):
    """Another process drops a voter again and again while others vote."""
    path, cast = server.arena.votes.path, []
    browsers = [Browser(server.port, server.code, f"v{number}") for number in range(12)]
    vote(browsers[0], "alpha", server.arena.votes)
    code = "import sys; from fluxedu.arena import Votes; v = Votes(sys.argv[1])\n"
    code += "for i in range(60): v.drop('v0', undo=i % 2 == 1)\n"
    other = subprocess.Popen([sys.executable, "-c", code, str(path)])
    at_once(11, lambda number: cast.extend(vote(browsers[number + 1], "beta", server.arena.votes, 6)))
    assert other.wait(60) == 0 and cast == [200] * 66
    assert len(server.arena.votes.rows()) == 67 and server.arena.ratings("overall", "people").total == 67


def test_a_voter_has_so_many_votes_within_an_hour(server):
    server.votes_given = Limit(3, 3600)
    ann, bob = (Browser(server.port, server.code, name) for name in ("ann", "bob"))
    sent = {"ballot": ann.request("/ballot", {"axis": "overall"})[1]["id"], "choice": "left"}
    assert [ann.request("/vote", sent) for _ in range(5)] == [(200, {"counted": True})] + [
        (200, {"counted": False})
    ] * 4
    assert vote(ann, "alpha", server.arena.votes, 3) == [200, 200, 429]
    assert vote(bob, "alpha", server.arena.votes) == [200]
    assert len(server.arena.votes.rows()) == 4


def test_votes_sent_at_the_same_time_do_not_pass_the_limit(server):
    server.votes_given, statuses = Limit(2, 3600), []
    ann = Browser(server.port, server.code, "ann")
    ballots = [ann.request("/ballot", {"axis": axis})[1]["id"] for axis in server.axes]
    send = lambda n: statuses.append(ann.request("/vote", {"ballot": ballots[n], "choice": "tie"})[0])  # noqa: E731
    at_once(6, send)
    assert sorted(statuses) == [200, 200, 429, 429, 429, 429] and len(server.arena.votes.rows()) == 2


def test_so_many_voters_join_from_one_address_within_an_hour(server, capfd):
    """The others see a sentence, and the teacher's terminal shows one line."""
    server.new_voters = Limit(5, 3600)
    for number in range(5):
        Browser(server.port, server.code, f"v{number}")
    for _ in range(3):
        status, body = ask(server.port, "/join", {"code": server.code})
        assert status == 429 and json.loads(body)["error"].startswith("Too many voters have joined from your network.")
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "voters joined from 127.0.0.1 within an hour; no more can join" in line


def test_wrong_codes_are_limited_and_refuse_the_right_one_to_nobody(server):
    """A student who guesses cannot keep out the class, which shares the address; eight letters are enough."""
    ann = Browser(server.port, server.code, "ann")
    statuses = [ask(server.port, "/join", {"code": f"{n:06d}"})[0] for n in range(40)]
    assert statuses == [403] * 30 + [429] * 10
    assert ask(server.port, "/join", {"code": server.code})[0] == 200
    assert vote(ann, "alpha", server.arena.votes, 2) == [200, 200]


def test_limits_forget(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    limit = Limit(2, 10)
    assert [limit.spend("a"), limit.spend("a"), limit.spend("a"), limit.spend("b")] == [True, True, False, True]
    limit.refund("a")
    clock[0] = 9.0
    assert [limit.spend("a"), limit.spend("a")] == [True, False]
    clock[0] = 10.5  # the first of the two is forgotten, the one at 9 seconds is not
    assert [limit.spend("a"), limit.spend("a")] == [True, False]


def test_limits_hold_nothing_of_clients_that_stopped_long_ago(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    limit = Limit(2, 10)
    for number in range(1000):
        clock[0] = number / 10
        limit.spend(str(number))
    assert len(limit.times) <= 101
    limit.refund("0")  # forgotten already


@pytest.mark.parametrize(
    ("network", "addresses"),
    [
        ("fd00::/64", ["fd00::1", "fd00::2", "fd00:0:0:0:ffff::9", "fd00::1%eth0"]),
        ("2001:db8:1:2::/64", ["2001:db8:1:2::5", "2001:db8:1:2:3:4:5:6"]),
        ("fe80::/64", ["fe80::1%3", "fe80::abcd:1%wlan0"]),
        ("192.168.0.7", ["192.168.0.7", "::ffff:192.168.0.7"]),  # of IPv4, an address is a client
    ],
)
def test_an_ipv6_network_is_one_client(network, addresses):
    assert {client_network(address) for address in addresses} == {network}


def test_a_browser_is_one_voter_however_often_it_joins(server):
    ann = Browser(server.port, server.code, "ann")
    assert ann.request("/join", {"code": server.code, "voter": "ann2"}) == (200, {"voter": "ann"})
    assert ann.request("/join", {}) == (200, {"voter": "ann"}), "also after a reload, without the code"


def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites_and_not_in_the_file(server):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/join", json.dumps({"code": server.code}))
    cookie = connection.getresponse().getheader("Set-Cookie")
    connection.close()
    assert "; HttpOnly" in cookie and "; SameSite=Strict" in cookie and "; Path=/" in cookie
    token = cookie.split("=")[1].split(";")[0]
    assert len(token) >= 20
    server.arena.votes.db.execute("PRAGMA wal_checkpoint(FULL)")
    assert token.encode() not in server.arena.votes.path.read_bytes(), "the file would let its reader vote for others"


def test_codes_are_random_and_unambiguous(server):
    assert re.fullmatch("[A-Z]{8}", server.code) and not set("IO") & set(server.code)
    codes = set()
    for _ in range(20):
        with create_server(server.arena, port=0) as other:
            codes.add(other.code)
            assert other.url.endswith(f":{other.port}/#{other.code}")
    assert len(codes) == 20


@pytest.mark.parametrize("code", ["", None, 0, [], {}])
def test_a_browser_without_a_code_learns_that_it_has_not_joined(server, code):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/join", json.dumps({"code": code, "voter": "eve"}))
    answer = connection.getresponse()
    assert json.loads(answer.read()) == {"voter": None} and answer.getheader("Set-Cookie") is None
    connection.close()


def test_without_a_code_the_link_is_enough(server):
    with create_server(server.arena, port=0, code="") as other:
        assert other.url.endswith("/")
    server.code = ""
    assert ask(server.port, "/join", {})[0] == 200


@pytest.mark.parametrize("name", ["judge", "Judge", "JUDGE ", "ｊｕｄｇｅ", "јudge", "people", " all", "judge\u200b"])
def test_names_that_the_arena_uses_itself_are_refused_in_python_too(name, tmp_path):
    votes = Votes(tmp_path / "v.sqlite")
    for refused in (lambda: votes.join(name), lambda: votes.drop(name)):
        with pytest.raises(ArenaError, match="reserved|judge does not vote|up to 40 letters"):
            refused()
    if name != "judge":
        with pytest.raises(ArenaError, match="reserved|up to 40 letters"):
            votes.issue("overall", "a", "b", "p", 0, (8, 8), name)


def test_several_voters_are_dropped_at_once_or_none_of_them(tmp_path):
    votes, words = Votes(tmp_path / "v.sqlite"), ["--votes", str(tmp_path / "v.sqlite")]
    for voter in ("ann", "bob", "bob", "cid"):
        votes.vote(votes.issue("overall", "a", "b", "p", 0, (8, 8), voter).id, "left", voter)
    dropped = lambda: [row["voter"] for row in votes.voters() if row["dropped"]]  # noqa: E731
    result = run(app, ["arena", "drop", "ann", "nobody", *words])
    assert result.exit_code == 2 and "there is no voter 'nobody'" in result.output and dropped() == []
    result = run(app, ["arena", "drop", "ann", "bob", "ann", *words])
    assert result.output.strip() == "3 votes of ann, bob no longer count" and dropped() == ["bob", "ann"]
    assert votes.outcomes("overall") == [("a", "b", 1.0, 1)]
    run(app, ["arena", "drop", "ann", "bob", "--undo", *words])
    assert dropped() == [] and votes.outcomes("overall") == [("a", "b", 1.0, 4)]


def test_an_unknown_voter_cannot_be_dropped(server):
    result = run(app, ["arena", "drop", "nobody", "--votes", str(server.arena.votes.path)])
    assert result.exit_code == 2 and "there is no voter 'nobody'; fluxedu arena voters lists them" in result.output


def test_voters_of_a_notebook_are_listed_and_dropped_too(server):
    arena = server.arena
    ballot = arena.ballot("me")
    arena.vote(ballot.id, "left", "me")
    assert [row["voter"] for row in arena.votes.voters()] == ["me"]
    with pytest.raises(ArenaError, match="the name Me is taken"):
        arena.votes.join("Me")
    left_open = arena.ballot("me")
    assert arena.votes.drop("me") == 1 and arena.ratings("overall", "people").total == 0
    for refused in (lambda: arena.ballot("me", "quality"), lambda: arena.vote(left_open.id, "left", "me")):
        with pytest.raises(ArenaError, match="voter me has been dropped"):
            refused()


def test_a_file_from_before_there_were_voters_is_extended(tmp_path):
    votes = Votes(tmp_path / "v.sqlite")
    votes.vote(votes.issue("overall", "a", "b", "p", 0, (8, 8), "ann").id, "left", "ann")
    votes.db.execute("DROP TABLE voters")
    votes.close()
    again = Votes(tmp_path / "v.sqlite")
    assert again.outcomes("overall", "people") == [("a", "b", 1.0, 1)] and again.drop("ann") == 1
    assert again.outcomes("overall", "people") == []


# ---------------------------------------------------------------- a disk that is full, or read-only


@pytest.mark.parametrize("trouble", ["full", "read-only", "locked"])
def test_a_vote_that_cannot_be_stored_is_not_acknowledged(server, trouble, capfd):
    votes, ann = server.arena.votes, Browser(server.port, server.code, "ann")
    vote(ann, "alpha", votes, 2)
    ballot = ann.request("/ballot", {"axis": "overall"})[1]["id"]
    if trouble == "full":
        pages = votes.db.execute("PRAGMA page_count").fetchone()[0]
        votes.db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own "database or disk is full"
    elif trouble == "read-only":
        votes.db.execute("PRAGMA query_only = ON")
    else:
        votes.db.execute("PRAGMA busy_timeout = 50")
        other = sqlite3.connect(votes.path)
        other.execute("BEGIN IMMEDIATE")
    acknowledged, status = 2, 200
    for _ in range(500):
        status, body = ann.request("/vote", {"ballot": ballot, "choice": "tie"})
        acknowledged += status == 200
        if status == 200:
            status, body = ann.request("/ballot", {"axis": "overall"})
            ballot = body.get("id")
        if status != 200:
            break
    assert status == 503 and body["error"].startswith("votes cannot be stored at the moment"), body
    assert len(votes.rows()) == acknowledged
    printed = capfd.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and "cannot be used as a file of votes" in printed[0] and "Traceback" not in printed[0]
    assert ask(server.port, "/")[0] == 200


FULL_AT_START = """
import resource, sys
from typer.testing import CliRunner
from fluxedu.arena import match
from fluxedu.cli import app
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # no file may grow beyond 64 bytes
match.Gallery.image = lambda *_: sys.exit("an image was generated first")
for path in sys.argv[1:]:
    words = ["arena", "serve", "nano@1", "nano@2", "--prompts", "1", "--port", "0", "--votes", path]
    result = CliRunner().invoke(app, words)
    print(result.exit_code, result.output.strip())
"""


def test_a_full_disk_is_found_before_the_images_are_generated(tmp_path):
    """For a file that exists, and for a new one."""
    pytest.importorskip("resource")
    Votes(tmp_path / "v.sqlite").close()
    code = [sys.executable, "-c", FULL_AT_START, str(tmp_path / "v.sqlite"), str(tmp_path / "new.sqlite")]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120)
    old, new = done.stdout.strip().splitlines()
    assert old.startswith("2 fluxedu: ") and "v.sqlite cannot be" in old, done
    assert new.startswith("2 fluxedu: ") and "new.sqlite cannot be" in new, done


def test_names_in_a_file_of_somebody_else_do_not_control_the_terminal(tmp_path):
    votes = Votes(tmp_path / "v.sqlite")
    votes.vote(votes.issue("overall", "a\x1b]0;title\x07\n", "Zoë", "p", 0, (8, 8), "ann").id, "left", "ann")
    votes.db.execute("UPDATE ballots SET voter = ?", ("\x1b[31mred\r\x9b2J",))
    listed, rated = (run(app, ["arena", word, "--votes", str(votes.path)]).output for word in ("voters", "table"))
    assert "\\x1b[31mred\\r\\x9b2J " in listed and "\\x1b]0;title\\x07\\n " in rated and "Zoë" in rated
    assert (listed + rated).replace("\n", "").isprintable()


def test_voters_of_a_damaged_file_are_listed_or_one_sentence_says_why_not(tmp_path):
    votes = Votes(tmp_path / "v.sqlite")
    for voter, given in (("ann", 1e300), ("bob", -1e300), ("cid", float("inf"))):
        votes.vote(votes.issue("overall", "a", "b", "p", 0, (8, 8), voter).id, "left", voter)
        query = "UPDATE votes SET given = ? WHERE ballot = (SELECT id FROM ballots WHERE voter = ?)"
        votes.db.execute(query, (given, voter))
    votes.issue("overall", "a", "b", "p", 0, (8, 8), "dan")
    result = run(app, ["arena", "voters", "--votes", str(votes.path)])
    assert result.exit_code == 0 and [line.split()[:2] for line in result.output.splitlines()[1:]] == [
        *(["ann", "1"], ["bob", "1"], ["cid", "1"], ["dan", "0"])
    ]
