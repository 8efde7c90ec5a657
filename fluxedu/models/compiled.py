"""torch.compile, block by block: one graph for all double blocks, one for all single ones.

Only the blocks: they are where the time goes, and a graph of one is made in seconds where the whole takes minutes.
While an instrument looks or changes, what is compiled runs as it is written (``fluxedu.instruments.watching``).
"""

from __future__ import annotations

import torch

from fluxedu.models.config import said
from fluxedu.models.transformer import Flux


class CompileError(ValueError):
    """A compiler that there is not, or blocks that it cannot take."""


def compiled(flux: Flux, backend: str | bool = True, dynamic: bool | None = None) -> Flux:
    """Have every block compiled at its first call, in place; returns ``flux``.

    backend: True, which is inductor, or the name of another, as ``eager`` or ``aot_eager`` · dynamic: as
    torch.compile's. Raises CompileError, at once, where the compiler does not work, or blocks visit.
    """
    backend = "inductor" if backend is True else backend
    known = ("eager", "aot_eager", *torch.compiler.list_backends())
    if not isinstance(backend, str) or backend not in known:
        raise CompileError(f"compile is True or one of {', '.join(dict.fromkeys(known))}, not {said(backend)}.")
    blocks = [*flux.double_blocks, *flux.single_blocks]
    if set(getattr(flux, "visitors", ())).intersection(blocks):
        raise CompileError('blocks that visit cannot be compiled; load with memory="full" or "no-modulations".')
    _try(backend, flux.img_in.weight.device)
    for block in blocks:
        block.compile(backend=backend, dynamic=dynamic)
    return flux


def _try(backend: str, device: torch.device) -> None:
    """A compiler is code that is generated and built, in C++ on a CPU: whether it works shows when it is used."""
    tried = torch.compile(lambda x: x.sin() + 1, backend=backend)
    try:
        tried(torch.zeros(8, device=device))
    except Exception as error:  # whatever a compiler may fail with
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
        raise CompileError(f"torch.compile does not work here ({why}); load without compile.") from None
