"""The arena: contestants, prompts and votes, brought together.

a = Arena(["nano", "nano@4"], "votes.sqlite")
ballot = a.ballot("me", "overall")           # the pair that tells most, sides by chance
left, right = a.sides(ballot)                # lists of pictures
a.vote(ballot.id, "left", "me")
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from fluxedu.arena.axes import AXES, asked, checked_axis, shots
from fluxedu.arena.contestants import Contestant, Gallery, contestant
from fluxedu.arena.pairing import best_pairs
from fluxedu.arena.rating import Ratings, cells_of, rated, wins_of
from fluxedu.arena.votes import JUDGE, Ballot, Votes, checked_voter
from fluxedu.errors import ArenaError
from fluxedu.nano.exam import Question


class Arena:
    """Models (names as :func:`contestant` takes them, or :class:`Contestant`), and the file of votes on them.

    prompts: how many held-out prompts · folder: where pictures are kept for the next time · seed: of what is left to
    chance.
    """

    def __init__(
        self,
        models: Sequence[str | Contestant],
        votes: Path | str | Votes,
        *,
        prompts: int = 40,
        folder: Path | str | None = None,
        seed: int = 0,
    ):
        self.gallery = Gallery([contestant(m) if isinstance(m, str) else m for m in models], folder)
        self.names = tuple(self.gallery.contestants)
        self.votes = votes if isinstance(votes, Votes) else Votes(votes)
        self.prompts, self.seed, self.lock = prompts, seed, threading.Lock()
        self._questions: dict[str, list[Question]] = {}

    def questions(self, axis: str) -> list[Question]:
        """The prompts of an axis."""
        if checked_axis(axis) not in self._questions:
            self._questions[axis] = asked(axis, self.prompts)
        return self._questions[axis]

    # -- voting

    def ballot(self, voter: str, axis: str = "overall") -> Ballot:
        """What the voter is asked next on this axis: an open ballot again, as after a reload, or a new one.

        Nobody is shown the same two pictures twice; raises ArenaError when the voter has seen them all.
        """
        checked_voter(voter)
        questions = {(q.prompt, q.seed): q for q in self.questions(axis)}
        with self.lock:
            for ballot in self.votes.open(axis, voter):
                if {ballot.left, ballot.right} <= set(self.names) and (ballot.prompt, ballot.seed) in questions:
                    return ballot
            return self._issue(voter, axis, questions)

    def _issue(self, voter: str, axis: str, questions: dict[tuple[str, int], Question]) -> Ballot:
        who = JUDGE if voter == JUDGE else "people"
        rng = np.random.default_rng([self.seed, self.votes.issued()])
        for i, j in best_pairs(self._wins(axis, who), rng, self._pending(axis, who)):
            left, right = self.names[i], self.names[j]
            shown = self.votes.shown(axis, (left, right), who, voter)
            fresh = [key for key in questions if shown.get(key, (0, 0))[1] == 0]
            if fresh:  # of the prompts shown least on this pair, any
                least = min(shown.get(key, (0, 0))[0] for key in fresh)
                key = fresh[rng.choice([n for n, key in enumerate(fresh) if shown.get(key, (0, 0))[0] == least])]
                return self.votes.issue(axis, left, right, *key, questions[key].size, voter)
        raise ArenaError(f"voter {voter} has judged every pair there is on {axis}; more prompts make more.")

    def vote(self, ballot: str, choice: str, voter: str) -> bool:
        """Give a vote: left, right or tie; False when it had been given already."""
        return self.votes.vote(ballot, choice, voter)

    def sides(self, ballot: Ballot) -> tuple[list[Image.Image], list[Image.Image]]:
        """What is shown on the left, and on the right."""
        return self.side(ballot, "left"), self.side(ballot, "right")

    def side(self, ballot: Ballot, side: str) -> list[Image.Image]:
        """What is shown on one side."""
        asked = shots(ballot.axis, ballot.seed, (ballot.height, ballot.width))
        return [self.gallery.picture(getattr(ballot, side), ballot.prompt, *shot) for shot in asked]

    def prepare(self, axes: Sequence[str] = tuple(AXES)) -> int:
        """Draw every picture that the axes can ask for, so that nobody waits; how many there are."""
        wanted = dict.fromkeys(
            (name, q.prompt, *shot)
            for axis in axes
            for q in self.questions(axis)
            for shot in shots(axis, q.seed, q.size)
            for name in self.names
        )
        for picture in tqdm(wanted, desc="draw", delay=1):
            self.gallery.picture(*picture)
        return len(wanted)

    # -- counting

    def ratings(self, axis: str = "overall", who: str = "all", **how) -> Ratings:
        """Elo on an axis, by the votes of ``judge``, ``people`` or ``all``; more as for :func:`rated`."""
        return rated(self.names, self._outcomes(axis, who), **how)

    def _outcomes(self, axis: str, who: str) -> list[tuple[str, str, float, int]]:
        """Votes on two of the present contestants; the file may know others."""
        return [vote for vote in self.votes.outcomes(axis, who) if {vote[0], vote[1]} <= set(self.names)]

    def _wins(self, axis: str, who: str) -> np.ndarray:
        return wins_of(cells_of(self.names, self._outcomes(axis, who)), len(self.names))

    def _pending(self, axis: str, who: str) -> np.ndarray:
        """Games ``[M, M]`` under way, row against column."""
        table = np.zeros((len(self.names),) * 2)
        for left, right, n in self.votes.pending(axis, who):
            if {left, right} <= set(self.names):
                table[self.names.index(left), self.names.index(right)] += n
        return table
