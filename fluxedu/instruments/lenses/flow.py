"""The velocity field itself: where it points, whether it spreads, how straight its paths are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.interventions import intervene
from fluxedu.instruments.lenses.run import how_many, number, one_prompt
from fluxedu.instruments.named import Named
from fluxedu.sampling.latents import pack, unpack
from fluxedu.sampling.pipeline import FluxPipeline, Output, Trajectory
from fluxedu.sampling.request import Request


def _check_path(path: Trajectory) -> None:
    if not isinstance(path, Trajectory):
        raise InstrumentError(f"a path is a run's trajectory (trajectory=True), not {describe(path)}.")


def straightness(path: Trajectory) -> Named:
    """How far a path is from the straight line between its ends: axis ``picture``, 0 being straight.

    ``sum dt |v - (x_noise - x_picture)|^2 / |x_noise - x_picture|^2``, the integral of arXiv 2209.03003 over the steps
    that were taken, relative to the line's length.
    """
    _check_path(path)
    line = path.latents[0] - path.latents[-1]  # the velocity that would lead there at once, since t falls from 1 to 0
    dt = (path.times[:-1] - path.times[1:]).to(path.velocities).view(-1, 1)
    span = (path.times[0] - path.times[-1]).to(path.velocities)
    off = (path.velocities - line / span).flatten(2).square().sum(-1)  # [N, B]
    return Named((dt * off).sum(0) / (line / span).flatten(1).square().sum(-1), ("picture",))


def curvature(path: Trajectory) -> Named:
    """How much the velocity turns from step to step: axes ``step, picture``, in degrees per unit of time.

    Straight paths (arXiv 2209.03003) have 0. Where it is large, more steps would help.
    """
    _check_path(path)
    v = path.velocities.flatten(2)
    cosine = torch.cosine_similarity(v[:-1].double(), v[1:].double(), dim=-1).clamp(-1, 1)
    dt = (path.times[:-2] - path.times[1:-1]).double().view(-1, 1)
    return Named((cosine.acos().rad2deg() / dt).float(), ("step", "picture"), {"step": path.times[1:-1].tolist()})


def _run(pipe: FluxPipeline, prompt: str, asked: dict) -> tuple[Output, Callable[[Tensor, float], Tensor]]:
    """A run, and its guided velocity as a function of any latent ``[1, C, h, w]`` at the run's times."""
    requests: list[Request] = []
    with intervene("sample.noise", lambda x, ctx: requests.append(ctx.step_context.request) or x):
        out = pipe(one_prompt(prompt), **({"progress": False} | asked | {"trajectory": True}))
    (texts,) = pipe.encode(requests[:1])
    field = pipe.velocity_field(out.trajectory.times, texts, requests[0])
    return out, lambda x, t: unpack(field(pack(x), t), *x.shape[-2:])


def divergence(pipe: FluxPipeline, prompt: str, *, probes: int = 8, seed: int = 0, **asked) -> Named:
    """Whether the flow spreads or gathers along its path: axis ``step``, the divergence a number of the latent.

    ``div v = trace(dv/dx)``, estimated with random signs e as the mean of ``e . (v(x + h e) - v(x - h e)) / 2h``
    (Hutchinson; arXiv 1810.01367). Where it is positive, paths draw together on their way to the picture (t falls).
    """
    how_many(probes, "probes is how many", 1000)
    how_many(seed, "a seed is one", 2**63 - 2, least=0)
    out, field = _run(pipe, prompt, {"seed": seed} | asked)
    path, g, found, h = out.trajectory, torch.Generator().manual_seed(seed), [], 0.01
    steps = list(zip(path.latents[:-1], path.times.tolist(), strict=False))
    for x, t in tqdm(steps, desc="divergence", delay=1, leave=False):
        total = 0.0
        for _ in range(probes):
            e = (torch.randint(0, 2, x.shape, generator=g) * 2 - 1).to(x)
            ahead, behind = (field(x + s * h * e, t) for s in (1, -1))
            total += float(((ahead - behind).double() * e.double()).sum()) / (2 * h)
        found.append(total / probes / x.numel())
    return Named(torch.tensor(found), ("step",), {"step": path.times[:-1].tolist()})


def velocity_field(
    pipe: FluxPipeline, prompt: str, *, at_step: int = 0, size: int = 9, reach: float = 1.0, seed: int = 0, **asked
) -> Named:
    """The field on a plane of latents: axes ``up, across, what``; what: two coordinates, two components.

    The plane goes through the run's state at ``at_step``, the picture it ends at (across) and another seed's state
    (up), made orthogonal; one unit is the way to the picture. Arrows are ``-t v``, the way the sampler would walk in
    all the time that is left, so at the run's own point (0, 0) the arrow is (1, 0) when the path ahead is straight.
    The plane is our own choice; what a velocity field is to a flow: arXiv 2210.02747.
    """
    how_many(size, "size is how many arrows a side", 256)
    how_many(seed, "a seed is one", 2**63 - 2, least=0)
    reach = number(reach, "reach")
    out, field = _run(pipe, prompt, {"seed": [seed, seed + 1]} | asked)
    path, times = out.trajectory, out.trajectory.times.tolist()[:-1]
    if not isinstance(at_step, int) or not -len(times) <= at_step < len(times):
        raise InstrumentError(f"the run has {len(times)} steps, so there is no step {describe(at_step)}.")
    t = times[at_step]
    x = path.latents[:-1][at_step, :1]
    across = out.latents[:1] - x
    unit = across.norm()
    up = path.latents[:-1][at_step, 1:] - x
    up = up - (up * across).sum() / unit**2 * across
    across, up = across / unit, up / up.norm()
    line = torch.linspace(-reach, reach, size)
    table = torch.zeros(size, size, 4)
    for i, b in enumerate(tqdm(line, desc="field", delay=1, leave=False)):
        for j, a in enumerate(line):
            v = -field(x + unit * (a * across + b * up), t)
            along = [float((v * axis).sum() / unit * t) for axis in (across, up)]
            table[i, j] = torch.tensor([float(a), float(b), *along])
    return Named(table, ("up", "across", "what"), {"what": ["across", "up", "v across", "v up"]})
