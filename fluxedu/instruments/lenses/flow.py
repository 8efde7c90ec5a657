"""The velocity field itself: where it points, whether it spreads, and how straight its trajectories are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fluxedu.errors import InstrumentError, check_integer, check_number, describe
from fluxedu.instruments.interventions import intervene
from fluxedu.instruments.lenses.run import LensResult, lens
from fluxedu.instruments.named import Named
from fluxedu.progress import progress_bar
from fluxedu.sampling.pipeline import FluxPipeline, Output, Trajectory
from fluxedu.sampling.request import Request


@lens
def straightness(trajectory: Trajectory) -> Named:
    """How far a trajectory is from the straight line between its ends: axis ``picture``; a straight one has 0.

    ``sum dt |v - (x_noise - x_image)|^2 / |x_noise - x_image|^2``, the integral of arXiv 2209.03003 over the steps
    of the run, relative to the length of the line.
    """
    latents, velocities, times = trajectory.latents, trajectory.velocities, trajectory.times
    line = (latents[0] - latents[-1]) / (times[0] - times[-1]).to(velocities)  # the constant velocity between the ends
    dt = (times[:-1] - times[1:]).to(velocities).view(-1, 1)
    deviation = (velocities - line).flatten(2).square().sum(-1)  # [N, B]
    return Named((dt * deviation).sum(0) / line.flatten(1).square().sum(-1), ("picture",))


@lens
def curvature(trajectory: Trajectory) -> Named:
    """How much the velocity turns from step to step: axes ``step, picture``, in degrees per unit of time.

    A straight trajectory (arXiv 2209.03003) has 0. Where the value is large, more steps would help.
    """
    v, times = trajectory.velocities.flatten(2), trajectory.times
    cosine = torch.cosine_similarity(v[:-1].double(), v[1:].double(), dim=-1).clamp(-1, 1)
    dt = (times[:-2] - times[1:-1]).double().view(-1, 1).to(v.device)
    return Named((cosine.acos().rad2deg() / dt).float(), ("step", "picture"), {"step": times[1:-1].tolist()})


@lens
def divergence(pipe: FluxPipeline, prompt: str, *, probes: int = 8, seed: int = 0, **options) -> LensResult:
    """The divergence of the velocity along a trajectory, per number of the latent: axis ``step``.

    ``div v = trace(dv/dx)``, estimated as the mean of ``e . (v(x + h e) - v(x - h e)) / 2h`` over random signs e
    (Hutchinson; arXiv 1810.01367). Where it is positive, neighbouring trajectories approach each other on their way
    to the image, as t falls.
    """
    check_integer("probes", probes, 1, 1000, error=InstrumentError)
    seed = check_integer("seed", seed, 0, 2**63 - 2, error=InstrumentError)
    out, velocity = _run_with_velocity(pipe, prompt, {"seed": seed} | options)
    times, latents, h = out.trajectory.times[:-1].tolist(), out.trajectory.latents, 0.01
    generator, divergences = torch.Generator("cpu").manual_seed(seed), []
    for i, t in enumerate(progress_bar(times, desc="divergence", leave=False)):
        x, total = latents[i], 0.0
        for _ in range(probes):
            e = (torch.randint(0, 2, x.shape, generator=generator, device="cpu") * 2 - 1).to(x)
            difference = velocity(x + h * e, t) - velocity(x - h * e, t)
            total += float((difference.double() * e.double()).sum()) / (2 * h)
        divergences.append(total / probes / x.numel())
    found = torch.tensor(divergences, dtype=torch.float32, device="cpu")
    return LensResult(found, ("step",), {"step": times}, out.images)


@lens
def velocity_field(
    pipe: FluxPipeline, prompt: str, *, at_step: int = 0, size: int = 9, reach: float = 1.0, seed: int = 0, **options
) -> LensResult:
    """The velocity on a plane of latents: axes ``up, across, what``; what: two coordinates, two components.

    The origin is the state of the run at ``at_step``. The axis ``across`` points to the image of the run, the axis
    ``up`` to the state of another seed, made orthogonal; the unit is the distance to the image, and the plane extends
    to ``reach`` in each direction, with ``size`` points per side. The components are those of ``-t v``, the
    displacement of the sampler over all the remaining time: (1, 0) at the origin if the trajectory is straight from
    there. The plane is our own choice; velocity fields of flows: arXiv 2210.02747.
    """
    check_integer("size", size, 1, 256, error=InstrumentError)
    check_integer("seed", seed, 0, 2**63 - 2, error=InstrumentError)
    reach = check_number("reach", reach, -1e30, 1e30, error=InstrumentError)
    out, velocity = _run_with_velocity(pipe, prompt, {"seed": [seed, seed + 1]} | options)
    times, latents = out.trajectory.times[:-1].tolist(), out.trajectory.latents[:-1]
    if not isinstance(at_step, int) or not -len(times) <= at_step < len(times):
        raise InstrumentError(f"the run has {len(times)} steps, so there is no step {describe(at_step)}.")
    t, x = times[at_step], latents[at_step, :1]
    across = out.latents[:1] - x
    unit = across.norm()
    up = latents[at_step, 1:] - x
    up = up - (up * across).sum() / unit**2 * across
    across, up = across / unit, up / up.norm()
    line = torch.linspace(-reach, reach, size, dtype=torch.float32, device="cpu")
    table = torch.zeros(size, size, 4, dtype=torch.float32, device="cpu")
    for i, b in enumerate(progress_bar(line, desc="field", leave=False)):
        for j, a in enumerate(line):
            v = -velocity(x + unit * (a * across + b * up), t)
            components = [float((v * axis).sum() / unit * t) for axis in (across, up)]
            table[i, j] = table.new_tensor([float(a), float(b), *components])
    coords = {"what": ["across", "up", "v across", "v up"]}
    return LensResult(table, ("up", "across", "what"), coords, out.images[:1])


def _run_with_velocity(pipe: FluxPipeline, prompt: str, options: dict) -> tuple[Output, Callable]:
    """A run, and its guided velocity as a function of a latent ``[1, C, h, w]`` and one of the run's times."""
    requests: list[Request] = []

    def keep_request(noise: Tensor, ctx) -> Tensor:
        requests.append(ctx.step_context.request)
        return noise

    with intervene("sample.noise", keep_request):
        out = pipe(prompt, **({"progress": False} | options | {"trajectory": True}))
    encoded, negative = pipe.encode(requests[:1])
    texts = encoded if negative is None else negative.joined(encoded)
    velocity = pipe.velocity_field(requests[:1], out.trajectory.times, texts)
    return out, torch.no_grad()(velocity)
