"""Ballots and votes in one SQLite file: nothing that was acknowledged is lost, and nothing counts twice.

A ballot says which two pictures a voter was shown, and on which axis. A vote answers a ballot: the ballot must have
been issued, to this voter, and its number is the vote's key, so that a second vote on it cannot be stored. The file is
in WAL mode with full synchronisation: a vote is on the disk before the voter hears that it counts.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fluxedu.arena.axes import checked_axis
from fluxedu.checkpoints.save import write_text
from fluxedu.errors import ArenaError

CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5}  # the left one's share of the win
JUDGE = "judge"  # the scene world's judge as a voter; all others are people
PATIENCE = 600.0  # seconds after which an unanswered ballot is no longer waited for
OURS = 0x666C7861  # "flxa": how SQLite knows whose file it is
_VOTER = re.compile(r"\w[\w .-]{0,39}")  # no name that a spreadsheet takes for a formula

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


@dataclass(frozen=True)
class Ballot:
    """Two models' pictures of one prompt, one seed and one size, as one voter is shown them on one axis."""

    id: str
    axis: str
    left: str
    right: str
    prompt: str
    seed: int
    height: int
    width: int
    voter: str


def checked_voter(voter: str) -> str:
    """The voter's name; raises ArenaError for one that could be mistaken in a table."""
    if not isinstance(voter, str) or not _VOTER.fullmatch(voter):
        raise ArenaError(f"a voter's name is up to 40 letters, digits, spaces, dots and dashes, not {voter!r:.60}.")
    return voter


def _of(who: str) -> str:
    """The condition that leaves the judge's votes, the people's, or all."""
    conditions = {"judge": f"voter = '{JUDGE}'", "people": f"voter != '{JUDGE}'", "all": "1"}
    if who not in conditions:
        raise ArenaError(f"votes are those of judge, people or all, not of {who!r}.")
    return conditions[who]


class Votes:
    """The file ``path``, made when it is not there. Threads and processes may share it."""

    def __init__(self, path: Path | str):
        self.path, self.lock = Path(path), threading.Lock()
        with self._in_order():
            self.db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self.db.row_factory = sqlite3.Row
            self._prepare()

    def _prepare(self) -> None:
        for told in ("foreign_keys = ON", "journal_mode = WAL", "synchronous = FULL"):
            self.db.execute(f"PRAGMA {told}")
        with self._writing() as db:
            mark = db.execute("PRAGMA application_id").fetchone()[0]
            if mark == OURS:
                return
            if mark or db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise ArenaError(f"{self.path} is another program's file; name a new one.")
            for statement in filter(str.strip, _TABLES.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {OURS}")

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """A file that is damaged, or a disk that is full, in a sentence."""
        try:
            yield
        except sqlite3.Error as error:
            raise ArenaError(f"{self.path} cannot be used as a file of votes: {error}.") from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """All of it happens, or nothing; nobody else writes meanwhile."""
        with self.lock, self._in_order():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:  # a full disk ends it by itself
                    self.db.execute("ROLLBACK")
                raise

    def _read(self, query: str, *values) -> list[sqlite3.Row]:
        with self.lock, self._in_order():
            return self.db.execute(query, values).fetchall()

    def close(self) -> None:
        """Fold the log into the file."""
        with self.lock:
            self.db.close()

    # -- writing

    def issue(
        self, axis: str, left: str, right: str, prompt: str, seed: int, size: tuple[int, int], voter: str
    ) -> Ballot:
        """A new ballot, on the disk when this returns."""
        ballot = Ballot(secrets.token_urlsafe(12), checked_axis(axis), left, right, prompt, seed, *size,
                        checked_voter(voter))  # fmt: skip
        with self._writing() as db:
            marks = ",".join("?" * 10)
            db.execute(f"INSERT INTO ballots VALUES ({marks})", (*asdict(ballot).values(), time.time()))
        return ballot

    def vote(self, ballot: str, choice: str, voter: str) -> bool:
        """Store a vote: left, right or tie. False when the very same one is there, as after a repeated click."""
        if not isinstance(choice, str) or choice not in CHOICES:
            raise ArenaError(f"a vote is left, right or tie, not {choice!r:.60}.")
        issued = self.ballot(ballot)
        if issued.voter != voter:
            raise ArenaError(f"ballot {ballot} was issued to another voter.")
        with self._writing() as db:
            row = (ballot, choice, time.time())
            if db.execute("INSERT INTO votes VALUES (?,?,?) ON CONFLICT DO NOTHING", row).rowcount:
                return True
            first = db.execute("SELECT choice FROM votes WHERE ballot = ?", (ballot,)).fetchone()[0]
        if first != choice:
            raise ArenaError(f"ballot {ballot} has been answered already, with {first}; a vote is not changed.")
        return False

    # -- reading

    def ballot(self, id: str) -> Ballot:
        """The ballot with this number; raises ArenaError when none was issued."""
        columns = ", ".join(Ballot.__dataclass_fields__)
        rows = self._read(f"SELECT {columns} FROM ballots WHERE id = ?", id) if isinstance(id, str) else []
        if not rows:
            raise ArenaError(f"no ballot {id!r:.60} was ever issued.")
        return Ballot(**rows[0])

    def open(self, axis: str, voter: str) -> list[Ballot]:
        """The voter's ballots that are not answered, the oldest first."""
        columns = ", ".join(Ballot.__dataclass_fields__)
        query = f"SELECT {columns} FROM ballots LEFT JOIN votes ON ballot = id WHERE ballot IS NULL AND axis = ? "
        return [Ballot(**row) for row in self._read(query + "AND voter = ? ORDER BY issued", axis, voter)]

    def outcomes(self, axis: str, who: str = "all") -> list[tuple[str, str, float, int]]:
        """Votes on an axis: (left, right, the left one's share, how many alike), in a fixed order."""
        query = "SELECT left, right, choice, count(*) FROM votes JOIN ballots ON id = ballot WHERE axis = ? AND "
        rows = self._read(query + _of(who) + " GROUP BY 1, 2, 3 ORDER BY 1, 2, 3", checked_axis(axis))
        if strange := {choice for _, _, choice, _ in rows} - set(CHOICES):
            raise ArenaError(f"{self.path} is damaged: it holds a vote for {strange.pop()!r:.60}.")
        return [(left, right, CHOICES[choice], n) for left, right, choice, n in rows]

    def pending(self, axis: str, who: str = "all") -> list[tuple[str, str, int]]:
        """Ballots that voters have before them at this moment: (left, right, how many)."""
        query = (
            "SELECT left, right, count(*) FROM ballots LEFT JOIN votes ON ballot = id WHERE ballot IS NULL AND axis = ?"
            " AND issued > ? AND "
        )
        return [tuple(row) for row in self._read(query + _of(who) + " GROUP BY 1, 2", axis, time.time() - PATIENCE)]

    def shown(self, axis: str, pair: tuple[str, str], who: str, voter: str) -> dict[tuple[str, int], tuple[int, int]]:
        """For two models: (prompt, seed) -> how often it was shown, and how often to this voter; sides apart."""
        query = "SELECT prompt, seed, count(*), sum(voter = ?) FROM ballots WHERE axis = ? AND left IN (?, ?) AND "
        rows = self._read(query + "right IN (?, ?) AND " + _of(who) + " GROUP BY 1, 2", voter, axis, *pair, *pair)
        return {(prompt, seed): (n, mine) for prompt, seed, n, mine in rows}

    def issued(self) -> int:
        """How many ballots there are."""
        return self._read("SELECT count(*) FROM ballots")[0][0]

    def rows(self) -> list[dict]:
        """Every vote with its ballot, as plain values, the earliest first."""
        query = "SELECT ballots.*, choice, given FROM votes JOIN ballots ON id = ballot ORDER BY given, id"
        return [dict(row) for row in self._read(query)]

    def export(self, path: Path | str) -> int:
        """Write every vote to a ``.csv`` or ``.json`` file; how many there were."""
        path, rows = Path(path), self.rows()
        columns = [*Ballot.__dataclass_fields__, "issued", "choice", "given"]
        if path.suffix == ".json":
            text = json.dumps(rows, indent=1) + "\n"
        elif path.suffix == ".csv":
            lines = io.StringIO()
            writer = csv.DictWriter(lines, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            text = lines.getvalue()
        else:
            raise ArenaError(f"votes are written to a file that ends in .csv or .json, not to {path.name}.")
        write_text(path, text)
        return len(rows)
