"""What each size of card is predicted to hold: counted on the meta device, not measured on a card."""

from __future__ import annotations

from dataclasses import asdict

from fluxedu.memory.placement import GB, RESERVE, Networks, Placement, choose

CARDS = (80, 24, 16, 12, 8)


def predicted(
    cards: tuple[int, ...] = CARDS, variant: Networks | None = None, size: int = 1024, small: str | None = None
) -> list[dict]:
    """A row a card, in GB: what auto chooses there, what stays on the card, and the peak of each stage.

    ``small``: what the blocks' weights are quantised to.
    """
    networks, rows = variant or Networks.official(), []
    for card in cards:
        placement = choose(networks, "auto", card * GB - RESERVE, size, small=small)
        need = networks.need(placement, size, size, 512)
        rows.append(_row(f"{card} GB", placement, need, card * GB - RESERVE))
    return rows


def _row(name: str, placement: Placement, need, free: float) -> dict:
    stages = {stage: (need.resident + getattr(need, stage)) / GB for stage in ("text", "planning", "step", "decode")}
    return {
        "card": name,
        **asdict(placement),
        "resident": need.resident / GB,
        **stages,
        "peak": need.peak / GB,
        "fits": need.peak <= free,
    }


def table(size: int = 1024) -> str:
    """The prediction as text."""
    lines = [
        f"predicted, not measured: FLUX.1 dev in bfloat16, one picture of {size} x {size}, 512 text tokens, in GB;",
        f"{RESERVE / GB:g} GB of each card is left to CUDA itself",
        f"{'card':<7} {'memory':<15} {'blocks that visit':>17} {'tiles':>6} {'stays':>6} {'text':>6} "
        f"{'plan':>6} {'step':>6} {'decode':>7} {'peak':>6}",
    ]
    for r in predicted(size=size):
        lines.append(
            f"{r['card']:<7} {r['mode']:<15} {r['streamed']:>17} {'yes' if r['tiled'] else 'no':>6} "
            f"{r['resident']:>6.1f} {r['text']:>6.1f} {r['planning']:>6.1f} {r['step']:>6.1f} {r['decode']:>7.1f} "
            f"{r['peak']:>6.1f}{'' if r['fits'] else '  does not fit'}"
        )
    return "\n".join(lines)
