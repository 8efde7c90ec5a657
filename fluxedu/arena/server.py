"""How people vote: on a web page for a class, or with a widget in a notebook.

    fluxedu arena serve nano nano@4 --votes votes.sqlite --host 0.0.0.0
    arena.booth(a)

The server answers seven requests, and no path leads to a file:

    GET  /                         the page, with its script and style; it loads nothing from elsewhere
    POST /join                     {code, voter} -> {voter}, and a cookie that makes this browser this voter;
                                   {} -> {voter}, which is null if this browser has not joined
    POST /ballot                   {axis} -> {id, question, prompt, left, right}, without the models' names
    POST /vote                     {ballot, choice} -> {counted}
    GET  /picture/BALLOT/left      the left side of an issued ballot as a PNG
    GET  /ratings                  the ratings from people's votes so far, by axis
    GET  /voters                   the voters and their numbers of votes

Only the page is answered without the cookie, and ``/join`` gives it only to those who know the class code. A page of
another site cannot make a student's browser vote or read: requests must name one of the server's own addresses as their
Host, and come from its own page.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from email.message import Message
from functools import lru_cache
from importlib import resources

import numpy as np
from PIL import Image

from fluxedu.arena.limits import Limit, LimitedHandler, LimitedServer, Refused
from fluxedu.arena.match import Arena, contact_sheet
from fluxedu.arena.rating import rate
from fluxedu.arena.votes import AXES, check_person
from fluxedu.errors import ArenaError, VotesFileError, check_choice, checked, describe
from fluxedu.files import read_json
from fluxedu.widgets.explorer import Explorer, View, Vote
from fluxedu.widgets.panels import Pixels

LETTERS = "ABCDEFGHJKLMNPQRTUVWXYZ"  # of a class code; none looks like a digit
WRONG_CODES = (30, 600)  # per address, in so many seconds; the right one, of 78 billion, is never refused
NEW_VOTERS = (200, 3600)  # per address and hour; a class behind one router shares an address
VOTES = (300, 3600)  # per voter and hour
_PICTURE = re.compile(r"/picture/([\w-]{1,40})/(left|right)", re.ASCII)


# ---------------------------------------------------------------- the web server


class Server(LimitedServer):
    """An arena at an address, with ballots on ``axes``, for those who know ``code`` (everybody, if it is empty)."""

    def __init__(self, arena: Arena, host: str, port: int, axes: tuple[str, ...], code: str, names: Sequence[str]):
        super().__init__(host, port, Handler)
        self.arena, self.axes, self.code = arena, axes, code
        self.host, self.port = host.lower(), self.server_address[1]
        self.further_names = {name.lower() for name in names}
        self.wrong_codes, self.new_voters, self.votes_given = Limit(*WRONG_CODES), Limit(*NEW_VOTERS), Limit(*VOTES)

    @property
    def url(self) -> str:
        """The address to open in a browser, with the class code; for 0.0.0.0, that of this machine in its network."""
        host = _own_address() if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{_in_url(host)}:{self.port}/" + (f"#{self.code}" if self.code else "")

    def check_sender(self, headers: Message, path: str, address: str) -> None:
        """Raise Refused unless a request names this server as its Host and comes from its own page, or from no page.

        address: the one of this machine at which the request arrived
        """
        host = headers.get("Host", "").lower()
        names = {"localhost", "127.0.0.1", "[::1]", _in_url(self.host), _in_url(address)}
        own = {f"{name}:{self.port}" for name in names} | (names if self.port == 80 else set())
        if len(headers.get_all("Host", [])) != 1 or not (host in own or host.split(":")[0] in self.further_names):
            here = self.url.partition("#")[0]
            raise Refused(403, f"this server is at {here}, not at {describe(host)}; --allow-host NAME adds a name.")
        opened = (path, headers.get("Sec-Fetch-Mode")) == ("/", "navigate")  # by a link on any page
        foreign = headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and not opened
        if foreign or headers.get("Origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "a page of another site may not use this server.")

    def check_code(self, given, client: str) -> None:
        """Raise Refused unless ``given`` is the class code."""
        text = "".join(str(given).split()).upper()
        if not secrets.compare_digest(text.encode(errors="replace"), self.code.encode()):
            if self.wrong_codes.spend(client):
                raise Refused(403, f"{describe(text)} is not the class code.")
            raise Refused(429, "Too many wrong codes were entered in your network. Please ask your teacher.")


class Handler(LimitedHandler):
    """Answers a request; only the paths listed above exist."""

    server: Server

    def answer(self, body: bytes) -> None:
        arena, axes, path = self.server.arena, self.server.axes, self.path.partition("?")[0]
        self.server.check_sender(self.headers, path, self.connection.getsockname()[0])
        picture = _PICTURE.fullmatch(path)
        try:
            match self.command, path:
                case "GET", "/":
                    self.send(page(axes).encode(), "text/html; charset=utf-8")
                case "POST", "/join":
                    self._join(_json_object(body))
                case "POST", "/ballot":
                    self._send_json(self._ballot(self._voter(), _json_object(body)))
                case "POST", "/vote":
                    self._send_json(self._vote(self._voter(), _json_object(body)))
                case "GET", "/ratings" if self._voter():
                    ratings = {axis: _rows(arena.names, tuple(arena.outcomes(axis, "people"))) for axis in axes}
                    self._send_json(ratings)
                case "GET", "/voters" if self._voter():
                    rows = arena.votes.voters()
                    self._send_json([{key: row[key] for key in ("voter", "votes", "dropped")} for row in rows])
                case "GET", _ if picture and self._voter():
                    self.send(self._picture(*picture.groups()), "image/png")
                case _:
                    raise Refused(404, f"there is nothing at {describe(path)}.")
        except VotesFileError as error:  # the voter learns that nothing is stored, and the teacher why
            self.server.warn(str(error))
            raise Refused(503, "votes cannot be stored at the moment; tell your teacher, and try again.") from None
        except ArenaError as error:
            raise Refused(400, error.on_page) from None

    def _send_json(self, value, **headers: str) -> None:
        self.send(json.dumps(value).encode(), **headers)

    def _cookie_holder(self) -> tuple[str | None, bool]:
        cookie = re.search(rf"(?:^|; ?)fluxedu_{self.server.port}=([\w-]+)", self.headers.get("Cookie", ""))
        return self.server.arena.votes.holder(cookie[1]) if cookie else (None, False)

    def _voter(self) -> str:
        voter, dropped = self._cookie_holder()
        if voter is None:
            raise Refused(401, "enter the class code first.")
        if dropped:
            raise Refused(403, f"voter {voter} has been dropped by the teacher.")
        return voter

    def _join(self, body: dict) -> None:
        voter, _ = self._cookie_holder()
        if voter is not None or (self.server.code and not body.get("code")):
            return self._send_json({"voter": voter})
        if self.server.code:
            self.server.check_code(body["code"], self.client)
        if not self.server.new_voters.spend(self.client):
            self.server.warn(f"{NEW_VOTERS[0]} voters joined from {self.client} within an hour; no more can join.")
            raise Refused(429, "Too many voters have joined from your network. Please tell your teacher.")
        voter, token = self.server.arena.votes.join(body.get("voter") or f"voter-{secrets.token_hex(4)}")
        cookie = f"fluxedu_{self.server.port}={token}; Path=/; Max-Age=2592000; HttpOnly; SameSite=Strict"
        self._send_json({"voter": voter}, **{"Set-Cookie": cookie})

    def _ballot(self, voter: str, body: dict) -> dict:
        axis = check_choice("axis", body.get("axis", self.server.axes[0]), self.server.axes, error=ArenaError)
        ballot = self.server.arena.ballot(voter, axis)
        sides = {side: f"/picture/{ballot.id}/{side}" for side in ("left", "right")}
        return {"id": ballot.id, "prompt": ballot.prompt, "question": AXES[axis].question, **sides}

    def _vote(self, voter: str, body: dict) -> dict:
        counted = False
        if not self.server.votes_given.spend(voter):
            limit = f"You have given {VOTES[0]} votes in one hour, which is the limit."
            raise Refused(429, f"{limit} Please continue later.")
        try:
            counted = self.server.arena.vote(body.get("ballot"), body.get("choice"), voter)
        finally:
            if not counted:  # sent again, or refused
                self.server.votes_given.refund(voter)
        return {"counted": counted}

    def _picture(self, ballot: str, side: str) -> bytes:
        arena, png = self.server.arena, io.BytesIO()
        contact_sheet(arena.side(arena.votes.ballot(ballot), side)).save(png, format="PNG")
        return png.getvalue()


@lru_cache(maxsize=64)
def _rows(names: tuple[str, ...], outcomes: tuple) -> dict:
    return rate(names, outcomes).rows()  # a tenth of a second, so it is not repeated for every visitor


def _json_object(body: bytes) -> dict:
    try:
        value = read_json(body.decode())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ArenaError("a request must be a JSON object.")
    return value


def _in_url(host: str) -> str:
    host = host.partition("%")[0].removeprefix("::ffff:")
    return f"[{host}]" if ":" in host else host


def _own_address() -> str:
    """This machine's address in its network; nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # there may be no network
        probe.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737)
        return probe.getsockname()[0]
    return "localhost"


@checked(ArenaError)
def create_server(
    arena: Arena,
    host: str = "127.0.0.1",
    port: int = 8765,
    axes: tuple[str, ...] = tuple(AXES),
    *,
    code: str | None = None,
    allowed_hosts: Sequence[str] = (),
) -> Server:
    """A server that has its port (0: any free one); call ``serve_forever()`` to run it.

    code: what voters must know to join (a short one can be guessed); None chooses eight random letters, "" lets
    everybody in · allowed_hosts: further names under which browsers reach the server, such as that of a proxy
    """
    for axis in axes:
        arena.questions(axis)  # raises ArenaError if there is no such axis
    if code is None:
        code = "".join(secrets.choice(LETTERS) for _ in range(8))
    try:
        return Server(arena, host, port, axes, code.upper(), allowed_hosts)
    except (OSError, OverflowError, ValueError, TypeError) as error:
        raise ArenaError(f"{host}:{port} cannot be served: {error}.") from None


@lru_cache
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
        self.arena, self.voter, self.axis, self.votes_given = arena, check_person(voter), axis, 0
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


@checked(ArenaError)
def booth(arena: Arena, *, voter: str = "me", axis: str = "overall") -> Booth:
    """A widget to vote on pairs of images without seeing the models' names; keys: left, right, and down for a tie.

    Every vote is stored at once. A ballot left open is the first to be shown the next time.
    """
    return Booth(arena, voter, axis)
