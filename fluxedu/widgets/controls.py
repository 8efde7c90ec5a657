"""What a reader can move. Every control's value is a place in a list, so the state of an explorer is a few whole
numbers; places can be said by their labels as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from fluxedu.errors import InstrumentError


@dataclass(frozen=True)
class Control:
    """``labels``: what its places are called · ``start``: where it stands at first · ``values``: what the places mean,
    where that is a number of its own: a number then names a value, not a place.
    """

    name: str
    label: str
    labels: Sequence[str]
    start: int = 0
    values: Sequence[float | None] | None = None

    kind = "slider"

    def message(self) -> dict:
        """What the browser is told."""
        return {"kind": self.kind, "name": self.name, "label": self.label, "labels": list(map(str, self.labels))}

    def place(self, said: int | float | str) -> int:
        """A place by its label, its value or, without values, its number; raises InstrumentError for others."""
        labels = list(map(str, self.labels))
        if isinstance(said, str):
            bare = [label.lstrip("▁") for label in labels]
            places = [i for i, label in enumerate(labels) if label == said] or [
                i for i, label in enumerate(bare) if label == said
            ]
        elif self.values is not None:
            places = [i for i, value in enumerate(self.values) if value is not None and value == said]
        else:
            places = [said % len(labels)] if _whole(said) and -len(labels) <= said < len(labels) else []
        if places:
            return int(places[0])
        shown = ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
        raise InstrumentError(f"{self.name} is one of {len(labels)} ({shown}), not {said!r}.")


def _whole(said: object) -> bool:
    return isinstance(said, Integral) and not isinstance(said, bool)


class Slider(Control):
    """Places in an order, such as steps."""


def clock(times: Sequence[float], start: int) -> Slider:
    """The slider of a run's times, ``step``; where a solver asks twice at one time, the second says so."""
    labels = [f"t = {t:.2f}" + ", again" * (t in times[:i]) for i, t in enumerate(times)]
    return Slider("step", "time", labels, start)


class Choice(Control):
    """Places in no order, in a list that opens."""

    kind = "choice"


class Chips(Control):
    """Places side by side, such as the words of a prompt: one is chosen by pointing at it. A view may shade them."""

    kind = "chips"


class Vote(Control):
    """Left, the same or right, by button or by the keys left, down and right: the first place is no answer yet.

    Its state is (which question, the answer), so that a key pressed twice answers one question, not two.
    """

    kind = "vote"
