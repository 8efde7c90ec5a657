"""A class votes in the browser: one page, on one machine's address, for as many voters as there are.

    fluxedu arena serve nano nano@4 --votes votes.sqlite --host 0.0.0.0

Four requests are answered, and no path leads to a file:

    GET  /                         the page, script and style inside; it fetches nothing from elsewhere
    POST /ballot                   {voter, axis} -> {id, ask, prompt, left, right}: no model is named
    GET  /picture/BALLOT/left      the left side of an issued ballot, a PNG
    POST /vote                     {voter, ballot, choice} -> {counted}
    GET  /ratings                  the people's ratings so far, by axis
"""

from __future__ import annotations

import io
import json
import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

from fluxedu.arena.axes import AXES, sheet
from fluxedu.arena.match import Arena
from fluxedu.arena.votes import JUDGE
from fluxedu.errors import ArenaError, describe

MOST = 4096  # bytes of a request's body
_PICTURE = re.compile(r"/picture/([\w-]{1,40})/(left|right)")


class Server(ThreadingHTTPServer):
    """An arena at an address; ``axes`` are asked about."""

    daemon_threads = True
    request_queue_size = 128  # a whole class opens the page at once

    def __init__(self, arena: Arena, address: tuple[str, int], axes: tuple[str, ...]):
        self.arena, self.axes = arena, axes
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        return "http://{}:{}/".format(*self.server_address[:2])


def serving(arena: Arena, host: str = "127.0.0.1", port: int = 8765, axes: tuple[str, ...] = tuple(AXES)) -> Server:
    """A server that is bound and not yet running (``serve_forever()``). Port 0 takes a free one."""
    for axis in axes:
        arena.questions(axis)  # said here, if there is no such axis
    try:
        return Server(arena, (host, port), axes)
    except (OSError, OverflowError) as error:
        raise ArenaError(f"{host}:{port} cannot be served: {error}.") from None


class Handler(BaseHTTPRequestHandler):
    """One connection; what it may ask is a table of names, nothing else."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that a silent connection is kept
    server: Server

    def do_GET(self) -> None:
        picture = _PICTURE.fullmatch(self.path)
        if self.path == "/":
            self._answer(page(self.server.axes).encode(), "text/html; charset=utf-8")
        elif self.path == "/ratings":
            self._told(lambda: _ratings(self.server))
        elif picture:
            self._told(lambda: _picture(self.server.arena, *picture.groups()), "image/png")
        else:
            self._told(lambda: _nothing(self.path))

    def do_POST(self) -> None:
        routes = {"/ballot": _ballot, "/vote": _vote}
        self._told(lambda: routes.get(self.path, lambda *_: _nothing(self.path))(self.server, self._body()))

    def _body(self) -> dict:
        """What was sent; raises ArenaError for anything but a small JSON object."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST:
            self.close_connection = True  # what was not read would be taken for the next request
            raise ArenaError(f"a request carries a JSON object of at most {MOST} bytes.")
        try:
            sent = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            sent = None
        if not isinstance(sent, dict):
            raise ArenaError("a request carries a JSON object.")
        return sent

    def _told(self, answer, kind: str = "application/json") -> None:
        """Send what ``answer()`` gives, or the sentence that says why it cannot be."""
        try:
            body = answer()
        except ArenaError as error:
            self._answer(json.dumps({"error": str(error)}).encode(), "application/json", HTTPStatus.BAD_REQUEST)
        else:
            self._answer(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)

    def _answer(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Quiet: the votes are the log."""


# ---------------------------------------------------------------- the answers


def page(axes: tuple[str, ...]) -> str:
    """The page, with the axes that it asks about."""
    text = resources.files("fluxedu.arena").joinpath("page.html").read_text(encoding="utf-8")
    return text.replace("$axes", json.dumps({axis: AXES[axis].title for axis in axes}))


def _nothing(path: str) -> bytes:
    raise ArenaError(f"there is nothing at {describe(path)}.")


def _voter(sent: dict) -> str:
    if sent.get("voter") == JUDGE:
        raise ArenaError("the judge does not vote in a browser; choose another name.")
    return sent.get("voter", "")


def _ballot(server: Server, sent: dict) -> dict:
    axis = sent.get("axis", server.axes[0])
    if axis not in server.axes:
        raise ArenaError(f"this arena asks about {', '.join(server.axes)}, not {describe(axis)}.")
    ballot = server.arena.ballot(_voter(sent), axis)
    sides = {side: f"/picture/{ballot.id}/{side}" for side in ("left", "right")}
    return {"id": ballot.id, "prompt": ballot.prompt, "ask": AXES[axis].ask, **sides}


def _vote(server: Server, sent: dict) -> dict:
    return {"counted": server.arena.vote(sent.get("ballot"), sent.get("choice"), _voter(sent))}


def _picture(arena: Arena, ballot: str, side: str) -> bytes:
    png = io.BytesIO()
    sheet(arena.side(arena.votes.ballot(ballot), side)).save(png, format="PNG")
    return png.getvalue()


def _ratings(server: Server) -> dict:
    return {axis: server.arena.ratings(axis, "people").rows() for axis in server.axes}
