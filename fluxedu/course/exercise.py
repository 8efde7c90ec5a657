"""An exercise: a solution, what it is tried on, and the wrong answers that people really give.

    @exercise("rope.rotate", minutes=10, difficulty=2, hints=(...), cases=some_inputs)
    def rotate(x, angles):
        '''What the student reads.'''
        ...

    @wrong("rope.rotate", "your pairs are halves, as in Llama; FLUX turns neighbours.")
    def halves(x, angles): ...

A wrong answer serves twice: a check must reject it, and a student's answer that gives the same numbers is told why.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

Cases = Callable[[], Sequence[tuple]]


@dataclass(frozen=True)
class Wrong:
    """An answer that is not right, and the one sentence that says why."""

    answer: Callable
    says: str


@dataclass
class Exercise:
    """One exercise of the course.

    solution: a function or a class, its docstring the task · cases: a function that makes the argument tuples it is
    tried on, the same every time · call: ``(answer, *case) -> tensors``, how an answer is tried, for one that is
    not a function of the case · against: what the answer is compared with, the solution if not said · tolerance:
    of the relative error, or 0 for equality · stub: the code the student begins with, else the solution's first lines.
    """

    name: str
    solution: Callable
    minutes: int
    difficulty: int
    hints: tuple[str, str, str]
    cases: Cases
    call: Callable[..., Any]
    against: Callable | None
    tolerance: float
    stub: str | None
    wrong: list[Wrong] = field(default_factory=list)

    @property
    def object(self) -> str:
        """The name of what the student writes."""
        return self.solution.__name__

    @property
    def task(self) -> str:
        return inspect.cleandoc(self.solution.__doc__ or "")

    @property
    def solved(self) -> str:
        """The solution's code, as a cell."""
        lines = inspect.getsource(self.solution).splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(("def ", "class ")))
        return "\n".join(lines[start:])

    @property
    def unsolved(self) -> str:
        """The code a student begins with: the head and the task, the rest to be written."""
        if self.stub is not None:
            return textwrap.dedent(self.stub).strip()
        lines = self.solved.splitlines()
        end = next(
            i for i, line in enumerate(lines) if line.rstrip().endswith('"""') and (i > 1 or line.count('"""') == 2)
        )
        return "\n".join([*lines[: end + 1], '    raise NotImplementedError("your turn")'])


_known: dict[str, Exercise] = {}


def exercise(
    name: str,
    *,
    minutes: int,
    difficulty: int,
    hints: tuple[str, str, str],
    cases: Cases,
    call: Callable[..., Any] = lambda answer, *case: answer(*case),
    against: Callable | None = None,
    tolerance: float = 1e-5,
    stub: str | None = None,
) -> Callable[[Callable], Callable]:
    """Register what is decorated as the solution of an exercise; difficulty is 1, 2 or 3. See :class:`Exercise`."""

    def register(solution: Callable) -> Callable:
        if isinstance(solution, type) and stub is None:
            raise ValueError(f"{name}: a class needs a stub, since its body runs before anything is asked of it.")
        _known[name] = Exercise(name, solution, minutes, difficulty, hints, cases, call, against, tolerance, stub)
        return solution

    return register


def wrong(name: str, says: str) -> Callable[[Callable], Callable]:
    """Register what is decorated as a wrong answer to the exercise ``name``."""

    def register(answer: Callable) -> Callable:
        _known[name].wrong.append(Wrong(answer, says))
        return answer

    return register


@cache
def all_exercises() -> dict[str, Exercise]:
    """All exercises by name, in the order of the notebooks."""
    package = import_module("fluxedu.course.exercises")
    for module in sorted(iter_modules(package.__path__), key=lambda m: m.name):
        import_module(f"{package.__name__}.{module.name}")
    return dict(_known)
