"""Checks that teach: what a verdict says about an error, which styles of right answers pass, and which answers do not.

`python tests/behaviour/rewriting.py` surveys the wrong answers to all exercises; here is a sample of them.
"""

import numpy as np
import pytest
import torch
from rewriting import right_answers, right_for_others, styles, survey, wrong_answers
from torch import Tensor, nn

from fluxedu.course import all_exercises
from fluxedu.course.check import assess, gradients
from fluxedu.course.exercise import Exercise

TASKS = all_exercises()


def task_of(solution, cases, **details):
    return Exercise("a.b", solution, 5, 1, ("a", "b", "c"), cases=lambda: cases, **details)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- simple errors are named


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention."""
    return (scale * q @ k.mT).softmax(-1) @ v


ATTEND = task_of(
    attend, [(normal(2, 5, 4), normal(2, 5, 4, seed=1), normal(2, 5, 4, seed=2), 0.7),
             (normal(1, 3, 6), normal(1, 3, 6, seed=3), normal(1, 3, 6, seed=4), 0.4)],
)  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *a: 0 * a[0], "all values are 0."),
        (lambda *a: -attend(*a), "the values have the wrong sign."),
        (lambda *a: 1 - attend(*a), "the values are 1 minus the right ones."),
        (lambda *a: 1000 * attend(*a), "the values are 1000 times the right ones."),
        (lambda *a: attend(*a) / 2, "the values are the right ones divided by 2."),
        (lambda *a: attend(*a) * a[0].shape[-1] ** 0.5,
         "the values are the right ones times the square root of the size of the first tensor's dim -1."),
        (lambda *a: attend(*a) + 0.3,
         "the values differ from the right ones by a constant that is added or subtracted."),
        (lambda *a: attend(*a) - a[2], "`v` must still be added, or is subtracted too often."),
        (lambda *a: attend(*a) + a[0], "`q` is added once too often."),
        (lambda *a: a[1] + 0, "the result is `k` itself."),
        (lambda *a: attend(*a).sigmoid(), "a sigmoid is applied to the right values."),
        (lambda *a: attend(*a).exp().log(), "right in 2 cases."),
        (lambda *a: attend(*a).softmax(-2), "a softmax over dim -2 is applied to the right values."),
        (lambda *a: attend(*a).flip(1), "the order is reversed along dim -2."),
        (lambda *a: attend(*a).roll(1, 1), "the values are shifted by one place along dim -2."),
        (lambda *a: torch.cat(attend(*a).chunk(2, -1)[::-1], -1), "the halves along dim -1 are in another order."),
        (lambda *a: attend(*a).unflatten(-1, (2, -1)).mT.flatten(-2),
         "halves and neighbours are confused along dim -1."),
        (lambda *a: attend(*a).round(), "a rounding to integers is applied to the right values."),
        (lambda q, k, v, scale: attend(k, q, v, scale), "`q` and `k` are exchanged."),
        (lambda q, k, v, scale: attend(q, k, k, scale), "`k` is used in place of `v`."),
        (lambda q, k, v, scale: attend(q, k, v, 1), "`scale` is used as if it were 1."),
        (lambda q, k, v, scale: attend(q, k, v, scale**2), "`scale` is squared, or used twice."),
        (lambda q, k, v, scale: attend(q, k, v.roll(1, 1), scale), "`k` is shifted back by one place along dim -2."),
        (lambda *a: attend(*a) * torch.arange(1, a[0].shape[-1] + 1) ** 0.3,
         "the values are right up to a factor for each index of dim -1: "
         "look at what is multiplied, divided or normalised there."),
        (lambda *a: attend(*a).sort(1)[0], "the values along dim -2 are right but in another order."),
    ],
)  # fmt: skip
def test_a_simple_error_is_named(answer, message):
    verdict = assess(ATTEND, answer)
    assert verdict.message == message
    assert verdict or verdict.detail.startswith("your value at [0, 0, 0] is ") or "wrong)" in verdict.detail


def test_an_error_must_explain_every_case():
    answer = lambda *a: attend(*a) * (-1 if len(a[0]) == 2 else 1.1)  # noqa: E731
    assert assess(ATTEND, answer).message.startswith("the values are proportional to the right ones")
    answer = lambda *a: -attend(*a) if len(a[0]) == 2 else attend(*a).sin()  # noqa: E731
    assert assess(ATTEND, answer).message.startswith("the shapes are right but the values are wrong:")


def test_the_smallest_case_is_shown():
    verdict = assess(ATTEND, lambda q, k, v, scale: -attend(q, k, v, scale))
    value = float(attend(*ATTEND.cases()[1])[0, 0, 0])
    assert str(verdict).splitlines()[1] == (
        f"  your value at [0, 0, 0] is {-value:.5g} but should be {value:.5g} (18 of 18 values are wrong) "
        "(inputs: q [1, 3, 6], k [1, 3, 6], v [1, 3, 6], scale 0.4)"
    )


def test_one_of_several_results_is_named():
    def both(x):
        """Both."""
        return x + 1, 2 * x, x.exp()

    task = task_of(both, [(normal(3, 4),)])
    assert assess(task, lambda x: (x + 1, -2 * x, x.exp())).message == (
        "in result 2 of 3, the values have the wrong sign."
    )
    assert assess(task, lambda x: (2 * x, x + 1, x.exp())).message == (
        "the results are right but in another order: yours are number 2, 1, 3."
    )
    detail = assess(task, lambda x: (x + 1, 2 * x, x.exp() + torch.eye(3, 4))).detail
    assert detail.startswith("your value at [0, 0] of result 3 is") and "(3 of 12 values are wrong)" in detail


# ---------------------------------------------------------------- errors, changes, gradients


def raises(x):
    y = x + 1
    return y.no_such_method()


def test_an_error_names_the_students_line():
    task = task_of(lambda x: x, [(normal(2),)])
    line = raises.__code__.co_firstlineno + 2
    message = assess(task, raises).message
    assert f"in line {line}: `return y.no_such_method()` (inputs: x [1.54" in message


@pytest.mark.parametrize("name", ["t5.RMSNorm", "attention.qknorm", "double.block", "single.block", "single.split"])
def test_a_forgotten_return_is_recognised(name):
    task, nothing = TASKS[name], lambda *_: None
    answer = type("Answer", (task.solution,), {"forward": nothing}) if isinstance(task.solution, type) else nothing
    assert "is there a `return` statement?" in assess(task, answer).message


def spoil_tuple(x, parts, names, layer):
    parts[1].add_(1)


def spoil_dict(x, parts, names, layer):
    names["scale"].mul_(2)


def drop_key(x, parts, names, layer):
    names.pop("scale")


def spoil_weight(x, parts, names, layer):
    layer[0].weight.data += 1


def spoil_buffer(x, parts, names, layer):
    layer[1].running_mean.add_(1)


@pytest.mark.parametrize("spoil", [spoil_tuple, spoil_dict, drop_key, spoil_weight, spoil_buffer])
def test_changes_inside_inputs_are_detected(spoil):
    def double(x, parts, names, layer):
        """Twice x."""
        return 2 * x

    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    case = (normal(2), (normal(2), normal(2)), {"scale": normal(1), "shift": 1.0}, layer)
    task = task_of(double, [case])

    def answer(*inputs):
        result = double(*inputs)
        spoil(*inputs)
        return result

    assert assess(task, double)
    assert assess(task, answer).message.startswith("it modifies its input in place")


def test_a_gradient_must_flow_to_inputs_and_parameters():
    task = TASKS["rope.rotate"]
    verdict = assess(task, lambda x, angles: task.solution(x, angles.detach()))
    assert verdict.message.startswith("the values are right, but no gradient flows back to an input of shape [5, 4];")
    assert not assess(task, torch.no_grad()(task.solution))
    task.gradient = False
    try:
        assert assess(task, torch.no_grad()(task.solution))
    finally:
        task.gradient = True
    task = TASKS["t5.RMSNorm"]

    class Norm(task.solution):
        def forward(self, x):
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight.data

    assert "no gradient flows back to a parameter of shape [6]" in assess(task, Norm).message
    assert "a parameter of shape [6]" in gradients(task, task.solution, task.cases()[0])


class ParameterLoRA(nn.Module):
    def __init__(self, old, A, B, scale):
        super().__init__()
        self.old, self.A, self.B, self.scale = old, nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, x):
        return self.old(x) + self.scale * (x @ self.A.T @ self.B.T)


class LinearLoRA(nn.Module):
    def __init__(self, old, A, B, scale):
        super().__init__()
        self.old, self.scale = old.requires_grad_(False), scale
        self.down, self.up = (nn.Linear(*weight.shape[::-1], bias=False) for weight in (A, B))
        self.down.weight.data, self.up.weight.data = A, B

    def forward(self, x):
        return self.old(x) + self.scale * self.up(self.down(x))


@pytest.mark.parametrize("layer", [ParameterLoRA, LinearLoRA])
def test_a_lora_layer_may_store_its_matrices_as_parameters(layer):
    assert assess(TASKS["lora.layer"], layer)


def test_a_known_mistake_is_named_when_it_returns_nan():
    def best(x, t, points):
        weights = torch.exp(-(x[:, None] - (1 - t) * points).square().sum(-1) / (2 * t * t))
        return (x - weights / weights.sum(-1, keepdim=True) @ points) / t

    assert "use `softmax`" in assess(TASKS["flow.best"], best).message


def test_an_answer_may_use_autograd():
    def slope(x):
        """The derivative of the sum of the cubes."""
        return 3 * x**2

    def by_autograd(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x**3).sum(), x)[0]

    task = task_of(slope, [(normal(3),)], gradient=False)
    assert assess(task, by_autograd)


# ---------------------------------------------------------------- styles, and what follows


@pytest.mark.parametrize("number", [np.float64, np.float32, np.array, torch.tensor, lambda x: torch.tensor(x).double()])
def test_any_kind_of_number_passes(number):
    task = TASKS["sampling.mu"]
    assert assess(task, lambda tokens: number(task.solution(tokens)))


@pytest.mark.parametrize("kind", [list, Tensor.tolist, Tensor.numpy, Tensor.double])
def test_numbers_pass_as_a_sequence(kind):
    task = TASKS["sampling.schedule"]
    assert assess(task, lambda steps, mu: kind(task.solution(steps, mu)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Tensor.bool, "the values are right, but their dtype is bool; it should be float32."),
        (Tensor.long, "the values are right, but their dtype is int64; it should be float32."),
        (Tensor.tolist, "the values are right, but a list of numbers is not a tensor; return `torch.tensor(...)`."),
    ],
)
def test_an_answer_that_would_fail_in_the_next_cell_does_not_pass(change, message):
    task = TASKS["inside.points"]
    assert assess(task, lambda *maps: change(task.solution(*maps))).message == message


def test_a_wider_dtype_would_fail_in_the_model():
    task = TASKS["rope.rotate"]
    answer = lambda x, angles: task.solution(x.double(), angles)  # noqa: E731
    assert assess(task, answer).message == "the values are right, but their dtype is float64; it should be float32."


# ---------------------------------------------------------------- answers that nobody has written by hand

SAMPLE = [TASKS[name] for name in ("latents.pack", "t5.attend", "rope.rotate", "guidance.guide", "sampling.heun")]


def test_wrong_answers_are_rejected_and_explained():
    counts, accepted = survey(6, SAMPLE, show=None)
    rejected = sum(counts.values()) - counts["equivalent"] - len(accepted)
    assert rejected >= 30 and not accepted
    assert counts["none"] == 0  # each shows the place of an error
    assert counts["place of the first wrong value"] <= 0.4 * rejected


def test_right_answers_in_other_styles_pass():
    number, rejected = styles(SAMPLE)
    assert number >= 20 and not rejected


def test_a_wrong_answer_that_only_fresh_inputs_reveal_would_be_counted():
    task = TASKS["rope.rotate"]
    table = [(x, task.solution(x, angles)) for x, angles in task.cases()]
    memorised = lambda x, angles: next(  # noqa: E731
        (y + 0 * (x + angles.sum()) for known, y in table if torch.equal(x, known)), x
    )
    assert assess(task, memorised) and not right_for_others(task, memorised)


def test_rewritten_answers_differ_from_the_solution():
    task = TASKS["t5.attend"]
    texts = wrong_answers(task, 0)
    assert len(texts) > 30 and len(set(texts)) == len(texts)
    assert {style for style, _ in right_answers(task)} >= {"Matmul", "Renamed", "Keywords"}
