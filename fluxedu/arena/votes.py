"""Ballots and votes in one SQLite file: no acknowledged vote is lost, and none counts twice.

A ballot records which two models' images a voter was shown, and on which axis. A vote answers a ballot that was issued
to this voter. The ballot's id is the vote's primary key, so a second vote on it cannot be stored. The file is in WAL
mode with full synchronisation: a vote is on the disk before the voter is told that it counts.

A voter who joins on the web page gets a secret token, of which the file holds the hash. The votes of a dropped voter
stay in the file, and do not count.
"""

from __future__ import annotations

import csv
import io
import json
import re
import secrets
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from fluxedu.errors import ArenaError, VotesFileError, check_choice, checked, describe
from fluxedu.files import write_text

CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5}  # the left model's share of the win
JUDGE = "judge"  # the voter's name under which the scene judge votes; everyone else is a person
#: whose votes to count, as a condition in SQL
WHOSE = {"judge": f"voter = '{JUDGE}'", "people": f"voter != '{JUDGE}'", "all": "1"}
PATIENCE = 600.0  # seconds after which an open ballot no longer counts as pending
APPLICATION_ID = 0x666C7861  # "flxa", which marks the SQLite file as ours
_VOTER = re.compile(r"\w[\w .-]{0,39}")  # excludes names that a spreadsheet would read as a formula
_LOOKALIKES = str.maketrans("јϳսυԁɗɡցеєҽаӏоοр", "jjuuddggeeealoop")  # Cyrillic, Greek, Armenian, phonetic


@dataclass(frozen=True)
class Axis:
    """One way to compare two models; ``question`` is shown below the images."""

    title: str
    question: str


#: the six axes of the published comparison
AXES = {
    "overall": Axis("Overall", "Which image is better overall?"),
    "prompt": Axis("Prompt following", "Which image follows the prompt more exactly?"),
    "size": Axis("Size/aspect variability", "Which set of three image sizes follows the prompt better?"),
    "typography": Axis("Typography", "Which image has the better letters?"),
    "diversity": Axis("Output diversity", "Which set of four images of the prompt is more diverse?"),
    "quality": Axis("Visual quality", "Which image is drawn more cleanly, whatever the prompt says?"),
}

_TABLES = """
CREATE TABLE ballots (
    id TEXT PRIMARY KEY, axis TEXT NOT NULL, left TEXT NOT NULL, right TEXT NOT NULL, prompt TEXT NOT NULL,
    seed INTEGER NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL, voter TEXT NOT NULL, issued REAL NOT NULL,
    CHECK (left != right)
) STRICT;
CREATE TABLE votes (
    ballot TEXT PRIMARY KEY REFERENCES ballots (id), choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie')),
    given REAL NOT NULL
) STRICT;
CREATE INDEX ballots_of_an_axis ON ballots (axis, voter);
"""
_VOTERS = """CREATE TABLE IF NOT EXISTS voters (
    name TEXT PRIMARY KEY, token TEXT UNIQUE, joined REAL, dropped REAL
) STRICT"""  # names without a token vote in a notebook; dropped: when, or NULL


@dataclass(frozen=True)
class Ballot:
    """Two models' images of one prompt, seed and size, as one voter is shown them on one axis."""

    id: str
    axis: str
    left: str
    right: str
    prompt: str
    seed: int
    height: int
    width: int
    voter: str


_BALLOT = ", ".join(Ballot.__dataclass_fields__)  # the columns of a ballot, for SELECT
_VOTES_BY_VOTER = """voter, count(choice) AS votes, min(given) AS first, max(given) AS last, dropped
    FROM ballots LEFT JOIN votes ON ballot = id LEFT JOIN voters ON name = voter GROUP BY voter ORDER BY 2 DESC, 1"""


def _hash(token: str) -> str:
    return sha256(token.encode()).hexdigest()


def check_axis(axis: str) -> str:
    """``axis`` if it is one of :data:`AXES`; raises ArenaError otherwise."""
    return check_choice("axis", axis, AXES, error=ArenaError)


def name_key(name: str) -> str:
    """What names that look the same share: without case, accents, spaces, punctuation and invisible characters."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", name).casefold().translate(_LOOKALIKES))
    return "".join(character for character in decomposed if character.isalnum())


def check_voter(voter: str) -> str:
    """``voter`` if it is a name that is safe in a table, or the judge's; raises ArenaError otherwise."""
    if not isinstance(voter, str) or not _VOTER.fullmatch(voter):
        raise ArenaError(
            f"a voter's name must be up to 40 letters, digits, spaces, dots and dashes, not {describe(voter)}."
        )
    if voter != JUDGE and (voter != voter.strip() or name_key(voter) in WHOSE):
        raise ArenaError(f"the name {describe(voter)} is reserved, or ends in a space; choose another one.")
    return voter


def check_person(voter: str) -> str:
    """:func:`check_voter` for people, who cannot be the judge."""
    if voter == JUDGE:
        raise ArenaError("the judge does not vote here; choose another name.")
    return check_voter(voter)


def _whose(who: str) -> str:
    condition = WHOSE[check_choice("who", who, WHOSE, error=ArenaError)]
    return f"{condition} AND voter NOT IN (SELECT name FROM voters WHERE dropped IS NOT NULL)"


@checked(ArenaError)
class Votes:
    """The file of votes at ``path``; it is created if it does not exist. Threads and processes may share it."""

    def __init__(self, path: Path | str):
        self.path, self.lock = Path(path), threading.Lock()
        with self._readable_errors():
            if self.path.exists() and not self.path.is_file():
                raise OSError("it is a folder, a pipe or a device")
            self.db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self.db.row_factory = sqlite3.Row
            for setting in ("foreign_keys = ON", "journal_mode = WAL", "synchronous = FULL"):
                self.db.execute(f"PRAGMA {setting}")
            self._create_tables()
            self.db.execute(_VOTERS)

    def _create_tables(self) -> None:
        with self._transaction() as db:
            application_id = db.execute("PRAGMA application_id").fetchone()[0]
            if application_id == APPLICATION_ID:
                return
            if application_id or db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise ArenaError(f"{self.path} belongs to another program; choose a new file name.")
            for statement in filter(str.strip, _TABLES.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    def check_writable(self) -> None:
        """Raise ArenaError if the file can only be read."""
        with self._transaction() as db:
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")  # writes what is there already

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Turns errors of SQLite, such as a damaged file or a full disk, into one sentence."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:  # ValueError: of a path that no file can have
            unusable = VotesFileError(f"{self.path} cannot be used as a file of votes: {error}.")
            raise error if isinstance(error, ArenaError) else unusable from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything inside happens, or nothing; nobody else can write meanwhile."""
        with self.lock, self._readable_errors():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:  # a full disk has ended it already
                    self.db.execute("ROLLBACK")
                raise

    def _select(self, query: str, *values) -> list[sqlite3.Row]:
        with self.lock, self._readable_errors():
            return self.db.execute(f"SELECT {query}", values).fetchall()

    def close(self) -> None:
        """Close the file, which also merges SQLite's write-ahead log into it."""
        with self.lock:
            self.db.close()

    # -- writing

    def issue(
        self, axis: str, left: str, right: str, prompt: str, seed: int, size: tuple[int, int], voter: str
    ) -> Ballot:
        """A new ballot, stored on the disk when this returns."""
        height, width = size
        id = secrets.token_urlsafe(12)
        ballot = Ballot(id, check_axis(axis), left, right, prompt, seed, height, width, check_voter(voter))
        with self._transaction() as db:
            self._check_not_dropped(voter)
            marks = ",".join("?" * 10)
            db.execute(f"INSERT INTO ballots VALUES ({marks})", (*asdict(ballot).values(), time.time()))
        return ballot

    def vote(self, ballot: str, choice: str, voter: str) -> bool:
        """Store a vote: left, right or tie. False if the same vote is there already, as after a repeated click."""
        check_choice("a vote", choice, CHOICES, error=ArenaError)
        if self.ballot(ballot).voter != voter:
            raise ArenaError(f"ballot {ballot} was issued to another voter.")
        with self._transaction() as db:
            self._check_not_dropped(voter)
            row = (ballot, choice, time.time())
            if db.execute("INSERT INTO votes VALUES (?,?,?) ON CONFLICT DO NOTHING", row).rowcount:
                return True
            first = db.execute("SELECT choice FROM votes WHERE ballot = ?", (ballot,)).fetchone()[0]
        if first != choice:
            message = f"ballot {ballot} has already been answered with {first}, and a vote cannot be changed."
            raise ArenaError(message, f"Your first vote on this pair was counted: {first}. Here is the next pair.")
        return False

    def _check_not_dropped(self, voter: str) -> None:
        if self.db.execute("SELECT 1 FROM voters WHERE name = ? AND dropped IS NOT NULL", (voter,)).fetchone():
            raise ArenaError(f"voter {voter} has been dropped, so further votes do not count.")

    def join(self, name: str) -> tuple[str, str]:
        """Register a new voter; returns the name, in Unicode's normal form, and a secret token for :meth:`holder`."""
        if isinstance(name, str):
            name = " ".join(unicodedata.normalize("NFKC", name[:200]).split())
        token, key = secrets.token_urlsafe(16), name_key(check_person(name))
        with self._transaction() as db:
            taken = db.execute("SELECT name FROM voters UNION SELECT voter FROM ballots")
            if not key or key in {name_key(other) for (other,) in taken}:
                raise ArenaError(f"the name {name} is taken, or too similar to another voter's; choose another one.")
            db.execute("INSERT INTO voters VALUES (?, ?, ?, NULL)", (name, _hash(token), time.time()))
        return name, token

    def drop(self, *voters: str, undo: bool = False) -> int:
        """Leave votes of these voters out of all ratings, now and later, or count them again; returns their number."""
        with self._transaction() as db:
            numbers = {row["voter"]: row["votes"] for row in db.execute(f"SELECT {_VOTES_BY_VOTER}")}
            for voter in voters:
                if check_person(voter) not in numbers:
                    raise ArenaError(f"there is no voter {describe(voter)}; fluxedu arena voters lists them.")
                db.execute("INSERT OR IGNORE INTO voters VALUES (?, NULL, NULL, NULL)", (voter,))
                db.execute("UPDATE voters SET dropped = ? WHERE name = ?", (None if undo else time.time(), voter))
        return sum(numbers[voter] for voter in set(voters))

    # -- reading

    def holder(self, token: str) -> tuple[str | None, bool]:
        """The voter who joined with this token, or None, and whether this voter has been dropped."""
        rows = self._select("name, dropped IS NOT NULL FROM voters WHERE token = ?", _hash(token))
        return (rows[0][0], bool(rows[0][1])) if rows else (None, False)

    def voters(self) -> list[dict]:
        """Everybody who has been shown a ballot, most votes first: voter, votes, first, last (times), dropped."""
        return [{**row, "dropped": bool(row["dropped"])} for row in self._select(_VOTES_BY_VOTER)]

    def ballot(self, id: str) -> Ballot:
        """The ballot with this id; raises ArenaError if there is none."""
        known = isinstance(id, str) and id.isascii()  # SQLite takes no lone surrogates
        rows = self._select(f"{_BALLOT} FROM ballots WHERE id = ?", id) if known else []
        if not rows:
            raise ArenaError(f"there is no ballot {describe(id)}.")
        return Ballot(**rows[0])

    def open(self, axis: str, voter: str) -> list[Ballot]:
        """The voter's unanswered ballots, the oldest first."""
        query = "FROM ballots LEFT JOIN votes ON ballot = id WHERE ballot IS NULL AND axis = ? AND voter = ?"
        return [Ballot(**row) for row in self._select(f"{_BALLOT} {query} ORDER BY issued", axis, voter)]

    def outcomes(self, axis: str, who: str = "all") -> list[tuple[str, str, float, int]]:
        """Votes on an axis as (left, right, the left model's share, number of such votes), in a fixed order."""
        query = (
            f"FROM votes JOIN ballots ON id = ballot WHERE axis = ? AND {_whose(who)} GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        )
        rows = self._select(f"left, right, choice, count(*) {query}", check_axis(axis))
        if unknown := {choice for _, _, choice, _ in rows} - set(CHOICES):
            raise ArenaError(f"{self.path} is damaged: it contains a vote for {describe(unknown.pop())}.")
        return [(left, right, CHOICES[choice], n) for left, right, choice, n in rows]

    def pending(self, axis: str, who: str = "all") -> list[tuple[str, str, int]]:
        """Ballots that voters are looking at now, as (left, right, number of them)."""
        query = f"WHERE ballot IS NULL AND axis = ? AND issued > ? AND {_whose(who)} GROUP BY 1, 2"
        query = f"left, right, count(*) FROM ballots LEFT JOIN votes ON ballot = id {query}"
        return [tuple(row) for row in self._select(query, axis, time.time() - PATIENCE)]

    def shown(self, axis: str, pair: tuple[str, str], who: str, voter: str) -> dict[tuple[str, int], tuple[int, int]]:
        """How often two models were shown, on either side: (prompt, seed) -> (to everybody, to this voter)."""
        query = f"WHERE axis = ? AND left IN (?, ?) AND right IN (?, ?) AND {_whose(who)} GROUP BY 1, 2"
        query = f"prompt, seed, count(*), sum(voter = ?) FROM ballots {query}"
        return {(prompt, seed): (n, own) for prompt, seed, n, own in self._select(query, voter, axis, *pair, *pair)}

    def issued(self) -> int:
        """The number of ballots."""
        return self._select("count(*) FROM ballots")[0][0]

    def rows(self) -> list[dict]:
        """Every vote with its ballot, as plain values, the earliest first."""
        query = (
            "ballots.*, choice, given, dropped FROM votes JOIN ballots ON id = ballot LEFT JOIN voters ON name = voter"
        )
        return [dict(row) for row in self._select(f"{query} ORDER BY given, id")]

    @checked(ArenaError)
    def export(self, path: Path | str) -> int:
        """Write every vote to a ``.csv`` or ``.json`` file and return their number."""
        path, rows = Path(path), self.rows()
        if path.suffix == ".json":
            text = json.dumps(rows, indent=1) + "\n"
        elif path.suffix == ".csv":
            lines = io.StringIO()
            columns = [*Ballot.__dataclass_fields__, "issued", "choice", "given", "dropped"]
            writer = csv.DictWriter(lines, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            text = lines.getvalue()
        else:
            raise ArenaError(f"votes can be exported to a .csv or .json file, not to {path.name}.")
        write_text(path, text)
        return len(rows)
