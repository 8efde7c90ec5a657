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

from fluxedu.arena import Arena, Contestant, Votes, create_server

#: an arena of three contestants and its server, as a separate process; argument: the file of votes
SCRIPT = """
import sys
from PIL import Image
from fluxedu.arena import Arena, Contestant, create_server
flat = lambda name, colour: Contestant(name, lambda prompt, seed, h, w: Image.new("RGB", (w, h), colour))
arena = Arena([flat("alpha", "red"), flat("beta", "blue"), flat("gamma", "green")], sys.argv[1])
server = create_server(arena, port=0)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def flat(name, colour):
    return Contestant(name, lambda prompt, seed, height, width: Image.new("RGB", (width, height), colour))


@pytest.fixture
def server(tmp_path):
    arena = Arena([flat("alpha", "red"), flat("beta", "blue"), flat("gamma", "green")], tmp_path / "v.sqlite")
    with create_server(arena, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
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


def request(port, path, sent=None):
    status, body = ask(port, path, sent)
    return (status, json.loads(body))


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
    port, cast, lock = server.server_address[1], {}, threading.Lock()

    def vote(number):
        rng, voter = random.Random(number), f"voter {number}"
        for _ in range(5):
            _, ballot = request(port, "/ballot", {"voter": voter, "axis": "overall"})
            choice = rng.choice(["left", "right", "tie"])
            sent = {"voter": voter, "ballot": ballot["id"], "choice": choice}
            first, again = request(port, "/vote", sent), request(port, "/vote", sent)  # everybody clicks twice
            assert (first, again) == ((200, {"counted": True}), (200, {"counted": False}))
            with lock:
                cast[ballot["id"]] = (voter, choice)

    at_once(60, vote)
    stored = {row["id"]: (row["voter"], row["choice"]) for row in server.arena.votes.rows()}
    assert len(cast) == 300 and stored == cast
    assert server.arena.ratings(who="people").total == 300


def test_a_killed_server_continues_where_it_stopped(tmp_path):
    path, acknowledged, lock = tmp_path / "votes.sqlite", {}, threading.Lock()

    def start():
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, text=True)
        return process, int(process.stdout.readline())

    def vote(port, number, most):
        for _ in range(most):
            try:
                _, ballot = request(port, "/ballot", {"voter": f"v{number}", "axis": "overall"})
                sent = {"voter": f"v{number}", "ballot": ballot["id"], "choice": "left"}
                if request(port, "/vote", sent)[0] == 200:
                    with lock:
                        acknowledged[ballot["id"]] = f"v{number}"
            except (OSError, HTTPException, ValueError):  # the server has gone
                return

    def kill_midway():
        wait_for(lambda: len(acknowledged) >= 40)
        process.send_signal(signal.SIGKILL)

    process, port = start()
    threading.Thread(target=kill_midway).start()
    at_once(12, lambda number: vote(port, number, 1000))
    process.wait(30)
    before = dict(acknowledged)
    assert len(before) >= 40
    process, port = start()
    try:
        stored = {row["id"] for row in Votes(path).rows()}
        assert set(before) <= stored, "an acknowledged vote was lost"
        assert len(stored - set(before)) <= 12, "more votes are stored than were acknowledged or in flight"
        at_once(12, lambda number: vote(port, number, 2))
        assert len(acknowledged) == len(before) + 24
        assert set(acknowledged) <= {row["id"] for row in Votes(path).rows()}
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
    port = server.server_address[1]
    for number in range(8):
        _, body = ask(port, "/ballot", {"voter": f"v{number}", "axis": "size"})
        ballot = json.loads(body)
        for side in ("left", "right"):
            status, png = ask(port, ballot[side])
            image = Image.open(io.BytesIO(png))
            assert status == 200 and image.size == (128 + 192 + 96 + 8, 192) and image.info == {}
            body += png
        assert not any(name.encode() in body for name in server.arena.names)
    page = ask(port, "/")[1]
    assert b"alpha" not in page and b"http" not in page.replace(b"http-equiv", b""), "fetched from elsewhere"


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
    status, body = ask(server.server_address[1], path)
    assert status == 400 and len(body) < 200
    assert "there is nothing at" in json.loads(body)["error"]


BAD = [
    (dict(path="/vote", sent={"voter": "v", "ballot": "made-up", "choice": "left"}), "there is no ballot 'made-up'"),
    (dict(path="/vote", sent={"voter": "v", "ballot": 7, "choice": "left"}), "there is no ballot 7"),
    (dict(path="/vote", sent={}), "a vote must be one of left, right, tie, not None"),
    (dict(path="/vote", raw="[1, 2"), "a JSON object"),
    (dict(path="/vote", raw="[" * 4000), "a JSON object"),
    (dict(path="/vote", raw=b"\xff\xfe"), "a JSON object"),
    (dict(path="/vote", raw="x" * 5000), "at most 4096 bytes"),
    (dict(path="/vote", raw="", headers={"Content-Length": "-1"}), "at most 4096 bytes"),
    (dict(path="/ballot", sent={"voter": "judge"}), "the judge does not vote in a browser"),
    (dict(path="/ballot", sent={"voter": {"a": 1}}), "a voter's name"),
    (dict(path="/ballot", sent={"voter": "x" * 41}), "a voter's name"),
    (dict(path="/ballot", sent={"voter": "v", "axis": ["overall"]}), "axis must be one of overall"),
    (dict(path="/picture/made-up/left"), "there is no ballot 'made-up'"),
]


@pytest.mark.parametrize(("request_", "says"), BAD, ids=range(len(BAD)))
def test_bad_requests_get_a_one_sentence_error(server, request_, says):
    status, body = ask(server.server_address[1], **request_)
    assert status == 400 and says in json.loads(body)["error"]
    assert server.arena.votes.rows() == []


def test_nobody_votes_on_another_voters_ballot(server):
    port = server.server_address[1]
    _, ballot = request(port, "/ballot", {"voter": "ann", "axis": "overall"})
    status, response = request(port, "/vote", {"voter": "bob", "ballot": ballot["id"], "choice": "left"})
    assert status == 400 and "issued to another voter" in response["error"]
    assert request(port, "/ratings")[1]["overall"]["alpha"]["votes"] == 0
    request(port, "/vote", {"voter": "ann", "ballot": ballot["id"], "choice": "left"})
    assert sum(row["votes"] for row in request(port, "/ratings")[1]["overall"].values()) == 2


def test_the_server_listens_only_locally_by_default(server):
    assert server.server_address[0] == "127.0.0.1"
