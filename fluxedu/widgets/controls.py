"""What a reader can move. Every control's value is a place in a list, so the state of an explorer is a few whole
numbers; places can be said by their labels as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxedu.instruments.errors import InstrumentError


@dataclass(frozen=True)
class Control:
    """``labels``: what its places are called · ``start``: where it stands at first."""

    name: str
    label: str
    labels: Sequence[str]
    start: int = 0

    kind = "slider"

    def message(self) -> dict:
        """What the browser is told."""
        return {"kind": self.kind, "name": self.name, "label": self.label, "labels": list(map(str, self.labels))}

    def place(self, value: int | str) -> int:
        """A place said by number or label; raises InstrumentError for one that is not there."""
        labels = list(map(str, self.labels))
        if isinstance(value, str) and value in labels:
            return labels.index(value)
        if isinstance(value, int) and -len(labels) <= value < len(labels):
            return value % len(labels)
        shown = ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
        raise InstrumentError(f"{self.name} has {len(labels)} places ({shown}), and none is {value!r}.")


class Slider(Control):
    """Places in an order, such as steps."""


class Choice(Control):
    """Places in no order, in a list that opens."""

    kind = "choice"


class Chips(Control):
    """Places side by side, such as the words of a prompt: one is chosen by pointing at it. A view may shade them."""

    kind = "chips"
