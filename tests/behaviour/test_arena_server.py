"""A class votes: sixty voters at once, a killed server, and requests for what a visitor must not have."""

import io
import json
import random
import signal
import subprocess
import sys
import threading
from http.client import HTTPConnection, HTTPException

import pytest
from PIL import Image

from fluxedu.arena import Arena, ArenaError, Contestant, Votes, create_server
from fluxedu.arena.limits import Limit

#: an arena of three contestants and its server, as a separate process; argument: the file of votes
SCRIPT = """
import sys
from PIL import Image
from fluxedu.arena import Arena, Contestant, create_server
flat = lambda name, colour: Contestant(name, lambda prompt, seed, h, w: Image.new("RGB", (w, h), colour))
arena = Arena([flat("alpha", "red"), flat("beta", "blue"), flat("gamma", "green")], sys.argv[1])
server = create_server(arena, port=0)
print(server.server_address[1], server.code, flush=True)
server.serve_forever()
"""


def flat(name, colour):
    return Contestant(name, lambda prompt, seed, height, width: Image.new("RGB", (width, height), colour))


@pytest.fixture
def server(tmp_path):
    arena = Arena([flat("alpha", "red"), flat("beta", "blue"), flat("gamma", "green")], tmp_path / "v.sqlite")
    with create_server(arena, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def ask(port, path, sent=None, raw=None, headers=None):
    """The status and body of the response to one request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        body = raw if raw is not None else None if sent is None else json.dumps(sent)
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Browser:
    """A browser that has joined as ``voter``; ``token``: its cookie's, if it joined before."""

    def __init__(self, port, code, voter=None, token=None):
        self.port, self.token = port, token
        if token is None:
            connection = HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("POST", "/join", json.dumps({"code": code, "voter": voter}))
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            self.token = answer.getheader("Set-Cookie").split(";")[0].split("=")[1]
            connection.close()

    def ask(self, path, sent=None, raw=None, headers=None):
        cookie = {"Cookie": f"other=1; fluxedu_{self.port}={self.token}"}
        return ask(self.port, path, sent, raw, cookie | (headers or {}))

    def request(self, path, sent=None):
        status, body = self.ask(path, sent)
        return (status, json.loads(body))


@pytest.fixture
def ann(server):
    return Browser(server.port, server.code, "ann")


def at_once(count, work):
    """Run ``work(number)`` in as many threads, started together; raises what any of them raised."""
    barrier, wrong = threading.Barrier(count), []

    def one(number):
        barrier.wait()
        try:
            work(number)
        except Exception as error:  # noqa: BLE001 - raised below, where pytest sees it
            wrong.append(error)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
    [t.start() for t in threads]
    [t.join(120) for t in threads]
    if wrong:
        raise wrong[0]


def test_sixty_voters_at_once_lose_no_vote_and_double_none(server):
    cast, lock = {}, threading.Lock()

    def vote(number):
        rng, voter = random.Random(number), f"voter {number}"
        browser = Browser(server.port, server.code, voter)
        for _ in range(5):
            _, ballot = browser.request("/ballot", {"axis": "overall"})
            choice = rng.choice(["left", "right", "tie"])
            sent = {"ballot": ballot["id"], "choice": choice}
            first, again = browser.request("/vote", sent), browser.request("/vote", sent)  # everybody clicks twice
            assert (first, again) == ((200, {"counted": True}), (200, {"counted": False}))
            with lock:
                cast[ballot["id"]] = (voter, choice)

    at_once(60, vote)
    stored = {row["id"]: (row["voter"], row["choice"]) for row in server.arena.votes.rows()}
    assert len(cast) == 300 and stored == cast
    assert server.arena.ratings(who="people").total == 300


def test_a_killed_server_continues_where_it_stopped(tmp_path):
    """Also for the browsers that joined before, whose code was that of the killed server."""
    path, acknowledged, lock, tokens = tmp_path / "votes.sqlite", {}, threading.Lock(), {}

    def start():
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, text=True)
        port, code = process.stdout.readline().split()
        return process, int(port), code

    def vote(port, code, number, most):
        browser = Browser(port, code, f"v{number}", tokens.get(number))
        tokens[number] = browser.token
        for _ in range(most):
            try:
                _, ballot = browser.request("/ballot", {"axis": "overall"})
                if browser.request("/vote", {"ballot": ballot["id"], "choice": "left"})[0] == 200:
                    with lock:
                        acknowledged[ballot["id"]] = f"v{number}"
            except (OSError, HTTPException, ValueError):  # the server has gone
                return

    def kill_midway():
        wait_for(lambda: len(acknowledged) >= 40)
        process.send_signal(signal.SIGKILL)

    process, port, code = start()
    for number in range(12):
        tokens[number] = Browser(port, code, f"v{number}").token
    threading.Thread(target=kill_midway).start()
    at_once(12, lambda number: vote(port, code, number, 1000))
    process.wait(30)
    before = dict(acknowledged)
    assert len(before) >= 40
    process, port, code = start()
    try:
        stored = {row["id"]: row["voter"] for row in Votes(path).rows()}
        assert before.items() <= stored.items(), "an acknowledged vote was lost"
        assert len(stored) - len(before) <= 12, "more votes are stored than were acknowledged or in flight"
        at_once(12, lambda number: vote(port, code, number, 2))
        assert len(acknowledged) == len(before) + 24
        assert acknowledged.items() <= {row["id"]: row["voter"] for row in Votes(path).rows()}.items()
    finally:
        process.kill()
        process.wait(30)


def wait_for(ready, seconds=60.0):
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if ready():
            return
        pause.wait(0.01)


def test_a_ballot_is_blind(server):
    for number in range(8):
        browser = Browser(server.port, server.code, f"v{number}")
        _, body = browser.ask("/ballot", {"axis": "size"})
        ballot = json.loads(body)
        for side in ("left", "right"):
            status, png = browser.ask(ballot[side])
            image = Image.open(io.BytesIO(png))
            assert status == 200 and image.size == (128 + 192 + 96 + 8, 192) and image.info == {}
            body += png
        assert not any(name.encode() in body for name in server.arena.names)
    page = ask(server.port, "/")[1]
    assert b"alpha" not in page and b"http" not in page.replace(b"http-equiv", b""), "fetched from elsewhere"
    assert server.code.encode() not in page


PATHS = [
    "/../../etc/passwd",
    "/picture/../../../etc/passwd/left",
    "/picture/%2e%2e%2f%2e%2e/left",
    "/votes.sqlite",
    "//etc/passwd",
    "/picture/x/left/../right",
    "/page.html",
    "/picture/" + "x" * 5000 + "/left",
    "/ballot",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_to_a_file(server, path):
    status, body = ask(server.port, path)
    assert status == 404 and len(body) < 200
    assert "there is nothing at" in json.loads(body)["error"]


BAD = [
    (400, dict(path="/vote", sent={"ballot": "made-up", "choice": "left"}), "there is no ballot 'made-up'"),
    (400, dict(path="/vote", sent={"ballot": 7, "choice": "left"}), "there is no ballot 7"),
    (400, dict(path="/vote", sent={"ballot": "\ud800", "choice": "left"}), "there is no ballot '\\ud800'"),
    (400, dict(path="/vote", sent={}), "a vote must be one of left, right, tie, not None"),
    (400, dict(path="/vote", raw="[1, 2"), "a JSON object"),
    (400, dict(path="/vote", raw="[" * 4000), "a JSON object"),
    (400, dict(path="/vote", raw=b"\xff\xfe"), "a JSON object"),
    (413, dict(path="/vote", raw="x" * 5000), "at most 4096 bytes"),
    (400, dict(path="/vote", raw="", headers={"Content-Length": "-1"}), "one header Content-Length, a whole number"),
    (400, dict(path="/ballot", sent={"axis": ["overall"]}), "axis must be one of overall"),
    (400, dict(path="/picture/made-up/left"), "there is no ballot 'made-up'"),
]


@pytest.mark.parametrize(("expected", "request_", "says"), BAD, ids=range(len(BAD)))
def test_bad_requests_get_a_one_sentence_error(ann, server, expected, request_, says):
    status, body = ann.ask(**request_)
    assert status == expected and says in json.loads(body)["error"]
    assert server.arena.votes.rows() == []


def test_a_voter_reads_what_to_do_next(ann, server):
    ballot = ann.request("/ballot", {"axis": "overall"})[1]["id"]
    assert ann.request("/vote", {"ballot": ballot, "choice": "left"}) == (200, {"counted": True})
    says = "Your first vote on this pair was counted: left. Here is the next pair."
    assert ann.request("/vote", {"ballot": ballot, "choice": "right"}) == (400, {"error": says})
    server.votes_given = Limit(0, 3600)
    status, body = ann.request("/vote", {"ballot": ballot, "choice": "left"})
    says = "You have given 300 votes in one hour, which is the limit. Please continue later."
    assert (status, body["error"]) == (429, says)
    server.arena.prompts = 0  # no pairs are left
    server.arena._questions.clear()
    status, body = ann.request("/ballot", {"axis": "overall"})
    says = "You have judged all pairs for this question. Choose another question above."
    assert (status, body["error"]) == (400, says)


def test_nobody_votes_on_another_voters_ballot(ann, server):
    bob = Browser(server.port, server.code, "bob")
    _, ballot = ann.request("/ballot", {"axis": "overall"})
    status, response = bob.request("/vote", {"voter": "ann", "ballot": ballot["id"], "choice": "left"})
    assert status == 400 and "issued to another voter" in response["error"]
    assert bob.request("/ratings")[1]["overall"]["alpha"]["votes"] == 0
    ann.request("/vote", {"ballot": ballot["id"], "choice": "left"})
    assert sum(row["votes"] for row in bob.request("/ratings")[1]["overall"].values()) == 2


def test_further_names_and_the_machines_own_addresses_are_answered_only_where_they_are_served(server, tmp_path):
    """A server at 0.0.0.0 prints the address of the machine in its network; --allow-host adds names, at any port."""
    host = lambda port, name: ask(port, "/", headers={"Host": name})[0]  # noqa: E731
    with create_server(server.arena, "0.0.0.0", 0, allowed_hosts=["Class.example"]) as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        printed = other.url.removeprefix("http://").partition("/")[0]
        assert not printed.startswith("0.0.0.0") and other.url.endswith(f"/#{other.code}")
        address = printed.rpartition(":")[0]
        connection = HTTPConnection(address, other.port, timeout=30)
        connection.request("GET", "/")  # as a student's browser, through the network
        assert connection.getresponse().status == 200
        connection.close()
        names = [f"localhost:{other.port}", "class.example", "class.example:443", "CLASS.example:9000"]
        assert [host(other.port, name) for name in names] == [200] * 4
        names = ["evil.example", "x.class.example", "class.example.evil", f"10.9.8.7:{other.port}"]
        assert [host(other.port, name) for name in names] == [403] * 4
        same = {"Host": "class.example", "Origin": "https://class.example"}  # a proxy that adds TLS
        assert ask(other.port, "/join", {"code": other.code}, headers=same)[0] == 200
        other.shutdown()
        thread.join(10)
    assert host(server.port, "class.example") == 403


def test_ipv6_addresses_are_served_too(server):
    try:
        other = create_server(server.arena, "::1", 0)
    except ArenaError:
        pytest.skip("no IPv6 here")
    with other:
        threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
        assert other.url.startswith(f"http://[::1]:{other.port}/#")
        connection = HTTPConnection("::1", other.port, timeout=30)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        other.shutdown()


def test_a_mistake_of_the_server_is_one_line_in_its_terminal(ann, server, monkeypatch, capfd):
    ballot = ann.request("/ballot", {"axis": "overall"})[1]
    monkeypatch.setattr(server.arena, "side", lambda *_: 1 / 0)
    for _ in range(3):
        status, body = ann.request(ballot["left"])
        assert status == 500 and body["error"] == "Something went wrong on the server. Please tell your teacher."
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"host": 7}, "host must be of the type str, not 7"),
        ({"host": "a" * 300}, "cannot be served"),
        ({"host": "\x00"}, "cannot be served"),
        ({"host": "256.1.1.1"}, "cannot be served"),
        ({"port": "80"}, "port must be of the type int, not '80'"),
        ({"port": 70000}, "cannot be served"),
        ({"code": 7}, "code must be of the type"),
        ({"allowed_hosts": "class.example"}, "allowed_hosts must be of the type"),
        ({"axes": ("beauty",)}, "axis must be one of overall"),
    ],
)
def test_a_server_that_cannot_be_is_refused_in_one_sentence(server, wrong, says):
    with pytest.raises(ArenaError, match=says):
        create_server(server.arena, **{"port": 0} | wrong)


def test_the_server_listens_only_locally_by_default(server):
    assert server.server_address[0] == "127.0.0.1"
