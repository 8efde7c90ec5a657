"""The arena in a notebook: two sides, a question, and three keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from fluxedu.arena.axes import AXES, sheet
from fluxedu.arena.match import Arena
from fluxedu.arena.votes import checked_voter
from fluxedu.errors import ArenaError
from fluxedu.widgets.controls import Vote
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.panels import Pixels

ANSWERS = ("not yet", "left", "the same", "right")
CHOICES = ("", "left", "tie", "right")  # as they are stored


def booth_view(ask: str, prompt: str, left: Sequence[Image.Image], right: Sequence[Image.Image], given: int) -> View:
    """Two sides of one ballot, unnamed; ``given``: the voter's votes so far."""
    panels = [Pixels(side, np.asarray(sheet(pictures))) for side, pictures in (("left", left), ("right", right))]
    return View(panels, f"“{prompt}”. {ask} Votes so far: {given}.")


class Booth(Explorer):
    """``booth.set(vote="left")`` votes by hand. What is shown says nowhere who drew it."""

    def __init__(self, arena: Arena, voter: str, axis: str):
        self.arena, self.voter, self.axis, self.given = arena, checked_voter(voter), axis, 0
        self._next()
        super().__init__(f"The arena: {AXES[axis].title}", [Vote("vote", "vote", ANSWERS, (0, 0))], self._shown)

    @property
    def values(self) -> dict[str, int]:
        """No vote: each is stored at once, and the next ballot is open."""
        return {"vote": 0}

    def set(self, vote: int | str) -> Booth:
        """Vote ``left``, ``right`` or ``the same``."""
        self.state = self.state | {"vote": [self.given, self.known["vote"].place(vote)]}
        return self

    def _shown(self, vote: int) -> View:
        return self.present

    def _next(self) -> None:
        """Open the next ballot."""
        self.ballot = self.arena.ballot(self.voter, self.axis)
        sides = self.arena.sides(self.ballot)
        self.present = booth_view(AXES[self.axis].ask, self.ballot.prompt, *sides, self.given)

    def _redraw(self, change=None) -> None:
        """Store the vote, if it is on the ballot that is open, and show the next one."""
        question, answer = self.state["vote"]
        if answer and self.ballot is not None and question == self.given:
            try:
                self.arena.vote(self.ballot.id, CHOICES[answer], self.voter)
                self.ballot, self.given = None, self.given + 1
                self._next()
            except ArenaError as error:  # all is judged, or somebody votes under the same name
                self.present = View(self.present.panels, str(error))
        if [question, answer] != [self.given, 0]:
            self.unobserve(self._redraw, "state")  # the next question is ours to ask, and no move
            self.state = self.state | {"vote": [self.given, 0]}
            self.observe(self._redraw, "state")
        super()._redraw(change)


def booth(arena: Arena, *, voter: str = "me", axis: str = "overall") -> Booth:
    """Vote on pairs of pictures, the makers unnamed: the keys are left, right, and down for the same.

    Every vote is stored when it is given; a ballot left open is the first to be shown next time.
    """
    return Booth(arena, voter, axis)
