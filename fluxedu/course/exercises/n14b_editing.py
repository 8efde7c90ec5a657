"""Notebook 14b: editing images."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes, wrong
from fluxedu.sampling import conditions as library
from fluxedu.sampling.latents import image_ids
from fluxedu.sampling.solvers import from_strength, schedule


def _starts() -> list[tuple]:
    g = torch.Generator().manual_seed(46)
    cases = []
    for steps, strength, side in ((8, 0.25, 16), (8, 0.6, 4), (20, 0.3, 4), (5, 1.0, 4)):
        clean, noise = (torch.randn(1, 16, side, side, generator=g) for _ in range(2))
        cases.append((clean, noise, schedule(steps, 64, True, (1.0986, 1.0986)), strength))
    return cases


def _by_library(clean: Tensor, noise: Tensor, times: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The reference: the library's schedule for this strength, and a linear interpolation."""
    rest = from_strength(times, strength)
    return torch.lerp(clean, noise, rest[0]), rest


@exercise(
    "family.start",
    minutes=4,
    difficulty=1,
    cases=_starts,
    against=_by_library,
    hints=(
        "Decide first which steps are run: they are the last ones of the schedule. Its times fall, so the first of the "
        "remaining times says how much noise there is.",
        "With N steps, run `math.ceil(N * strength)` of them; k steps need k + 1 times, `times[-(k + 1):]`.",
        "`k = math.ceil((len(times) - 1) * strength)`, `rest = times[-(k + 1):]`, `t = rest[0]`, "
        "`return (1 - t) * clean + t * noise, rest`.",
    ),
)
def start(clean: Tensor, noise: Tensor, times: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Where image-to-image starts: the state, like `clean [1, 16, h, w]`, and the times of the steps that remain.

    `times [N + 1]` is the whole schedule of N steps, from 1 to 0. The last N * strength steps are run, rounded up. The
    state is what rectified flow has at the first remaining time t: a share t of noise and 1 - t of the image.
    """
    k = math.ceil((len(times) - 1) * strength)  # steps to run
    rest = times[-(k + 1) :]
    t = rest[0]
    return (1 - t) * clean + t * noise, rest


@mistakes(
    "family.start",
    ("strength as time", "you mix with the strength as the time; the schedule is shifted, so the first time differs."),
    ("exchanged", "image and noise are exchanged: at t = 1 the state is pure noise."),
    ("added", "you add noise to the whole image; its own share falls to 1 - t."),
    ("next time", "you mix for the end of the first step; the state at its start is needed, at the first time."),
    ("root", "your weights are those of DDPM, with square roots; rectified flow mixes on a straight line."),
)
def _start_with(mistake, clean, noise, times, strength):
    steps = len(times) - 1
    k = math.ceil(steps * strength)
    rest = times[-(k + 1) :]
    t = torch.tensor(strength) if mistake == "strength as time" else rest[int(mistake == "next time")]
    if mistake == "added":
        return clean + t * noise, rest
    if mistake == "root":
        return (1 - t * t).sqrt() * clean + t * noise, rest
    if mistake == "exchanged":
        return t * clean + (1 - t) * noise, rest
    return (1 - t) * clean + t * noise, rest


def _test_velocity(x: Tensor, t: float) -> Tensor:
    """A made-up velocity that depends on state and time."""
    return 0.7 * x.roll(1, -1) * (1 + float(t)) - torch.sin(3 * x) + float(t) ** 2


def _inversions() -> list[tuple]:
    g = torch.Generator().manual_seed(41)
    return [
        (torch.randn(1, 3, 4, generator=g), torch.tensor([1.0, 0.7, 0.3, 0.0]), _test_velocity, 1),
        (torch.randn(2, 3, 5, generator=g), torch.tensor([1.0, 0.9, 0.75, 0.4, 0.0]), _test_velocity, 3),
    ]


def _by_recursion(x: Tensor, times: Tensor, velocity: Callable, rounds: int = 1) -> Tensor:
    """The reference, by recursion: invert the last step by fixed-point iteration, then the steps before it."""
    if len(times) < 2:
        return x
    t, t_next = times[-2], times[-1]
    guesses = [x]
    while len(guesses) <= rounds:
        guesses.append(x - (t_next - t) * velocity(guesses[-1], t))
    return _by_recursion(guesses[-1], times[:-1], velocity, rounds)


@exercise(
    "family.invert",
    minutes=13,
    difficulty=3,
    cases=_inversions,
    against=_by_recursion,
    hints=(
        "The sampler went from t to t_next with x_next = x + (t_next - t) v(x, t). You know x_next and look for x. "
        "v(x, t) needs the x that you do not have yet, so use x_next in its place at first.",
        "Go through the steps from the last to the first: `times[:-1].flip(0)` are their start times, "
        "`times[1:].flip(0)` their end times.",
        "For every step: `guess = x`, then `rounds` times `guess = x + (t - t_next) * velocity(guess, t)`, then "
        "`x = guess`.",
    ),
)
def invert(x: Tensor, times: Tensor, velocity: Callable, rounds: int = 1) -> Tensor:
    """Invert Euler's method: from the image `x [B, N, D]` at `times[-1]` to the state at `times[0]` that leads to it.

    `times` falls from 1 to 0, as in the sampler. For each step evaluate `velocity(x, t)` at the step's start time, as
    the sampler did. Find the state at the start by fixed-point iteration: the first guess is x itself, and each
    evaluation gives the next guess, `rounds` times in all.
    """
    for t, t_next in zip(times[:-1].flip(0), times[1:].flip(0), strict=True):
        guess = x
        for _ in range(rounds):
            guess = x + (t - t_next) * velocity(guess, t)
        x = guess
    return x


@mistakes(
    "family.invert",
    ("sampler's order", "you take the steps in the sampler's order; to go back, begin with its last step."),
    ("sign", "your step has the sampler's sign, so it continues towards the image; time grows during inversion."),
    ("end time", "you evaluate at t_next; the sampler evaluated at t, and that velocity has to be undone."),
    (
        "start moves",
        "each of your rounds starts where the last one ended, so the step is taken repeatedly; start at x each time.",
    ),
)
def _invert_with(mistake, x, times, velocity, rounds=1):
    steps = list(zip(times[:-1], times[1:], strict=True))
    for t, t_next in steps if mistake == "sampler's order" else reversed(steps):
        dt = t_next - t if mistake == "sign" else t - t_next
        guess = x
        for _ in range(rounds):
            start = guess if mistake == "start moves" else x
            guess = start + dt * velocity(guess, t_next if mistake == "end time" else t)
        x = guess
    return x


@exercise(
    "family.reference",
    minutes=4,
    difficulty=1,
    cases=lambda: [(4, 6), (10, 2), (16, 16)],
    against=library.reference_ids,
    tolerance=0,
    hints=(
        "As for the image itself (notebook 04): a token is 2 x 2 latent cells, and rows come before columns.",
        "`image_ids(height, width)` from fluxedu.sampling.latents gives rows and columns; only the frame is missing.",
        "`ids = image_ids(height, width)`, then `ids[:, 0] = 1`.",
    ),
)
def reference_ids(height: int, width: int) -> Tensor:
    """The position ids of FLUX.1 Kontext's reference image of `height x width` latent cells: `[h/2 * w/2, 3]`.

    Each id is (1, row, column). Row and column are those of an ordinary image of this size; only the frame differs.
    """
    ids = image_ids(height, width)  # [h/2 * w/2, 3]: (0, row, column)
    ids[:, 0] = 1
    return ids


def _grid_ids(height: int, width: int, frame: float = 1, offset: float = 0) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.full_like(rows, frame), rows, columns + offset], dim=-1).reshape(-1, 3).float()


wrong(
    "family.reference", "the frame is 0, that of the target: each token would share its position with a target token."
)(lambda height, width: _grid_ids(height, width, frame=0))
wrong("family.reference", "you put the reference beside the target in frame 0; it belongs in frame 1.")(
    lambda height, width: _grid_ids(height, width, frame=0, offset=width // 2)
)
wrong("family.reference", "columns come before rows in your ids; they are (1, row, column).")(
    lambda height, width: _grid_ids(height, width)[:, [0, 2, 1]]
)
wrong("family.reference", "your rows and columns count latent cells; they count tokens, which are two cells wide.")(
    lambda height, width: _grid_ids(height, width) * torch.tensor([1, 2, 2])
)


def _mixing_network(tokens: Tensor, ids: Tensor) -> Tensor:
    """A made-up network in which every token depends on all tokens and their ids."""
    place = ids @ torch.tensor([2.0, 0.3, 0.05])
    near = torch.softmax(-(place[:, None] - place[None, :]).abs(), dim=-1)  # [N + M, N + M]
    return torch.sin(tokens) + near @ tokens + 0.1 * place[:, None]


def _edits() -> list[tuple]:
    g = torch.Generator().manual_seed(45)
    cases = []
    for batch, shape, reference_shape in ((1, (16, 16), (16, 16)), (3, (4, 6), (6, 8))):
        ids, other_ids = image_ids(*shape), library.reference_ids(*reference_shape)
        x, reference = torch.randn(batch, len(ids), 64, generator=g), torch.randn(1, len(other_ids), 64, generator=g)
        cases.append((_mixing_network, x, ids, reference, other_ids))
    return cases


def _with_filled_tables(network: Callable, x: Tensor, ids: Tensor, reference: Tensor, reference_ids: Tensor) -> Tensor:
    """The reference: tables of the right size, filled one image after another."""
    n, m = len(ids), len(reference_ids)
    tokens, every_id = x.new_zeros(len(x), n + m, x.shape[-1]), ids.new_zeros(n + m, 3)
    tokens[:, :n], tokens[:, n:] = x, reference
    every_id[:n], every_id[n:] = ids, reference_ids
    return network(tokens, every_id).narrow(1, 0, n)


@exercise(
    "family.velocity",
    minutes=6,
    difficulty=2,
    cases=_edits,
    against=_with_filled_tables,
    tolerance=1e-5,
    hints=(
        "The network takes one sequence of tokens and one list of ids. Join both, in the same order, call it, and keep "
        "a part of what it returns.",
        "`reference` has a batch of 1, x may have more: `reference.expand(len(x), -1, -1)`. Tokens are joined along "
        "dim 1, ids along dim 0.",
        "`tokens = torch.cat([x, reference.expand(len(x), -1, -1)], dim=1)`, `v = network(tokens, "
        "torch.cat([ids, reference_ids]))`, `return v[:, : x.shape[1]]`.",
    ),
)
def edit_velocity(network: Callable, x: Tensor, ids: Tensor, reference: Tensor, reference_ids: Tensor) -> Tensor:
    """The velocity of the target in FLUX.1 Kontext: `x [B, N, 64]`, `reference [1, M, 64]` -> `[B, N, 64]`.

    `network(tokens [B, N + M, 64], ids [N + M, 3])` returns the velocities of all tokens. The target's tokens come
    first; `ids [N, 3]` and `reference_ids [M, 3]` are the position ids of the two images. The reference is the same for
    every target of the batch.
    """
    tokens = torch.cat([x, reference.expand(len(x), -1, -1)], dim=1)  # [B, N + M, 64]
    v = network(tokens, torch.cat([ids, reference_ids]))  # [B, N + M, 64]
    return v[:, : x.shape[1]]


@mistakes(
    "family.velocity",
    ("reference first", "the reference's tokens come first in your sequence; they come after the target's."),
    ("ids exchanged", "the ids are in another order than the tokens: the target's ids come first."),
    ("target's ids", "you give the reference the ids of the target; it has ids of its own, in frame 1."),
    ("no reference", "the network receives the target only; it has to see the reference in every step."),
    ("last", "you keep the velocities at the end, those of the reference; the target's are at the beginning."),
)
def _velocity_with(mistake, network, x, ids, reference, reference_ids):
    n, reference = x.shape[1], reference.expand(len(x), -1, -1)
    if mistake == "reference first":
        return network(torch.cat([reference, x], dim=1), torch.cat([reference_ids, ids]))[:, :n]
    if mistake == "no reference":
        return network(x, ids)
    every_id = torch.cat([ids, reference_ids])
    if mistake == "ids exchanged":
        every_id = torch.cat([reference_ids, ids])
    if mistake == "target's ids":
        every_id = every_id * torch.tensor([0, 1, 1])
    v = network(torch.cat([x, reference], dim=1), every_id)
    return v[:, -n:] if mistake == "last" else v[:, :n]
