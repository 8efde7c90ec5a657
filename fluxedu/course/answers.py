"""What crosses between a student's process and the marker's: a question in, tensors and sentences out.

The marker sends the name of an exercise and a number, the salt. :func:`reply` draws the inputs with it, calls the
answer and returns JSON in base64, in which tensors are safetensors. The marker has drawn the same inputs, so
:func:`read_reply` gives it all that it needs to judge. No object of the student's process is unpickled or called in the
marker's.
"""

from __future__ import annotations

import base64
import inspect
import json
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import fluxedu
from fluxedu import errors
from fluxedu.course.check import Outcome, outcomes
from fluxedu.course.exercise import Exercise, all_exercises

PACKAGE = str(Path(fluxedu.__file__).parent)
MOST_BYTES = 4 << 20  # of the tensors of one case; no answer of the course has more than a few thousand bytes
MOST_TEXT = 300  # characters of a sentence
#: what runs in the student's process; the course is imported again, because the student's code may have changed it
CALL = """
import sys as _sys
for _name in [name for name in _sys.modules if name.startswith("fluxedu.course")]:
    del _sys.modules[_name]
from fluxedu.course.answers import reply as _reply
_reply = _reply({name!r}, globals().get({answer!r}), {salts!r})
"""


def reply(name: str, answer: Any, salts: Sequence[int]) -> str:
    """Call an answer with the cases of exercise ``name`` for each salt; a salt of 0 gives those of `fe.check`.

    It runs in the student's process, where :data:`CALL` has imported it afresh.
    """
    torch.set_default_dtype(torch.float32)  # the marker's, so that both draw the same numbers
    torch.set_default_device(None)
    task = all_exercises()[name]
    tensors, sets, own, used, allowed = {}, [], set(), set(), set()
    for salt in salts:
        cases = task.fresh_cases(salt) if salt else task.cases()
        try:
            with _watched(task, own, used):
                done = outcomes(task, answer, cases)
            with _watched(task, set(), allowed):
                outcomes(task, task.solution, cases)
        except BaseException as error:  # noqa: BLE001 - an exit, an interrupt, an error whose text is an error
            done = [Outcome(problem=f"it raises {type(error).__name__}")]
        sets.append([_encoded(outcome, f"{salt}.{i}", tensors) for i, outcome in enumerate(done)])
        if done[-1].problem:
            break
    data = base64.b64encode(safetensors.torch.save(tensors)).decode()
    content = {"of_package": bool(own), "used": sorted(used - allowed), "sets": sets, "tensors": data}
    return base64.b64encode(json.dumps(content).encode()).decode()


def read_reply(text: str) -> tuple[bool, list[str], list[list[Outcome]]]:
    """Whether the answer ran fluxedu's own, what else of fluxedu it called that the shipped solution does not, and for
    each salt the outcomes. Raises ValueError for anything else.
    """
    try:
        content = json.loads(base64.b64decode(text.strip("'"), validate=True))
        tensors = safetensors.torch.load(base64.b64decode(content["tensors"], validate=True))
        sets = [[_decoded(outcome, tensors) for outcome in outcomes] for outcomes in content["sets"]]
        return bool(content["of_package"]), [printable(str(name), 60) for name in content["used"][:3]], sets
    except Exception:  # noqa: BLE001 - the student's process may send anything
        raise ValueError("its process sent a reply that cannot be read") from None


def _encoded(outcome: Outcome, key: str, tensors: dict[str, Tensor]) -> dict:
    if sum(x.numel() * x.element_size() for x in outcome.tensors) > MOST_BYTES:
        return {"problem": f"it returns more than {MOST_BYTES >> 20} MB", "keys": []}
    keys = []
    try:
        for i, x in enumerate(outcome.tensors):
            x = x.to_dense() if x.layout is not torch.strided else x.resolve_conj().resolve_neg()
            keys.append(f"{key}.{i}{'.complex' * x.is_complex()}")
            tensors[keys[-1]] = (torch.view_as_real(x) if x.is_complex() else x).to("cpu", copy=True).contiguous()
    except (RuntimeError, NotImplementedError, AttributeError) as error:  # a tensor without numbers, on "meta"
        return {"problem": f"it returns a tensor that cannot be read ({type(error).__name__})", "keys": []}
    return {"problem": outcome.problem, "keys": keys, "gradients": list(outcome.gradients)}


def _decoded(outcome: dict, tensors: dict[str, Tensor]) -> Outcome:
    complex_of = {True: torch.view_as_complex, False: lambda x: x}
    return Outcome(
        [complex_of[key.endswith(".complex")](tensors[key]) for key in outcome["keys"]],
        printable(str(outcome["problem"])),
        [printable(str(name)) for name in outcome.get("gradients", [])],
    )


def printable(text: str, most: int = MOST_TEXT) -> str:
    """Text on one line and of limited length, with control characters as escapes, such as ``\\x1b``."""
    text = errors.printable(text[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"


@contextmanager
def _watched(task: Exercise, found: set[str], used: set[str]):
    """Add to ``found`` the functions of the exercise's solution, and of what it is checked against, that run inside,
    and to ``used`` all others of fluxedu.
    """
    own = {place for part in (task.solution, task.against) for place in _places(part)}

    def watch(frame, event, _) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_filename.endswith("errors.py"):
            return
        if (code.co_filename, code.co_firstlineno) in own:
            found.add(code.co_name)
        else:
            used.add(f"{Path(code.co_filename).stem}.{code.co_name}")

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def _places(part: Any) -> list[tuple[str, int]]:
    """Where the code of a function, or of the methods of a class, begins."""
    functions = vars(part).values() if isinstance(part, type) else [part]
    codes = [getattr(inspect.unwrap(f) if callable(f) else f, "__code__", None) for f in functions]
    return [(code.co_filename, code.co_firstlineno) for code in codes if isinstance(code, CodeType)]
