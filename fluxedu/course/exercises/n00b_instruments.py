"""Notebook 00b: instruments."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.course.exercises import random_weights, run_module, subclass
from fluxedu.instruments import Context, Named


def _recordings() -> list[tuple]:
    g = torch.Generator().manual_seed(1)
    sizes = ({"step": 2, "text": 5, "channel": 3}, {"image": 64, "channel": 160}, {"channel": 4, "row": 2, "column": 3})
    return [(Named(torch.randn(*s.values(), generator=g), tuple(s)),) for s in sizes]


def _reduced(answer: Callable, value: Named):
    """The result as numbers and the names of its axes."""
    result = answer(value)
    if isinstance(result, Tensor):
        raise TypeError('a recording needs a Named; `value.dropped("channel", numbers)` makes one')
    return (result.tensor, " ".join(result.axes)) if isinstance(result, Named) else result


@exercise(
    "instruments.lengths",
    minutes=5,
    difficulty=1,
    cases=_recordings,
    call=_reduced,
    hints=(
        "The length is the square root of the sum of squares along one axis; torch has a function for it.",
        '`value.axis("channel")` is the number of that axis, which may differ from case to case, and '
        "`tensor.norm(dim=...)` the length.",
        '`value.dropped("channel", value.tensor.norm(dim=value.axis("channel")))`.',
    ),
)
def lengths(value: Named) -> Named:
    """The length of every token of a recorded value: the Euclidean norm along its axis "channel".

    The result is a `Named` without that axis; `value.dropped("channel", numbers)` makes one.
    """
    return value.dropped("channel", value.tensor.norm(dim=value.axis("channel")))


@mistakes(
    "instruments.lengths",
    ("squared", "you return the sum of squares; the length is its square root."),
    ("mean", "you divide by the number of channels: the length has the sum of squares under the root, not the mean."),
    ("absolute", "you add absolute values; the Euclidean length adds squares and takes the root."),
    ("largest", "you return the largest absolute value along the axis, not the length."),
)
def _lengths(mistake: str, value: Named) -> Named:
    x, axis = value.tensor, value.axis("channel")
    result = {
        "squared": lambda: x.square().sum(axis),
        "mean": lambda: x.square().mean(axis).sqrt(),
        "absolute": lambda: x.abs().sum(axis),
        "largest": lambda: x.abs().amax(axis),
    }
    return value.dropped("channel", result[mistake]())


def _tokens() -> list[tuple]:
    g = torch.Generator().manual_seed(2)
    return [
        ([1], 0.0, torch.randn(2, 4, 4, generator=g)),
        ([0, 3], -1.5, torch.randn(1, 32, 160, generator=g)),
        ([2], 1.0, torch.randn(1, 3, 5, generator=g)),
    ]


def _changed(answer: Callable, tokens: list[int], factor: float, value: Tensor):
    """The value changed as an intervention changes it: the function gets a copy and a context."""
    change = answer(tokens, factor)
    if not callable(change):
        raise TypeError(f"scale_tokens must return a function change(value, ctx), not a {type(change).__name__}")
    return change(value.clone(), Context("txt_in", ("batch", "text", "channel"), None))


@exercise(
    "instruments.scale_tokens",
    minutes=5,
    difficulty=1,
    cases=_tokens,
    call=_changed,
    hints=(
        "Define a function `change(value, ctx)` inside `scale_tokens` and return it. It does not have to use `ctx`.",
        "The tokens are the second axis: `value[:, tokens]` selects them.",
        "`value` is a copy, so `change` may write to it: `value[:, tokens] = factor * value[:, tokens]`, then "
        "`return value`.",
    ),
)
def scale_tokens(tokens: list[int], factor: float) -> Callable:
    """A function for `fe.intervene`: it multiplies the vectors of the tokens with these indices by `factor`.

    Return a function `change(value, ctx)` that returns the changed value, `[batch, tokens, channels]`. The other tokens
    keep their values.
    """

    def change(value, ctx):
        value[:, tokens] = factor * value[:, tokens]
        return value

    return change


@mistakes(
    "instruments.scale_tokens",
    ("all", "you scale all tokens; only those with the given indices shall change."),
    ("channel", "you scale channels: the axes are batch, tokens, channels, and the indices count along the second."),
    ("add", "you add the factor; multiply by it."),
    ("set", "you set the vectors to the factor; multiply them by it."),
    ("others", "you scale the other tokens and keep the given ones; it is the other way round."),
)
def _scale_tokens(mistake: str, tokens: list[int], factor: float) -> Callable:
    def change(value, ctx):
        old, index = value.clone(), (..., tokens) if mistake == "channel" else (slice(None), tokens)
        value[index] = {"add": old[index] + factor, "set": torch.full_like(old[index], factor)}.get(
            mistake, factor * old[index]
        )
        if mistake == "others":
            value = factor * old
            value[index] = old[index]
        return factor * old if mistake == "all" else value

    return change


def _sequences() -> list[tuple]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(count, 1, 160, generator=g),) for count in (3, 20, 2)]


def _two_runs(answer: Callable, values: Tensor):
    """Two functions, each used in a run of its own with the steps 0, 1, 2, ...: what they return at each step."""
    contexts = [SimpleNamespace(site="vec", step=i, time=1 - i / len(values)) for i in range(len(values))]
    results = []
    for run in (values, -values.flip(0)):
        change = answer()
        if not callable(change):
            raise TypeError(f"hold must return a function change(value, ctx), not a {type(change).__name__}")
        results += [change(value.clone(), ctx) for value, ctx in zip(run, contexts, strict=True)]
    return results


@exercise(
    "instruments.hold",
    minutes=6,
    difficulty=2,
    cases=_sequences,
    call=_two_runs,
    hints=(
        "The inner function needs a place that outlives one call, such as a dictionary that `hold` creates.",
        "At `ctx.step == 0`, store the value in the dictionary. Return the stored value at every step.",
        '`first = {}` in `hold`; in `change` `if ctx.step == 0: first["value"] = value`, and `return first["value"]`.',
    ),
)
def hold() -> Callable:
    """A function for `fe.intervene`: at every step of a run it returns the value of the first step, number 0.

    Return a function `change(value, ctx)`; `ctx.step` is the number of the step. Each call of `hold()`
    returns a new function, with a store of its own.
    """
    first = {}

    def change(value, ctx):
        if ctx.step == 0:
            first["value"] = value
        return first["value"]

    return change


_shared: dict[str, Tensor] = {}


@mistakes(
    "instruments.hold",
    ("every step", "you store the value at every step, so nothing is held: store it at step 0 only."),
    ("previous", "you return the value of the step before; return that of step 0."),
    ("shared", "a second function still holds the value of the first; create the dictionary inside `hold`."),
    ("after", "you return the first value at step 1 only; return it at all later steps too."),
)
def _hold(mistake: str) -> Callable:
    stored = _shared if mistake == "shared" else {}

    def change(value, ctx):
        if mistake == "every step":
            return value
        if mistake == "previous":
            before = stored.get("value", value)
            stored["value"] = value
            return before
        if mistake == "shared":
            return stored.setdefault("value", value)
        first = stored.setdefault("value", value)
        return first if ctx.step < 2 else value

    return change


def _rows() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    sizes = (((2, 3, 4), 4, 4), ((1, 64, 64), 64, 160), ((5, 6), 6, 2))
    return [
        ((d_in, d_out), random_weights(nn.Linear(d_in, d_out), 4), torch.randn(shape, generator=g))
        for shape, d_in, d_out in sizes
    ]


@exercise(
    "instruments.Linear",
    minutes=4,
    difficulty=1,
    cases=_rows,
    call=run_module,
    against=nn.Linear,
    hints=(
        "Every output is a weighted sum of the inputs plus one number. A matrix product computes all of them at once.",
        "The weight is `[out, in]` and the tokens are `[..., in]`, so the weight must be transposed: `self.weight.T`.",
        "`return x @ self.weight.T + self.bias`.",
    ),
)
class Linear(nn.Module):
    """A linear layer: `x [..., in_features]` becomes `x Wᵀ + b`, `[..., out_features]`.

    The parameters are named `weight`, `[out_features, in_features]`, and `bias`, as in `torch.nn.Linear`, so that the
    trained values fit. Write it without calling a linear layer of torch.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        # your turn
        return x @ self.weight.T + self.bias


wrong("instruments.Linear", "the bias is missing.")(subclass(Linear, forward=lambda self, x: x @ self.weight.T))
wrong("instruments.Linear", "you reshape the weight to [in, out]; that mixes its numbers up. Transpose it: weight.T.")(
    subclass(Linear, forward=lambda self, x: x @ self.weight.reshape(self.weight.shape[::-1]) + self.bias)
)
wrong("instruments.Linear", "you subtract the bias; add it.")(
    subclass(Linear, forward=lambda self, x: x @ self.weight.T - self.bias)
)
wrong("instruments.Linear", "you divide by the square root of in_features; a linear layer does not scale its result.")(
    subclass(Linear, forward=lambda self, x: x @ self.weight.T / x.shape[-1] ** 0.5 + self.bias)
)
