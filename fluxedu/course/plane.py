"""Flows in the plane for notebooks 10 and 10b: a small network, its training, and counts of trajectories that cross."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Pairs = Callable[[], tuple[Tensor, Tensor]]


class VelocityNetwork(nn.Module):
    """From points ``x [B, 2]`` and times ``t [B]`` to velocities ``[B, 2]``: three linear layers with SiLU.

    Besides the point it reads the time, and sines and cosines of the time.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])  # [B, 4]
        return self.layers(torch.cat([x, t[:, None], angles.cos(), angles.sin()], dim=-1))


def field(model: nn.Module) -> Callable[[Tensor, float], Tensor]:
    """The model as ``velocity(x, t)`` with one time for all points, as a solver calls it."""

    @torch.no_grad()
    def velocity(x: Tensor, t: float) -> Tensor:
        return model(x, torch.full((len(x),), t))

    return velocity


def train(pairs: Pairs, steps: int, learning_rate: float, initial: nn.Module | None = None) -> VelocityNetwork:
    """Train a network on batches ``x0, noise = pairs()`` with uniform times, starting from ``initial`` if given.

    The learning rate rises and falls again during the training.
    """
    torch.manual_seed(1)
    model = VelocityNetwork()
    if initial is not None:
        model.load_state_dict(initial.state_dict())
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps)
    for _ in range(steps):
        x0, noise = pairs()
        t = torch.rand(len(x0))
        x_t = (1 - t)[:, None] * x0 + t[:, None] * noise
        optimiser.zero_grad()
        (model(x_t, t) - (noise - x0)).square().mean().backward()
        optimiser.step()
        schedule.step()
    return model


def crossings(path: Tensor) -> int:
    """How many pairs of the trajectories ``path [N + 1, B, 2]`` cross in the plane, at whatever times."""

    def side(a: Tensor, b: Tensor, c: Tensor) -> Tensor:  # above zero if c is to the left of the line from a to b
        return (b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0]

    path, count = path[::2], 0
    for i in range(path.shape[1] - 1):
        a, b = path[:-1, i, None, None], path[1:, i, None, None]  # [N, 1, 1, 2]: the segments of trajectory i
        c, d = path[None, :-1, i + 1 :], path[None, 1:, i + 1 :]  # [1, N, B - i - 1, 2]: those of the later ones
        crosses = (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
        count += int(crosses.any(0).any(0).sum())
    return count


def meetings(path: Tensor, times: Sequence[float], until: float = 0.2) -> int:
    """How many pairs are closer than 0.1 at the same time, with velocities that differ by more than 1.

    Times after ``until`` are left out: near t = 0, all lines to the same data point come together.
    """
    meet = torch.zeros(path.shape[1], path.shape[1], dtype=torch.bool)
    for k, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        if t > until:
            v = (path[k + 1] - path[k]) / (t_next - t)
            meet |= (torch.cdist(path[k], path[k]) < 0.1) & (torch.cdist(v, v) > 1)
    return int(meet.triu(1).sum())
