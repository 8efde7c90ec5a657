"""An exercise: its solution, the cases it is checked with, and the wrong answers that people really give.

    @exercise("rope.rotate", minutes=10, difficulty=2, hints=(...), cases=some_inputs, after="## Build it")
    def rotate(x, angles):
        '''The task, as the student reads it.'''
        ...

    @wrong("rope.rotate", "you pair the two halves, as Llama does; FLUX rotates neighbouring components.")
    def halves(x, angles): ...

    @mistakes("sampling.heun", ("sum", "the two velocities are added; ..."), ("old time", "the second ..."))
    def heun_with(mistake, x, t, t_next, velocity): ...

A wrong answer serves two purposes: the check must reject it, and a student whose answer gives the same values reads
its message.

The student starts from the solution's signature and docstring. In a class, a comment ``# your turn`` marks each method
that is to be written, and the lines above it are kept. `Exercise.starter_code` has the details.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any
from unittest import mock

import torch

YOUR_TURN = re.compile(r"^ +# (your turn.*)\n", re.MULTILINE)


@dataclass(frozen=True)
class WrongAnswer:
    """A wrong answer and the sentence that explains the mistake."""

    answer: Callable
    message: str


@dataclass
class Exercise:
    """One exercise of the course.

    - solution: a function or class whose docstring is the task
    - minutes, difficulty: how long it takes, and how hard it is, from 1 to 3
    - hints: three, each giving away more than the one before
    - cases: a function that returns the argument tuples to check with, always the same ones
    - call: ``(answer, *case) -> tensors``, for an answer that is not simply a function of the case
    - against: what the answer is compared with; None: the solution
    - tolerance: largest relative error, or 0 for equality
    - gradient: whether gradients must flow through an answer, as they do through the solution
    - after: where the exercise stands in its notebook: below the one cell whose source contains this text (a heading,
      say), or below the exercise of this name; not needed if a cell of the source names the exercise
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
    gradient: bool = True
    after: str = ""
    wrong: list[WrongAnswer] = field(default_factory=list)

    def fresh_cases(self, salt: int) -> Sequence[tuple]:
        """The cases with other random numbers: those of ``torch.Generator().manual_seed(seed + salt)``."""

        class Salted(torch.Generator):
            def manual_seed(self, seed: int) -> torch.Generator:
                return super().manual_seed(seed + salt)

        with mock.patch.object(torch, "Generator", Salted):
            return self.cases()

    @property
    def notebook(self) -> str:
        """The number of the exercise's notebook: ``"04"`` in ``n04_rope.py``, ``"13b"`` in ``n13b_patching.py``."""
        return self.solution.__module__.rpartition(".")[2].partition("_")[0][1:]

    @property
    def answer_name(self) -> str:
        """The name of the function or class that the student writes."""
        return self.solution.__name__

    @property
    def task(self) -> str:
        """The description of the task."""
        return inspect.cleandoc(self.solution.__doc__ or "")

    @property
    def _marked_code(self) -> str:
        """The solution's code with the comments ``# your turn``, without decorators and the formatter's comments."""
        lines = inspect.getsource(self.solution).splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(("def ", "class ")))
        return "\n".join(line.removesuffix("  # fmt: skip") for line in lines[start:])

    @property
    def solution_code(self) -> str:
        """The code of the solution, without decorators."""
        return YOUR_TURN.sub("", self._marked_code)

    @property
    def starter_code(self) -> str:
        """The code that the student starts from.

        A function keeps its signature and docstring. A class keeps everything but the lines from a comment
        ``# your turn`` to the end of its method. Methods after the last such comment only help the solution, and are
        left out. ``# your turn: self.lin`` puts its text into the NotImplementedError.
        """
        code, *marked = YOUR_TURN.split(self._marked_code)
        if not marked:
            if isinstance(self.solution, type):
                raise ValueError(f"{self.name}: no comment `# your turn` marks the methods that are to be written.")
            docstring_end = code.index('"""', code.index('"""') + 3) + 3
            return f'{code[:docstring_end]}\n    raise NotImplementedError("your turn")'
        next_methods = [rest[rest.index("\n\n    def ") :] for rest in marked[1:-1:2]]
        for text, next_method in zip(marked[::2], [*next_methods, ""], strict=True):
            code += f'        raise NotImplementedError("{text}")' + next_method
        return code


_exercises: dict[str, Exercise] = {}


def exercise(name: str, **details) -> Callable[[Callable], Callable]:
    """A decorator that registers the solution of an exercise; ``details`` are the fields of :class:`Exercise`."""

    def register(solution: Callable) -> Callable:
        _exercises[name] = Exercise(name, solution, **details)
        return solution

    return register


def wrong(name: str, message: str) -> Callable[[Callable], Callable]:
    """A decorator that registers a wrong answer to the exercise ``name``; ``message`` explains the mistake."""

    def register(answer: Callable) -> Callable:
        _exercises[name].wrong.append(WrongAnswer(answer, message))
        return answer

    return register


def mistakes(name: str, *messages: tuple[str, str]) -> Callable[[Callable], Callable]:
    """A decorator that registers one wrong answer to ``name`` for each pair (mistake, message).

    It decorates a function ``answer(mistake, *case)``, or a class that reads ``self.mistake``.
    """

    def register(answer: Callable) -> Callable:
        for mistake, message in messages:
            if isinstance(answer, type):
                wrong(name, message)(type(answer.__name__, (answer,), {"mistake": mistake}))
            else:
                wrong(name, message)(partial(answer, mistake))
        return answer

    return register


@cache
def all_exercises() -> dict[str, Exercise]:
    """All exercises by name, in the order of the notebooks."""
    package = import_module("fluxedu.course.exercises")
    for module in sorted(iter_modules(package.__path__), key=lambda m: m.name):
        import_module(f"{package.__name__}.{module.name}")
    return dict(_exercises)
