"""How time steers the blocks: every shift, scale and gate, without drawing anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.lenses.run import blocks_of, how_many, number, one_prompt
from fluxedu.instruments.named import Named
from fluxedu.models.flux import Plan
from fluxedu.sampling.pipeline import FluxPipeline

KINDS = ("shift", "scale", "gate")


def modulation(
    pipe: FluxPipeline, prompt: str, *, times: int | Sequence[float] | torch.Tensor = 21, guidance: float | None = None
) -> Named:
    """The size of every modulation over time and depth: axes ``time, layer, kind``, the root mean square over channels.

    times: how many, from 1 to 0, or a tensor of them. A layer is a block's part, ``double.0.img_attn``,
    ``double.0.img_mlp``, ``single.3``; kinds are shift, scale and gate. They depend on the time, the guidance and the
    pooled text only, so no picture is drawn. AdaLN: arXiv 2212.09748.
    """
    table = channels(pipe, prompt, times=times, guidance=guidance)
    return table.dropped("channel", table.tensor.square().mean(-1).sqrt())


@torch.no_grad()
def channels(
    pipe: FluxPipeline, prompt: str, *, times: int | Sequence[float] | torch.Tensor = 21, guidance: float | None = None
) -> Named:
    """The modulations themselves: axes ``time, layer, kind, channel``; else as :func:`modulation`."""
    flux = pipe.flux
    clock = _clock(times)
    strength = pipe.defaults.guidance if guidance is None else number(guidance, "guidance")
    given = torch.tensor([float(strength)], device=pipe.device) if flux.config.guidance_embed else None
    plan = flux.plan(clock.to(pipe.device)[:, None], given, pipe.prompt_encoder([one_prompt(prompt)]).pooled)
    names, rows = _rows(pipe, plan)
    table = torch.stack([row.unflatten(-1, (3, -1)).float() for row in rows], dim=1).cpu()
    coords = {"time": clock.tolist(), "layer": names, "kind": list(KINDS)}
    return Named(table, ("time", "layer", "kind", "channel"), coords)


def _clock(times: int | Sequence[float] | torch.Tensor) -> torch.Tensor:
    if isinstance(times, int) and not isinstance(times, bool):
        return torch.linspace(1, 0, how_many(times, "times is how many, or some of them in [0, 1]", 10_000))
    try:
        clock = torch.as_tensor(times, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        clock = torch.zeros(())
    if clock.ndim != 1 or not len(clock) or not bool(((clock >= 0) & (clock <= 1)).all()):
        raise InstrumentError(f"times is how many, a whole number, or some of them in [0, 1], not {describe(times)}.")
    return clock


def _rows(pipe: FluxPipeline, plan: Plan) -> tuple[list[str], list[torch.Tensor]]:
    """Each layer's row ``[T, 3 D]``."""
    names, rows = [], []
    for name, mods in zip(blocks_of(pipe), [*plan.double, *plan.single], strict=True):
        if isinstance(mods, dict):
            for stream, row in mods.items():
                for part, half in zip(("attn", "mlp"), row[:, 0].chunk(2, dim=-1), strict=True):
                    names.append(f"{name}.{stream}_{part}")
                    rows.append(half)
        else:
            names.append(name)
            rows.append(mods[:, 0])
    return names, rows
