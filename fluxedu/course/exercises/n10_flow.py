"""Notebook 10: rectified flow in the plane."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong


def _data_and_noise() -> list[tuple]:
    g = torch.Generator().manual_seed(10)
    plane = torch.randn(3, 2, generator=g) + 1, torch.randn(3, 2, generator=g), torch.tensor([0.2, 0.5, 0.9])
    latents = torch.randn(2, 3, 4, 5, generator=g), torch.randn(2, 3, 4, 5, generator=g), torch.tensor([0.1, 0.7])
    return [plane, latents]


def _by_lerp(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: `torch.lerp`, one sample at a time."""
    x_t = torch.stack([torch.lerp(x0[i], noise[i], t[i]) for i in range(len(x0))])
    return x_t, torch.sub(noise, x0)


@exercise(
    "flow.between",
    minutes=5,
    difficulty=1,
    cases=_data_and_noise,
    against=_by_lerp,
    hints=(
        "At t = 0 the state is the image, at t = 1 it is the noise, and at t = 0.5 it is the mean of both.",
        "`t` has one number per sample. To multiply a whole sample by it, give it as many axes as `x0` has.",
        "`t = t.view(-1, *[1] * (x0.ndim - 1))`, then `(1 - t) * x0 + t * noise`; the velocity is its derivative by t.",
    ),
)
def between(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The state at time `t [B]` on the straight line from `x0 [B, ...]` to `noise [B, ...]`, and its velocity.

    Return two tensors of the shape of `x0`. Time 0 is the image, time 1 the noise. The velocity is the derivative of
    the state with respect to time.
    """
    t = t.view(-1, *[1] * (x0.ndim - 1))  # [B] -> [B, 1, ...]
    return (1 - t) * x0 + t * noise, noise - x0


wrong("flow.between", "your time runs in the opposite direction: here t = 0 is the image and t = 1 the noise.")(
    lambda x0, noise, t: between(noise, x0, t)
)
wrong("flow.between", "the velocity has the wrong sign: the state moves towards the noise as t grows, noise - x0.")(
    lambda x0, noise, t: (between(x0, noise, t)[0], x0 - noise)
)
wrong("flow.between", "you return the noise, which DDPM-style models predict; the velocity of a flow is noise - x0.")(
    lambda x0, noise, t: (between(x0, noise, t)[0], noise)
)


@wrong("flow.between", "your weights are square roots, as in DDPM; a straight line needs the weights 1 - t and t.")
def _roots(x0, noise, t):
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return (1 - t).sqrt() * x0 + t.sqrt() * noise, noise - x0


def _models() -> list[tuple]:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return (1 + t.view(-1, *[1] * (x.ndim - 1))) * x.cos()

    return [(model, *case) for case in _data_and_noise()]


def _mse(model: Callable, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    x_t, v = _by_lerp(x0, noise, t)
    return F.mse_loss(model(x_t, t), v)


@exercise(
    "flow.loss",
    minutes=6,
    difficulty=1,
    cases=_models,
    against=_mse,
    hints=(
        "Give the network a state between image and noise together with its time, and compare its output with the "
        "velocity of that line.",
        "`between(x0, noise, t)` returns both the network's input and its target.",
        "`x_t, v = between(x0, noise, t)`, then the mean of `(model(x_t, t) - v) ** 2`.",
    ),
)
def loss(model: Callable, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The training loss of rectified flow: the mean squared difference of `model(x_t, t)` and the velocity.

    `x0 [B, ...]` are images, `noise [B, ...]` is noise, and `t [B]` has one time per sample. Return one number.
    """
    t_view = t.view(-1, *[1] * (x0.ndim - 1))  # [B] -> [B, 1, ...]
    x_t = (1 - t_view) * x0 + t_view * noise
    v = noise - x0
    return (model(x_t, t) - v).square().mean()


wrong("flow.loss", "the network gets the clean images; it must get the states between image and noise.")(
    lambda model, x0, noise, t: (model(x0, t) - (noise - x0)).square().mean()
)
wrong("flow.loss", "the target is x0 - noise: with t = 1 as noise, the velocity is noise - x0.")(
    lambda model, x0, noise, t: (model(_by_lerp(x0, noise, t)[0], t) + noise - x0).square().mean()
)
wrong("flow.loss", "you return the sum; the mean does not grow with batch size and image size.")(
    lambda model, x0, noise, t: _mse(model, x0, noise, t) * x0.numel()
)
wrong("flow.loss", "the network gets 1 - t as its time; it must be the time t of the state that it gets.")(
    lambda model, x0, noise, t: _mse(lambda x, t: model(x, 1 - t), x0, noise, t)
)


def _trainings() -> list[tuple]:
    g = torch.Generator().manual_seed(14)
    cases = []
    for steps, batch, learning_rate in ((4, 3, 0.1), (25, 256, 0.03)):
        x0, noise = torch.randn(2, steps + 1, batch, 2, generator=g)
        t = torch.rand(steps + 1, batch, generator=g)
        cases.append((torch.randn(2, 3, generator=g), x0 + 1, noise, t, steps, learning_rate))
    return cases


class _Affine(nn.Module):
    """A network that is small enough to train in a check."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, t[:, None]], dim=-1) @ self.weight.T


def _trained(answer: Callable, weight: Tensor, x0: Tensor, noise: Tensor, t: Tensor, steps: int, rate: float):
    """The losses that a training loop returns, and the weight that it leaves behind."""
    model, batches, times = _Affine(weight.clone()), zip(x0, noise, strict=True), iter(t)
    with torch.enable_grad():
        losses = answer(model, _mse, lambda: next(batches), lambda count: next(times)[:count], steps, rate)
    return None if losses is None else (torch.tensor([float(value) for value in losses]), model.weight.detach())


def _adam_by_hand(model, loss, pairs, draw_times, steps, learning_rate):
    """The reference: Adam written out, with `autograd.grad` instead of stored gradients."""
    mean, square, losses = 0.0, 0.0, []
    for i in range(1, steps + 1):
        x0, noise = pairs()
        value = loss(model, x0, noise, draw_times(len(x0)))
        (gradient,) = torch.autograd.grad(value, [model.weight])
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        step = (mean / (1 - 0.9**i)) / ((square / (1 - 0.999**i)).sqrt() + 1e-8)
        model.weight.data -= learning_rate * step
        losses.append(value.item())
    return losses


@exercise(
    "flow.fit",
    minutes=10,
    difficulty=2,
    cases=_trainings,
    call=_trained,
    against=_adam_by_hand,
    tolerance=1e-3,
    hints=(
        "In each step: draw images and noise, draw times, compute the loss, and let the optimiser change the weights.",
        "PyTorch adds each gradient to the stored one, so call `optimiser.zero_grad()` once per step, before "
        "`backward()`. `value.item()` is the loss as a float.",
        "`x0, noise = pairs()`, `value = loss(model, x0, noise, draw_times(len(x0)))`, `optimiser.zero_grad()`, "
        "`value.backward()`, `optimiser.step()`, `losses.append(value.item())`.",
    ),
)
def fit(
    model: nn.Module, loss: Callable, pairs: Callable, draw_times: Callable, steps: int, learning_rate: float
) -> list[float]:
    """Train `model` for `steps` steps with `torch.optim.Adam`, and return the loss of each step as floats.

    In each step, `x0, noise = pairs()` draws a batch and `draw_times(B)` draws one time for each of its B samples.
    `loss(model, x0, noise, t)` is the quantity to be minimised. The model is changed in place.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        x0, noise = pairs()
        value = loss(model, x0, noise, draw_times(len(x0)))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    return losses


@mistakes(
    "flow.fit",
    ("accumulated", "the gradients are never reset, so each step also repeats all earlier ones; call zero_grad()."),
    ("one batch", "you draw one batch before the loop; draw a new one in each step."),
    ("one time", "all samples of a batch get the same time; draw as many times as there are samples."),
    ("SGD", "that is plain gradient descent; use torch.optim.Adam."),
    ("ascent", "the loss grows: you minimise its negative."),
    ("frozen", "the weights do not change; call the optimiser's step() after backward()."),
)
def _fit_with(mistake, model, loss, pairs, draw_times, steps, learning_rate):
    kind = torch.optim.SGD if mistake == "SGD" else torch.optim.Adam
    optimiser, losses = kind(model.parameters(), lr=learning_rate), []
    for i in range(steps):
        if mistake != "one batch" or i == 0:
            x0, noise = pairs()
        value = loss(model, x0, noise, draw_times(1).expand(len(x0)) if mistake == "one time" else draw_times(len(x0)))
        if mistake != "accumulated":
            optimiser.zero_grad()
        (-value if mistake == "ascent" else value).backward()
        if mistake != "frozen":
            optimiser.step()
        losses.append(value.item())
    return losses


def _runs() -> list[tuple]:
    def velocity(x: Tensor, t: float) -> Tensor:
        return x.sin() + (2 * t) ** 2 * x

    g = torch.Generator().manual_seed(15)
    x = torch.randn(1, 16, 16, 16, generator=g)
    return [
        (velocity, torch.randn(3, 2, generator=g), [1.0, 0.9, 0.6, 0.25, 0.0], lambda noise: noise.flip(0) / 2),
        (velocity, x, [1.0, 0.75, 0.0], lambda noise: noise),
        (velocity, x, [0.75, 0.5, 0.25], lambda noise: noise.cos()),
    ]


def _by_euler(velocity: Callable, x: Tensor, times: Sequence[float], renoise: Callable) -> Tensor:
    """The reference: a step of Euler's method, corrected by the difference of the new noise and the predicted one."""
    states = [x]
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        noise = torch.add(x, v, alpha=1 - t)
        x = torch.add(x, v, alpha=t_next - t) + t_next * (renoise(noise) - noise)
        states.append(x)
    return torch.stack(states)


@exercise(
    "flow.sample",
    minutes=8,
    difficulty=2,
    cases=_runs,
    against=_by_euler,
    hints=(
        "A velocity implies both ends of the line through the state. Compute both, and mix them for the next time.",
        "`x0 = x - t * v` is the predicted image and `noise = x + (1 - t) * v` the predicted noise.",
        "In the loop over `zip(times[:-1], times[1:])`: `v = velocity(x, t)`, the two predictions, and then "
        "`x = (1 - t_next) * x0 + t_next * renoise(noise)`, appended to `states`; at the end `torch.stack(states)`.",
    ),
)
def sample(velocity: Callable, x: Tensor, times: Sequence[float], renoise: Callable) -> Tensor:
    """From the noise `x [B, ...]` to the image: all states, `[N + 1, B, ...]`, the first being `x` itself.

    `times` are N + 1 decreasing numbers. In each step, the velocity `v = velocity(x, t)` implies a predicted image and
    a predicted noise, called `noise` here. The next state is their mixture for the time `t_next`, but with
    `renoise(noise)` in place of `noise`.
    """
    states = [x]
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = velocity(x, t)
        x0, noise = x - t * v, x + (1 - t) * v
        x = (1 - t_next) * x0 + t_next * renoise(noise)
        states.append(x)
    return torch.stack(states)


@mistakes(
    "flow.sample",
    ("sign", "your predicted image lies on the side of the noise: it is x - t v, since v points towards the noise."),
    ("late time", "you evaluate the velocity at the time where the step ends; it belongs to the time where it starts."),
    ("whole", "your predicted noise is too far away: the noise lies 1 - t from the state, not 1."),
    ("same noise", "you mix with the predicted noise itself; mix with renoise(noise)."),
    ("old time", "you mix image and noise for the time t; the next state belongs to t_next."),
    ("exchanged", "the weights of the mixture are exchanged: t_next is the weight of the noise."),
    ("state", "you pass the state to renoise; pass the predicted noise."),
)
def _sample_with(mistake, velocity, x, times, renoise):
    states = [x]
    for t, t_next in pairwise(times):
        v = velocity(x, t_next if mistake == "late time" else t)
        x0 = x + t * v if mistake == "sign" else x - t * v
        noise = x + (1 if mistake == "whole" else 1 - t) * v
        new = noise if mistake == "same noise" else renoise(x if mistake == "state" else noise)
        weight = {"old time": t, "exchanged": 1 - t_next}.get(mistake, t_next)
        x = (1 - weight) * x0 + weight * new
        states.append(x)
    return torch.stack(states)
