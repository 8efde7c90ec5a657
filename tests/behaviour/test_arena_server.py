"""The class votes: sixty at once, a server that is killed, and visitors who ask for what is not theirs."""

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

from fluxedu.arena import Arena, Contestant, Votes, serving

#: three painters, an arena and a server, as a process of its own: (file of votes)
SCRIPT = """
import sys
from PIL import Image
from fluxedu.arena import Arena, Contestant, serving
flat = lambda name, colour: Contestant(name, lambda prompt, seed, h, w: Image.new("RGB", (w, h), colour))
arena = Arena([flat("alpha", "red"), flat("beta", "blue"), flat("gamma", "green")], sys.argv[1])
server = serving(arena, port=0)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def flat(name, colour):
    return Contestant(name, lambda prompt, seed, height, width: Image.new("RGB", (width, height), colour))


@pytest.fixture
def server(tmp_path):
    arena = Arena([flat("alpha", "red"), flat("beta", "blue"), flat("gamma", "green")], tmp_path / "v.sqlite")
    with serving(arena, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def ask(port, path, sent=None, raw=None, headers=None):
    """(status, what came back) of one request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        body = raw if raw is not None else None if sent is None else json.dumps(sent)
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def told(port, path, sent=None):
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
            _, ballot = told(port, "/ballot", {"voter": voter, "axis": "overall"})
            choice = rng.choice(["left", "right", "tie"])
            sent = {"voter": voter, "ballot": ballot["id"], "choice": choice}
            first, again = told(port, "/vote", sent), told(port, "/vote", sent)  # everybody clicks twice
            assert (first, again) == ((200, {"counted": True}), (200, {"counted": False}))
            with lock:
                cast[ballot["id"]] = (voter, choice)

    at_once(60, vote)
    stored = {row["id"]: (row["voter"], row["choice"]) for row in server.arena.votes.rows()}
    assert len(cast) == 300 and stored == cast
    assert server.arena.ratings(who="people").total == 300


def test_a_killed_server_goes_on_where_it_was(tmp_path):
    path, acknowledged, lock = tmp_path / "votes.sqlite", {}, threading.Lock()

    def start():
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, text=True)
        return process, int(process.stdout.readline())

    def vote(port, number, most):
        for _ in range(most):
            try:
                _, ballot = told(port, "/ballot", {"voter": f"v{number}", "axis": "overall"})
                sent = {"voter": f"v{number}", "ballot": ballot["id"], "choice": "left"}
                if told(port, "/vote", sent)[0] == 200:
                    with lock:
                        acknowledged[ballot["id"]] = f"v{number}"
            except (OSError, HTTPException, ValueError):  # the server has gone
                return

    def kill_in_the_midst():
        wait_for(lambda: len(acknowledged) >= 40)
        process.send_signal(signal.SIGKILL)

    process, port = start()
    threading.Thread(target=kill_in_the_midst).start()
    at_once(12, lambda number: vote(port, number, 1000))
    process.wait(30)
    before = dict(acknowledged)
    assert len(before) >= 40
    process, port = start()
    try:
        stored = {row["id"] for row in Votes(path).rows()}
        assert set(before) <= stored, "an acknowledged vote was lost"
        assert len(stored - set(before)) <= 12, "at most the vote that each had just sent is not known to them"
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
    (dict(path="/vote", sent={"voter": "v", "ballot": "made-up", "choice": "left"}), "no ballot 'made-up'"),
    (dict(path="/vote", sent={"voter": "v", "ballot": 7, "choice": "left"}), "no ballot 7"),
    (dict(path="/vote", sent={}), "a vote is left, right or tie, not None"),
    (dict(path="/vote", raw="[1, 2"), "a JSON object"),
    (dict(path="/vote", raw="[" * 4000), "a JSON object"),
    (dict(path="/vote", raw=b"\xff\xfe"), "a JSON object"),
    (dict(path="/vote", raw="x" * 5000), "at most 4096 bytes"),
    (dict(path="/vote", raw="", headers={"Content-Length": "-1"}), "at most 4096 bytes"),
    (dict(path="/ballot", sent={"voter": "judge"}), "the judge does not vote in a browser"),
    (dict(path="/ballot", sent={"voter": {"a": 1}}), "a voter's name"),
    (dict(path="/ballot", sent={"voter": "x" * 41}), "a voter's name"),
    (dict(path="/ballot", sent={"voter": "v", "axis": ["overall"]}), "asks about overall"),
    (dict(path="/picture/made-up/left"), "no ballot 'made-up'"),
]


@pytest.mark.parametrize(("request_", "says"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_said_in_one_sentence(server, request_, says):
    status, body = ask(server.server_address[1], **request_)
    assert status == 400 and says in json.loads(body)["error"]
    assert server.arena.votes.rows() == []


def test_nobody_votes_on_anothers_ballot(server):
    port = server.server_address[1]
    _, ballot = told(port, "/ballot", {"voter": "ann", "axis": "overall"})
    status, said = told(port, "/vote", {"voter": "bob", "ballot": ballot["id"], "choice": "left"})
    assert status == 400 and "issued to another voter" in said["error"]
    assert told(port, "/ratings")[1]["overall"]["alpha"]["votes"] == 0
    told(port, "/vote", {"voter": "ann", "ballot": ballot["id"], "choice": "left"})
    assert sum(row["votes"] for row in told(port, "/ratings")[1]["overall"].values()) == 2


def test_the_server_listens_to_this_machine_only_unless_told_otherwise(server):
    assert server.server_address[0] == "127.0.0.1"
