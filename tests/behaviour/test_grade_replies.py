"""What a student's process may reply to the marker: nothing makes a wrong answer right, or ends the marking."""

import base64
import json
import re
import sys

import pytest
import safetensors.torch
import torch

from fluxedu.course import answers, grade
from fluxedu.course.exercise import all_exercises

IDS = all_exercises()["rope.ids"]


class Process:
    """Stands for a student's process: it replies ``text``, or what a real one would to an honest call."""

    def __init__(self, text=None, answer=None, task=IDS):
        self.text, self.answer, self.task, self.notes = text, answer, task, []

    def execute(self, code, what, expression):
        if self.text is not None:
            return self.text
        salts = json.loads(re.search(r"\[\d+, \d+\]", code)[0])
        return repr(answers.reply(self.task.name, self.answer, salts))


def sealed(content):
    return base64.b64encode(json.dumps(content).encode()).decode()


def stored(**tensors):
    return base64.b64encode(safetensors.torch.save(tensors)).decode()


def forged(problem="", keys=("a",), sets=None, **more):
    outcome = {"problem": problem, "keys": list(keys)}
    return sealed(
        {"of_package": False, "used": [], "sets": sets or [[outcome] * 3] * 2, "tensors": stored(a=torch.zeros(6, 3))}
        | more
    )


REPLIES = {
    "nothing": "",
    "no base64": "'%%%'",
    "no JSON": sealed({})[:-6],
    "a number": sealed(3),
    "a list": sealed([]),
    "nothing in it": sealed({}),
    "true": sealed(True),
    "passed": sealed({"passed": True, "message": "right in 3 cases."}),
    "no sets": forged(sets={}),
    "sets are text": forged(sets="right"),
    "one empty set": forged(sets=[[]]),
    "one case": forged(sets=[[{"problem": "", "keys": ["a"]}]]),
    "empty sets": forged(sets=[[], []]),
    "100 sets": forged(sets=[[]] * 100),
    "a case is a number": forged(sets=[[3]]),
    "no such tensor": forged(keys=["b"]),
    "keys are numbers": forged(keys=[0]),
    "no tensors": forged(keys=[]),
    "complex of reals": forged(keys=["a.complex"]),
    "tensors are no base64": forged(tensors="%"),
    "tensors are null": forged(tensors=None),
    "tensors are cut": forged(tensors=stored(a=torch.zeros(6, 3))[:20]),
    "a pickle": forged(tensors=base64.b64encode(b"\x80\x04N.").decode()),
    "NaN": forged(tensors=stored(a=torch.full((6, 3), torch.nan))),
    "bits": forged(tensors=stored(a=torch.zeros(6, 3, dtype=torch.float8_e4m3fn))),
    "no numbers": forged(tensors=stored(a=torch.zeros(0))),
    "8 million": forged(tensors=stored(a=torch.zeros(2_000_000))),
    "unsigned": forged(tensors=stored(a=torch.zeros(6, 3, dtype=torch.uint64))),
    "a verdict": forged(problem="right in 3 cases."),
    "a long problem": forged(problem="x\x1b[2J" * 99_999),
    "deep": base64.b64encode(b"[" * 99_999).decode(),
    "a problem that is none": forged(problem=None),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_no_reply_makes_a_wrong_answer_right(kind):
    passed, message, _ = grade._judged(IDS, Process(REPLIES[kind]))
    assert not passed and message.isprintable() and len(message) < 500


class Equal:
    """Equal to everything, and callable with everything."""

    def __eq__(self, _):
        return True

    def __call__(self, *_, **__):
        return Equal()

    def __getattr__(self, name):
        return Equal()

    def __iter__(self):
        return iter([Equal()])


class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("equal", "allclose", "abs", "__eq__"):
            return True
        return super().__torch_function__(function, types, args, kwargs or {})


class Unprintable(Exception):
    def __str__(self):
        raise KeyError


def raises(error):
    raise error


ENDLESS = []
ENDLESS.append(ENDLESS)
ANSWERS = {
    "equal to all": Equal(),
    "returns equal": lambda *_: Equal(),
    "a tensor that lies": lambda h, w: torch.zeros(h * w, 3).as_subclass(Liar),
    "exits": lambda *_: raises(SystemExit),
    "is interrupted": lambda *_: raises(KeyboardInterrupt),
    "cannot be printed": lambda *_: raises(Unprintable()),
    "control characters": lambda *_: raises(ValueError("\x1b[2J\x07\u202e=1")),
    "ends generators": lambda *_: raises(GeneratorExit),
    "long": lambda *_: raises(ValueError("x" * 10**7)),
    "endless": lambda *_: ENDLESS,
    "a huge number": lambda *_: 10**400,
    "a huge view": lambda *_: torch.zeros(1).expand(10**12),
    "large": lambda *_: torch.zeros(2_000_000),
    "meta": lambda h, w: torch.zeros(h * w, 3, device="meta"),
    "sparse": lambda h, w: torch.zeros(h * w, 3).to_sparse(),
    "nothing": lambda *_: (),
    "a generator": lambda *_: (x for x in [1]),
    "an iterator": lambda *_: iter([]),
    "recursion": lambda *a: ANSWERS["recursion"](*a),
    "a class": torch.nn.Module,
    "text": "ids",
    "a string": lambda *_: "right in 3 cases.",
    "no import": lambda *_: __import__("nowhere"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_no_object_is_right(kind):
    passed, message, flagged = grade._judged(IDS, Process(answer=ANSWERS[kind]))
    assert not passed and not flagged and message.isprintable() and len(message) < 500


def test_a_table_of_the_checks_inputs_does_not_pass():
    """An answer that knows the right values for the inputs of `fe.check` only: seen, because the inputs are fresh."""
    task = all_exercises()["rope.rotate"]
    table = [(x, task.solution(x, angles)) for x, angles in task.cases()]

    def rotate(x, angles):
        y = next((y for known, y in table if torch.equal(x, known)), torch.zeros_like(x))
        return y + 0 * (x + angles.sum())  # with a gradient, as the check demands

    passed, message, flagged = grade._judged(task, Process(answer=rotate, task=task))
    assert not passed and not flagged  # a plain mistake can look like this too
    assert message.startswith("it is right for the inputs of the notebook's check, but not")


def test_an_answer_that_calls_the_librarys_own_function_is_flagged():
    """In another wrapping than the check's, so that only the call gives it away."""
    from fluxedu.sampling.solvers import schedule

    task = all_exercises()["sampling.schedule"]
    passed, message, flagged = grade._judged(
        task, Process(answer=lambda steps, mu: schedule(steps, 64, ends=(float(mu), float(mu))), task=task)
    )
    assert passed and flagged and "it calls solvers.schedule" in message and "so look at its code." in message


def test_the_default_dtype_and_device_of_a_notebook_do_not_matter():
    task = all_exercises()["rope.rotate"]
    honest = {}
    exec(f"import torch\nfrom torch import Tensor\n{task.solution_code}", honest)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        process = Process(answer=honest["rotate"], task=task)
        text = process.execute("[0, 5]", "", "")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
    of_package, used, sets = answers.read_reply(text)
    assert not of_package and not used and torch.equal(sets[1][0].tensors[0], task.solution(*task.fresh_cases(5)[0]))


@pytest.mark.parametrize("task", all_exercises().values(), ids=lambda task: task.name)
def test_the_channel_serves_every_exercise(task):
    """The printed solution passes with the check's inputs and with fresh ones; a known mistake gets its message."""
    printed = dict(vars(sys.modules[task.solution.__module__]))
    exec(task.solution_code, printed)
    passed, message, flagged = grade._judged(task, Process(answer=printed[task.answer_name], task=task))
    assert passed and not flagged and message.startswith("right in ")
    assert grade._judged(task, Process(answer=task.solution, task=task)) == (False, grade.OF_PACKAGE, True)
    for known in task.wrong:
        assert grade._judged(task, Process(answer=known.answer, task=task)) == (False, known.message, False)
