"""How people vote: on a web page for a class, or with a widget in a notebook.

    fluxedu arena serve nano nano@4 --votes votes.sqlite --host 0.0.0.0
    arena.booth(a)

The server answers five requests, and no path leads to a file:

    GET  /                         the page, with its script and style; it loads nothing from elsewhere
    GET  /picture/BALLOT/left      the left side of an issued ballot as a PNG
    GET  /ratings                  the ratings from people's votes so far, by axis
    POST /ballot                   {voter, axis} -> {id, question, prompt, left, right}, without the models' names
    POST /vote                     {voter, ballot, choice} -> {counted}
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

import numpy as np
from PIL import Image

from fluxedu.arena.match import Arena, contact_sheet
from fluxedu.arena.votes import AXES, JUDGE, check_voter
from fluxedu.errors import ArenaError, check_choice, describe
from fluxedu.widgets.explorer import Explorer, View, Vote
from fluxedu.widgets.panels import Pixels

MAX_BODY = 4096  # bytes of a request
_PICTURE = re.compile(r"/picture/([\w-]{1,40})/(left|right)")


# ---------------------------------------------------------------- the web server


class Server(ThreadingHTTPServer):
    """An arena at an address, with ballots on ``axes``."""

    daemon_threads = True
    request_queue_size = 128  # a whole class opens the page at the same time

    def __init__(self, arena: Arena, address: tuple[str, int], axes: tuple[str, ...]):
        self.arena, self.axes = arena, axes
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        """The address to open in a browser."""
        return "http://{}:{}/".format(*self.server_address[:2])


def create_server(
    arena: Arena, host: str = "127.0.0.1", port: int = 8765, axes: tuple[str, ...] = tuple(AXES)
) -> Server:
    """A server that has its port (0: any free one); call ``serve_forever()`` to run it."""
    for axis in axes:
        arena.questions(axis)  # raises ArenaError if there is no such axis
    try:
        return Server(arena, (host, port), axes)
    except (OSError, OverflowError) as error:
        raise ArenaError(f"{host}:{port} cannot be served: {error}.") from None


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection; only the paths listed above exist."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds after which a silent connection is closed
    server: Server

    def do_GET(self) -> None:
        picture = _PICTURE.fullmatch(self.path)
        if self.path == "/":
            self._send(page(self.server.axes).encode(), "text/html; charset=utf-8")
        elif picture:
            self._answer(lambda: self._picture(*picture.groups()), "image/png")
        elif self.path == "/ratings":
            self._answer(self._ratings)
        else:
            self._answer(self._not_found)

    def do_POST(self) -> None:
        self._answer({"/ballot": self._ballot, "/vote": self._vote}.get(self.path, self._not_found))

    def _answer(self, respond, kind: str = "application/json") -> None:
        """Send what ``respond()`` returns, or the message of the error that it raises."""
        try:
            body = respond()
        except ArenaError as error:
            self._send(json.dumps({"error": str(error)}).encode(), "application/json", HTTPStatus.BAD_REQUEST)
        else:
            self._send(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Prints nothing: the file of votes is the log."""

    def _body(self) -> dict:
        """The request's JSON object; raises ArenaError for anything else, and for more than MAX_BODY bytes."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            self.close_connection = True  # the unread rest would be taken for the next request
            raise ArenaError(f"a request must be a JSON object of at most {MAX_BODY} bytes.")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise ArenaError("a request must be a JSON object.")
        if body.get("voter") == JUDGE:
            raise ArenaError("the judge does not vote in a browser; choose another name.")
        return body

    def _not_found(self) -> dict:
        if self.command == "POST":
            self._body()
        raise ArenaError(f"there is nothing at {describe(self.path)}.")

    def _ballot(self) -> dict:
        body = self._body()
        axis = check_choice("axis", body.get("axis", self.server.axes[0]), self.server.axes, error=ArenaError)
        ballot = self.server.arena.ballot(body.get("voter", ""), axis)
        sides = {side: f"/picture/{ballot.id}/{side}" for side in ("left", "right")}
        return {"id": ballot.id, "prompt": ballot.prompt, "question": AXES[axis].question, **sides}

    def _vote(self) -> dict:
        body = self._body()
        return {"counted": self.server.arena.vote(body.get("ballot"), body.get("choice"), body.get("voter", ""))}

    def _picture(self, ballot: str, side: str) -> bytes:
        arena, png = self.server.arena, io.BytesIO()
        contact_sheet(arena.side(arena.votes.ballot(ballot), side)).save(png, format="PNG")
        return png.getvalue()

    def _ratings(self) -> dict:
        return {axis: self.server.arena.ratings(axis, "people").rows() for axis in self.server.axes}


def page(axes: tuple[str, ...]) -> str:
    """The web page, offering these axes."""
    text = resources.files("fluxedu.arena").joinpath("page.html").read_text(encoding="utf-8")
    return text.replace("$axes", json.dumps({axis: AXES[axis].title for axis in axes}))


# ---------------------------------------------------------------- the widget

ANSWERS = ("not yet", "left", "the same", "right")  # as the widget shows them
CHOICES = ("", "left", "tie", "right")  # as they are stored


def booth_view(
    question: str, prompt: str, left: Sequence[Image.Image], right: Sequence[Image.Image], votes: int
) -> View:
    """The two sides of a ballot, without names; ``votes`` is the number that the voter has given so far."""
    sides = (("left", left), ("right", right))
    panels = [Pixels(name, np.asarray(contact_sheet(images))) for name, images in sides]
    return View(panels, f"“{prompt}”. {question} Votes so far: {votes}.")


class Booth(Explorer):
    """A widget for voting; ``booth.set(vote="left")`` votes from code. It never shows which model is which."""

    def __init__(self, arena: Arena, voter: str, axis: str):
        self.arena, self.voter, self.axis, self.votes_given = arena, check_voter(voter), axis, 0
        self._next_ballot()
        controls = [Vote("vote", "vote", ANSWERS, (0, 0))]
        super().__init__(f"The arena: {AXES[axis].title}", controls, lambda vote: self.current)

    @property
    def values(self) -> dict[str, int]:
        """Always "not yet": each vote is stored at once and followed by the next ballot."""
        return {"vote": 0}

    def set(self, vote: int | str) -> Booth:
        """Vote ``left``, ``right`` or ``the same``."""
        self.state = self.state | {"vote": [self.votes_given, self.control["vote"].index(vote)]}
        return self

    def _next_ballot(self) -> None:
        self.ballot = self.arena.ballot(self.voter, self.axis)
        sides = self.arena.sides(self.ballot)
        self.current = booth_view(AXES[self.axis].question, self.ballot.prompt, *sides, self.votes_given)

    def _redraw(self, change=None) -> None:
        """Store the vote, if it answers the open ballot, and show the next one."""
        number, answer = self.state["vote"]
        if answer and self.ballot is not None and number == self.votes_given:
            try:
                self.arena.vote(self.ballot.id, CHOICES[answer], self.voter)
                self.ballot, self.votes_given = None, self.votes_given + 1
                self._next_ballot()
            except ArenaError as error:  # every pair has been judged, or somebody else votes under this name
                self.current = View(self.current.panels, str(error))
        if [number, answer] != [self.votes_given, 0]:
            self.unobserve(self._redraw, "state")  # resetting the control for the next ballot is not a vote
            self.state = self.state | {"vote": [self.votes_given, 0]}
            self.observe(self._redraw, "state")
        super()._redraw(change)


def booth(arena: Arena, *, voter: str = "me", axis: str = "overall") -> Booth:
    """A widget to vote on pairs of images without seeing the models' names; keys: left, right, and down for a tie.

    Every vote is stored at once. A ballot left open is the first to be shown the next time.
    """
    return Booth(arena, voter, axis)
