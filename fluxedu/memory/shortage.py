"""Out of memory, as a sentence with numbers: what was needed, what is free, and what would need less.

The numbers are those by which ``memory="auto"`` chooses: counted, not measured (placement.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fluxedu.errors import OutOfMemory
from fluxedu.memory.placement import GB, MODES, Networks, Placement, free_bytes
from fluxedu.models import AutoEncoder, CLIPTextEncoder, Flux, T5Encoder
from fluxedu.models.meta_init import meta_init


def ran_out(error: BaseException) -> bool:
    """Is this what torch raises when there is no memory left, on a GPU or here?"""
    said = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(w in said for w in ("out of memory", "not enough memory", "alloc_cpu"))
    )


@contextmanager
def advised(
    networks: Networks, device: torch.device, height: int, width: int, words: int, small: str | None = None
) -> Iterator[None]:
    """In place of an error of the allocator: OutOfMemory, for a picture ``height x width`` with so many words.

    ``small``: what the blocks are quantised to.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not ran_out(error):
            raise
        error.__traceback__ = None  # whose frames hold what filled the memory
        try:
            said = advice(networks, device, height, width, words, small)
        except Exception:  # counting takes some memory too
            said = f"memory ran out on {device}: ask for less than {height} x {width}, or load with another memory=."
        raise OutOfMemory(said) from None


def advice(
    networks: Networks, device: torch.device, height: int, width: int, words: int, small: str | None = None
) -> str:
    """The sentence. The networks' configs alone are read."""
    with meta_init():
        kinds = ((Flux, networks.flux), (AutoEncoder, networks.ae), (CLIPTextEncoder, networks.clip))
        plain = Networks(*(kind(n.config) for kind, n in kinds), T5Encoder(networks.t5.config), networks.dtype)
    blocks = len(plain.flux.double_blocks) + len(plain.flux.single_blocks)
    ways = MODES[1:3] if small else MODES[1:]  # blocks that are quantised do not visit
    modes = [Placement(mode, blocks if mode == "stream" else 0, small=small) for mode in ways]
    take = lambda placement, h, w: f"{plain.need(placement, h, w, words).peak / GB:.2f} GB"  # noqa: E731
    each = ", ".join(f"memory={mode.mode!r} about {take(mode, height, width)}" for mode in modes)
    free = free_bytes(device)
    left = "" if free == float("inf") else f", and {max(free, 0) / GB:.2f} GB are free"
    smaller = max(16, height // 32 * 16), max(16, width // 32 * 16)
    half = f"one of {smaller[0]} x {smaller[1]} about {take(modes[0], *smaller)} with the first"
    fewer = "" if small else "or with quantise= (fewer bits, not exact), "
    what = f" and {small} weights" if small else ""
    return (
        f"memory ran out on {device}: a picture of {height} x {width} needs, with {each}{what}{left}; {half}. "
        f"Load with a memory= further to the right, {fewer}or ask for a smaller picture."
    )
