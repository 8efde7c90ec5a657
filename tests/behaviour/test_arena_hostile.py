"""What a hostile class can send to the arena's server: each request gets a status and a sentence, and no vote moves.

All requests go to one server in a process of its own, which must print nothing and serve an honest voter after each.
"""

import json
import socket
import struct
import subprocess
import sys
import time

import pytest

#: prints its port and class code; arguments: the file of votes, the deadline in seconds
SERVER = """
import sys
from PIL import Image
from fluxedu.arena import Arena, Contestant, create_server
flat = lambda name, colour: Contestant(name, lambda prompt, seed, h, w: Image.new("RGB", (w, h), colour))
arena = Arena([flat("alpha", "red"), flat("beta", "blue"), flat("gamma", "green")], sys.argv[1])
server = create_server(arena, port=0)
server.deadline = float(sys.argv[2])
print(server.server_address[1], getattr(server, "code", ""), flush=True)
server.serve_forever()
"""


class Running:
    """A server in a process of its own, and an honest voter's token."""

    def __init__(self, folder, deadline):
        command = [sys.executable, "-c", SERVER, str(folder / "votes.sqlite"), str(deadline)]
        self.errors = open(folder / "errors.txt", "w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.port, self.code = self.process.stdout.readline().split()
        self.port = int(self.port)
        self.cookie = self.join({"voter": "honest"})

    def join(self, body):
        """The cookie of a new voter."""
        _, head, _ = self.send(self.post("/join", {"code": self.code} | body, cookie=False))
        return head.split("Set-Cookie: ")[1].split(";")[0]

    def post(self, path, body, headers="", cookie=True):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.head("POST", path, f"Content-Length: {len(raw)}\r\n{headers}", cookie) + raw

    def head(self, method, path, headers="", cookie=True, host=None):
        host = f"Host: {host or f'127.0.0.1:{self.port}'}\r\n"
        cookie = f"Cookie: {self.cookie}\r\n" if cookie else ""
        return f"{method} {path} HTTP/1.1\r\n{host}{cookie}{headers}\r\n".encode("latin-1")

    def send(self, raw, seconds=20, half_close=False):
        """The status, head and body of the response to these bytes; status 0 if there was none."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            answer = b""
            try:
                connection.sendall(raw)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(65536):
                    answer += piece
            except OSError:  # closed by the server, or no answer in time
                pass
        head, _, body = answer.partition(b"\r\n\r\n")
        words = head.split()
        status = int(words[1]) if len(words) > 1 and words[0] == b"HTTP/1.1" and words[1].isdigit() else 0
        return status, head.decode("latin-1"), body

    def honest_vote(self):
        """An honest voter gets a ballot and votes; returns the seconds that this took."""
        start = time.monotonic()
        status, _, body = self.send(self.post("/ballot", {"axis": "diversity"}))
        assert status == 200, body
        status, _, body = self.send(self.post("/vote", {"ballot": json.loads(body)["id"], "choice": "tie"}))
        assert (status, json.loads(body)) == (200, {"counted": True})
        return time.monotonic() - start

    def close(self):
        self.process.kill()
        self.process.wait(30)
        self.errors.seek(0)
        printed = self.errors.read()
        self.errors.close()
        return printed


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    server = Running(tmp_path_factory.mktemp("hostile"), deadline=0.5)
    yield server
    assert server.close() == "", "the terminal of the server shows nothing"


# ---------------------------------------------------------------- what is not HTTP, or not the HTTP of a browser

GET = b"GET /ratings HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nCookie: TOKEN\r\n"
POST = b"POST /ballot HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nCookie: TOKEN\r\n"
RAW = [
    (400, b"GET /\r\n"),
    (400, b"GET /\r\n\r\n"),
    (400, b"GET / HTTP/1.x\r\n\r\n"),
    (400, b"GET / http/1.1\r\n\r\n"),
    (400, b"get / HTTP/1.1\r\n\r\n"),
    (400, b"GET  / HTTP/1.1\r\n\r\n"),
    (400, b"GET\t/\tHTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1 extra\r\n\r\n"),
    (400, b"/ HTTP/1.1\r\n\r\n"),
    (400, b"\r\nGET / HTTP/1.1\r\n\r\n"),
    (400, b"\r\n" * 50),
    (400, b"\x00" * 40 + b"\r\n\r\n"),
    (400, bytes(range(256)) * 4),
    (400, b"GET http://127.0.0.1:PORT/ HTTP/1.1\r\n\r\n"),
    (400, b"GET * HTTP/1.1\r\n\r\n"),
    (400, b"CONNECT example.org:80 HTTP/1.1\r\n\r\n"),
    (400, b"GET /\xff\xfe HTTP/1.1\r\n\r\n"),
    (400, b"GET /\x00 HTTP/1.1\r\n\r\n"),
    (400, b"GET /a b HTTP/1.1\r\n\r\n"),
    (400, b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n\r\n"),
    (400, b"A" * 100_000),
    (400, b"SSH-2.0-OpenSSH_9.2\r\n"),
    (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (408, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x07" * 32),  # the beginning of https
    (408, b"GET / HTTP/1.1"),
    (408, b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n"),
    (408, POST + b"Content-Length: 10\r\n\r\n{}"),
    (505, b"GET / HTTP/2.0\r\n\r\n"),
    (505, b"GET / HTTP/9.9\r\n\r\n"),
    (400, b"GET / HTTP/0.9\r\n\r\n"),
    (403, b"GET / HTTP/1.1\r\n\r\n"),
    (403, b"GET / HTTP/1.0\r\n\r\n"),
    (403, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    (403, b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nHost: evil.example\r\n\r\n"),
    (403, b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nHost: 127.0.0.1:PORT\r\n\r\n"),
    (405, b"HEAD / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n"),
    (405, b"PUT /vote HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nContent-Length: 2\r\n\r\n{}"),
    (405, b"DELETE /vote HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n"),
    (405, b"OPTIONS /vote HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nOrigin: http://evil.example\r\n\r\n"),
    (405, b"TRACE / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n"),
    (405, b"PATCH /vote HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n"),
    (405, b"BREW / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n"),
    (404, POST.replace(b"/ballot", b"/") + b"Content-Length: 2\r\n\r\n{}"),
    (404, POST.replace(b"/ballot", b"/ratings") + b"Content-Length: 2\r\n\r\n{}"),
    (404, GET.replace(b"/ratings", b"/vote") + b"\r\n"),
    (431, GET + b"X-Long: " + b"x" * 40_000 + b"\r\n\r\n"),
    (431, GET + b"X-Long: " + b"x" * 400_000 + b"\r\n\r\n"),
    (431, GET + b"".join(b"X-%d: 1\r\n" % n for n in range(200)) + b"\r\n"),
    (411, POST + b"\r\n"),
    (411, POST + b"\r\n{}"),
    (411, POST + b"Content-Length: \r\n\r\n{}"),
    (501, POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    (501, POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    (501, POST + b"Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}"),
    (400, POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
    (400, POST + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}"),
    (413, POST + b"Content-Length: 5000\r\n\r\n" + b"x" * 5000),
    (413, POST + b"Content-Length: 500000\r\n\r\n" + b"x" * 500_000),
    (413, POST + b"Content-Length: 99999999999\r\n\r\n"),
    *(
        (400, POST + b"Content-Length: " + length + b"\r\n\r\n{}")
        for length in (b"-1", b"+2", b"2, 2", b"0x2", b"2e0", b"2.0", b"two", b"2 2", "２".encode(), b"9" * 30)
    ),
    *(
        (400, POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        for body in (
            b"",
            b"null",
            b"7",
            b'"text"',
            b"[]",
            b"{",
            b"{]",
            b"\xff\xfe{\x00}\x00",
            b"\xe9",
            b'{"axis": "overall", "axis": "size"}',
            b"[" * 4000,
            b'{"a":' * 600,
            b"9" * 4096,
            b'{"axis": NaN}',
            b'{"axis": 1e999}',
            b'{"axis": "\\ud800"}',
            b'{"axis": "' + b"x" * 4000 + b'"}',
            b"\x00" * 4096,
        )
    ),
]


def check(running, answer, status, raw):
    """The expected status, with one JSON sentence that does not echo the request, and a server that is still there."""
    got, head, body = answer
    assert got == status, (raw[:80], head, body[:200])
    if status != 200:
        sentence = json.loads(body)["error"]
        assert len(sentence) < 300 and sentence.isprintable() and "Traceback" not in sentence
    assert running.process.poll() is None


@pytest.mark.parametrize(("status", "raw"), RAW, ids=[f"{n}-{status}" for n, (status, _) in enumerate(RAW)])
def test_what_is_not_a_browsers_request(running, status, raw):
    raw = raw.replace(b"PORT", b"%d" % running.port).replace(b"TOKEN", running.cookie.encode())
    check(running, running.send(raw), status, raw)


@pytest.mark.parametrize(
    "cut", [b"GET / HT", b"GET / HTTP/1.1\r\nHost: 1", POST + b"Content-Length: 10\r\n\r\n{}", GET]
)
@pytest.mark.parametrize("how", ["half-closed", "closed", "reset"])
def test_a_client_that_leaves_in_the_middle(running, cut, how):
    raw = cut.replace(b"PORT", b"%d" % running.port).replace(b"TOKEN", running.cookie.encode())
    if how == "half-closed":
        assert running.send(raw, half_close=True)[0] in (200, 400, 403)
        return
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(raw)
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_client_that_does_not_take_its_pictures(running):
    """It resets the connection before, or in the middle of, the response."""
    ballot = json.loads(running.send(running.post("/ballot", {"axis": "size"}))[2])
    for taken in (0, 1, 200) * 5:
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(running.head("GET", ballot["left"]))
            if taken:
                connection.recv(taken)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    running.honest_vote()


# ---------------------------------------------------------------- pages of other sites


HOSTS = [
    (200, "127.0.0.1:PORT"),
    (200, "localhost:PORT"),
    (200, "LocalHost:PORT"),
    (200, "[::1]:PORT"),
    *((403, host) for host in ("evil.example:PORT", "evil.example", "localhost", "127.0.0.1", "localhost:1")),
    *((403, host) for host in ("localhost.:PORT", "127.0.0.1.evil.example:PORT", "evil.localhost:PORT", "127.1:PORT")),
    *((403, host) for host in ("0.0.0.0:PORT", "2130706433:PORT", "0x7f.1:PORT", "192.168.1.1:PORT", "[::]:PORT")),
    *((403, host) for host in ("a@127.0.0.1:PORT", "127.0.0.1:PORT@evil", "127.0.0.1:PORT,evil", "::1:PORT", "x" * 99)),
]  # fmt: skip


@pytest.mark.parametrize(("status", "host"), HOSTS)
def test_only_the_printed_names_are_answered(running, status, host):
    """DNS rebinding makes a browser send the attacker's own name as Host."""
    host = host.replace("PORT", str(running.port))
    for raw in (running.head("GET", "/", host=host), running.head("GET", "/ratings", host=host)):
        check(running, running.send(raw), status, raw)


FOREIGN = [
    (200, "Origin: http://127.0.0.1:PORT"),
    (200, "Origin: https://127.0.0.1:PORT"),  # behind a proxy
    (200, "Sec-Fetch-Site: same-origin"),
    (200, "Sec-Fetch-Site: none"),
    *((403, f"Origin: {origin}") for origin in ("null", "http://evil.example", "http://evil.example:PORT", "file://")),
    *((403, f"Origin: {origin}") for origin in ("http://localhost:PORT", "http://127.0.0.1", "http://127.0.0.1:1", "")),
    *((403, f"Origin: {origin}") for origin in ("http://127.0.0.1:PORT.evil", "ftp://127.0.0.1:PORT", "x" * 900)),
    *((403, f"Sec-Fetch-Site: {site}") for site in ("cross-site", "same-site", "CROSS-SITE", "")),
    (403, "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate"),
    (403, "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: image"),
]


@pytest.mark.parametrize(("status", "line"), FOREIGN)
def test_pages_of_other_sites_neither_read_nor_vote(running, status, line):
    line = line.replace("PORT", str(running.port)) + "\r\n"
    for raw in (running.head("GET", "/voters", line), running.post("/ballot", {"axis": "typography"}, line)):
        check(running, running.send(raw), status, raw)


def test_the_link_may_be_on_any_page_but_not_in_a_frame(running):
    line = "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n"
    status, head, _ = running.send(running.head("GET", "/", line))
    assert status == 200 and "frame-ancestors 'none'" in head


# ---------------------------------------------------------------- names, codes, cookies, ids

LONG = "x" * 1900
NAMES = [
    *("judge", "Judge", "JUDGE", "judge ", " judge", "ju dge", "j.u.d.g.e", "judge-", "judge_", "ｊｕｄｇｅ", "𝐣𝐮𝐝𝐠𝐞"),
    *("јudge", "judɡe", "jսdge", "juԁge", "judgе", "júdge", "judge\u0301", "judge\u200b", "ju\u200ddge", "judge\u2060"),
    *("judge\u00a0", "judge\u3000", "jud\u00adge", "\u202ejudge", "people", "People ", "all", "ALL", "аll", "a l l"),
    *("ann\x00", "a\nb\x01", "\x1b[31mred", "a\x7fb", "a\u202eb", "a\u200bb", "\ud800", "=1+1", "+1", "-1", "<b>"),
    *("'; DROP TABLE votes; --", "honest", "HONEST", "hon est", "honest\u200b", "___", "x" * 41, LONG, "😀", "../x"),
    *(7, True, ["ann"], {"a": 1}, 1e300),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_mislead_are_refused(running, name):
    raw = running.post("/join", {"code": running.code, "voter": name}, cookie=False)
    check(running, running.send(raw), 400, raw)


def test_other_names_are_welcome(running):
    for name, stored in [("Zoë", "Zoë"), ("  李  雷 ", "李 雷"), ("Ｂｏｂ", "Bob"), ("O.Neil-Smith", "O.Neil-Smith")]:
        raw = running.post("/join", {"code": running.code.lower(), "voter": name}, cookie=False)
        assert json.loads(running.send(raw)[2]) == {"voter": stored}


CODES = ["AAAAAA", "%", "*", ["AAAAAA"], {"$ne": ""}, True, LONG, "\ud800", "😀" * 6, "\x00", 123456]


@pytest.mark.parametrize("code", CODES, ids=range(len(CODES)))
def test_wrong_codes_let_nobody_in(running, code):
    raw = running.post("/join", {"code": code, "voter": "eve"}, cookie=False)
    check(running, running.send(raw), 403, raw)


COOKIES = ["", "x", "fluxedu_PORT", "fluxedu_PORT=", "fluxedu_PORT=x", "fluxedu_PORT=' OR 1=1 --", "fluxedu_PORT=%00",
           "xfluxedu_PORT=TOKEN", "fluxedu_1=TOKEN", "fluxedu_PORT=TOKENx", "fluxedu_PORT=" + "a" * 9000,
           "\xff=\xfe", ";" * 900]  # fmt: skip


@pytest.mark.parametrize("cookie", COOKIES, ids=range(len(COOKIES)))
def test_without_its_cookie_nobody_votes_or_reads(running, cookie):
    token = running.cookie.partition("=")[2]
    line = "Cookie: " + cookie.replace("PORT", str(running.port)).replace("TOKEN", token) + "\r\n"
    for raw in (
        running.head("GET", "/ratings", line, cookie=False),
        running.head("GET", "/picture/x/left", line, cookie=False),
        running.post("/ballot", {"voter": "honest"}, line, cookie=False),
        running.post("/vote", {"voter": "honest", "ballot": "x", "choice": "left"}, line, cookie=False),
    ):
        check(running, running.send(raw), 401, raw)


TRICKS = ["/../votes.sqlite", "/%2e%2e/%2e%2e/etc/passwd", "/picture/../left", "/picture/a/b/left", "/picture//left",
          "/picture/x/left%00", "/picture/\\..\\left", "/RATINGS", "/ratings/", "/.git/config", "/page.html",
          "/picture/" + "x" * 41 + "/left", "/;/", "/%", "/picture/x/middle", "/votes.sqlite-wal",
          "/" + "a" * 9000]  # fmt: skip


@pytest.mark.parametrize("path", TRICKS, ids=range(len(TRICKS)))
def test_no_path_leads_elsewhere(running, path):
    check(running, running.send(running.head("GET", path)), 404, path)


IDS = [
    None,
    7,
    -1,
    1e9,
    True,
    [],
    {},
    "",
    "x",
    LONG,
    "\ud800",
    "\x00",
    "é",
    "' OR 1=1 --",
    "%",
    "../x",
    ["a"],
    {"id": "a"},
]


@pytest.mark.parametrize("id", IDS, ids=range(len(IDS)))
def test_odd_ids_and_choices(running, id):
    for body in ({"ballot": id, "choice": "left"}, {"ballot": "x", "choice": id}, {"ballot": id, "choice": id}):
        check(running, running.send(running.post("/vote", body)), 400, body)
    if id != "":
        check(running, running.send(running.post("/ballot", {"axis": id})), 400, id)
