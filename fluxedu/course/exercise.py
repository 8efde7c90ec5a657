"""An exercise: its solution, the cases it is checked with, and the wrong answers that people really give.

    @exercise("rope.rotate", minutes=10, difficulty=2, hints=(...), cases=some_inputs)
    def rotate(x, angles):
        '''The task, as the student reads it.'''
        ...

    @wrong("rope.rotate", "you pair the two halves, as Llama does; FLUX rotates neighbouring components.")
    def halves(x, angles): ...

A wrong answer serves two purposes: the check must reject it, and a student whose answer gives the same values reads
its message.
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


@dataclass(frozen=True)
class WrongAnswer:
    """A wrong answer and the sentence that explains the mistake."""

    answer: Callable
    message: str


@dataclass
class Exercise:
    """One exercise of the course.

    solution: a function or class whose docstring is the task
    minutes, difficulty: how long it takes, and how hard it is, from 1 to 3
    hints: three, each giving away more than the one before
    cases: a function that returns the argument tuples to check with, always the same ones
    call: ``(answer, *case) -> tensors``, for an answer that is not simply a function of the case
    against: what the answer is compared with; None: the solution
    tolerance: largest relative error, or 0 for equality
    stub: the code that the student starts from; None: the solution's signature and docstring
    """

    name: str
    solution: Callable
    minutes: int
    difficulty: int
    hints: tuple[str, str, str]
    cases: Callable[[], Sequence[tuple]]
    call: Callable[..., Any] = lambda answer, *case: answer(*case)
    against: Callable | None = None
    tolerance: float = 1e-5
    stub: str | None = None
    wrong: list[WrongAnswer] = field(default_factory=list)

    @property
    def answer_name(self) -> str:
        """The name of the function or class that the student writes."""
        return self.solution.__name__

    @property
    def task(self) -> str:
        """The description of the task."""
        return inspect.cleandoc(self.solution.__doc__ or "")

    @property
    def solution_code(self) -> str:
        """The code of the solution, without decorators."""
        lines = inspect.getsource(self.solution).splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(("def ", "class ")))
        return "\n".join(lines[start:])

    @property
    def starter_code(self) -> str:
        """The code that the student starts from: signature and task, with the body left to write."""
        if self.stub is not None:
            return textwrap.dedent(self.stub).strip()
        lines = self.solution_code.splitlines()
        end = next(
            i for i, line in enumerate(lines) if line.rstrip().endswith('"""') and (i > 1 or line.count('"""') == 2)
        )
        return "\n".join([*lines[: end + 1], '    raise NotImplementedError("your turn")'])


_exercises: dict[str, Exercise] = {}


def exercise(name: str, **details) -> Callable[[Callable], Callable]:
    """A decorator that registers the solution of an exercise; ``details`` are the fields of :class:`Exercise`."""

    def register(solution: Callable) -> Callable:
        if isinstance(solution, type) and details.get("stub") is None:
            raise ValueError(
                f"{name}: a class needs a stub, since `raise` in the class body would stop the cell that defines it."
            )
        _exercises[name] = Exercise(name, solution, **details)
        return solution

    return register


def wrong(name: str, message: str) -> Callable[[Callable], Callable]:
    """A decorator that registers a wrong answer to the exercise ``name``; ``message`` explains the mistake."""

    def register(answer: Callable) -> Callable:
        _exercises[name].wrong.append(WrongAnswer(answer, message))
        return answer

    return register


@cache
def all_exercises() -> dict[str, Exercise]:
    """All exercises by name, in the order of the notebooks."""
    package = import_module("fluxedu.course.exercises")
    for module in sorted(iter_modules(package.__path__), key=lambda m: m.name):
        import_module(f"{package.__name__}.{module.name}")
    return dict(_exercises)
